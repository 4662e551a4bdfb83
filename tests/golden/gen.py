#!/usr/bin/env python3
"""Writes the golden files of tests/tests/golden.rs: a BitNet's training steps and the two quantizers, by PyTorch.

    python tests/golden/gen.py

Needs torch, numpy and safetensors; their versions go into the metadata of each file. The model is written here from the
formulas alone, with plain autograd: the straight-through estimator is `x + (quantized - x).detach()`.

A rounding to int8 or to a ternary code that sits near a tie falls to either side, depending on the order of a sum in front
of it; the comparison would then be of two different functions. So seeds are tried from 0 until, over all steps, every value
stays MARGIN (activations) or WEIGHT_MARGIN (weights) of a code away from the next tie.
"""
import json
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import safetensors
import torch
from safetensors.torch import save

HERE = Path(__file__).parent
EPS = 1e-5
MARGIN = 1e-4
WEIGHT_MARGIN = 1e-5
STEPS = 3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY, CLIP = 0.1, 1.0
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 67, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}
SEQUENCES, LENGTH = 2, 12
CASES = {
    "bitnet": {"sub_norm": True, "hidden_act": "silu", "tie_word_embeddings": True},
    "llama": {"sub_norm": False, "hidden_act": "relu2", "tie_word_embeddings": False},
}


class NearTie(Exception):
    """This seed has a value whose code is not certain."""


def integers(seed, stream, count):
    """SplitMix64 in counter mode: what golden.rs computes too, so that initial values need no room in the file."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed << 40 | stream << 32) + np.arange(count, dtype=np.uint64)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


def uniform(seed, stream, count):
    """Between -1/2 and 1/2, exact in f32."""
    return (integers(seed, stream, count) >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)


def shapes(case):
    """Tensor shapes by name, in the order of names: the place is the tensor's random stream."""
    h, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    kv = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    tensors = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not case["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (v, h)
    for layer in range(SHAPE["num_hidden_layers"]):
        inner = {
            "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }
        if case["sub_norm"]:
            inner |= {"self_attn.attn_sub_norm": (h,), "mlp.ffn_sub_norm": (f,)}
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in inner.items()}
    return dict(sorted(tensors.items()))


def initial(case, seed):
    """Norms between 3/4 and 5/4, embeddings between -1/2 and 1/2, projections between -1/4 and 1/4."""
    parameters = {}
    for stream, (name, shape) in enumerate(shapes(case).items()):
        values = uniform(seed, stream, math.prod(shape)).reshape(shape)
        if len(shape) == 1:
            values = np.float32(1) + values * np.float32(0.5)
        elif any(projection in name for projection in PROJECTIONS):
            values = values * np.float32(0.5)
        parameters[name] = torch.nn.Parameter(torch.from_numpy(values))
    return parameters


def codes_of_activations(x):
    """Codes and the factor that gave them, one a token."""
    factor = 127 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)
    return (x * factor).round().clamp(-128, 127), factor


def codes_of_weights(w):
    """Codes and the one scale that multiplies them."""
    scale = w.abs().mean().clamp(min=EPS)
    return (w * (1 / scale)).round().clamp(-1, 1), scale


def require_margin(ratios, margin, limit):
    """Values that a tie is near to: `n + 1/2` up to `limit`."""
    ratios = ratios.detach().double().abs()
    near = ((ratios - ratios.floor() - 0.5).abs() < margin) & (ratios < limit)
    if near.any():
        raise NearTie


def bit_linear(x, w):
    q, factor = codes_of_activations(x)
    require_margin(x * factor, MARGIN, 127)
    x = x + (q / factor - x).detach()
    t, scale = codes_of_weights(w)
    require_margin(w / scale, WEIGHT_MARGIN, 1)
    w = w + (t * scale - w).detach()
    return x @ w.T


def rms_norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SHAPE["rms_norm_eps"]))


def rope(x):
    """`[sequences, heads, positions, dim]`, pairs `i` and `i + dim / 2`."""
    dim, positions = x.shape[-1], x.shape[-2]
    frequency = 1.0 / SHAPE["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim)
    angle = torch.outer(torch.arange(positions).float(), frequency.float())
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def loss_of(case, p, ids, targets):
    heads, kv, dim = (SHAPE[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    x = p["model.embed_tokens.weight"][ids]
    causal = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
    for layer in range(SHAPE["num_hidden_layers"]):
        w = lambda name: p[f"model.layers.{layer}.{name}.weight"]
        h = rms_norm(x, w("input_layernorm"))
        q, k, v = (
            bit_linear(h, w(f"self_attn.{which}_proj")).view(SEQUENCES, LENGTH, n, dim).transpose(1, 2)
            for which, n in (("q", heads), ("k", kv), ("v", kv))
        )
        k, v = (t.repeat_interleave(heads // kv, dim=1) for t in (rope(k), v))
        a = (rope(q) @ k.transpose(-1, -2) / math.sqrt(dim) + causal).softmax(-1) @ v
        a = a.transpose(1, 2).reshape(SEQUENCES, LENGTH, heads * dim)
        if case["sub_norm"]:
            a = rms_norm(a, w("self_attn.attn_sub_norm"))
        x = x + bit_linear(a, w("self_attn.o_proj"))
        h = rms_norm(x, w("post_attention_layernorm"))
        gate, up = bit_linear(h, w("mlp.gate_proj")), bit_linear(h, w("mlp.up_proj"))
        m = (torch.nn.functional.silu(gate) if case["hidden_act"] == "silu" else gate.relu().square()) * up
        if case["sub_norm"]:
            m = rms_norm(m, w("mlp.ffn_sub_norm"))
        x = x + bit_linear(m, w("mlp.down_proj"))
    x = rms_norm(x, p["model.norm.weight"])
    head = p["model.embed_tokens.weight" if case["tie_word_embeddings"] else "lm_head.weight"]
    return torch.nn.functional.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten())


def train(case, seed):
    """Losses, first gradients, gradient norms and what STEPS updates change."""
    p = initial(case, seed)
    start = {name: value.detach().clone() for name, value in p.items()}
    tokens = (integers(seed, 255, SEQUENCES * (LENGTH + 1)) % np.uint64(SHAPE["vocab_size"])).astype(np.int64)
    tokens = torch.from_numpy(tokens).view(SEQUENCES, LENGTH + 1)
    ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    decayed = [value for name, value in p.items() if any(projection in name for projection in PROJECTIONS)]
    others = [value for name, value in p.items() if not any(projection in name for projection in PROJECTIONS)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, foreach=False, **OPTIMIZER)
    tensors, losses, norms = {"ids": ids, "targets": targets}, [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(case, p, ids, targets)
        loss.backward()
        if step == 0:
            tensors |= {f"gradient.{name}": value.grad.clone() for name, value in p.items()}
        losses.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(p.values(), CLIP))
        optimizer.step()
    tensors |= {"losses": torch.stack(losses), "gradient_norms": torch.stack(norms)}
    # In f16: a change of 1e-3 a step is kept to 1e-6.
    tensors |= {f"change.{name}": (value.detach() - start[name]).half() for name, value in p.items()}
    return tensors


def quantizer_vectors():
    """Rows of activations and tensors of weights with ties, zeros, tiny and large values."""
    width = 24
    ties = np.arange(-126.5, 127.5, 11, dtype=np.float32)[:23]
    rows = [
        np.concatenate([[127.0], ties]),  # the factor is 1: every half is a tie
        np.concatenate([[-127.0], -ties]),
        np.concatenate([[254.0], 2 * ties]),
        np.zeros(width),
        4e-7 * np.arange(width),  # the floor of the largest magnitude
        np.full(width, -1e-9),
        1e30 * uniform(1, 0, width),
        uniform(1, 1, width),
        np.where(np.arange(width) == 5, 1000.0, uniform(1, 2, width)),
    ]
    x = torch.from_numpy(np.stack(rows).astype(np.float32))
    codes, factor = codes_of_activations(x)
    tensors = {"activations": x, "activation_codes": codes.to(torch.int8), "activation_factors": factor.flatten()}
    weights = {
        # The mean magnitude is 1: 0.5, 1.5 and 2.5 are ties.
        "ties": [0.5, -0.5, 1.5, -1.5, 0.5, -0.5, 2.5, -0.5],
        "zeros": np.zeros(8),
        "tiny": 2e-6 * np.arange(-4, 4),
        "random": 0.04 * uniform(2, 0, 1000),
        "outlier": np.where(np.arange(64) == 9, 50.0, uniform(2, 1, 64)),
        "equal": np.full(16, -0.3),
    }
    for name, values in weights.items():
        w = torch.from_numpy(np.asarray(values, dtype=np.float32))
        codes, scale = codes_of_weights(w)
        tensors |= {f"weights.{name}": w, f"weight_codes.{name}": codes.to(torch.int8), f"weight_scale.{name}": scale}
    return tensors


def write(name, tensors, metadata):
    """As safetensors writes it, but with the metadata in order: its own order changes from run to run."""
    data = save(tensors, metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (HERE / name).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "safetensors": safetensors.__version__}
    for name, case in CASES.items():
        for seed in range(100_000):
            try:
                tensors = train(case, seed)
                break
            except NearTie:
                continue
        config = SHAPE | case | {"max_position_embeddings": LENGTH}
        metadata = versions | {k: str(v) for k, v in config.items()} | {"seed": str(seed)}
        metadata |= {"learning_rate": str(OPTIMIZER["lr"]), "weight_decay": str(DECAY), "gradient_clip": str(CLIP)}
        write(f"{name}.safetensors", tensors, metadata)
        print(name, "seed", seed, "losses", tensors["losses"].tolist(), "norms", tensors["gradient_norms"].tolist())
    write("quantizers.safetensors", quantizer_vectors(), versions)


if __name__ == "__main__":
    main()
