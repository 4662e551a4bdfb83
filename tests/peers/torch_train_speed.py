#!/usr/bin/env python3
"""Training speed and peak memory beside PyTorch's on this machine: the same shape, two processes in turn, the ratio of medians.

    pip install torch numpy
    cargo build --release --bin trainer
    python tests/peers/torch_train_speed.py --config configs/tiny.toml
    python tests/peers/torch_train_speed.py --config configs/small.toml --rounds 3

PyTorch runs the same BitNet (pre-norms and sub-norms, fake quantization, straight-through gradients, fused AdamW) under
torch.compile, by default with bf16 autocast, its fastest step (--dtype f32 for f32). --isa holds both sides to an
instruction set: vnni is AVX-512 with VNNI but neither AMX nor bf16 products, avx2 is AVX2.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import tomllib

ISA = {
    "native": ({}, {}),
    "vnni": ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, {"BITLINEAR_KERNEL": "avx512vnni"}),
    "avx2": ({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}, {"BITLINEAR_KERNEL": "avx2"}),
}


def shape_of(path):
    with open(path, "rb") as file:
        config = tomllib.load(file)
    model, data, train = config["model"], config["data"], config["train"]
    return dict(
        width=model["hidden_size"], ffn=model["intermediate_size"], layers=model["num_hidden_layers"],
        heads=model["num_attention_heads"], vocab=model["vocab_size"], length=data["sequence_length"],
        batch=train["batch_size"],
    )


def torch_side(shape, dtype, steps, threads, full_precision):
    """Trains in this process and prints one JSON line."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch
    from torch import nn
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(1234)
    c = argparse.Namespace(**shape)

    class Norm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), 1e-5)

    class BitLinear(nn.Linear):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs, bias=False)
            nn.init.normal_(self.weight, std=0.02)

        def forward(self, x):
            if full_precision:
                return F.linear(x, self.weight)
            scale = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
            x = x + ((x * scale).round().clamp(-128, 127) / scale - x).detach()
            w = self.weight
            scale = 1.0 / w.abs().mean().clamp(min=1e-5)
            return F.linear(x, w + ((w * scale).round().clamp(-1, 1) / scale - w).detach())

    dim = c.width // c.heads
    angles = torch.outer(torch.arange(c.length).float(), 1e4 ** (-torch.arange(0, dim, 2).float() / dim))
    cos, sin = angles.cos(), angles.sin()

    def rope(x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (BitLinear(c.width, c.width) for _ in range(4))
            self.gate, self.up, self.down = BitLinear(c.width, c.ffn), BitLinear(c.width, c.ffn), BitLinear(c.ffn, c.width)
            self.norm1, self.norm2, self.norm3, self.norm4 = Norm(c.width), Norm(c.width), Norm(c.width), Norm(c.ffn)

        def forward(self, x):
            h = self.norm1(x)
            q, k, v = (f(h).view(c.batch, c.length, c.heads, dim).transpose(1, 2) for f in (self.q, self.k, self.v))
            q, k = rope(q), rope(k)
            a = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
            x = x + self.o(self.norm2(a.transpose(1, 2).reshape(x.shape)))
            h = self.norm3(x)
            return x + self.down(self.norm4(F.silu(self.gate(h)) * self.up(h)))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(c.vocab, c.width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.layers = nn.ModuleList(Layer() for _ in range(c.layers))
            self.norm = Norm(c.width)

        def forward(self, ids, targets):
            x = self.embedding(ids)
            for layer in self.layers:
                x = layer(x)
            logits = F.linear(self.norm(x), self.embedding.weight)
            return F.cross_entropy(logits.float().view(-1, c.vocab), targets.view(-1))

    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)
    times = []
    for step in range(steps + 2):
        ids = torch.randint(c.vocab, (c.batch, c.length + 1))
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    rate = c.batch * c.length / statistics.median(times[2:])
    print(json.dumps(dict(rate=rate, memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)), flush=True)


def run(command, environment):
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config with all sizes and the vocabulary in it")
    parser.add_argument("--trainer", default="target/release/trainer")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16", help="of PyTorch's products")
    parser.add_argument("--isa", choices=ISA, default="native")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="measured in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full-precision", action="store_true", help="no quantization, on both sides")
    parser.add_argument("--set", action="append", default=[], help="a setting for our side")
    parser.add_argument("--torch-side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = shape_of(args.config)
    if args.torch_side:
        return torch_side(shape, args.dtype, args.steps, args.threads, args.full_precision)

    theirs_environment, ours_environment = ISA[args.isa]
    theirs_command = [sys.executable, __file__, "--torch-side", "--config", args.config, "--dtype", args.dtype,
                      "--steps", str(args.steps), "--threads", str(args.threads)]
    ours_command = [args.trainer, "bench", args.config, "--json", "--repetitions", str(args.steps),
                    "--set", f"run.threads={args.threads}"]
    settings = list(args.set)
    if args.full_precision:
        theirs_command.append("--full-precision")
        settings.append("model.quantization=none")
    for setting in settings:
        ours_command += ["--set", setting]
    ours_environment = {"CANDLE_NUM_THREADS": "1", **ours_environment}
    ours, theirs, memory = [], [], {}
    for number in range(args.rounds):
        our, their = run(ours_command, ours_environment), run(theirs_command, theirs_environment)
        ours.append(our["tokens_per_second"]["median"])
        theirs.append(their["rate"])
        memory = dict(ours=our["peak_memory_bytes"] or 0, theirs=their["memory"])
        print(f"round {number + 1}: ours {ours[-1]:.0f}, PyTorch {theirs[-1]:.0f} tokens/s, ratio {ours[-1] / theirs[-1]:.2f}",
              flush=True)
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    print(f"medians: ours {statistics.median(ours):.0f}, PyTorch {args.dtype} {statistics.median(theirs):.0f} tokens/s, "
          f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); "
          f"peak memory ours {memory['ours'] >> 20} MiB, PyTorch {memory['theirs'] >> 20} MiB")


main()
