#!/usr/bin/env python3
"""Writes the golden file of tests/tests/architectures.rs: logits of small models of each architecture, by transformers.

    python tests/golden/architectures.py

Needs torch, transformers, accelerate, numpy and safetensors; their versions go into the metadata. A case is a folder as a
user has it: the `config.json` that transformers writes, and tensors whose values come from a formula (`uniform` of gen.py,
the place in the order of names is the tensor's random stream), so that the test makes them itself. The file holds the text
of the config, type and shape of each tensor, token ids and logits. transformers loads the folder and has to use every
tensor in it.

As in gen.py, seeds are tried from 0 until no activation, and no latent weight, is near a tie of its code.
"""
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import gen  # sets OMP_NUM_THREADS, so first
import accelerate
import numpy as np
import safetensors
import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.bitnet import AutoBitLinear, BitLinear

TOKENS = 16
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
MULTIPLY = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
DIVIDE = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
DENSE_MODULES = ["lm_head", "model.layers.1.mlp.down_proj", r"model\.layers\.0\.self_attn\.[kv]_proj"]
CASES = {
    "llama": ("Llama", {"rope_theta": 5000.0}, None),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, None),
    "qwen3": ("Qwen3", {"head_dim": 16}, None),
    "bitnet_online": ("BitNet", {"tie_word_embeddings": True, "hidden_act": "silu"}, ONLINE),
    "llama_mixed": ("Llama", {"hidden_act": "relu2"}, MULTIPLY | {"modules_to_not_convert": DENSE_MODULES}),
    "qwen2_multiply": ("Qwen2", {}, MULTIPLY | {"modules_to_not_convert": DENSE_MODULES}),
    "qwen2_divide": ("Qwen2", {}, DIVIDE),
    "qwen3_multiply": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, MULTIPLY),
}


def tensors(seed, shapes):
    """Packed codes are two bits a row; scales lie between 1/16 and 3/16, norms between 3/4 and 5/4, all else within 1/2."""
    made = {}
    for stream, (name, (dtype, shape)) in enumerate(sorted(shapes.items())):
        count = int(np.prod(shape))
        if dtype == "U8":
            codes = gen.integers(seed, stream, 4 * count) % np.uint64(3)
            values = sum(codes[i * count : (i + 1) * count].astype(np.uint8) << (2 * i) for i in range(4)).astype(np.uint8)
        else:
            values = gen.uniform(seed, stream, count)
            if name.endswith("weight_scale"):
                values = np.float32(0.125) + values * np.float32(0.125)
            elif len(shape) == 1 and name.endswith("weight"):
                values = np.float32(1) + values * np.float32(0.5)
        made[name] = torch.from_numpy(values.reshape(shape))
    return made


def shapes(config):
    """Type and shape of each tensor that transformers wants of a checkpoint."""
    quantization = config.quantization_config if hasattr(config, "quantization_config") else None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if quantization is not None:
        quantization = transformers.BitNetQuantConfig(**{k: v for k, v in quantization.items() if k != "quant_method"})
        quantizer = transformers.quantizers.quantizer_bitnet.BitNetHfQuantizer(quantization)
        quantizer._process_model_before_weight_loading(model)
    wanted = {}
    packed = {
        f"{name}.weight" for name, module in model.named_modules()
        if isinstance(module, (AutoBitLinear, BitLinear)) and quantization.quantization_mode == "offline"
    }
    for name, value in model.state_dict().items():
        shape = list(value.shape)
        if name in packed:
            # BitLinear holds packed rows, AutoBitLinear the rows that they unpack to.
            shape = shape if value.dtype == torch.uint8 else [shape[0] // 4, shape[1]]
            wanted[name] = ("U8", shape)
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            wanted[name] = ("F32", shape)
    return wanted


def check_margins(module, inputs):
    x = inputs[0]
    gen.require_margin(x * 127 / x.abs().amax(-1, keepdim=True).clamp(min=gen.EPS), gen.MARGIN, 127)
    if isinstance(module, AutoBitLinear) and module.online_quant:
        gen.require_margin(module.weight / module.weight.abs().mean(), gen.WEIGHT_MARGIN, 1)


def logits(folder, ids):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not any(report.values()), report
    for module in model.modules():
        if isinstance(module, (AutoBitLinear, BitLinear)):
            module.register_forward_pre_hook(check_margins)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)[None]).logits[0].contiguous()


def case(name, seed):
    kind, options, quantization = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | options, architectures=[f"{kind}ForCausalLM"])
    if quantization is not None:
        config.quantization_config = quantization
    wanted = shapes(config)
    ids = (gen.integers(seed, 255, TOKENS) % np.uint64(SIZES["vocab_size"])).astype(np.int64)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        text = (Path(folder) / "config.json").read_text()
        save_file(tensors(seed, wanted), Path(folder) / "model.safetensors", {"format": "pt"})
        found = logits(folder, ids)
    metadata = {"config": text, "seed": str(seed), "tensors": json.dumps(wanted, sort_keys=True)}
    return {f"{name}.ids": torch.from_numpy(ids), f"{name}.logits": found}, {f"{name}.{k}": v for k, v in metadata.items()}


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    modules = (torch, transformers, accelerate, np, safetensors)
    values, metadata = {}, {module.__name__: module.__version__ for module in modules}
    for name in CASES:
        for seed in range(100_000):
            try:
                more, facts = case(name, seed)
                break
            except gen.NearTie:
                continue
        values |= more
        metadata |= facts
        print(name, "seed", seed, "largest logit", more[f"{name}.logits"].abs().max().item())
    gen.write("architectures.safetensors", values, metadata)


if __name__ == "__main__":
    main()
