//! How much memory a run will need at its peak, so that one that cannot fit is refused before it starts.
use bitlinear::training::LOGITS_CHUNK;
use infer::bench::available_memory;
use infer::config::ModelConfig;

use crate::config::{Config, Precision, QuantizationWarmup, Recompute};

/// What the process takes besides: code, tokenizer, tables, threads.
const BASE: u64 = 48 << 20;

/// Bytes that a run needs, by what for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Parameters, their gradients and both moments, all f32, the weights that a step computes with, and the codes that an
    /// evaluation compares.
    pub parameters: u64,
    /// What is kept from the forward to the backward.
    pub activations: u64,
    /// Buffers that layers share, logits, and the rest of the process.
    pub buffers: u64,
}

/// Why a run is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "training needs about {} MiB of memory and {} MiB are free; [model] and [train]; use a smaller train.batch_size with more \
     train.gradient_accumulation, train.recompute = \"block\", or a smaller model", needed >> 20, available >> 20
)]
pub struct MemoryError {
    /// Bytes needed.
    pub needed: u64,
    /// Bytes free.
    pub available: u64,
}

impl Estimate {
    /// Of a config whose model has this shape.
    pub fn new(config: &Config, shape: &ModelConfig) -> Self {
        let count = |value: usize| value as u64;
        let tokens = count(config.train.batch_size).saturating_mul(count(config.data.sequence_length));
        let (hidden, ffn, layers) =
            (count(shape.hidden_size), count(shape.intermediate_size), count(shape.num_hidden_layers));
        let queries = count(shape.num_attention_heads * shape.head_dim);
        let keys = count(shape.num_key_value_heads * shape.head_dim);
        let heads = count(shape.num_attention_heads);
        let parameters = shape.parameters().unwrap_or(u64::MAX / 32);
        let projections = shape.ternary_parameters();
        let ternary = shape.quantized && config.quantization.warmup == QuantizationWarmup::None;
        // Weights: twice two bits, or mixed in f32 where the share of quantization grows.
        let weights = match (shape.quantized, ternary) {
            (false, _) => 0,
            (true, true) => projections / 2,
            (true, false) => 4 * projections,
        };
        let inputs = (2 * hidden + queries + ffn) * if ternary { 1 } else { 4 };
        let layer = 4 * (2 * queries + 2 * keys + heads + hidden + 2 * ffn) + inputs;
        let (activations, shared) = match config.train.precision {
            Precision::Fast => {
                let saved = if config.train.recompute == Recompute::Block { 1 } else { layers };
                let room = 4 * (hidden + 3 * queries + 4 * keys + 3 * ffn) + 4 * ffn.max(queries);
                (saved * layer + 4 * (layers + 1) * hidden, room + 4 * 3 * hidden)
            }
            // candle keeps what every operation returns until the backward is done, and its gradients beside them.
            Precision::F32 => {
                let outputs = 4 * (9 * hidden + 3 * queries + 2 * keys + 4 * ffn);
                (layers * outputs * 3 / 2, 4 * 8 * ffn)
            }
        };
        let logits = 4 * count(shape.vocab_size).saturating_mul(count(LOGITS_CHUNK).min(tokens));
        Self {
            // candle's store of gradients comes on top of ours.
            parameters: parameters
                .saturating_mul(if config.train.precision == Precision::F32 { 20 } else { 16 })
                .saturating_add(weights + 2 * projections),
            activations: activations.saturating_mul(tokens),
            buffers: shared.saturating_mul(tokens).saturating_add(logits + BASE),
        }
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.parameters.saturating_add(self.activations).saturating_add(self.buffers)
    }

    /// Refuses a run that needs more than is free, where the system tells.
    ///
    /// # Errors
    /// It does not fit.
    pub fn check(&self) -> Result<(), MemoryError> {
        match available_memory() {
            Some(available) if self.total() > available => {
                Err(MemoryError { needed: self.total(), available })
            }
            _ => Ok(()),
        }
    }
}
