//! How well a model predicts a text: log-probabilities of its tokens, and perplexity.

use bitlinear::{math, simd_fn};
use rayon::prelude::*;

use crate::model::{KvCache, KvPrecision, Model, ModelError};

/// Tokens whose logits are in memory at once.
const ROWS: usize = 16;
/// Probabilities that are added up in f32, before the sum goes on in f64.
const SUM_CHUNK: usize = 1024;

/// Why a text cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// Nothing to predict.
    #[error("{0} tokens have no next token to predict; text; give at least 2")]
    TooShort(usize),
    /// A window of no tokens.
    #[error("a context of 0 tokens; evaluation; give at least 1")]
    ZeroContext,
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// How well a text was predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Mean `-ln P(token | tokens before it in its window)`, nats a token.
    pub loss: f64,
    /// Length of a window, in tokens.
    pub context: usize,
}

impl Evaluation {
    /// `e^loss`
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }

    /// `loss / ln 2 * tokens / bytes`, with the tokens and bytes of the text.
    pub fn bits_per_byte(&self, tokens: usize, bytes: usize) -> f64 {
        self.loss / std::f64::consts::LN_2 * tokens as f64 / bytes as f64
    }
}

/// Log-probability of every token but the first, given those before it: entry `i` is `ln P(ids[i + 1] | ids[..= i])`.
///
/// # Shapes
/// `[tokens] -> [tokens - 1]`; fewer than two tokens give nothing.
///
/// # Errors
/// An id is not in the vocabulary, or there are more than `max_position_embeddings + 1`.
pub fn score(model: &Model, ids: &[u32]) -> Result<Vec<f32>, ModelError> {
    score_with(model, ids, KvPrecision::F32)
}

fn score_with(model: &Model, ids: &[u32], kv: KvPrecision) -> Result<Vec<f32>, ModelError> {
    let Some((last, inputs)) = ids.split_last() else { return Ok(Vec::new()) };
    let vocab_size = model.config().vocab_size;
    if *last as usize >= vocab_size {
        return Err(ModelError::Token { id: *last, position: inputs.len(), vocab_size });
    }
    let mut cache = KvCache::with_precision(model, inputs.len(), kv)?;
    let hidden = model.hidden(inputs, &mut cache)?;
    let mut scores = vec![0.0; inputs.len()];
    let tiles = hidden.chunks(ROWS * model.config().hidden_size).zip(ids[1..].chunks(ROWS));
    for ((hidden, targets), scores) in tiles.zip(scores.chunks_mut(ROWS)) {
        let logits = model.logits(hidden)?;
        let rows = logits.par_chunks_exact(vocab_size).zip(targets);
        rows.zip(scores)
            .for_each(|((row, target), score)| *score = log_probability(row, *target as usize) as f32);
    }
    Ok(scores)
}

simd_fn! {
    /// `logit[target] - ln Σ e^logit`
    fn log_probability(logits: &[f32], target: usize) -> f64 {
        let max = logits.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
        let mut total = 0f64;
        let mut powers = [0f32; SUM_CHUNK];
        for chunk in logits.chunks(SUM_CHUNK) {
            let powers = &mut powers[..chunk.len()];
            for (power, logit) in powers.iter_mut().zip(chunk) {
                *power = math::exp(logit - max);
            }
            total += f64::from(math::sum(powers));
        }
        f64::from(logits[target] - max) - total.ln()
    }
}

/// Mean loss over a text in windows of `context` tokens: window `i` predicts tokens `i * T + 1 ..= i * T + T` from
/// those before them, from `i * T` on.
///
/// `T` is the smaller of `context` and `max_position_embeddings`. What does not fill a window at the end is left out;
/// a text that fills none is one window. The sum runs in f64, window after window.
///
/// # Errors
/// There are fewer than two tokens, the context is 0, or an id is not in the vocabulary.
pub fn perplexity(
    model: &Model,
    ids: &[u32],
    context: usize,
    kv: KvPrecision,
) -> Result<Evaluation, EvalError> {
    if ids.len() < 2 {
        return Err(EvalError::TooShort(ids.len()));
    }
    if context == 0 {
        return Err(EvalError::ZeroContext);
    }
    let context = context.min(model.config().max_position_embeddings).min(ids.len() - 1);
    let windows = (ids.len() - 1) / context;
    let mut sum = 0f64;
    for window in 0..windows {
        let scores = score_with(model, &ids[window * context..][..context + 1], kv)?;
        sum -= scores.iter().map(|s| f64::from(*s)).sum::<f64>();
    }
    let tokens = windows * context;
    Ok(Evaluation { tokens, loss: sum / tokens as f64, context })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_softmax() {
        let logits: Vec<f32> = (0..3000).map(|i| (i as f32 * 0.7).sin() * 9.0 + 100.0).collect();
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for target in [0, 17, 2999] {
            let truth = f64::from(logits[target]) - total.ln();
            assert!((log_probability(&logits, target) - truth).abs() < 1e-5);
        }
        assert!(log_probability(&[0.0, f32::NAN], 0).is_nan());
        assert_eq!(log_probability(&[3.0], 0), 0.0);
    }

    #[test]
    fn bits_per_byte_of_a_fair_coin() {
        let evaluation = Evaluation { tokens: 100, loss: std::f64::consts::LN_2, context: 10 };
        assert_eq!(evaluation.bits_per_byte(100, 100), 1.0);
        assert_eq!(evaluation.bits_per_byte(50, 100), 0.5);
        assert!((evaluation.perplexity() - 2.0).abs() < 1e-12);
    }
}
