#!/usr/bin/env python3
"""Compares the speed of `infer` with llama.cpp's, on the same random ternary model, in turn, in one run.

Not part of `cargo test`: it needs Python with llama-cpp-python (whose installation builds llama.cpp from source, with
cmake and a C++ compiler), gguf and numpy; `--install` installs them. Only the shape matters, a config.json of
`BitNetForCausalLM` (with sub-norms and a tied head, the shape that llama.cpp's architecture `bitnet` has):

    cargo build --release --bin infer
    python tests/peers/llama_cpp_speed.py --infer target/release/infer --shape configs/shapes/2b4t.json

Random codes are written twice: packed in a Hugging Face folder, and in a GGUF file for each of llama.cpp's ternary
types. The embedding, which is also the head, is bf16 in the folder and Q6_K (or f16) in the GGUF files. Each round
measures every type in llama.cpp, then runs `infer bench`: a prompt in one pass, with the logits of its last token, then
new tokens one at a time after it, in f16 KV cache and batches of 512 in llama.cpp. Both warm up before.

Prints tokens a second, median (min..max) of the rounds. `ours/theirs` is the ratio of the medians and, in brackets, the
median of the rounds' ratios: above 1, `infer` is faster. Absolute figures hold for one machine at one time; the ratio
can be compared, if the machine is quiet: llama.cpp's threads wait for each other in loops, and where one has to share
its core all stop. With `--quiet 0.05` each measurement waits until other programs use less than 5 % of the
machine, and is made again if they used more meanwhile.
llama.cpp computes SiLU whatever the shape says, so for a `relu2` model its logits are wrong; its speed is hardly
another for that.

Exit status 1 for bad input, with a message that says what is wrong.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = {"llama_cpp": "llama-cpp-python", "gguf": "gguf", "numpy": "numpy"}
TYPES = ("tq2_0", "tq1_0")
HEADS = ("q6_k", "f16")
BLOCK = 256  # columns in a block of TQ2_0, TQ1_0 and Q6_K
BATCH = 512  # tokens that llama.cpp takes in one pass
NOISE = 0.05  # share of the machine that others may use without a warning
QUIET_SECONDS = 3  # for how long others must have used less before a measurement
TRIES = 20  # measurements until a quiet one
SEED = 1
TABLE_ROWS = 1024  # rows of the embedding that are made at a time


def fail(message):
    raise SystemExit(f"error: {message}")


def progress(message):
    print(message, file=sys.stderr, flush=True)


# ---- The model: sizes, tensors, and their random values


class Shape:
    """Sizes of a config.json, checked against what both engines can hold."""

    def __init__(self, path):
        try:
            self.config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fail(f"cannot read the shape; {path}; {error}")
        if not isinstance(self.config, dict):
            fail(f"the shape is not a JSON object; {path}; give a config.json")
        if self.config.get("architectures") != ["BitNetForCausalLM"]:
            fail(f"not a BitNetForCausalLM; {path}; only this architecture runs in both engines")

        def size(key):
            value = self.config.get(key)
            if type(value) is not int or value < 1:
                fail(f"{json.dumps(value)} is not a size; {path}; key '{key}' must be a whole number above 0")
            return value

        def number(keys, key, default):
            value = keys.get(key, default)
            if type(value) not in (int, float) or not 0 < value < 1e30:
                fail(f"{json.dumps(value)} is not a number above 0; {path}; key '{key}'")
            return float(value)

        self.hidden, self.ffn = size("hidden_size"), size("intermediate_size")
        self.layers, self.vocab = size("num_hidden_layers"), size("vocab_size")
        self.heads, self.kv_heads = size("num_attention_heads"), size("num_key_value_heads")
        self.context = size("max_position_embeddings")
        self.eps = number(self.config, "rms_norm_eps", 1e-5)
        rope = self.config.get("rope_parameters")
        self.theta = number({**(rope if isinstance(rope, dict) else {}), **self.config}, "rope_theta", 500000.0)
        for key, value in (("hidden_size", self.hidden), ("intermediate_size", self.ffn)):
            if value % BLOCK:
                fail(f"{value} is not a multiple of {BLOCK}; {path}; key '{key}': a ternary block has {BLOCK} columns")
        if self.hidden % (2 * self.heads):
            fail(f"hidden_size {self.hidden} is not {self.heads} heads of an even size; {path}")
        if self.config.get("head_dim") not in (None, self.hidden // self.heads):
            fail(f"head_dim is not hidden_size / num_attention_heads; {path}; llama.cpp's `bitnet` wants that")
        if self.heads % self.kv_heads:
            fail(f"{self.heads} heads do not share {self.kv_heads} key-value heads evenly; {path}")
        self.kv = self.kv_heads * (self.hidden // self.heads)
        if self.kv % 4:
            fail(f"{self.kv} rows of k_proj are not a multiple of 4; {path}; they are packed four to a byte")
        if not self.config.get("tie_word_embeddings", False):
            fail(f"the head is not tied; {path}; llama.cpp's `bitnet` needs tie_word_embeddings true")

    def tensors(self):
        """(name in Hugging Face's files, in GGUF, kind, shape, seed) of every tensor."""
        h, f, kv = self.hidden, self.ffn, self.kv
        yield "model.embed_tokens.weight", "token_embd.weight", "table", (self.vocab, h), (0,)
        yield "model.norm.weight", "output_norm.weight", "norm", (h,), None
        for layer in range(self.layers):
            hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
            for ours, theirs, width in (
                ("input_layernorm", "attn_norm", h),
                ("self_attn.attn_sub_norm", "attn_sub_norm", h),
                ("post_attention_layernorm", "ffn_norm", h),
                ("mlp.ffn_sub_norm", "ffn_sub_norm", f),
            ):
                yield f"{hf}{ours}.weight", f"{gguf}{theirs}.weight", "norm", (width,), None
            for index, (ours, theirs, rows, columns) in enumerate((
                ("self_attn.q_proj", "attn_q", h, h),
                ("self_attn.k_proj", "attn_k", kv, h),
                ("self_attn.v_proj", "attn_v", kv, h),
                ("self_attn.o_proj", "attn_output", h, h),
                ("mlp.gate_proj", "ffn_gate", f, h),
                ("mlp.up_proj", "ffn_up", f, h),
                ("mlp.down_proj", "ffn_down", h, f),
            )):
                seed = (layer + 1, index)
                yield f"{hf}{ours}.weight", f"{gguf}{theirs}.weight", "ternary", (rows, columns), seed


def random_codes(shape, seed):
    """Codes 0, 1, 2 for -1, 0, +1."""
    import numpy as np

    return np.random.default_rng((SEED, *seed)).integers(0, 3, size=shape, dtype=np.uint8)


def scale_of(columns):
    """A scale that keeps the size of what it multiplies (2/3 of the codes are not zero), exact in f16."""
    return struct.unpack("<e", struct.pack("<e", math.sqrt(1.5 / columns)))[0]


def random_table(shape, seed):
    """The embedding in pieces of some rows: the high halves of f32 values, which are bf16 values."""
    import numpy as np

    rows, columns = shape
    for start in range(0, rows, TABLE_ROWS):
        rng = np.random.default_rng((SEED, *seed, start))
        values = rng.random((min(TABLE_ROWS, rows - start), columns), dtype=np.float32) - np.float32(0.5)
        yield start, (values.view(np.uint32) >> 16).astype(np.uint16)


# ---- The Hugging Face folder


def write_hf(shape, folder):
    """config.json and model.safetensors: packed codes with a scale that multiplies, norms f32, embedding bf16."""
    import numpy as np

    header, at = {"__metadata__": {"format": "pt"}}, 0

    def add(name, dtype, size, nbytes):
        nonlocal at
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, at + nbytes]}
        at += nbytes

    for name, _, kind, size, _ in shape.tensors():
        if kind == "table":
            add(name, "BF16", size, 2 * size[0] * size[1])
        elif kind == "norm":
            add(name, "F32", size, 4 * size[0])
        else:
            add(name, "U8", (size[0] // 4, size[1]), size[0] // 4 * size[1])
            add(f"{name}_scale", "F32", (1,), 4)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(exist_ok=True)
    part = folder / "model.safetensors.part"
    with open(part, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, _, kind, size, seed in shape.tensors():
            if kind == "table":
                for _, piece in random_table(size, seed):
                    out.write(piece.astype("<u2").tobytes())
            elif kind == "norm":
                out.write(np.ones(size, "<f4").tobytes())
            else:
                # Bits 2i and 2i + 1 of byte row j hold row j + i * rows / 4.
                c = random_codes(size, seed).reshape(4, size[0] // 4, size[1])
                out.write((c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6).tobytes())
                out.write(struct.pack("<f", scale_of(size[1])))
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    config = {**shape.config, "quantization_config": {**quantization, "modules_to_not_convert": None}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "model.safetensors")


# ---- The GGUF files


def tq2_0(codes, scale):
    """66 bytes a block: in each half of 128 codes, byte p holds codes p, 32 + p, 64 + p, 96 + p, the first lowest."""
    import numpy as np

    c = codes.reshape(-1, 2, 4, 32)
    qs = c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6
    d = np.broadcast_to(np.array([scale], "<f2").view(np.uint8), (len(c), 2))
    return np.concatenate([qs.reshape(-1, 64), d], axis=1)


def tq1_0(codes, scale):
    """54 bytes a block: five codes a byte in base 3, of 160 codes, of 80, and four a byte of the last 16."""
    import numpy as np

    stored = np.array([(v * 256 + 242) // 243 for v in range(243)], np.uint8)  # v/243 as a byte, rounded up
    blocks = codes.reshape(-1, BLOCK)

    def base3(c):
        return stored[sum(c[:, n] * np.uint8(3 ** (4 - n)) for n in range(c.shape[1]))]

    parts = ((0, 5, 32), (160, 5, 16), (240, 4, 4))
    pieces = [blocks[:, at : at + n * stride].reshape(-1, n, stride) for at, n, stride in parts]
    d = np.broadcast_to(np.array([scale], "<f2").view(np.uint8), (len(blocks), 2))
    return np.concatenate([*map(base3, pieces), d], axis=1)


def q6_k(values):
    """Rows of f32 as Q6_K, by llama.cpp's own quantizer."""
    import gguf
    import llama_cpp
    import numpy as np

    quantize = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, columns = values.shape
    out = np.empty((rows, columns // BLOCK * 210), np.uint8)
    written = quantize(int(gguf.GGMLQuantizationType.Q6_K), values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    if written != out.nbytes:
        fail(f"llama.cpp wrote {written} bytes of Q6_K where {out.nbytes} were expected")
    return out


def write_gguf(shape, path, kind_of_codes, head):
    """The same model as a GGUF file of the architecture `bitnet`, without a tokenizer."""
    import gguf
    import numpy as np

    types = gguf.GGMLQuantizationType
    code_type, pack, block_bytes = {"tq2_0": (types.TQ2_0, tq2_0, 66), "tq1_0": (types.TQ1_0, tq1_0, 54)}[kind_of_codes]
    writer = gguf.GGUFWriter(None, "bitnet")
    writer.add_name("random")
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(shape.theta)
    writer.add_quantization_version(2)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind_of_codes.upper()}"])
    writer.add_tokenizer_model("no_vocab")
    for _, name, kind, size, _ in shape.tensors():
        if kind == "norm":
            writer.add_tensor_info(name, size, np.dtype(np.float32), 4 * size[0])
        elif kind == "table" and head == "f16":
            writer.add_tensor_info(name, size, np.dtype(np.float16), 2 * size[0] * size[1])
        else:
            dtype, width = (types.Q6_K, 210) if kind == "table" else (code_type, block_bytes)
            row = size[1] // BLOCK * width
            writer.add_tensor_info(name, (size[0], row), np.dtype(np.uint8), size[0] * row, raw_dtype=dtype)
    part = path.with_name(path.name + ".part")
    writer.write_header_to_file(part)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, kind, size, seed in shape.tensors():
        if kind == "norm":
            data = np.ones(size, np.float32)
        elif kind == "table":
            pieces = []
            for _, piece in random_table(size, seed):
                values = (piece.astype(np.uint32) << 16).view(np.float32)
                pieces.append(values.astype(np.float16) if head == "f16" else q6_k(values))
            data = np.concatenate(pieces)
        else:
            data = pack(random_codes(size, seed), scale_of(size[1]))
        writer.write_tensor_data(data)
    writer.close()
    part.replace(path)


def prepare(shape, folder, types, head):
    """Writes what is missing in the folder; returns the Hugging Face folder and the GGUF files."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "made-from.json"
    made_from = json.dumps({"seed": SEED, "config": shape.config}, indent=2, sort_keys=True) + "\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") != made_from:
        fail(f"the folder holds models of another shape; --workdir {folder}; give another folder, or empty this one")
    hf, ggufs = folder / "hf", [folder / f"{name}-{head}.gguf" for name in types]
    if not stamp.exists():
        if any(path.exists() for path in (hf, *ggufs)):
            fail(f"the folder holds models, but not what they were made from; --workdir {folder}; give another folder")
        stamp.write_text(made_from, encoding="utf-8")
    if not (hf / "model.safetensors").exists():
        progress(f"writing {hf}")
        write_hf(shape, hf)
    for name, path in zip(types, ggufs):
        if not path.exists():
            progress(f"writing {path}")
            write_gguf(shape, path, name, head)
    return hf, ggufs


# ---- llama.cpp, a process for each model


def serve(pipe, path, options):
    """Loads a model once, then measures whenever asked. Between the questions it waits for the pipe."""
    try:
        serve_or_raise(pipe, path, options)
    except RuntimeError as error:
        pipe.send({"error": str(error)})
    except (EOFError, KeyboardInterrupt):
        pass  # the program that asked is gone


def serve_or_raise(pipe, path, options):
    import llama_cpp as lib

    complaints = []

    @lib.llama_log_callback
    def log(level, text, _):
        if level in (3, 4):  # warnings and errors
            complaints.append(text.decode(errors="replace").strip())

    lib.llama_log_set(log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}: {'; '.join(complaints[-3:])}")
    params = lib.llama_context_default_params()
    params.n_ctx = options["prompt"] + options["gen"]
    params.n_batch = params.n_ubatch = BATCH
    params.n_threads = params.n_threads_batch = options["threads"]
    params.offload_kqv = params.op_offload = False
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp cannot make a context: {'; '.join(complaints[-3:])}")
    ids = [i * 7919 % options["vocab"] for i in range(options["prompt"] + options["gen"])]

    def batch_of(ids):
        tokens = (lib.llama_token * len(ids))(*ids)
        return tokens, lib.llama_batch_get_one(tokens, len(ids))  # logits of the last token only

    prompt = [batch_of(ids[i : min(i + BATCH, options["prompt"])]) for i in range(0, options["prompt"], BATCH)]
    new = [batch_of([i]) for i in ids[options["prompt"] :]]

    def seconds(batches):
        start = time.perf_counter()
        for _, batch in batches:
            if lib.llama_decode(context, batch) != 0:
                raise RuntimeError(f"llama.cpp cannot decode: {'; '.join(complaints[-3:])}")
            lib.llama_synchronize(context)
        return time.perf_counter() - start

    def clear():
        lib.llama_memory_clear(lib.llama_get_memory(context), True)

    seconds(prompt), seconds(new[:1])
    used, since = time.process_time(), time.perf_counter()
    pipe.send({"system": (lib.llama_print_system_info() or b"").decode().strip(" |"), "cpu": used})
    while pipe.recv() == "measure":
        # CPU time of all its threads since the last answer, while others were measured.
        busy, waited = time.process_time() - used, time.perf_counter() - since
        clear()
        seconds(new[:1])  # the weights are in the caches again
        clear()
        speeds = {"prompt": options["prompt"] / seconds(prompt), "gen": options["gen"] / seconds(new)}
        used, since = time.process_time(), time.perf_counter()
        pipe.send({"busy": busy, "waited": waited, "cpu": used, **speeds})


class LlamaCpp:
    """A process that holds a model."""

    def __init__(self, path, options):
        processes = multiprocessing.get_context("spawn")
        self.pipe, other = processes.Pipe()
        self.process = processes.Process(target=serve, args=(other, str(path), options), daemon=True)
        self.process.start()
        other.close()
        self.cpu = 0.0
        self.system = self.answer()["system"]

    def answer(self):
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            fail(f"llama.cpp ended with status {self.process.exitcode}; what it printed before may say why")
        if "error" in answer:
            fail(answer["error"])
        self.cpu = answer["cpu"]
        return answer

    def measure(self):
        self.pipe.send("measure")
        return self.answer()


# ---- infer


def run_infer(args, folder):
    command = [args.infer, "bench", str(folder), "--json", "--prompt-tokens", str(args.prompt_tokens)]
    command += ["--gen-tokens", str(args.gen_tokens), "--threads", str(args.threads), "--repetitions", "1"]
    command += args.infer_args
    env = {**os.environ, **({"BITLINEAR_KERNEL": args.kernel} if args.kernel else {})}
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        fail(f"cannot run infer; {args.infer}; {error}")
    if done.returncode != 0:
        fail(f"infer ended with status {done.returncode}: {shlex.join(command)}")
    try:
        report = json.loads(done.stdout)
        report["prompt"] = report["prompt_tokens_per_second"]["median"]
        report["gen"] = report["gen_tokens_per_second"]["median"]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"infer's report is not understood ({error!r}): {done.stdout[:200]!r}")
    return report


# ---- The comparison


def machine_cpu():
    """Seconds of CPU time that the machine has given to anybody, host included; None where Linux does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Others:
    """The share of the machine's CPU time that other programs use from here on."""

    def __init__(self, engines):
        self.engines, self.start = engines, time.perf_counter()
        self.machine, self.own = machine_cpu(), self.own_cpu()

    def own_cpu(self):
        return sum(os.times()[:4]) + sum(engine.cpu for engine in self.engines)  # this one, infer, llama.cpp

    def share(self):
        if self.machine is None:
            return None
        used = machine_cpu() - self.machine - (self.own_cpu() - self.own)
        return max(0.0, used / (time.perf_counter() - self.start) / os.cpu_count())


def wait_for_quiet(share):
    """Waits until others have used less than this share for some seconds."""
    told = False
    while True:
        others = Others([])
        time.sleep(QUIET_SECONDS)
        found = others.share()
        if found is None:
            fail("this system does not tell what other programs use; --quiet; leave it out")
        if found <= share:
            return
        if not told:
            progress(f"waiting: other programs use {100 * found:.0f} % of the machine")
            told = True


def measure(quiet, engines, name, run):
    """What `run` measures, again if others used more than the share `quiet` meanwhile."""
    for _ in range(TRIES):
        if quiet:
            wait_for_quiet(quiet)
        others = Others(engines)
        result = run()
        share = others.share()
        noisy = share is not None and share > (quiet or NOISE)
        if noisy:
            again = "measured again" if quiet else "see --quiet"
            progress(f"warning: other programs used {100 * share:.0f} % of the machine while {name} ran; {again}")
        if not (noisy and quiet):
            return {**result, "share_of_others": share}
    fail(f"the machine is not quiet; --quiet {quiet}; {TRIES} measurements of {name} were disturbed")


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def compare(args, shape, folder):
    hf, ggufs = prepare(shape, folder, args.types, args.head)
    options = {"prompt": args.prompt_tokens, "gen": args.gen_tokens, "threads": args.threads, "vocab": shape.vocab}
    progress("loading the models in llama.cpp")
    engines = [LlamaCpp(path, options) for path in ggufs]
    theirs, ours = [[] for _ in engines], []
    for index in range(args.repetitions):
        for name, engine, results in zip(args.types, engines, theirs):
            results.append(measure(args.quiet, engines, name, engine.measure))
            last = results[-1]
            if last["busy"] > 0.1 + 0.05 * last["waited"]:
                progress(f"warning: {name} used {last['busy']:.1f} s of CPU time while it should have been idle")
        ours.append(measure(args.quiet, engines, "infer", lambda: run_infer(args, hf)))
        line = [f"{name} {r[-1]['prompt']:.1f} / {r[-1]['gen']:.2f}" for name, r in zip(args.types, theirs)]
        line.append(f"infer {ours[-1]['prompt']:.1f} / {ours[-1]['gen']:.2f}")
        progress(f"round {index + 1} of {args.repetitions}, prompt / new tokens a second: {', '.join(line)}")

    report = {
        "shape": args.shape, "threads": args.threads, "prompt_tokens": args.prompt_tokens,
        "gen_tokens": args.gen_tokens, "repetitions": args.repetitions,
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"), "llama_cpp_system": engines[0].system,
        "infer": {
            "kernel": ours[-1].get("kernel"), "threads": ours[-1].get("threads"), "args": shlex.join(args.infer_args),
            "bytes_per_token": ours[-1].get("bytes_per_token"),
            "prompt_tokens_per_second": spread([r["prompt"] for r in ours]),
            "gen_tokens_per_second": spread([r["gen"] for r in ours]),
            "share_of_others": [r["share_of_others"] for r in ours],
        },
        "llama_cpp": [],
    }
    for name, path, results in zip(args.types, ggufs, theirs):
        # Each token reads the whole file: all projections, norms, and the embedding as the head.
        entry = {"type": name, "head": args.head, "bytes_per_token": path.stat().st_size}
        entry["share_of_others"] = [r["share_of_others"] for r in results]
        for key in ("prompt", "gen"):
            entry[f"{key}_tokens_per_second"] = spread([r[key] for r in results])
            medians = report["infer"][f"{key}_tokens_per_second"], entry[f"{key}_tokens_per_second"]
            entry[f"{key}_ratio"] = medians[0]["median"] / medians[1]["median"]
            entry[f"{key}_ratio_of_rounds"] = statistics.median([o[key] / t[key] for o, t in zip(ours, results)])
        report["llama_cpp"].append(entry)
    return report


def show(report):
    def speeds(entry):
        values = [entry[f"{key}_tokens_per_second"] for key in ("prompt", "gen")]
        return [f"{v['median']:.1f} ({v['min']:.1f}..{v['max']:.1f})" for v in values]

    def megabytes(entry):
        return f"{(entry['bytes_per_token'] or 0) / 1e6:.0f}"

    ours = report["infer"]
    lines = [["engine", "format", "MB/token", "prompt tok/s", "new tok/s", "ours/theirs: prompt", "new"]]
    what = " ".join(filter(None, [ours["kernel"], ours["args"]]))
    lines.append(["infer", what, megabytes(ours), *speeds(ours), "", ""])
    for entry in report["llama_cpp"]:
        ratios = [f"{entry[f'{key}_ratio']:.2f} ({entry[f'{key}_ratio_of_rounds']:.2f})" for key in ("prompt", "gen")]
        lines.append(["llama.cpp", f"{entry['type']}, head {entry['head']}", megabytes(entry), *speeds(entry), *ratios])
    widths = [max(map(len, column)) for column in zip(*lines)]
    tokens = f"prompt {report['prompt_tokens']}, new {report['gen_tokens']}"
    print(f"{report['shape']}: {tokens}, {report['threads']} threads, {report['repetitions']} rounds")
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(f"llama-cpp-python {report['llama_cpp_python']}; {report['llama_cpp_system']}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.print_usage(sys.stderr)
        fail(message)


def arguments():
    def count(text):
        value = int(text)
        if value < 1:
            raise ValueError
        return value

    def share(text):
        value = float(text)
        if not 0 < value <= 1:
            raise ValueError
        return value

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infer", required=True, help="the program `infer`")
    parser.add_argument("--shape", required=True, help="a config.json")
    parser.add_argument("--types", default="tq2_0", help="of tq2_0,tq1_0 (default %(default)s)")
    parser.add_argument("--head", default="q6_k", choices=HEADS, help="type of llama.cpp's head (default %(default)s)")
    parser.add_argument("--threads", type=count, default=2, help="of both engines (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=512, help="(default %(default)s)")
    parser.add_argument("--gen-tokens", type=count, default=64, help="new tokens (default %(default)s)")
    parser.add_argument("--repetitions", type=count, default=5, help="rounds (default %(default)s)")
    parser.add_argument("--workdir", help="keep the models here, use those already here (default: a temporary folder)")
    parser.add_argument("--infer-args", type=shlex.split, default=[], help="more for `infer bench`, in one string")
    parser.add_argument("--kernel", help="sets BITLINEAR_KERNEL for infer")
    parser.add_argument("--quiet", type=share, metavar="SHARE", help="wait while others use more than this share "
                        "of the machine, and measure again if they did meanwhile (default: only warn above 0.05)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--install", action="store_true", help="install what is missing with pip, for this Python")
    args = parser.parse_args()
    args.types = args.types.split(",")
    if not set(args.types) <= set(TYPES) or len(set(args.types)) < len(args.types):
        parser.error(f"--types {','.join(args.types)}; give one or several, each once, of {','.join(TYPES)}")
    return args


def need_packages(install):
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    command = [sys.executable, "-m", "pip", "install", *missing]
    if not install:
        fail(f"missing Python packages: {', '.join(missing)}; use --install, or run {shlex.join(command)}")
    # What pip says goes to stderr: stdout is for the report.
    if subprocess.run(command, stdout=sys.stderr).returncode != 0:
        fail(f"the installation failed; {shlex.join(command)}; llama-cpp-python needs cmake and a C++ compiler")
    importlib.invalidate_caches()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes
    args = arguments()
    infer = shutil.which(args.infer)
    if infer is None:
        fail(f"not a program; --infer {args.infer}; build it with `cargo build --release --bin infer`")
    args.infer = str(Path(infer).resolve())
    shape = Shape(args.shape)
    if args.prompt_tokens + args.gen_tokens > shape.context:
        fail(f"{args.prompt_tokens} + {args.gen_tokens} tokens do not fit the context of {shape.context}; {args.shape}")
    need_packages(args.install)
    try:
        if args.workdir:
            report = compare(args, shape, Path(args.workdir))
        else:
            with tempfile.TemporaryDirectory(prefix="llama_cpp_speed-") as folder:
                report = compare(args, shape, Path(folder))
    except OSError as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    main()
