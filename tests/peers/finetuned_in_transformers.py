#!/usr/bin/env python3
"""Loads exported folders in Hugging Face transformers and compares what the two say: tokens, logits, greedy continuations.

Not part of `cargo test`: it needs Python with torch, transformers, accelerate, safetensors and numpy. Give it any folders that
`trainer train` or `trainer export` wrote, for example those of fine-tuned models:

    cargo build --release --bin infer
    TORCHDYNAMO_DISABLE=1 python tests/peers/finetuned_in_transformers.py runs/a/export/hf runs/b/export/hf

Each prompt goes through the folder's tokenizer on both sides. `infer generate` continues it greedily, at most 64 tokens (--n);
transformers does, with the folder's generation config; then both compute the logits of prompt and continuation, in f32 on
the CPU. Prints a row for each folder: whether it has a chat template, greedy tokens that agree, of the largest difference of
a logit at each position the tenth that is least and the largest, and the mean KL divergence of the worst prompt. Exit 1 if
transformers misses a tensor, prompts have other ids, one of these figures is above its bound, or continuations part where the
two likeliest tokens are not as close as the logits.

Two right implementations differ by 1e-6, but for positions at and behind an activation that lies next to a rounding tie: there
a difference of 1e-7 moves an int8 code by one, and logits by some 1e-2. Two that are not the same model differ everywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiled functions round differently in bf16

import torch
import transformers
from hf_logits import measure
from safetensors.torch import load_file

PROMPTS = ["Once upon a time", "The capital of", "A"]


def infer(binary: str, *args: str) -> dict:
    done = subprocess.run([binary, *args, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(args)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def our_logits(binary: str, folder: str, ids: list[int]) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as temporary:
        out = str(Path(temporary) / "logits.safetensors")
        infer(binary, "logits", folder, "--ids", ",".join(map(str, ids)), "--out", out)
        return load_file(out)["logits"].double()


def their_continuation(model, ids: list[int], n: int) -> list[int]:
    """Greedy tokens without the one that ended the text, as `infer` gives them."""
    prompt = torch.tensor([ids])
    asked = {"max_new_tokens": n, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    tokens = model.generate(prompt, **asked)[0, len(ids) :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def part(ours: list[int], theirs: list[int]) -> int:
    """Where the continuations part; their length if they do not."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def compare(folder: str, args: argparse.Namespace) -> bool:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # A folder elsewhere is code and weights of somebody else's: only the classes of transformers itself are used.
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    good, same, tokens, divergence, gaps = not any(report.values()), 0, 0, 0.0, []
    for prompt in PROMPTS:
        said = infer(args.infer, "generate", folder, "--prompt", prompt, "-n", str(args.n), "--temperature", "0")
        ids, ours = said["prompt_ids"], said["ids"]
        good &= tokenizer(prompt)["input_ids"] == ids
        with torch.no_grad():
            theirs = their_continuation(model.eval(), ids, args.n)
            logits = model(torch.tensor([ids + ours])).logits[0].double()
        found = our_logits(args.infer, folder, ids + ours)
        difference, kl, _ = measure(found, logits)
        gaps.append((found - logits).abs().amax(-1))
        at = part(ours, theirs)
        if ours != theirs:
            first, second = logits[len(ids) + at - 1].topk(2).values.tolist()
            good &= first - second <= 2 * difference
        same, tokens, divergence = same + at, tokens + max(len(ours), len(theirs)), max(divergence, kl)
        # Written so that NaN fails.
        good &= kl <= args.max_kl
    least, worst = torch.cat(gaps).quantile(0.1).item(), torch.cat(gaps).max().item()
    good &= least <= args.max_least and worst <= args.max_difference
    template = "yes" if tokenizer.chat_template else "no"
    name = f"{type(model).__name__:<20} {template:>8} {same:>6} of {tokens:<6} {least:>9.1e} {worst:>9.1e} {divergence:>9.1e}"
    print(f"{name}  {'ok' if good else 'DIFFERS'}  {folder}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of exported models")
    parser.add_argument("--infer", default="target/release/infer", help="the binary (default %(default)s)")
    parser.add_argument("--n", type=int, default=64, help="new tokens at most (default %(default)s)")
    parser.add_argument("--max-least", type=float, default=1e-4, help="bound (default %(default)s)")
    parser.add_argument("--max-difference", type=float, default=0.1, help="bound (default %(default)s)")
    parser.add_argument("--max-kl", type=float, default=1e-4, help="bound, nats a token (default %(default)s)")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'class':<20} {'template':>8} {'equal greedy':>16} {'least':>9} {'largest':>9} {'KL':>9}")
    return 0 if all([compare(folder, args) for folder in args.folders]) else 1


if __name__ == "__main__":
    sys.exit(main())
