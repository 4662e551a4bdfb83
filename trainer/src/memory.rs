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
    /// Of a config whose model has this shape, with a teacher of that one if there is one.
    pub fn new(config: &Config, shape: &ModelConfig, teacher: Option<&ModelConfig>) -> Self {
        let tokens = count(config.train.batch_size).saturating_mul(count(config.data.sequence_length));
        let parameters = shape.parameters().unwrap_or(u64::MAX / 32);
        let projections = shape.ternary_parameters();
        let ternary = shape.quantized && config.quantization.warmup == QuantizationWarmup::None;
        // Weights: twice two bits, or mixed in f32 where the share of quantization grows.
        let weights = match (shape.quantized, ternary) {
            (false, _) => 0,
            (true, true) => projections / 2,
            (true, false) => 4 * projections,
        };
        let (activations, shared) = match config.train.precision {
            Precision::Fast => {
                let block = config.train.recompute == Recompute::Block;
                let saved = if block { 1 } else { count(shape.num_hidden_layers) };
                (saved * layer(shape, ternary) + residuals(shape), room(shape))
            }
            // candle keeps what every operation returns until the backward is done, and its gradients beside them.
            Precision::F32 => {
                let (hidden, ffn) = (count(shape.hidden_size), count(shape.intermediate_size));
                let (queries, keys) = (count(shape.attention_width()), count(shape.kv_width()));
                let outputs = 4 * (9 * hidden + 3 * queries + 2 * keys + 4 * ffn);
                (count(shape.num_hidden_layers) * outputs * 3 / 2, 4 * 8 * ffn)
            }
        };
        let logits = 4 * count(shape.vocab_size).saturating_mul(count(LOGITS_CHUNK).min(tokens));
        let student = Self {
            // candle's store of gradients comes on top of ours.
            parameters: parameters
                .saturating_mul(if config.train.precision == Precision::F32 { 20 } else { 16 })
                .saturating_add(weights + 2 * projections),
            activations: activations.saturating_mul(tokens),
            buffers: shared.saturating_mul(tokens).saturating_add(logits + BASE),
        };
        teacher.map_or(student, |shape| student.with_teacher(shape, tokens, logits))
    }

    /// With a model that reads the same tokens, one layer after the other, and logits of its own.
    fn with_teacher(self, shape: &ModelConfig, tokens: u64, logits: u64) -> Self {
        let parameters = shape.parameters().unwrap_or(u64::MAX / 32).saturating_mul(4);
        // Queries, keys and values of the layer whose relations are learnt.
        let relations = 4 * (count(shape.attention_width()) + 2 * count(shape.kv_width()));
        let activations = (layer(shape, false) + residuals(shape) + relations).saturating_mul(tokens);
        Self {
            parameters: self.parameters.saturating_add(parameters),
            activations: self.activations.saturating_add(activations),
            buffers: self.buffers.saturating_add(room(shape).saturating_mul(tokens)).saturating_add(logits),
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

/// Bytes a token that a layer keeps for its backward, inputs of projections as codes or in f32.
fn layer(shape: &ModelConfig, ternary: bool) -> u64 {
    let (hidden, ffn) = (count(shape.hidden_size), count(shape.intermediate_size));
    let (queries, keys) = (count(shape.attention_width()), count(shape.kv_width()));
    let inputs = (2 * hidden + queries + ffn) * if ternary { 1 } else { 4 };
    4 * (2 * queries + 2 * keys + count(shape.num_attention_heads) + hidden + 2 * ffn) + inputs
}

/// Bytes a token of the inputs of all layers and the output of the last.
fn residuals(shape: &ModelConfig) -> u64 {
    4 * (count(shape.num_hidden_layers) + 1) * count(shape.hidden_size)
}

/// Bytes a token of what layers share.
fn room(shape: &ModelConfig) -> u64 {
    let (hidden, ffn) = (count(shape.hidden_size), count(shape.intermediate_size));
    let (queries, keys) = (count(shape.attention_width()), count(shape.kv_width()));
    4 * (hidden + 3 * queries + 4 * keys + 3 * ffn) + 4 * ffn.max(queries) + 4 * 3 * hidden
}

fn count(value: usize) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::model_config;

    fn estimate(config: &Config, teacher: bool) -> Estimate {
        let shape = model_config(config, 4096, None).unwrap();
        Estimate::new(config, &shape, teacher.then_some(&shape))
    }

    #[test]
    fn a_teacher_counts() {
        let mut config = Config::default();
        config.model.quantization = crate::config::Quantization::None;
        let (alone, taught) = (estimate(&config, false), estimate(&config, true));
        let parameters = model_config(&config, 4096, None).unwrap().parameters().unwrap();
        // The student's: value, gradient and two moments, and a byte a code twice.
        let codes = 2 * model_config(&config, 4096, None).unwrap().ternary_parameters();
        assert_eq!(alone.parameters, 16 * parameters + codes);
        assert_eq!(taught.parameters - alone.parameters, 4 * parameters);
        // Logits of 512 tokens, and at least what the MLP's backward has room for.
        let logits = 4 * 512 * 4096;
        assert!(taught.buffers - alone.buffers > logits && alone.buffers > logits + BASE);
        // One layer of the six, beside the residual stream.
        let more = taught.activations - alone.activations;
        assert!(more > 0 && more < alone.activations / 2, "{more} of {}", alone.activations);
    }

    #[test]
    fn sizes_beyond_memory_do_not_overflow() {
        let mut config = Config::default();
        (config.model.hidden_size, config.model.intermediate_size) = (1 << 16, 1 << 18);
        (config.model.num_hidden_layers, config.train.batch_size) = (1024, 1 << 16);
        config.data.sequence_length = 1 << 20;
        let estimate = estimate(&config, true);
        assert!(estimate.total() > 1 << 60);
    }
}
