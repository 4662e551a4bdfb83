//! What learns: parameters, their optimizer, and the step that brings them on.
use std::time::{Duration, Instant};

use bitlinear::packed::PackError;
use bitlinear::training::ProjectionError;
use infer::config::ModelConfig;

use super::TrainError;
use crate::config::{Config, Precision, Recompute};
use crate::data::Batch;
use crate::decoder::{Decoder, DecoderTimes, Lesson, StepLoss, StepWeights};
use crate::model::Model;
use crate::optimizer::{AdamW, AdamWConfig, Gradients};
use crate::parameters::Parameters;
use crate::schedule::{self, Shares};
use crate::teacher::Teacher;

/// A model with what one step needs besides data.
pub struct Learner {
    /// The model as it is evaluated and exported.
    pub model: Model,
    /// What is trained.
    pub parameters: Parameters,
    /// Its moments.
    pub optimizer: AdamW,
    gradients: Gradients,
    /// The fast step; without it steps go through candle's graph, in f32.
    decoder: Option<Decoder>,
    teacher: Option<Teacher>,
    times: StepTimes,
}

/// What a step came to.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Its losses, over all micro-batches.
    pub loss: StepLoss,
    /// Norm of the gradient before clipping; NaN without a finite loss.
    pub grad_norm: f64,
    /// Whether loss and gradient were finite and so parameters changed.
    pub updated: bool,
}

/// Where the time of a step goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepTimes {
    /// Latent weights ternarized and packed.
    pub weights: Duration,
    /// Forward, head and backward; of candle's graph the forward includes the head.
    pub decoder: DecoderTimes,
    /// Gradient norm, clipping and update.
    pub optimizer: Duration,
}

/// The optimizer's settings that stay the same over a run.
pub(super) fn adamw(config: &Config) -> AdamWConfig {
    let optimizer = &config.optimizer;
    AdamWConfig { beta1: optimizer.beta1, beta2: optimizer.beta2, eps: optimizer.eps }
}

impl Learner {
    /// A model of this shape that goes on from `parameters` and `optimizer`.
    pub fn new(
        config: &Config,
        shape: ModelConfig,
        parameters: Parameters,
        optimizer: AdamW,
        teacher: Option<Teacher>,
    ) -> Self {
        let length = config.data.sequence_length;
        let decoder = (config.train.precision == Precision::Fast)
            .then(|| Decoder::new(shape.clone(), length, config.train.recompute == Recompute::Block));
        let gradients = Gradients::new(&parameters);
        let model = Model::new(shape, length);
        Self { model, parameters, optimizer, gradients, decoder, teacher, times: StepTimes::default() }
    }

    /// A fresh model of this shape.
    ///
    /// # Errors
    /// candle cannot make a tensor.
    pub fn fresh(config: &Config, shape: ModelConfig) -> Result<Self, TrainError> {
        let parameters = Parameters::init(&shape, config.model.initializer_range, config.run.seed)?;
        let optimizer = AdamW::new(adamw(config), &parameters);
        Ok(Self::new(config, shape, parameters, optimizer, None))
    }

    /// Whether there is a teacher.
    pub fn teaches(&self) -> bool {
        self.teacher.is_some()
    }

    /// Where the time of the last step went.
    pub fn times(&self) -> StepTimes {
        self.times
    }

    /// Step `at`, counted from 0, on these micro-batches; parameters stay as they are if loss or gradient is not finite.
    ///
    /// # Errors
    /// At step 0 a parameter gets no gradient; no kernel can run.
    pub fn step(&mut self, config: &Config, at: u64, batches: &[Batch]) -> Result<Step, TrainError> {
        self.times = StepTimes::default();
        let shares = schedule::shares(config, at);
        let loss = self.accumulate(config, shares, batches)?;
        if !loss.total.is_finite() {
            return Ok(Step { loss, grad_norm: f64::NAN, updated: false });
        }
        let start = Instant::now();
        let norms = self.gradients.norms();
        // A student that still computes what its teacher does has nothing to learn yet, and relations alone teach only the
        // layers that they are of.
        let distill = &config.distill;
        let head_learns = distill.cross_entropy > 0.0 || distill.logits > 0.0;
        if at == 0 && (self.teacher.is_none() || shares.quantization > 0.0 && head_learns) {
            require_live(&norms, shares)?;
        }
        let grad_norm = norms.iter().map(|(_, norm)| norm * norm).sum::<f64>().sqrt();
        if !grad_norm.is_finite() {
            return Ok(Step { loss, grad_norm, updated: false });
        }
        let clip = config.train.gradient_clip;
        let factor = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        let (rate, decay) = (schedule::learning_rate(config, at), schedule::weight_decay(config, at));
        self.optimizer.update(&self.parameters, &self.gradients, factor, rate, decay)?;
        self.times.optimizer = start.elapsed();
        Ok(Step { loss, grad_norm, updated: true })
    }

    /// The losses of a step's micro-batches, and their gradients; these are of no use unless the loss is finite.
    fn accumulate(
        &mut self,
        config: &Config,
        shares: Shares,
        batches: &[Batch],
    ) -> Result<StepLoss, TrainError> {
        let Self { model, parameters, gradients, decoder, teacher, times, .. } = self;
        let share = 1.0 / batches.len() as f64;
        gradients.clear();
        let values = parameters.values()?;
        let start = Instant::now();
        let weights = match decoder {
            Some(_) => match StepWeights::new(model.config(), &values, shares) {
                // Weights that are not finite make no finite loss.
                Err(ProjectionError::Pack(PackError::Scale(_))) => {
                    return Ok(StepLoss { total: f64::NAN, ..StepLoss::default() });
                }
                weights => Some(weights?),
            },
            None => None,
        };
        times.weights = start.elapsed();
        let mut loss = StepLoss::default();
        for batch in batches {
            loss += match (decoder.as_mut(), &weights) {
                (Some(decoder), Some(weights)) => {
                    if let Some(teacher) = teacher {
                        teacher.read(batch)?;
                    }
                    let teacher = teacher.as_ref();
                    let values = teacher.map(Teacher::values).transpose()?;
                    let lesson = match (teacher, &values) {
                        (Some(teacher), Some(values)) => teacher.lesson(&config.distill, values),
                        _ => Lesson::TEXT,
                    };
                    decoder.step(weights, batch, &lesson, share, gradients)?
                }
                _ => {
                    let start = Instant::now();
                    let batch_loss = model.loss(parameters, batch, shares)?;
                    let value = f64::from(batch_loss.to_scalar::<f32>()?) * share;
                    times.decoder.forward += start.elapsed();
                    let start = Instant::now();
                    if value.is_finite() {
                        gradients.add(parameters, (batch_loss * share)?.backward()?)?;
                    }
                    times.decoder.backward += start.elapsed();
                    StepLoss { total: value, cross_entropy: value, ..StepLoss::default() }
                }
            };
        }
        if let Some(decoder) = decoder {
            times.decoder = decoder.take_times();
        }
        Ok(loss)
    }
}

/// Each trainable variable must have a finite gradient that is not zero: a cut graph is no error in itself. Of the gains of
/// sub-norms only as much as is blended in counts.
fn require_live(norms: &[(&str, f64)], shares: Shares) -> Result<(), TrainError> {
    let waits = |name: &str| shares.sub_norm == 0.0 && name.ends_with("_sub_norm.weight");
    match norms.iter().find(|(name, norm)| !(norm.is_finite() && (*norm > 0.0 || waits(name)))) {
        Some((name, norm)) => Err(TrainError::DeadGradient { name: (*name).to_owned(), norm: *norm }),
        None => Ok(()),
    }
}
