//! A model's sizes and options, under the names of Hugging Face's `config.json`.
//!
//! What would change the arithmetic and is not implemented is refused by name; a key that cannot change it is ignored.
//! So a model that loads computes what its authors meant.

mod architecture;
mod json;
mod keys;
mod modules;

pub use json::shortest;

use bitlinear::kernels::MAX_IN_FEATURES;
use bitlinear::math::Activation;

/// Most layers that a config may ask for; the sizes of layers have a bound in [`MAX_IN_FEATURES`].
const MAX_LAYERS: usize = 1 << 16;
/// Largest vocabulary that a config may ask for.
const MAX_VOCAB: usize = i32::MAX as usize;
/// Longest context that a config may ask for: positions up to here are exact in f32.
const MAX_POSITIONS: usize = 1 << 24;

/// What is wrong with a `config.json`.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON.
    #[error("not valid JSON: {0}; write the file again")]
    Json(#[from] serde_json::Error),
    /// A key that has no default is not there.
    #[error("no value; key '{key}'; a model cannot be built without it")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value has the wrong type.
    #[error("{found} is not {expected}; key '{key}'; correct the value")]
    Type {
        /// The key.
        key: String,
        /// What was expected.
        expected: &'static str,
        /// The value found.
        found: String,
    },
    /// A value asks for arithmetic that is not implemented.
    #[error("{found} is not supported; key '{key}'; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What is implemented.
        supported: &'static str,
    },
    /// A number is out of range.
    #[error("{found} is out of range; key '{key}'; must be {range}")]
    Range {
        /// The key.
        key: &'static str,
        /// The value found.
        found: String,
        /// The range.
        range: String,
    },
    /// Two sizes do not go together.
    #[error("{left} = {left_value} does not go with {right} = {right_value}; config; {rule}")]
    Mismatch {
        /// Name of the first.
        left: &'static str,
        /// Value of the first.
        left_value: usize,
        /// Name of the second.
        right: &'static str,
        /// Value of the second.
        right_value: usize,
        /// What must hold.
        rule: &'static str,
    },
    /// Two options that no architecture of transformers has together.
    #[error(
        "{left} does not go with {right}; config; no architecture of transformers has both, leave one out"
    )]
    Together {
        /// The first.
        left: &'static str,
        /// The second.
        right: &'static str,
    },
    /// A projection that is to stay dense and is none.
    #[error(
        "'{name}' is no projection of this model or not in order; config, modules_to_not_convert; give full module names such as model.layers.0.mlp.down_proj, each once and sorted"
    )]
    Module {
        /// The name.
        name: String,
    },
}

/// How a checkpoint stores the weights of its seven projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// f32, bf16 or f16 weights, used as they are.
    Dense,
    /// f32, bf16 or f16 latent weights, ternarized when loaded (`autobitlinear`, online).
    Latent,
    /// Packed ternary codes and a scale that multiplies (`autobitlinear`, offline).
    PackedMultiply,
    /// Packed ternary codes and a scale that divides (`bitlinear`, also where `linear_class` is missing).
    PackedDivide,
    /// Latent weights as in [`Storage::Latent`], under 1bitLLM's names of the sub-norms (`BitnetForCausalLM`).
    LatentOneBit,
}

/// Sizes and options of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// The epsilon of every norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    /// Longest context, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head's weight is that of the embedding.
    pub tie_word_embeddings: bool,
    /// Activation function of the MLP.
    pub hidden_act: Activation,
    /// Norms before `o_proj` and `down_proj`: the model is `BitNetForCausalLM`. Of this, [`qkv_bias`](Self::qkv_bias) and
    /// [`qk_norm`](Self::qk_norm), an architecture has one at most; with none of them the model is `LlamaForCausalLM`.
    pub sub_norm: bool,
    /// Whether `q_proj`, `k_proj` and `v_proj` add a bias (Qwen2).
    pub qkv_bias: bool,
    /// Whether each head's queries and keys pass an RMSNorm over `head_dim` before the rotary embedding (Qwen3).
    pub qk_norm: bool,
    /// Whether the seven projections of a layer are ternary (W1.58A8); else they are dense f32.
    pub quantized: bool,
    /// Projections of a quantized model that stay dense, by full module name (`model.layers.0.mlp.down_proj`), sorted.
    pub modules_to_not_convert: Vec<String>,
    /// The token that starts a text, if any.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Checks every size against its bounds and against the others, and that transformers has an architecture for the options.
    ///
    /// # Errors
    /// Names the first value that is out of range or that does not go with another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check_ranges()?;
        self.check_sizes()?;
        self.check_options()
    }

    fn check_ranges(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_IN_FEATURES),
            ("intermediate_size", self.intermediate_size, MAX_IN_FEATURES),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_IN_FEATURES),
            ("num_key_value_heads", self.num_key_value_heads, MAX_IN_FEATURES),
            ("head_dim", self.head_dim, MAX_IN_FEATURES),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ];
        for (key, size, max) in sizes {
            if !(1..=max).contains(&size) {
                return Err(ConfigError::Range {
                    key,
                    found: size.to_string(),
                    range: format!("1 to {max}"),
                });
            }
        }
        for (key, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                let range = "positive and finite".to_owned();
                return Err(ConfigError::Range { key, found: value.to_string(), range });
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            let range = "even, for the rotary embedding".to_owned();
            return Err(ConfigError::Range { key: "head_dim", found: self.head_dim.to_string(), range });
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), ConfigError> {
        let mismatch = |left, left_value, right, right_value, rule| {
            Err(ConfigError::Mismatch { left, left_value, right, right_value, rule })
        };
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let rule = "every key/value head serves the same number of query heads";
            return mismatch("num_attention_heads", heads, "num_key_value_heads", kv_heads, rule);
        }
        let attention_width = heads.checked_mul(self.head_dim).filter(|width| *width <= MAX_IN_FEATURES);
        let Some(attention_width) = attention_width else {
            let rule = "their product is too large";
            return mismatch("num_attention_heads", heads, "head_dim", self.head_dim, rule);
        };
        if self.sub_norm && attention_width != self.hidden_size {
            let rule = "with sub-norms, num_attention_heads * head_dim must equal hidden_size";
            return mismatch(
                "num_attention_heads * head_dim",
                attention_width,
                "hidden_size",
                self.hidden_size,
                rule,
            );
        }
        if self.parameters().is_none_or(|count| count > isize::MAX as u64 / 4) {
            let rule = "the model has more parameters than memory has addresses";
            return mismatch(
                "num_hidden_layers",
                self.num_hidden_layers,
                "hidden_size",
                self.hidden_size,
                rule,
            );
        }
        Ok(())
    }

    fn check_options(&self) -> Result<(), ConfigError> {
        let options = [("sub_norm", self.sub_norm), ("qkv_bias", self.qkv_bias), ("qk_norm", self.qk_norm)];
        let mut on = options.into_iter().filter(|(_, on)| *on).map(|(name, _)| name);
        if let (Some(left), Some(right)) = (on.next(), on.next()) {
            return Err(ConfigError::Together { left, right });
        }
        let names = &self.modules_to_not_convert;
        let unsorted = names.windows(2).find(|pair| pair[0] >= pair[1]).map(|pair| &pair[1]);
        match names.iter().find(|name| !modules::is_projection(self, name)).or(unsorted) {
            Some(name) => Err(ConfigError::Module { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Whether a projection, by its full module name, is ternary.
    pub fn is_ternary(&self, module: &str) -> bool {
        self.quantized && !self.modules_to_not_convert.iter().any(|dense| dense == module)
    }

    /// Width of all query heads together: the input of `o_proj`.
    pub fn attention_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Name and shape `(name, out_features, in_features)` of the seven projections of a layer.
    pub fn projections(&self) -> [(&'static str, usize, usize); 7] {
        let (hidden, width, attention) = (self.hidden_size, self.intermediate_size, self.attention_width());
        [
            ("self_attn.q_proj", attention, hidden),
            ("self_attn.k_proj", self.kv_width(), hidden),
            ("self_attn.v_proj", self.kv_width(), hidden),
            ("self_attn.o_proj", hidden, attention),
            ("mlp.gate_proj", width, hidden),
            ("mlp.up_proj", width, hidden),
            ("mlp.down_proj", hidden, width),
        ]
    }

    /// Number of weights of the seven projections of all layers, which a quantized model has as ternary ones, but for
    /// [`modules_to_not_convert`](Self::modules_to_not_convert): they count, too.
    pub fn ternary_parameters(&self) -> u64 {
        let layer = self.projections().into_iter().map(|(_, out, columns)| out as u64 * columns as u64);
        // It cannot overflow: `validate` counts all parameters.
        layer.sum::<u64>() * self.num_hidden_layers as u64
    }

    /// Number of weights, a tied head counted once; `None` if it does not fit.
    pub fn parameters(&self) -> Option<u64> {
        let count = |a: usize, b: usize| (a as u64).checked_mul(b as u64);
        let mut vectors = 2 * self.hidden_size as u64;
        if self.sub_norm {
            vectors += (self.hidden_size + self.intermediate_size) as u64;
        }
        if self.qkv_bias {
            vectors += (self.attention_width() + 2 * self.kv_width()) as u64;
        }
        if self.qk_norm {
            vectors += 2 * self.head_dim as u64;
        }
        let layer = self
            .projections()
            .iter()
            .try_fold(vectors, |sum, (_, out, columns)| sum.checked_add(count(*out, *columns)?))?;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        layer
            .checked_mul(self.num_hidden_layers as u64)?
            .checked_add(count(self.vocab_size, self.hidden_size)?.checked_mul(tables)?)?
            .checked_add(self.hidden_size as u64)
    }
}
