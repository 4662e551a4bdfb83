//! What learns: parameters, their optimizer, and the step that brings them on.
use std::time::{Duration, Instant};

use bitlinear::packed::PackError;
use bitlinear::training::ProjectionError;
use infer::config::ModelConfig;

use super::TrainError;
use crate::config::{Config, Precision, Recompute};
use crate::decoder::{Decoder, DecoderTimes, StepWeights};
use crate::model::Model;
use crate::optimizer::{AdamW, AdamWConfig, Gradients};
use crate::parameters::Parameters;
use crate::schedule;

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
    times: StepTimes,
}

/// What a step came to.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Mean loss over its micro-batches, nats a token.
    pub loss: f64,
    /// Norm of the gradient before clipping; NaN without a finite loss.
    pub grad_norm: f64,
    /// Whether loss and gradient were finite and so parameters changed.
    pub updated: bool,
}

/// Where the time of a step goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepTimes {
    /// Batches out of the data.
    pub data: Duration,
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
    pub fn new(config: &Config, shape: ModelConfig, parameters: Parameters, optimizer: AdamW) -> Self {
        let length = config.data.sequence_length;
        let decoder = (config.train.precision == Precision::Fast)
            .then(|| Decoder::new(shape.clone(), length, config.train.recompute == Recompute::Block));
        let gradients = Gradients::new(&parameters);
        let model = Model::new(shape, length);
        Self { model, parameters, optimizer, gradients, decoder, times: StepTimes::default() }
    }

    /// A fresh model of this shape.
    ///
    /// # Errors
    /// candle cannot make a tensor.
    pub fn fresh(config: &Config, shape: ModelConfig) -> Result<Self, TrainError> {
        let parameters = Parameters::init(&shape, config.model.initializer_range, config.run.seed)?;
        let optimizer = AdamW::new(adamw(config), &parameters);
        Ok(Self::new(config, shape, parameters, optimizer))
    }

    /// Where the time of the last step went.
    pub fn times(&self) -> StepTimes {
        self.times
    }

    /// Step `at`, counted from 0, on the micro-batches (ids and targets) that `next` gives; parameters stay as they are if
    /// loss or gradient is not finite.
    ///
    /// # Errors
    /// At step 0 a parameter gets no gradient; no kernel can run.
    pub fn step(
        &mut self,
        config: &Config,
        at: u64,
        next: impl FnMut() -> (Vec<u32>, Vec<u32>),
    ) -> Result<Step, TrainError> {
        self.times = StepTimes::default();
        let loss = self.accumulate(config, schedule::lambda(config, at), next)?;
        if !loss.is_finite() {
            return Ok(Step { loss, grad_norm: f64::NAN, updated: false });
        }
        let start = Instant::now();
        let norms = self.gradients.norms();
        if at == 0 {
            require_live(&norms)?;
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

    /// The mean loss of a step's micro-batches, and its gradients; these are of no use unless the loss is finite.
    fn accumulate(
        &mut self,
        config: &Config,
        lambda: f32,
        mut next: impl FnMut() -> (Vec<u32>, Vec<u32>),
    ) -> Result<f64, TrainError> {
        let Self { model, parameters, gradients, decoder, times, .. } = self;
        let share = 1.0 / config.train.gradient_accumulation as f64;
        gradients.clear();
        let values = parameters.values()?;
        let start = Instant::now();
        let weights = match decoder {
            Some(_) => match StepWeights::new(model.config(), &values, lambda) {
                // Weights that are not finite make no finite loss.
                Err(ProjectionError::Pack(PackError::Scale(_))) => return Ok(f64::NAN),
                weights => Some(weights?),
            },
            None => None,
        };
        times.weights = start.elapsed();
        let mut loss = 0.0;
        for _ in 0..config.train.gradient_accumulation {
            let start = Instant::now();
            let (ids, targets) = next();
            times.data += start.elapsed();
            loss += match (decoder.as_mut(), &weights) {
                (Some(decoder), Some(weights)) => {
                    decoder.step(weights, &ids, &targets, share, gradients)? * share
                }
                _ => {
                    let start = Instant::now();
                    let length = config.data.sequence_length;
                    let batch_loss = model.loss(parameters, &ids, &targets, length, lambda)?;
                    let value = f64::from(batch_loss.to_scalar::<f32>()?) * share;
                    times.decoder.forward += start.elapsed();
                    let start = Instant::now();
                    if value.is_finite() {
                        gradients.add(parameters, (batch_loss * share)?.backward()?)?;
                    }
                    times.decoder.backward += start.elapsed();
                    value
                }
            };
        }
        if let Some(decoder) = decoder {
            times.decoder = decoder.take_times();
        }
        Ok(loss)
    }
}

/// Each trainable variable must have a finite gradient that is not zero: a cut graph is no error in itself.
fn require_live(norms: &[(&str, f64)]) -> Result<(), TrainError> {
    match norms.iter().find(|(_, norm)| !(norm.is_finite() && *norm > 0.0)) {
        Some((name, norm)) => Err(TrainError::DeadGradient { name: (*name).to_owned(), norm: *norm }),
        None => Ok(()),
    }
}
