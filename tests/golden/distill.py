#!/usr/bin/env python3
"""Writes distill.safetensors, which tests/tests/distill.rs compares with: the losses of distillation, by PyTorch in f64.

    python tests/golden/distill.py

Operands are those of the random streams of gen.py, which the test computes too; the file holds losses and gradients.
Autograd and torch's own `cross_entropy`, `kl_div` and `normalize` make them, from the formulas of the papers: distillation of
logits (arXiv 1503.02531, section 2) and of relations (arXiv 2012.15828, with the cosines of arXiv 2510.13998).
"""
import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from gen import integers, uniform, write

SEED = 7
HEAD = {"tokens": 13, "features": 8, "teacher_features": 12, "vocab": 29}
# Relation heads, widths of student and teacher, temperature: one width, wider teachers, and two of the keys of grouped
# heads, where 8 query heads of 4 have 2 key heads, and a head of relations is none of attention.
RELATIONS = {
    "same": (4, 16, 16, 1.0),
    "wider": (4, 16, 24, 0.5),
    "grouped_keys": (4, 8, 16, 1.0),
    "one_head": (1, 8, 32, 2.0),
}
LENGTHS = [5, 1, 9]


def operand(stream, rows, columns, size):
    """Values between -size/2 and size/2 (a power of two): exact in f32."""
    values = uniform(SEED, stream, rows * columns) * np.float32(size)
    return torch.from_numpy(values).double().view(rows, columns)


def head_losses():
    """Weighted cross-entropy and divergence, and the gradients of both together, for each temperature."""
    tokens, vocab = HEAD["tokens"], HEAD["vocab"]
    hidden = operand(0, tokens, HEAD["features"], 4).requires_grad_()
    head = operand(1, vocab, HEAD["features"], 4).requires_grad_()
    with torch.no_grad():
        teacher = operand(2, tokens, HEAD["teacher_features"], 4) @ operand(3, vocab, HEAD["teacher_features"], 4).T
    targets = torch.from_numpy((integers(SEED, 4, tokens) % np.uint64(vocab)).astype(np.int64))
    # Every fourth token is masked; the others weigh between 1/2 and 3/2, in f32.
    weights = torch.from_numpy(np.float32(1) + uniform(SEED, 5, tokens)).double()
    weights[3::4] = 0.0
    tensors = {"head.targets": targets}
    for temperature, cross_entropy, coefficient in [(2.0, 1.0, 0.5), (5.0, 0.25, 1.0)]:
        logits = hidden @ head.T
        losses = F.cross_entropy(logits, targets, reduction="none")
        p, q = (F.log_softmax(x / temperature, -1) for x in (logits, teacher))
        divergences = F.kl_div(p, q, log_target=True, reduction="none").sum(-1)
        sums = [(weights * losses).sum(), (weights * divergences).sum()]
        total = cross_entropy * sums[0] + coefficient * temperature**2 * sums[1]
        grad_hidden, grad_head = torch.autograd.grad(total, [hidden, head])
        name = f"head.{temperature:.0f}"
        tensors |= {
            f"{name}.settings": torch.tensor([temperature, cross_entropy, coefficient]),
            f"{name}.losses": torch.stack(sums).detach(),
            f"{name}.hidden": grad_hidden.float(),
            f"{name}.head": grad_head.float(),
        }
    return tensors


def relations(rows, heads, temperature):
    """Logarithms of the relations of one sequence, `[heads, length, length]`."""
    unit = F.normalize(rows.view(rows.shape[0], heads, -1).transpose(0, 1), dim=-1)
    return F.log_softmax(unit @ unit.transpose(1, 2) / temperature, -1)


def relation_losses():
    """The mean divergence over tokens and heads, and its gradient in the student's rows."""
    tensors, tokens = {}, sum(LENGTHS)
    for stream, (name, (heads, width, teacher_width, temperature)) in enumerate(RELATIONS.items()):
        student = operand(10 + 2 * stream, tokens, width, 2).requires_grad_()
        teacher = operand(11 + 2 * stream, tokens, teacher_width, 2)
        total = 0.0
        for rows, teacher_rows in zip(student.split(LENGTHS), teacher.split(LENGTHS)):
            p, q = relations(rows, heads, temperature), relations(teacher_rows, heads, temperature)
            total = total + F.kl_div(p, q, log_target=True, reduction="sum")
        loss = total / (tokens * heads)
        (grad,) = torch.autograd.grad(loss, [student])
        tensors |= {
            f"relations.{name}.settings": torch.tensor([stream, heads, width, teacher_width, temperature]),
            f"relations.{name}.loss": loss.detach().reshape(1),
            f"relations.{name}.grad": grad.float(),
        }
    return tensors


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    metadata = {"torch": torch.__version__, "numpy": np.__version__, "safetensors": safetensors.__version__}
    metadata |= {k: str(v) for k, v in HEAD.items()} | {"seed": str(SEED), "lengths": " ".join(map(str, LENGTHS))}
    tensors = head_losses() | relation_losses()
    write("distill.safetensors", tensors, metadata)
    for name, tensor in tensors.items():
        if "loss" in name:
            print(name, tensor.tolist())


if __name__ == "__main__":
    main()
