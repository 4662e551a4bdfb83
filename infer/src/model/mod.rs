//! A model's weights, checked against its config, and the cache of keys and values that a text leaves behind.
//!
//! The forward pass is in [`forward`](Model::forward). Every shape is checked once, when the model is built, so that
//! the arithmetic afterwards has nothing left to check but the token ids and the room in the cache.

mod cache;
mod data;
mod forward;
mod parts;

use bitlinear::kernels::{Bits, IntWeight, KernelError};
use bitlinear::packed::{Layout, TernaryWeight};

use crate::config::{ConfigError, ModelConfig};
pub use cache::{KvCache, KvPrecision};
pub(crate) use data::with_table;
pub use data::{Data, F32Data, Table};
pub use forward::Logits;
pub use parts::{Part, Parts};

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
    /// Biases of q, k and v, as wide as their outputs; with `qkv_bias` only.
    pub qkv_bias: Option<[F32Data; 3]>,
    /// Norms of each head's queries and of its keys, `[head_dim]`; with `qk_norm` only.
    pub qk_norm: Option<[F32Data; 2]>,
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

    fn projections_mut(&mut self) -> [&mut Projection; 7] {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    /// Name, weight and width of every norm.
    pub fn norms(&self, config: &ModelConfig) -> [(&'static str, Option<&F32Data>, usize); 6] {
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        let [q_norm, k_norm] = self.qk_norm.as_ref().map_or([None; 2], |norms| norms.each_ref().map(Some));
        [
            ("input_layernorm", Some(&self.input_layernorm), hidden),
            ("self_attn.q_norm", q_norm, config.head_dim),
            ("self_attn.k_norm", k_norm, config.head_dim),
            ("self_attn.attn_sub_norm", self.attn_sub_norm.as_ref(), hidden),
            ("post_attention_layernorm", Some(&self.post_attention_layernorm), hidden),
            ("mlp.ffn_sub_norm", self.ffn_sub_norm.as_ref(), width),
        ]
    }

    /// Name, values and projection of every bias; nothing without `qkv_bias`.
    pub fn biases(&self) -> impl Iterator<Item = (&'static str, &F32Data, &Projection)> {
        let names = ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"];
        let biases = self.qkv_bias.iter().flatten();
        names.into_iter().zip(biases).zip(self.projections()).map(|((name, bias), proj)| (name, bias, proj))
    }
}

/// All weights of a model.
#[derive(Debug, Clone)]
pub struct Weights {
    /// `[vocab_size, hidden_size]`
    pub embed_tokens: Table,
    /// One entry a layer.
    pub layers: Vec<Layer>,
    /// The last norm, `[hidden_size]`.
    pub norm: F32Data,
    /// `[vocab_size, hidden_size]`; `None` where the head is tied to the embedding.
    pub lm_head: Option<Table>,
}

/// A model that can run: config and weights that fit each other.
#[derive(Debug, Clone)]
pub struct Model {
    config: ModelConfig,
    weights: Weights,
    /// The head at eight or four bits, in place of the exact one.
    int_head: Option<IntWeight>,
}

impl Model {
    /// Puts config and weights together.
    ///
    /// # Errors
    /// The config is not valid, or a weight does not have the shape or kind that it asks for.
    pub fn new(config: ModelConfig, weights: Weights) -> Result<Self, ModelError> {
        config.validate()?;
        let table = [config.vocab_size, config.hidden_size];
        let head = weights.lm_head.as_ref().map(Table::len);
        check_len("model.embed_tokens.weight", Some(weights.embed_tokens.len()), true, &table)?;
        check_len("model.norm.weight", Some(weights.norm.len()), true, &[config.hidden_size])?;
        check_len("lm_head.weight", head, !config.tie_word_embeddings, &table)?;
        if weights.layers.len() != config.num_hidden_layers {
            return Err(ModelError::Shape {
                tensor: "model.layers".into(),
                expected: format!("{} layers", config.num_hidden_layers),
                found: weights.layers.len().to_string(),
            });
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            check_layer(&config, index, layer)?;
        }
        Ok(Self { config, weights, int_head: None })
    }

    /// The same model with its ternary weights in another layout; the results are the same bit for bit.
    pub fn with_layout(mut self, layout: Layout) -> Self {
        for layer in &mut self.weights.layers {
            for projection in layer.projections_mut() {
                if let Projection::Ternary(weight) = projection
                    && weight.layout() != layout
                {
                    *weight = weight.with_layout(layout);
                }
            }
        }
        self
    }

    /// The same model with its head at eight or four bits a weight ([`IntWeight`]): smaller and faster, and no longer exact.
    ///
    /// At four bits that head only finds the tokens that count: the logits of the likeliest ones ([`Model::logits`]) are then
    /// computed with their exact rows.
    ///
    /// # Errors
    /// The rows of the head are too long.
    pub fn with_int_head(mut self, bits: Bits) -> Result<Self, ModelError> {
        let head = self.head();
        let (vocab_size, hidden) = (self.config.vocab_size, self.config.hidden_size);
        self.int_head = Some(IntWeight::quantize(vocab_size, hidden, bits, |row, out| head.row(row, out))?);
        Ok(self)
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
    pub fn head(&self) -> &Table {
        self.weights.lm_head.as_ref().unwrap_or(&self.weights.embed_tokens)
    }

    /// Precision of the head that runs: `f32`, `bf16`, `f16`, `int8` or `int4`.
    pub fn head_precision(&self) -> &'static str {
        match self.int_head.as_ref().map(IntWeight::bits) {
            Some(Bits::Eight) => "int8",
            Some(Bits::Four) => "int4",
            None => self.head().precision(),
        }
    }

    /// Layout of the ternary weights, if the model has any.
    pub fn layout(&self) -> Option<Layout> {
        self.weights.layers.iter().flat_map(Layer::projections).find_map(|projection| match projection {
            Projection::Ternary(weight) => Some(weight.layout()),
            Projection::Dense(_) => None,
        })
    }

    /// Bytes of weights that one new token reads: projections, biases, norms and the head that runs (with an int4 head, without the
    /// exact rows of the likeliest tokens).
    pub fn bytes_per_token(&self) -> usize {
        let layers = self.weights.layers.iter().map(|layer| {
            let norms = layer.norms(&self.config).into_iter().filter_map(|(_, norm, _)| norm);
            let biases = layer.biases().map(|(_, bias, _)| bias);
            let vectors = norms.chain(biases).map(|values| size_of_val(&**values)).sum::<usize>();
            layer.projections().iter().map(|p| p.bytes()).sum::<usize>() + vectors
        });
        let head = self.int_head.as_ref().map_or_else(|| self.head().bytes(), IntWeight::bytes);
        layers.sum::<usize>() + size_of_val(&*self.weights.norm) + head
    }
}

fn check_layer(config: &ModelConfig, index: usize, layer: &Layer) -> Result<(), ModelError> {
    for (name, norm, width) in layer.norms(config) {
        let wanted = match name {
            "self_attn.q_norm" | "self_attn.k_norm" => config.qk_norm,
            "self_attn.attn_sub_norm" | "mlp.ffn_sub_norm" => config.sub_norm,
            _ => true,
        };
        let len = norm.map(|norm| norm.len());
        check_len(&format!("model.layers.{index}.{name}.weight"), len, wanted, &[width])?;
    }
    let projections = config.projections();
    for (place, (name, rows, columns)) in projections.into_iter().enumerate() {
        let module = format!("model.layers.{index}.{name}");
        let projection = layer.projections()[place];
        let ternary = config.is_ternary(&module);
        check_projection(&format!("{module}.weight"), projection, ternary, rows, columns)?;
        // q, k and v come first.
        if place < 3 {
            let len = layer.qkv_bias.as_ref().map(|biases| biases[place].len());
            check_len(&format!("{module}.bias"), len, config.qkv_bias, &[rows])?;
        }
    }
    Ok(())
}

fn check_len(name: &str, len: Option<usize>, wanted: bool, shape: &[usize]) -> Result<(), ModelError> {
    let tensor = || name.to_owned();
    match (len, wanted) {
        (None, false) => Ok(()),
        (None, true) => Err(ModelError::Kind { tensor: tensor(), expected: "there", found: "missing" }),
        (Some(_), false) => Err(ModelError::Kind { tensor: tensor(), expected: "none", found: "there" }),
        // The product cannot overflow: ModelConfig::validate counts all parameters.
        (Some(len), true) if len == shape.iter().product::<usize>() => Ok(()),
        (Some(len), true) => Err(ModelError::Shape {
            tensor: tensor(),
            expected: format!("{shape:?}"),
            found: len.to_string(),
        }),
    }
}

fn check_projection(
    name: &str,
    projection: &Projection,
    wanted: bool,
    rows: usize,
    columns: usize,
) -> Result<(), ModelError> {
    let kind = |ternary| if ternary { "ternary" } else { "dense" };
    match projection {
        Projection::Ternary(weight) if wanted => {
            if (weight.out_features(), weight.in_features()) == (rows, columns) {
                return Ok(());
            }
            Err(ModelError::Shape {
                tensor: name.to_owned(),
                expected: format!("[{rows}, {columns}]"),
                found: format!("[{}, {}]", weight.out_features(), weight.in_features()),
            })
        }
        Projection::Dense(data) if !wanted => check_len(name, Some(data.len()), true, &[rows, columns]),
        _ => Err(ModelError::Kind { tensor: name.to_owned(), expected: kind(wanted), found: kind(!wanted) }),
    }
}
