//! A model's weights, checked against its config, and the cache of keys and values that a text leaves behind.
//!
//! The forward pass is in [`forward`](Model::forward). Every shape is checked once, when the model is built, so that
//! the arithmetic afterwards has nothing left to check but the token ids and the room in the cache.

mod data;
mod forward;

use bitlinear::kernels::KernelError;
use bitlinear::math::RopeTable;
use bitlinear::packed::TernaryWeight;

use crate::config::{ConfigError, ModelConfig};
pub use data::F32Data;
pub use forward::Logits;

/// What a model refuses.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The config is not one of a model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A weight has another shape than the config asks for.
    #[error(
        "{found} values, expected {expected}; tensor '{tensor}'; weights and config are of different models"
    )]
    Shape {
        /// The tensor's name.
        tensor: String,
        /// Its shape, or a number of values.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A weight is there and the config says it is not, or the other way round.
    #[error("tensor '{tensor}' is {found}, expected {expected}; weights and config are of different models")]
    Kind {
        /// The tensor's name.
        tensor: String,
        /// What the config asks for.
        expected: &'static str,
        /// What was given.
        found: &'static str,
    },
    /// A token id is not in the vocabulary.
    #[error(
        "token id {id} at position {position} is not below vocab_size {vocab_size}; the tokens belong to another model"
    )]
    Token {
        /// The id.
        id: u32,
        /// Its place in the ids given.
        position: usize,
        /// Number of ids of the model.
        vocab_size: usize,
    },
    /// More tokens than the cache has room for.
    #[error(
        "{tokens} more tokens after {used} do not fit a cache of {capacity}; ask for a longer one (at most max_position_embeddings)"
    )]
    CacheFull {
        /// Tokens to be added.
        tokens: usize,
        /// Tokens in the cache.
        used: usize,
        /// Room of the cache.
        capacity: usize,
    },
    /// A cache that is longer than the model's context.
    #[error("a cache of {capacity} tokens is longer than max_position_embeddings {limit}; shorten the text")]
    Context {
        /// Tokens asked for.
        capacity: usize,
        /// The model's longest context.
        limit: usize,
    },
    /// A cache that was made for a model of another shape.
    #[error("the cache was made for a model of another shape; make one with KvCache::new for this model")]
    ForeignCache,
    /// The ternary product failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// The weight of one of the seven projections of a layer, `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub enum Projection {
    /// Ternary weights; activations are quantized to int8 a token.
    Ternary(TernaryWeight),
    /// f32 weights, row after row.
    Dense(F32Data),
}

impl Projection {
    /// Bytes of the weight in memory.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Ternary(weight) => weight.bytes(),
            Self::Dense(weight) => size_of_val(&**weight),
        }
    }
}

/// Weights of one layer; names as in `model.layers.N`.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Norm before attention, `[hidden_size]`.
    pub input_layernorm: F32Data,
    /// `[num_attention_heads * head_dim, hidden_size]`
    pub q_proj: Projection,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub k_proj: Projection,
    /// `[num_key_value_heads * head_dim, hidden_size]`
    pub v_proj: Projection,
    /// `[hidden_size, num_attention_heads * head_dim]`
    pub o_proj: Projection,
    /// Norm before `o_proj`, `[hidden_size]`; with sub-norms only.
    pub attn_sub_norm: Option<F32Data>,
    /// Norm before the MLP, `[hidden_size]`.
    pub post_attention_layernorm: F32Data,
    /// `[intermediate_size, hidden_size]`
    pub gate_proj: Projection,
    /// `[intermediate_size, hidden_size]`
    pub up_proj: Projection,
    /// `[hidden_size, intermediate_size]`
    pub down_proj: Projection,
    /// Norm before `down_proj`, `[intermediate_size]`; with sub-norms only.
    pub ffn_sub_norm: Option<F32Data>,
}

impl Layer {
    /// The seven projections, in the order of [`ModelConfig::projections`].
    pub fn projections(&self) -> [&Projection; 7] {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    /// Name, weight and width of every norm.
    pub fn norms(&self, config: &ModelConfig) -> [(&'static str, Option<&F32Data>, usize); 4] {
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        [
            ("input_layernorm", Some(&self.input_layernorm), hidden),
            ("self_attn.attn_sub_norm", self.attn_sub_norm.as_ref(), hidden),
            ("post_attention_layernorm", Some(&self.post_attention_layernorm), hidden),
            ("mlp.ffn_sub_norm", self.ffn_sub_norm.as_ref(), width),
        ]
    }
}

/// All weights of a model.
#[derive(Debug, Clone)]
pub struct Weights {
    /// `[vocab_size, hidden_size]`
    pub embed_tokens: F32Data,
    /// One entry a layer.
    pub layers: Vec<Layer>,
    /// The last norm, `[hidden_size]`.
    pub norm: F32Data,
    /// `[vocab_size, hidden_size]`; `None` where the head is tied to the embedding.
    pub lm_head: Option<F32Data>,
}

/// A model that can run: config and weights that fit each other.
#[derive(Debug, Clone)]
pub struct Model {
    config: ModelConfig,
    weights: Weights,
}

impl Model {
    /// Puts config and weights together.
    ///
    /// # Errors
    /// The config is not valid, or a weight does not have the shape or kind that it asks for.
    pub fn new(config: ModelConfig, weights: Weights) -> Result<Self, ModelError> {
        config.validate()?;
        let table = [config.vocab_size, config.hidden_size];
        check_len("model.embed_tokens.weight", Some(&weights.embed_tokens), true, &table)?;
        check_len("model.norm.weight", Some(&weights.norm), true, &[config.hidden_size])?;
        check_len("lm_head.weight", weights.lm_head.as_ref(), !config.tie_word_embeddings, &table)?;
        if weights.layers.len() != config.num_hidden_layers {
            return Err(ModelError::Shape {
                tensor: "model.layers".into(),
                expected: format!("{} layers", config.num_hidden_layers),
                found: weights.layers.len().to_string(),
            });
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            for (name, norm, width) in layer.norms(&config) {
                let wanted = config.sub_norm || !name.contains("sub_norm");
                check_len(&format!("model.layers.{index}.{name}.weight"), norm, wanted, &[width])?;
            }
            for ((name, rows, columns), projection) in config.projections().iter().zip(layer.projections()) {
                let name = format!("model.layers.{index}.{name}.weight");
                check_projection(&name, projection, config.quantized, *rows, *columns)?;
            }
        }
        Ok(Self { config, weights })
    }

    /// Sizes and options.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The head's weight, `[vocab_size, hidden_size]`.
    pub fn head(&self) -> &[f32] {
        self.weights.lm_head.as_ref().unwrap_or(&self.weights.embed_tokens)
    }
}

fn check_len(name: &str, data: Option<&F32Data>, wanted: bool, shape: &[usize]) -> Result<(), ModelError> {
    let tensor = || name.to_owned();
    match (data, wanted) {
        (None, false) => Ok(()),
        (None, true) => Err(ModelError::Kind { tensor: tensor(), expected: "there", found: "missing" }),
        (Some(_), false) => Err(ModelError::Kind { tensor: tensor(), expected: "none", found: "there" }),
        // The product cannot overflow: ModelConfig::validate counts all parameters.
        (Some(data), true) if data.len() == shape.iter().product::<usize>() => Ok(()),
        (Some(data), true) => Err(ModelError::Shape {
            tensor: tensor(),
            expected: format!("{shape:?}"),
            found: data.len().to_string(),
        }),
    }
}

fn check_projection(
    name: &str,
    projection: &Projection,
    quantized: bool,
    rows: usize,
    columns: usize,
) -> Result<(), ModelError> {
    let kind = |quantized| if quantized { "ternary" } else { "dense" };
    match projection {
        Projection::Ternary(weight) if quantized => {
            if (weight.out_features(), weight.in_features()) == (rows, columns) {
                return Ok(());
            }
            Err(ModelError::Shape {
                tensor: name.to_owned(),
                expected: format!("[{rows}, {columns}]"),
                found: format!("[{}, {}]", weight.out_features(), weight.in_features()),
            })
        }
        Projection::Dense(data) if !quantized => check_len(name, Some(data), true, &[rows, columns]),
        _ => Err(ModelError::Kind {
            tensor: name.to_owned(),
            expected: kind(quantized),
            found: kind(!quantized),
        }),
    }
}

/// Keys and values of the tokens that a model has read, a layer at a time; it grows with the text, up to its capacity.
#[derive(Debug, Clone)]
pub struct KvCache {
    capacity: usize,
    len: usize,
    rope: RopeTable,
    /// `(hidden_size, kv_width, head_dim)` of the model it was made for.
    shape: (usize, usize, usize),
    layers: Vec<LayerCache>,
    scratch: forward::Scratch,
}

/// Keys and values of one layer, each `[tokens, kv_width]`.
#[derive(Debug, Clone, Default)]
struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens.
    ///
    /// # Errors
    /// The capacity is beyond the model's `max_position_embeddings`.
    pub fn new(model: &Model, capacity: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let limit = config.max_position_embeddings;
        if capacity > limit {
            return Err(ModelError::Context { capacity, limit });
        }
        Ok(Self {
            capacity,
            len: 0,
            rope: RopeTable::new(config.head_dim, 0, config.rope_theta),
            shape: Self::shape(config),
            layers: vec![LayerCache::default(); config.num_hidden_layers],
            scratch: forward::Scratch::default(),
        })
    }

    fn shape(config: &ModelConfig) -> (usize, usize, usize) {
        (config.hidden_size, config.kv_width(), config.head_dim)
    }

    /// Tokens in the cache.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether it is empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tokens that it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `len` tokens; does nothing if there are no more than that.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}
