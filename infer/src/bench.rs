//! Speed of a model on this machine: tokens a second for a prompt and for new tokens.
//!
//! The shape alone decides the speed, so a model of random weights serves as well as a trained one. What is left out:
//! tokenizer and sampler, and the first pass, which warms caches and threads.

use std::time::Instant;

use bitlinear::packed::{PackError, TernaryWeight};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::model::{F32Data, KvCache, Layer, Logits, Model, ModelError, Projection, Weights};

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A count is zero.
    #[error("{0} is 0; bench options; give at least 1")]
    Zero(&'static str),
    /// The model does not fit the memory.
    #[error(
        "random weights of this shape need {needed} bytes and {available} are free; config; choose a smaller shape"
    )]
    Memory {
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The random weights could not be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchOptions {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// New tokens, one at a time.
    pub gen_tokens: usize,
    /// How often each is measured.
    pub repetitions: usize,
}

/// Median and extremes of several measurements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The middle one (of an even number, the mean of the middle two).
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one measurement; none give zeros.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let (last, half) = (values.len().saturating_sub(1), values.len() / 2);
        Self { median: (at(last / 2) + at(half)) / 2.0, min: at(0), max: at(last) }
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BenchReport {
    /// Prompt tokens a second.
    pub prompt: Spread,
    /// New tokens a second.
    pub generation: Spread,
    /// Bytes of weights that a new token reads: all projections, norms and the head.
    pub bytes_per_token: usize,
}

impl BenchReport {
    /// Weight bytes read a second while generating, in 10^9 (median).
    pub fn gigabytes_per_second(&self) -> f64 {
        self.bytes_per_token as f64 * self.generation.median / 1e9
    }
}

/// Measures a model.
///
/// # Errors
/// A count is zero, or prompt and new tokens do not fit the model's context.
pub fn bench(model: &Model, options: &BenchOptions) -> Result<BenchReport, BenchError> {
    let BenchOptions { prompt_tokens, gen_tokens, repetitions } = *options;
    for (name, count) in
        [("prompt-tokens", prompt_tokens), ("gen-tokens", gen_tokens), ("repetitions", repetitions)]
    {
        if count == 0 {
            return Err(BenchError::Zero(name));
        }
    }
    let vocab_size = model.config().vocab_size;
    // The checks of the cache come before the list of ids, which is as long as asked for.
    let mut cache = KvCache::new(model, prompt_tokens.saturating_add(gen_tokens))?;
    let ids: Vec<u32> = (0..prompt_tokens + gen_tokens).map(|i| (i * 7919 % vocab_size) as u32).collect();
    let (prompt, new) = ids.split_at(prompt_tokens);
    let (mut prompts, mut generations) = (Vec::new(), Vec::new());
    for _ in 0..=repetitions {
        cache.truncate(0);
        let start = Instant::now();
        model.forward(prompt, &mut cache, Logits::Last)?;
        prompts.push(prompt_tokens as f64 / start.elapsed().as_secs_f64());
        let start = Instant::now();
        for id in new {
            model.forward(&[*id], &mut cache, Logits::Last)?;
        }
        generations.push(gen_tokens as f64 / start.elapsed().as_secs_f64());
    }
    Ok(BenchReport {
        prompt: Spread::of(prompts.split_off(1)),
        generation: Spread::of(generations.split_off(1)),
        bytes_per_token: bytes_per_token(model),
    })
}

/// Bytes of weights that one token reads.
pub fn bytes_per_token(model: &Model) -> usize {
    let config = model.config();
    let layers = model.weights().layers.iter().map(|layer| {
        let norms = layer.norms(config).into_iter().filter_map(|(_, norm, _)| norm);
        let norms = norms.map(|norm| size_of_val(&**norm)).sum::<usize>();
        layer.projections().iter().map(|p| p.bytes()).sum::<usize>() + norms
    });
    layers.sum::<usize>() + size_of_val(&*model.weights().norm) + size_of_val(model.head())
}

/// A model of a given shape with random ternary projections, whatever the config says of them, and random dense rest.
///
/// # Errors
/// The config is not valid or asks for more memory than is free (where the system tells).
pub fn random_model(config: &ModelConfig, seed: u64) -> Result<Model, BenchError> {
    let config = ModelConfig { quantized: true, ..config.clone() };
    config.validate().map_err(ModelError::from)?;
    check_memory(&config)?;
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    // A stream of its own for each layer, so that layers can be made in parallel.
    let generator = |stream: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream as u64);
        rng
    };
    let layers: Result<Vec<Layer>, PackError> = (0..config.num_hidden_layers)
        .into_par_iter()
        .map(|index| random_layer(&config, &mut generator(index + 2)))
        .collect();
    let weights = Weights {
        embed_tokens: random_f32(vocab * hidden, &mut generator(0)),
        layers: layers?,
        norm: vec![1.0; hidden].into(),
        lm_head: (!config.tie_word_embeddings).then(|| random_f32(vocab * hidden, &mut generator(1))),
    };
    Ok(Model::new(config, weights)?)
}

fn random_layer(config: &ModelConfig, rng: &mut ChaCha8Rng) -> Result<Layer, PackError> {
    let mut projection = |(_, rows, columns): (&str, usize, usize)| {
        let mut bytes = vec![0u8; rows * columns];
        rng.fill_bytes(&mut bytes);
        let codes: Vec<i8> = bytes.into_iter().map(|byte| (byte % 3) as i8 - 1).collect();
        // Products keep about the size of their inputs: 2/3 of the codes are not zero.
        let scale = (1.5 / columns as f32).sqrt();
        TernaryWeight::pack(&codes, rows, columns, scale).map(Projection::Ternary)
    };
    let [q, k, v, o, gate, up, down] = config.projections();
    let norm = |width: usize| F32Data::from(vec![1.0; width]);
    Ok(Layer {
        input_layernorm: norm(config.hidden_size),
        q_proj: projection(q)?,
        k_proj: projection(k)?,
        v_proj: projection(v)?,
        o_proj: projection(o)?,
        attn_sub_norm: config.sub_norm.then(|| norm(config.hidden_size)),
        post_attention_layernorm: norm(config.hidden_size),
        gate_proj: projection(gate)?,
        up_proj: projection(up)?,
        down_proj: projection(down)?,
        ffn_sub_norm: config.sub_norm.then(|| norm(config.intermediate_size)),
    })
}

fn random_f32(len: usize, rng: &mut ChaCha8Rng) -> F32Data {
    (0..len).map(|_| rng.random::<f32>() - 0.5).collect::<Vec<f32>>().into()
}

/// Refuses a shape whose weights exceed the free memory, where Linux tells what is free.
fn check_memory(config: &ModelConfig) -> Result<(), BenchError> {
    let table = config.vocab_size as u64 * config.hidden_size as u64;
    let tables = if config.tie_word_embeddings { table } else { 2 * table };
    // Packed at two bits; a layer's codes also pass through two bytes each while they are made.
    let total = config.parameters().unwrap_or(u64::MAX);
    let needed =
        (tables * 4).saturating_add(total / 4).saturating_add(total / config.num_hidden_layers as u64 * 2);
    let Ok(info) = std::fs::read_to_string("/proc/meminfo") else { return Ok(()) };
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    match kilobytes.map(|kilobytes| kilobytes.saturating_mul(1024)) {
        Some(available) if needed > available => Err(BenchError::Memory { needed, available }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_measurements() {
        let spread = |values: &[f64]| Spread::of(values.to_vec());
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(spread(&[4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
        assert_eq!(spread(&[5.0]), Spread { median: 5.0, min: 5.0, max: 5.0 });
    }
}
