//! From logits to a token: greedy, or drawn at a temperature from the likeliest tokens.
//!
//! The same seed and logits give the same token on every machine: the generator is ChaCha8, `exp` is that of
//! `bitlinear::math`, and ties are broken by the lower id.

use bitlinear::{math, simd_fn};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What a sampler refuses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The temperature is negative or not a number.
    #[error(
        "temperature {0} is not a number from 0 up; sampling options; 0 is greedy, 1 leaves the model as it is"
    )]
    Temperature(f32),
    /// The share of probability is not in (0, 1].
    #[error("top-p {0} is not above 0 and at most 1; sampling options; 1 keeps every token")]
    TopP(f32),
    /// The model gave no logits, or NaN, or infinity.
    #[error(
        "logit {value} of token {id} is not a number to sample from; model output; the weights or the cache are damaged"
    )]
    NotFinite {
        /// The token.
        id: usize,
        /// Its logit.
        value: f32,
    },
    /// There are no logits.
    #[error("no logits to sample from; model output; ask forward for the last token's")]
    Empty,
}

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Logits are divided by this; 0 takes the likeliest token.
    pub temperature: f32,
    /// Only this many of the likeliest tokens are drawn from; 0 keeps all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability are drawn from; 1 keeps all.
    pub top_p: f32,
    /// Seed of the generator.
    pub seed: u64,
}

impl SamplingOptions {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
}

/// A source of tokens with its generator.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplingOptions,
    rng: ChaCha8Rng,
    /// `(logit, then probability; id)` of the tokens in question, kept for its memory.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// The temperature or top-p is out of range.
    pub fn new(options: SamplingOptions) -> Result<Self, SampleError> {
        if !(options.temperature.is_finite() && options.temperature >= 0.0) {
            return Err(SampleError::Temperature(options.temperature));
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return Err(SampleError::TopP(options.top_p));
        }
        Ok(Self { options, rng: ChaCha8Rng::seed_from_u64(options.seed), candidates: Vec::new() })
    }

    /// Chooses a token: `P(id) ~ e^(logit / temperature)` over those that top-k, then top-p leave.
    ///
    /// # Shapes
    /// `[vocab_size] -> one id`
    ///
    /// # Errors
    /// There are no logits, or one is NaN or infinite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, SampleError> {
        let (best, max) = argmax(logits)?;
        let SamplingOptions { temperature, top_k, top_p, .. } = self.options;
        if temperature == 0.0 || top_k == 1 {
            return Ok(best);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(logits.iter().copied().zip(0..));
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if (1..candidates.len()).contains(&top_k) {
            candidates.select_nth_unstable_by(top_k, order);
            candidates.truncate(top_k);
        }
        if top_p < 1.0 || top_k > 0 {
            candidates.sort_unstable_by(order);
        }
        let mut total = powers(candidates, max, temperature);
        if top_p < 1.0 {
            let (mut sum, limit) = (0.0, total * f64::from(top_p));
            let enough = candidates.iter().position(|(value, _)| {
                sum += f64::from(*value);
                sum >= limit
            });
            if let Some(last) = enough {
                candidates.truncate(last + 1);
                total = sum;
            }
        }
        let mut rest = self.rng.random::<f64>() * total;
        for (value, id) in candidates.iter() {
            rest -= f64::from(*value);
            if rest < 0.0 {
                return Ok(*id);
            }
        }
        // Rounding may leave a rest of nothing.
        Ok(best)
    }
}

simd_fn! {
    /// `value = e^((value - max) / temperature)`, of each candidate; returns their sum.
    fn powers(candidates: &mut [(f32, u32)], max: f32, temperature: f32) -> f64 {
        let mut total = 0.0;
        for (value, _) in candidates {
            *value = math::exp((*value - max) / temperature);
            total += f64::from(*value);
        }
        total
    }
}

/// The likeliest token, the lowest id of equals, and its logit.
///
/// # Errors
/// There are no logits, or one is NaN or infinite.
pub fn argmax(logits: &[f32]) -> Result<(u32, f32), SampleError> {
    let mut best = (0, *logits.first().ok_or(SampleError::Empty)?);
    for (id, &value) in logits.iter().enumerate() {
        if !value.is_finite() {
            return Err(SampleError::NotFinite { id, value });
        }
        if value > best.1 {
            best = (id, value);
        }
    }
    Ok((best.0 as u32, best.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [0.5, 2.0, -1.0, 2.0, 1.0];

    fn draws(options: SamplingOptions, count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(options).unwrap();
        (0..count).map(|_| sampler.sample(&LOGITS).unwrap()).collect()
    }

    fn options(temperature: f32, top_k: usize, top_p: f32) -> SamplingOptions {
        SamplingOptions { temperature, top_k, top_p, seed: 7 }
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        assert_eq!(draws(SamplingOptions::GREEDY, 3), [1, 1, 1]);
        assert_eq!(draws(options(5.0, 1, 1.0), 100), vec![1; 100]);
        assert_eq!(draws(options(5.0, 0, 1e-9), 100), vec![1; 100]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let n = 40_000;
        for temperature in [0.5f32, 1.0, 2.0] {
            let weights = LOGITS.map(|l| f64::from(l / temperature).exp());
            let total: f64 = weights.iter().sum();
            let draws = draws(options(temperature, 0, 1.0), n);
            for (id, weight) in weights.iter().enumerate() {
                let share = draws.iter().filter(|d| **d == id as u32).count() as f64 / n as f64;
                // Four standard deviations of the share.
                let p = weight / total;
                assert!((share - p).abs() < 4.0 * (p * (1.0 - p) / n as f64).sqrt(), "{id}: {share} {p}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_leave_the_likeliest() {
        let seen = |options| draws(options, 3000).into_iter().collect::<std::collections::BTreeSet<u32>>();
        assert_eq!(seen(options(1.0, 2, 1.0)), [1, 3].into());
        assert_eq!(seen(options(1.0, 3, 1.0)), [1, 3, 4].into());
        assert_eq!(seen(options(1.0, 99, 1.0)), [0, 1, 2, 3, 4].into());
        // Probabilities 0.384, 0.384, 0.141, 0.086, ...
        assert_eq!(seen(options(1.0, 0, 0.3)), [1].into());
        assert_eq!(seen(options(1.0, 0, 0.7)), [1, 3].into());
        assert_eq!(seen(options(1.0, 0, 0.8)), [1, 3, 4].into());
        assert_eq!(seen(options(1.0, 3, 0.5)), [1, 3].into());
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let one = draws(options(1.0, 0, 1.0), 50);
        assert_eq!(one, draws(options(1.0, 0, 1.0), 50));
        assert_ne!(one, draws(SamplingOptions { seed: 8, ..options(1.0, 0, 1.0) }, 50));
    }

    #[test]
    fn bad_input_is_an_error() {
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(Sampler::new(options(bad, 0, 1.0)), Err(SampleError::Temperature(_))));
        }
        for bad in [0.0, 1.1, f32::NAN] {
            assert!(matches!(Sampler::new(options(1.0, 0, bad)), Err(SampleError::TopP(_))));
        }
        for options in [SamplingOptions::GREEDY, options(1.0, 2, 0.9)] {
            let mut sampler = Sampler::new(options).unwrap();
            assert_eq!(sampler.sample(&[]), Err(SampleError::Empty));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(matches!(sampler.sample(&[0.0, bad]), Err(SampleError::NotFinite { id: 1, .. })));
            }
        }
    }

    #[test]
    fn extreme_logits_and_temperatures_draw() {
        let mut sampler = Sampler::new(options(1e-30, 0, 1.0)).unwrap();
        assert_eq!(sampler.sample(&[f32::MIN, 3.0, f32::MAX]), Ok(2));
        let mut sampler = Sampler::new(options(f32::MAX, 0, 0.5)).unwrap();
        assert!(sampler.sample(&[f32::MIN, 3.0, f32::MAX]).is_ok());
    }
}
