//! Speed of a model on this machine: tokens a second for a prompt and for new tokens, beside what the memory allows.
//!
//! The shape alone decides the speed, so a model of random weights serves as well as a trained one. What is left out:
//! tokenizer and sampler, and the first pass, which warms caches and threads.

use std::time::Instant;

use bitlinear::packed::{Layout, Line, PackError, TernaryWeight, zeroed};
use bitlinear::{pool, simd_fn};
use half::bf16;

use crate::config::ModelConfig;
use crate::model::{
    F32Data, KvCache, KvPrecision, Layer, Logits, Model, ModelError, Part, Parts, Projection, Table, Weights,
};

/// Bytes that are read to measure the memory: more than any cache holds of them.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// Lines that a task of that measurement reads.
const BANDWIDTH_TASK: usize = 1 << 14;

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A count is zero.
    #[error("{0} is 0; bench options; give at least 1")]
    Zero(&'static str),
    /// The model does not fit the memory.
    #[error(
        "random weights of this shape need {needed} bytes and {available} are free; config; choose a smaller shape, or 1.6 bits"
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
    /// How keys and values are stored.
    pub kv: KvPrecision,
}

impl BenchOptions {
    /// Whether they measure anything.
    ///
    /// # Errors
    /// A count is zero.
    pub fn check(&self) -> Result<(), BenchError> {
        let Self { prompt_tokens, gen_tokens, repetitions, .. } = *self;
        let counts =
            [("prompt-tokens", prompt_tokens), ("gen-tokens", gen_tokens), ("repetitions", repetitions)];
        counts
            .into_iter()
            .try_for_each(|(name, count)| if count == 0 { Err(BenchError::Zero(name)) } else { Ok(()) })
    }
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
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let (last, half) = (values.len().saturating_sub(1), values.len() / 2);
        Self { median: (at(last / 2) + at(half)) / 2.0, min: at(0), max: at(last) }
    }
}

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchReport {
    /// Prompt tokens a second.
    pub prompt: Spread,
    /// New tokens a second.
    pub generation: Spread,
    /// Bytes of weights that a new token reads: all projections, norms and the head.
    pub bytes_per_token: usize,
    /// Multiplications and additions of a prompt token in the projections.
    pub operations_per_token: u64,
    /// What the threads together read from memory, in 10^9 bytes a second (median, measured between the passes).
    pub read_bandwidth: f64,
    /// Seconds a prompt token by part of the pass (mean of all repetitions).
    pub prompt_parts: Vec<(Part, f64)>,
    /// Seconds a new token by part of the pass.
    pub generation_parts: Vec<(Part, f64)>,
}

impl BenchReport {
    /// Weight bytes read a second while generating, in 10^9 (median).
    pub fn gigabytes_per_second(&self) -> f64 {
        self.bytes_per_token as f64 * self.generation.median / 1e9
    }

    /// The share of the measured read bandwidth that this is; above 1 where weights stay in the cache.
    pub fn bandwidth_share(&self) -> f64 {
        self.gigabytes_per_second() / self.read_bandwidth
    }

    /// Operations of the projections a second while reading a prompt, in 10^9 (median).
    pub fn gigaoperations_per_second(&self) -> f64 {
        self.operations_per_token as f64 * self.prompt.median / 1e9
    }

    /// New tokens a second on a machine that reads `bandwidth` 10^9 bytes a second, used to the same share as this one's.
    pub fn generation_at(&self, bandwidth: f64) -> f64 {
        self.bandwidth_share() * bandwidth * 1e9 / self.bytes_per_token as f64
    }
}

/// Measures a model.
///
/// # Errors
/// A count is zero, or prompt and new tokens do not fit the model's context.
pub fn bench(model: &Model, options: &BenchOptions) -> Result<BenchReport, BenchError> {
    let BenchOptions { prompt_tokens, gen_tokens, repetitions, kv } = *options;
    options.check()?;
    let vocab_size = model.config().vocab_size;
    // The checks of the cache come before the list of ids, which is as long as asked for.
    let context = prompt_tokens.saturating_add(gen_tokens);
    let mut cache = KvCache::with_precision(model, context, kv)?;
    let ids: Vec<u32> = (0..context).map(|i| (i * 7919 % vocab_size) as u32).collect();
    let (prompt, new) = ids.split_at(prompt_tokens);
    let memory = zeroed(BANDWIDTH_BYTES / size_of::<Line>());
    let (mut prompts, mut generations, mut bandwidths) = (Vec::new(), Vec::new(), Vec::new());
    let (mut prompt_times, mut generation_times) = (vec![0.0; Part::ALL.len()], vec![0.0; Part::ALL.len()]);
    for repetition in 0..=repetitions {
        cache.truncate(0);
        cache.start_clock();
        let start = Instant::now();
        model.forward(prompt, &mut cache, Logits::Last)?;
        let prompt_seconds = start.elapsed().as_secs_f64();
        let prompt_parts = cache.parts().cloned().unwrap_or_default();
        cache.start_clock();
        let start = Instant::now();
        for id in new {
            model.forward(&[*id], &mut cache, Logits::Last)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let bandwidth = read_bandwidth(&memory);
        if repetition > 0 {
            prompts.push(prompt_tokens as f64 / prompt_seconds);
            generations.push(gen_tokens as f64 / seconds);
            bandwidths.push(bandwidth);
            add_times(&mut prompt_times, &prompt_parts, prompt_tokens * repetitions);
            add_times(
                &mut generation_times,
                &cache.parts().cloned().unwrap_or_default(),
                gen_tokens * repetitions,
            );
        }
    }
    let named = |times: Vec<f64>| Part::ALL.into_iter().zip(times).collect();
    Ok(BenchReport {
        prompt: Spread::of(prompts),
        generation: Spread::of(generations),
        bytes_per_token: model.bytes_per_token(),
        operations_per_token: 2 * model.config().ternary_parameters(),
        read_bandwidth: Spread::of(bandwidths).median,
        prompt_parts: named(prompt_times),
        generation_parts: named(generation_times),
    })
}

fn add_times(times: &mut [f64], parts: &Parts, tokens: usize) {
    for (time, part) in times.iter_mut().zip(Part::ALL) {
        *time += parts.time(part).as_secs_f64() / tokens as f64;
    }
}

/// What all threads together read of some memory, in 10^9 bytes a second.
fn read_bandwidth(memory: &[Line]) -> f64 {
    let start = Instant::now();
    pool::run(memory.len().div_ceil(BANDWIDTH_TASK), &|task| {
        let first = task * BANDWIDTH_TASK;
        std::hint::black_box(read_all(&memory[first..memory.len().min(first + BANDWIDTH_TASK)]));
    });
    size_of_val(memory) as f64 / start.elapsed().as_secs_f64() / 1e9
}

simd_fn! {
    /// A value that depends on every byte.
    fn read_all(lines: &[Line]) -> Line {
        let mut all = Line::ZERO;
        for line in lines {
            for (all, byte) in all.0.iter_mut().zip(line.0) {
                *all |= byte;
            }
        }
        all
    }
}

/// The most memory that this process has used so far, in bytes, where Linux tells.
pub fn peak_memory() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Memory that programs can still have without swapping, in bytes, where Linux tells.
pub fn available_memory() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// The value of a line `KEY  123 kB` of one of Linux's reports, in bytes.
fn kilobytes(report: &str, key: &str) -> Option<u64> {
    let line = report.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A model of a given shape with random ternary projections, whatever the config says of them, and random dense rest
/// (the embedding in bf16).
///
/// # Errors
/// The config is not valid or asks for more memory than is free (where the system tells).
pub fn random_model(config: &ModelConfig, seed: u64, layout: Layout) -> Result<Model, BenchError> {
    let config = ModelConfig { quantized: true, modules_to_not_convert: Vec::new(), ..config.clone() };
    config.validate().map_err(ModelError::from)?;
    check_memory(&config, layout)?;
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let layers = (0..config.num_hidden_layers)
        .map(|index| random_layer(&config, seed ^ (index as u64 + 1) << 40, layout));
    let layers: Result<Vec<Layer>, PackError> = layers.collect();
    let weights = Weights {
        layers: layers?,
        embed_tokens: random_table(vocab * hidden, seed),
        norm: vec![1.0; hidden].into(),
        lm_head: (!config.tie_word_embeddings).then(|| random_table(vocab * hidden, seed ^ 1)),
    };
    Ok(Model::new(config, weights)?)
}

fn random_layer(config: &ModelConfig, seed: u64, layout: Layout) -> Result<Layer, PackError> {
    let projection = |index: u64, (_, rows, columns): (&str, usize, usize)| {
        // Products keep about the size of their inputs: 2/3 of the codes are not zero.
        let scale = (1.5 / columns as f32).sqrt();
        let fill = |row: usize, codes: &mut [u8]| {
            for (at, codes) in codes.chunks_mut(8).enumerate() {
                let bits = random_bits(seed ^ index << 60 ^ (row * columns / 8 + at) as u64);
                for (code, byte) in codes.iter_mut().zip(bits.to_le_bytes()) {
                    *code = ((u16::from(byte) * 3) >> 8) as u8;
                }
            }
        };
        TernaryWeight::from_rows(rows, columns, scale, layout, fill).map(Projection::Ternary)
    };
    let [q, k, v, o, gate, up, down] = config.projections();
    let norm = |width: usize| F32Data::from(vec![1.0; width]);
    Ok(Layer {
        input_layernorm: norm(config.hidden_size),
        qkv_bias: config.qkv_bias.then(|| [q, k, v].map(|(_, rows, _)| vec![0.125; rows].into())),
        qk_norm: config.qk_norm.then(|| [norm(config.head_dim), norm(config.head_dim)]),
        q_proj: projection(1, q)?,
        k_proj: projection(2, k)?,
        v_proj: projection(3, v)?,
        o_proj: projection(4, o)?,
        attn_sub_norm: config.sub_norm.then(|| norm(config.hidden_size)),
        post_attention_layernorm: norm(config.hidden_size),
        gate_proj: projection(5, gate)?,
        up_proj: projection(6, up)?,
        down_proj: projection(7, down)?,
        ffn_sub_norm: config.sub_norm.then(|| norm(config.intermediate_size)),
    })
}

/// Values between -1/2 and 1/2.
fn random_table(len: usize, seed: u64) -> Table {
    let mut values = vec![bf16::ZERO; len];
    pool::for_chunks(&mut values, 1 << 16, |chunk, values| {
        for (at, value) in values.iter_mut().enumerate() {
            let bits = random_bits(seed ^ ((chunk << 16) + at) as u64);
            *value = bf16::from_f32((bits >> 40) as f32 / (1 << 24) as f32 - 0.5);
        }
    });
    Table::Bf16(values.into())
}

/// The mixing step of SplitMix64: random enough for weights that nobody trained, and fast enough for 10^11 of them.
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
fn random_bits(index: u64) -> u64 {
    let mut z = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Refuses a shape whose weights exceed the free memory, where Linux tells what is free.
fn check_memory(config: &ModelConfig, layout: Layout) -> Result<(), BenchError> {
    let lines = |(_, out, columns): &(&str, usize, usize)| {
        (out.div_ceil(16) as u64).saturating_mul(layout.lines(*columns) as u64)
    };
    let layer = config.projections().iter().map(lines).fold(0, u64::saturating_add).saturating_mul(64);
    let table = config.vocab_size as u64 * config.hidden_size as u64 * 2;
    let tables = if config.tie_word_embeddings { table } else { 2 * table };
    let needed = layer.saturating_mul(config.num_hidden_layers as u64).saturating_add(tables);
    match available_memory() {
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

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_tells_the_peak_memory() {
        let before = peak_memory().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|b| u64::from(*b)).sum::<u64>() > 0);
        assert!(peak_memory().unwrap() >= before.max(64 << 20));
        assert!(available_memory().unwrap() > 0);
    }
}
