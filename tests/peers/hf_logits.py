#!/usr/bin/env python3
"""Compares the logits of `infer` with those of Hugging Face transformers, for one model folder.

Not part of `cargo test`: it needs Python with torch, transformers, accelerate, safetensors and numpy. Use it on any
folder that `trainer export` or `infer` reads:

    infer logits MODEL --ids 1,2,3 --out logits.safetensors
    TORCHDYNAMO_DISABLE=1 python tests/peers/hf_logits.py MODEL --ids 1,2,3 --logits logits.safetensors

Prints the largest difference, the mean KL divergence (nats a token, transformers to infer) and the share of positions
whose likeliest token agrees; exit 1 if the difference or the divergence is above its bound. In f32 two right
implementations differ by 1e-6 .. 5e-3 at most: where an activation lies next to a rounding tie, a difference of 1e-7
moves its int8 code by one.
"""

import argparse
import os
import sys

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiled functions round differently in bf16

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def measure(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float]:
    """Of logits [tokens, vocab] in f64: the largest difference, mean KL of ours from theirs in nats, share of equal argmax."""
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    top1 = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    return (ours - theirs).abs().max().item(), kl, top1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with config.json and model.safetensors")
    parser.add_argument("--ids", required=True, help="token ids, separated by commas: those given to `infer logits`")
    parser.add_argument("--logits", required=True, help="the file that `infer logits` wrote")
    parser.add_argument("--max-difference", type=float, default=5e-3, help="bound (default %(default)s)")
    parser.add_argument("--max-kl", type=float, default=1e-5, help="bound, nats a token (default %(default)s)")
    args = parser.parse_args()

    ids = torch.tensor([[int(i) for i in args.ids.split(",")]])
    # A folder elsewhere is code and weights of somebody else's: only the classes of transformers itself are used.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        theirs = model(ids).logits[0].double()
    ours = load_file(args.logits)["logits"].double()
    if ours.shape != theirs.shape:
        print(f"error: shapes {list(ours.shape)} and {list(theirs.shape)}; {args.logits}; give the same ids to both")
        return 1

    difference, kl, top1 = measure(ours, theirs)
    print(f"{type(model).__name__}: {ids.shape[1]} tokens, max difference {difference:.3e}, KL {kl:.3e}, top-1 {top1:.4f}")
    # Written so that NaN fails.
    return 0 if difference <= args.max_difference and kl <= args.max_kl else 1


if __name__ == "__main__":
    sys.exit(main())
