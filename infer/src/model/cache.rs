//! What a text leaves behind: keys and values of its tokens, and the buffers that one token after the other uses.

use bitlinear::math::RopeTable;
use half::f16;

use super::parts::Parts;
use super::{Model, ModelError, forward};
use crate::config::ModelConfig;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvPrecision {
    /// As they were computed: the model gives the logits that it was trained to give.
    #[default]
    F32,
    /// Rounded to f16: half the memory, and faster over long contexts; logits change in the fourth digit. Beyond
    /// 65,504 a value becomes infinite, and the logits with it, which no model comes near.
    F16,
}

impl KvPrecision {
    /// Both precisions.
    pub const ALL: [Self; 2] = [Self::F32, Self::F16];

    /// Its name: `f32` or `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// The precision of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|precision| precision.name() == name)
    }
}

/// Keys and values of the tokens that a model has read, a layer at a time; it grows with the text, up to its capacity.
#[derive(Debug, Clone)]
pub struct KvCache {
    pub(super) capacity: usize,
    pub(super) len: usize,
    pub(super) rope: RopeTable,
    /// `(hidden_size, kv_width, head_dim)` of the model it was made for.
    pub(super) shape: (usize, usize, usize),
    pub(super) layers: Vec<LayerCache>,
    pub(super) scratch: forward::Scratch,
}

/// Keys and values of one layer.
#[derive(Debug, Clone)]
pub(super) enum LayerCache {
    F32(Heads<f32>),
    F16(Heads<f16>),
}

/// Keys and values, a head at a time, each `[tokens, head_dim]`: what attention reads of a head lies in one run.
#[derive(Debug, Clone)]
pub(super) struct Heads<T> {
    pub(super) keys: Vec<Vec<T>>,
    pub(super) values: Vec<Vec<T>>,
}

impl<T: Copy> Heads<T> {
    fn new(heads: usize) -> Self {
        Self { keys: vec![Vec::new(); heads], values: vec![Vec::new(); heads] }
    }

    /// Puts new keys and values, each `[tokens, heads * head_dim]`, behind those of the first `start` tokens. What a failed
    /// call may have left there goes.
    fn append(&mut self, head_dim: usize, start: usize, new: [&[f32]; 2], store: impl Fn(f32) -> T) {
        for (all, new) in [&mut self.keys, &mut self.values].into_iter().zip(new) {
            let heads = all.len();
            for (head, stored) in all.iter_mut().enumerate() {
                stored.truncate(start * head_dim);
                for token in new.chunks_exact(heads * head_dim) {
                    stored.extend(token[head * head_dim..][..head_dim].iter().map(|x| store(*x)));
                }
            }
        }
    }
}

impl LayerCache {
    fn new(precision: KvPrecision, heads: usize) -> Self {
        match precision {
            KvPrecision::F32 => Self::F32(Heads::new(heads)),
            KvPrecision::F16 => Self::F16(Heads::new(heads)),
        }
    }

    /// [`Heads::append`] of keys and values in f32.
    pub(super) fn append(&mut self, head_dim: usize, start: usize, new: [&[f32]; 2]) {
        match self {
            Self::F32(heads) => heads.append(head_dim, start, new, |x| x),
            Self::F16(heads) => heads.append(head_dim, start, new, f16::from_f32),
        }
    }
}

impl KvCache {
    /// An empty cache with room for `capacity` tokens, with keys and values as computed.
    ///
    /// # Errors
    /// The capacity is beyond the model's `max_position_embeddings`.
    pub fn new(model: &Model, capacity: usize) -> Result<Self, ModelError> {
        Self::with_precision(model, capacity, KvPrecision::F32)
    }

    /// An empty cache of a given precision.
    ///
    /// # Errors
    /// The capacity is beyond the model's `max_position_embeddings`.
    pub fn with_precision(
        model: &Model,
        capacity: usize,
        precision: KvPrecision,
    ) -> Result<Self, ModelError> {
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
            layers: vec![LayerCache::new(precision, config.num_key_value_heads); config.num_hidden_layers],
            scratch: forward::Scratch::default(),
        })
    }

    pub(super) fn shape(config: &ModelConfig) -> (usize, usize, usize) {
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

    /// Starts to measure what the parts of a pass take, or starts again.
    pub fn start_clock(&mut self) {
        self.scratch.parts = Some(Parts::default());
    }

    /// What has been measured since [`KvCache::start_clock`]; `None` if it never was called.
    pub fn parts(&self) -> Option<&Parts> {
        self.scratch.parts.as_ref()
    }
}
