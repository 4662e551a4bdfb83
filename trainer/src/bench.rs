//! Speed of training on this machine: tokens a second, where a step's time goes, and how much of it the products would take
//! at the best rate that the machine gives them.
//!
//! The shape alone decides the speed, so fresh parameters and random tokens serve as well as real ones.
use std::time::{Duration, Instant};

use bitlinear::kernels::{Kernel, KernelError, QuantizedRows, matmul_with};
use bitlinear::packed::{PackError, TernaryWeight};
use bitlinear::products::{Matrix, Precision as Dense, multiply};
use infer::bench::{Spread, peak_memory};
use infer::config::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::{Config, Precision, QuantizationWarmup};
use crate::data::{DataError, Sampler, Tokens, Windows};
use crate::train::{Learner, StepTimes, TrainError};

/// Steps before the first that counts: they fault memory in.
const WARM_UP: u64 = 2;
/// Rows of the product that the machine's peak is measured with, and its two other sides.
const PEAK: (usize, usize) = (512, 1024);
/// How long each of the two is measured.
const PEAK_TIME: Duration = Duration::from_millis(300);

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Nothing to measure.
    #[error("0 repetitions; bench options; give at least 1")]
    Repetitions,
    /// The random tokens make no windows.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A step failed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// No kernel can run.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The peak's weight could not be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct BenchReport {
    /// Tokens of a step.
    pub tokens: usize,
    /// Tokens a second.
    pub tokens_per_second: Spread,
    /// Median seconds of a step's parts, by name.
    pub parts: Vec<(&'static str, f64)>,
    /// Operations of a step (a product and a sum are two) in ternary projections, and in all other products.
    pub operations: [u64; 2],
    /// The machine's best rate for both kinds, in 10^9 a second: int8 times ternary, and dense.
    pub peak: [f64; 2],
    /// Largest memory of the process, bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

impl BenchReport {
    /// Share of the median step that its products would take at the machine's best rate.
    pub fn product_share(&self) -> f64 {
        let seconds: f64 =
            self.operations.iter().zip(self.peak).map(|(count, rate)| *count as f64 / (rate * 1e9)).sum();
        seconds * self.tokens_per_second.median / self.tokens as f64
    }
}

/// Trains a fresh model of this shape for some steps.
///
/// # Errors
/// There is nothing to measure, or a step fails.
pub fn run(config: &Config, shape: &ModelConfig, repetitions: usize) -> Result<BenchReport, BenchError> {
    if repetitions == 0 {
        return Err(BenchError::Repetitions);
    }
    // The step that most of a run is made of: with the share of quantization at its end.
    let mut config = config.clone();
    config.quantization.warmup = QuantizationWarmup::None;
    let config = &config;
    let windows = random_windows(config, shape.vocab_size)?;
    let mut learner = Learner::fresh(config, shape.clone())?;
    let mut sampler = Sampler::new(config.run.seed, 0);
    let tokens = config.tokens_per_step();
    let (mut rates, mut times, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for at in 0..WARM_UP + repetitions as u64 {
        let start = Instant::now();
        let micro_batches = 0..config.train.gradient_accumulation;
        let batches: Vec<_> = micro_batches
            .map(|_| windows.whole_batch(&sampler.next_batch(windows.count(), config.train.batch_size)))
            .collect();
        let gathered = start.elapsed();
        learner.step(config, at, &batches)?;
        if at >= WARM_UP {
            data.push(gathered.as_secs_f64());
            rates.push(tokens as f64 / start.elapsed().as_secs_f64());
            times.push(learner.times());
        }
    }
    let peak_memory = peak_memory();
    Ok(BenchReport {
        tokens,
        tokens_per_second: Spread::of(rates),
        parts: parts(data, &times),
        operations: operations(config, shape),
        peak: [ternary_peak()?, dense_peak(config)],
        peak_memory,
    })
}

/// Windows for a few steps, of random tokens.
fn random_windows(config: &Config, vocab_size: usize) -> Result<Windows, DataError> {
    let mut rng = ChaCha8Rng::seed_from_u64(config.run.seed);
    let length = config.data.sequence_length;
    let count = 4 * config.train.batch_size * length + 1;
    let ids: Vec<u32> = (0..count).map(|_| rng.random_range(0..vocab_size as u32)).collect();
    Windows::new(Tokens::from_ids(&ids), length, "training")
}

/// Medians of each part.
fn parts(data: Vec<f64>, times: &[StepTimes]) -> Vec<(&'static str, f64)> {
    let median = |part: fn(&StepTimes) -> Duration| {
        Spread::of(times.iter().map(|times| part(times).as_secs_f64()).collect()).median
    };
    vec![
        ("data", Spread::of(data).median),
        ("weights", median(|times| times.weights)),
        ("forward", median(|times| times.decoder.forward)),
        ("head", median(|times| times.decoder.head)),
        ("backward", median(|times| times.decoder.backward)),
        ("optimizer", median(|times| times.optimizer)),
    ]
}

/// Operations of a step in ternary projections, and in all other products: each is computed once forward and twice back;
/// attention takes two products forward and five back (the scores once more, and the gradients of weights, queries, keys and
/// values). What is recomputed does not count.
fn operations(config: &Config, shape: &ModelConfig) -> [u64; 2] {
    let tokens = config.tokens_per_step() as u64;
    let projections = 6 * shape.ternary_parameters() * tokens;
    let head = 6 * (shape.vocab_size * shape.hidden_size) as u64 * tokens;
    let keys = config.data.sequence_length as u64 / 2;
    let queries = (shape.num_attention_heads * shape.head_dim) as u64;
    let attention = 14 * tokens * keys * queries * shape.num_hidden_layers as u64;
    match shape.quantized {
        true => [projections, head + attention],
        false => [0, projections + head + attention],
    }
}

/// Best rate of a product of int8 rows with ternary weights, 10^9 operations a second.
fn ternary_peak() -> Result<f64, BenchError> {
    let (rows, side) = PEAK;
    let codes: Vec<i8> = (0..side * side).map(|at| (at % 3) as i8 - 1).collect();
    let weight = TernaryWeight::pack(&codes, side, side, 1.0)?;
    let values: Vec<f32> = (0..rows * side).map(|at| (at % 255) as f32 - 127.0).collect();
    let x = QuantizedRows::quantize(&values, side);
    let mut out = vec![0f32; rows * side];
    let kernel = Kernel::active()?;
    let mut failed = None;
    let rate = best_rate(|| failed = failed.take().or(matmul_with(kernel, &x, &weight, &mut out).err()));
    failed.map_or(Ok(rate), |error| Err(error.into()))
}

/// Best rate of a dense product in a step's precision.
fn dense_peak(config: &Config) -> f64 {
    let (rows, side) = PEAK;
    let precision = match config.train.precision {
        Precision::Fast => Dense::Bf16,
        Precision::F32 => Dense::F32,
    };
    let (a, b) = (vec![0.5f32; rows * side], vec![0.25f32; side * side]);
    let mut out = vec![0f32; rows * side];
    best_rate(|| multiply(precision, Matrix::new(&a, side), Matrix::new(&b, side).t(), 0.0, &mut out))
}

fn best_rate(mut product: impl FnMut()) -> f64 {
    let (rows, side) = PEAK;
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < PEAK_TIME {
        let start = Instant::now();
        product();
        best = best.min(start.elapsed().as_secs_f64());
    }
    (2 * rows * side * side) as f64 / best / 1e9
}
