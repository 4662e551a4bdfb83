//! The lines of `metrics.jsonl`, and what is measured of the process.
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
    /// Mean loss over the step's micro-batches, nats a token.
    pub loss: f64,
    /// The same in bits a byte of text, by the mean length of a token.
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

/// The largest amount of memory that this process has had in use, in bytes, where Linux tells.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status");
    let status = status.as_deref().unwrap_or_default(); // not there on other systems
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().unwrap_or(0);
    Some(kib * 1024)
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

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_the_peak_memory() {
        let before = peak_memory().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|b| u64::from(*b)).sum::<u64>() > 0);
        assert!(peak_memory().unwrap() >= before.max(64 << 20));
    }
}
