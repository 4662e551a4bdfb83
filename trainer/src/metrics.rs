//! The lines of `metrics.jsonl`.
use std::collections::BTreeMap;

use serde::Serialize;

use crate::train::CodeShares;

/// One line of the metrics.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record<'a> {
    /// A training step.
    Train(TrainRecord),
    /// An evaluation.
    Eval(EvalRecord<'a>),
    /// A step without a finite loss or gradient: parameters stayed as they were.
    Skipped {
        /// Steps done.
        step: u64,
        /// The loss as text, since JSON has no NaN.
        loss: String,
        /// The gradient norm as text.
        grad_norm: String,
    },
}

/// A training step.
#[derive(Debug, Serialize)]
pub struct TrainRecord {
    /// Steps done.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Passes over the training data.
    pub epoch: f64,
    /// Mean cross-entropy over the step's micro-batches, nats a token.
    pub loss: f64,
    /// Mean divergence from the teacher's distributions, nats a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub divergence: Option<f64>,
    /// Mean divergence from the teacher's relations, nats a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relations: Option<f64>,
    /// The loss in bits a byte of text, by the mean length of a token.
    pub bits_per_byte: Option<f64>,
    /// Learning rate.
    pub learning_rate: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Share of quantization.
    pub lambda: f32,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Steps skipped so far.
    pub skipped: u64,
    /// Tokens a second in this step. Differs from run to run.
    pub tokens_per_second: f64,
    /// Peak memory of the process, bytes, where the system tells. Differs from run to run.
    pub peak_memory_bytes: Option<u64>,
}

/// An evaluation, fully quantized.
#[derive(Debug, Serialize)]
pub struct EvalRecord<'a> {
    /// Steps done.
    pub step: u64,
    /// Mean validation loss, nats a token.
    pub loss: f64,
    /// `e^loss`
    pub perplexity: f64,
    /// In bits a byte of text, by the mean length of a token.
    pub bits_per_byte: Option<f64>,
    /// Validation tokens scored.
    pub tokens: u64,
    /// Of each ternary projection.
    pub layers: BTreeMap<&'a str, CodeShares>,
}

/// Bits a byte for a loss in nats a token, where `bytes` of text make `tokens` tokens.
pub fn bits_per_byte(loss: f64, tokens: u64, bytes: Option<u64>) -> Option<f64> {
    let bytes = bytes.filter(|bytes| *bytes > 0)?;
    Some(loss / std::f64::consts::LN_2 * tokens as f64 / bytes as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uniform_byte_is_eight_bits() {
        assert_eq!(bits_per_byte(256f64.ln(), 100, Some(100)), Some(8.0));
        assert_eq!(bits_per_byte(256f64.ln(), 100, Some(200)), Some(4.0));
        assert_eq!(bits_per_byte(1.0, 1, None), None);
    }
}
