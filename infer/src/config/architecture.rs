//! The architectures that are known, with the defaults of each.

use bitlinear::math::Activation;

use super::ModelConfig;

/// What an architecture is and what it takes for keys that are missing: transformers' defaults, 1bitLLM's for its own.
#[derive(Debug, PartialEq)]
pub(super) struct Architecture {
    pub(super) name: &'static str,
    pub(super) model_type: &'static str,
    pub(super) sub_norm: bool,
    pub(super) qkv_bias: bool,
    pub(super) qk_norm: bool,
    /// Key and value heads; as many as query heads without.
    pub(super) num_key_value_heads: Option<usize>,
    /// Width of a head; the share of `hidden_size` without.
    pub(super) head_dim: Option<usize>,
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    pub(super) hidden_act: Activation,
    pub(super) max_position_embeddings: usize,
    pub(super) bos_token_id: Option<u32>,
    pub(super) eos_token_id: Option<u32>,
}

const LLAMA: Architecture = Architecture {
    name: "LlamaForCausalLM",
    model_type: "llama",
    sub_norm: false,
    qkv_bias: false,
    qk_norm: false,
    num_key_value_heads: None,
    head_dim: None,
    rms_norm_eps: 1e-6,
    rope_theta: 10_000.0,
    hidden_act: Activation::Silu,
    max_position_embeddings: 2048,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
};

const QWEN2: Architecture = Architecture {
    name: "Qwen2ForCausalLM",
    model_type: "qwen2",
    qkv_bias: true,
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_id: None,
    ..LLAMA
};

const QWEN3: Architecture = Architecture {
    name: "Qwen3ForCausalLM",
    model_type: "qwen3",
    qkv_bias: false,
    qk_norm: true,
    head_dim: Some(128),
    ..QWEN2
};

const BITNET: Architecture = Architecture {
    name: "BitNetForCausalLM",
    model_type: "bitnet",
    sub_norm: true,
    num_key_value_heads: Some(5),
    rms_norm_eps: 1e-5,
    rope_theta: 500_000.0,
    hidden_act: Activation::Relu2,
    bos_token_id: Some(128_000),
    eos_token_id: Some(128_001),
    ..LLAMA
};

/// 1bitLLM's own code: the same model with Llama's defaults and other names of the sub-norms. Read, never written.
pub(super) const ONE_BIT: Architecture = Architecture { name: "BitnetForCausalLM", sub_norm: true, ..LLAMA };

impl Architecture {
    /// The architecture of this name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        [&LLAMA, &QWEN2, &QWEN3, &BITNET, &ONE_BIT].into_iter().find(|known| known.name == name)
    }

    /// The architecture whose `config.json` and tensor names describe a model; [`ModelConfig::validate`] makes sure that there
    /// is one.
    pub(super) fn of(config: &ModelConfig) -> &'static Self {
        match config {
            ModelConfig { sub_norm: true, .. } => &BITNET,
            ModelConfig { qkv_bias: true, .. } => &QWEN2,
            ModelConfig { qk_norm: true, .. } => &QWEN3,
            _ => &LLAMA,
        }
    }
}
