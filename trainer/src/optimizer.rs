//! AdamW in f32 with parameter groups and a state that can be saved: candle's keeps its moments to itself and decays
//! every tensor alike.
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use bitlinear::{math, pool, simd_fn};
use candle_core::{CpuStorage, InplaceOp1, Layout, backprop::GradStore, bail};
use safetensors::SafeTensors;

use crate::parameters::{Parameter, ParameterError, Parameters, tensor_values};

/// Values that a task updates at once.
const CHUNK: usize = 8192;

/// Settings that stay the same over a run.
#[derive(Debug, Clone, Copy)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
}

/// AdamW ("Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2):
///
/// ```text
/// m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
/// p = p - lr decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
/// ```
///
/// Only projections decay: norms and embeddings do not.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// Updates made so far.
    updates: u64,
    /// By the parameter's name.
    moments: BTreeMap<String, Moments>,
}

/// Running means of a parameter's gradient and squared gradient.
#[derive(Debug)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

impl AdamW {
    /// An optimizer that has made no update.
    pub fn new(config: AdamWConfig, parameters: &Parameters) -> Self {
        let moments = parameters
            .iter()
            .map(|(name, p)| {
                let zeros = vec![0f32; p.value.elem_count()];
                (name.to_owned(), Moments { first: zeros.clone(), second: zeros })
            })
            .collect();
        Self { config, updates: 0, moments }
    }

    /// An optimizer out of the bytes of a safetensors file of [`AdamW::state`], after `updates` updates.
    ///
    /// # Errors
    /// The file is damaged or belongs to other parameters.
    pub fn from_safetensors(
        config: AdamWConfig,
        updates: u64,
        parameters: &Parameters,
        bytes: &[u8],
    ) -> Result<Self, ParameterError> {
        let file = SafeTensors::deserialize(bytes)?;
        let mut moments = BTreeMap::new();
        for (name, p) in parameters.iter() {
            let first = tensor_values(&file, &format!("{name}.exp_avg"), p.value.dims())?;
            let second = tensor_values(&file, &format!("{name}.exp_avg_sq"), p.value.dims())?;
            moments.insert(name.to_owned(), Moments { first, second });
        }
        Ok(Self { config, updates, moments })
    }

    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Name, shape and values of both moments of each parameter: its name with `.exp_avg` and `.exp_avg_sq` behind.
    pub fn state<'a>(&'a self, parameters: &'a Parameters) -> Vec<(String, &'a [usize], &'a [f32])> {
        let of = |(name, p): (&str, &'a Parameter)| {
            let (shape, moments) = (p.value.dims(), &self.moments[name]);
            [
                (format!("{name}.exp_avg"), shape, &moments.first[..]),
                (format!("{name}.exp_avg_sq"), shape, &moments.second[..]),
            ]
        };
        parameters.iter().flat_map(of).collect()
    }

    /// One update with these gradients, each times `factor` (for clipping).
    ///
    /// # Errors
    /// A gradient is missing, or candle cannot change a tensor in place.
    pub fn update(
        &mut self,
        parameters: &Parameters,
        gradients: &Gradients,
        factor: f64,
        learning_rate: f64,
        weight_decay: f64,
    ) -> candle_core::Result<()> {
        self.updates += 1;
        let AdamWConfig { beta1, beta2, eps } = self.config;
        let steps = i32::try_from(self.updates).unwrap_or(i32::MAX);
        for (name, Parameter { role, value }) in parameters.iter() {
            let Some(moments) = self.moments.get_mut(name) else { bail!("no moments for '{name}'") };
            let decay = if role.is_projection() { weight_decay } else { 0.0 };
            let coefficients = Coefficients {
                factor: factor as f32,
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                eps: eps as f32,
                keep: (1.0 - learning_rate * decay) as f32,
                rate: (learning_rate / (1.0 - beta1.powi(steps))) as f32,
                inv_correction: (1.0 / (1.0 - beta2.powi(steps))) as f32,
            };
            let update =
                Update { gradient: gradients.get(name)?, moments: Mutex::new(moments), coefficients };
            value.as_tensor().inplace_op1(&update)?;
        }
        Ok(())
    }
}

/// One update of one parameter.
struct Update<'a> {
    gradient: &'a [f32],
    moments: Mutex<&'a mut Moments>,
    coefficients: Coefficients,
}

/// The numbers of an update.
struct Coefficients {
    /// What gradients are multiplied by.
    factor: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    /// `1 - lr decay`
    keep: f32,
    /// `lr / (1 - beta1^t)`
    rate: f32,
    /// `1 / (1 - beta2^t)`
    inv_correction: f32,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(&self, values: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (values, layout.contiguous_offsets()) else {
            bail!("adamw needs contiguous f32 parameters");
        };
        let mut moments = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let Moments { first, second } = &mut **moments;
        let values = values[start..end].chunks_mut(CHUNK).zip(self.gradient.chunks(CHUNK));
        let moments = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
        pool::map(values.zip(moments), |_, ((values, gradient), (first, second))| {
            adamw(&self.coefficients, values, gradient, first, second);
        });
        Ok(())
    }
}

/// The gradient of each parameter, averaged over the micro-batches of a step; buffers are used again by the next.
#[derive(Debug)]
pub struct Gradients {
    values: BTreeMap<String, Vec<f32>>,
    /// Nothing has been added since [`Gradients::clear`]: what the buffers hold is of no meaning.
    empty: bool,
}

impl Gradients {
    /// Gradients for these parameters, nothing added yet.
    pub fn new(parameters: &Parameters) -> Self {
        let zeros = |(name, p): (&str, &Parameter)| (name.to_owned(), vec![0f32; p.value.elem_count()]);
        Self { values: parameters.iter().map(zeros).collect(), empty: true }
    }

    /// Forgets what was added.
    pub fn clear(&mut self) {
        self.empty = true;
    }

    /// What the buffers are to be multiplied by before something is added: 0, without reading them, or 1.
    pub fn keep(&self) -> f32 {
        if self.empty { 0.0 } else { 1.0 }
    }

    /// Says that every buffer now holds the gradients of a micro-batch more.
    pub fn added(&mut self) {
        self.empty = false;
    }

    /// Gives the buffers of some parameters to `work`.
    ///
    /// # Panics
    /// If there is no such parameter.
    pub fn with<const N: usize, R>(
        &mut self,
        names: [impl AsRef<str>; N],
        work: impl FnOnce([&mut [f32]; N]) -> R,
    ) -> R {
        let mut taken = names.each_ref().map(|name| std::mem::take(self.buffer(name.as_ref())));
        let result = work(taken.each_mut().map(Vec::as_mut_slice));
        for (name, values) in names.iter().zip(taken) {
            self.values.insert(name.as_ref().to_owned(), values);
        }
        result
    }

    fn buffer(&mut self, name: &str) -> &mut Vec<f32> {
        self.values.get_mut(name).unwrap_or_else(|| panic!("no parameter '{name}'"))
    }

    /// Adds the gradients of one micro-batch, whose loss was already divided by the number of micro-batches.
    ///
    /// # Errors
    /// A parameter got no gradient: the graph is cut.
    pub fn add(&mut self, parameters: &Parameters, mut store: GradStore) -> candle_core::Result<()> {
        let empty = self.empty;
        for (name, p) in parameters.iter() {
            let Some(gradient) = store.remove(p.value.as_tensor()) else {
                bail!("no gradient reaches '{name}'; an operation between it and the loss has no backward");
            };
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            self.with([name], |[sum]| match empty {
                true => sum.copy_from_slice(&gradient),
                false => sum.iter_mut().zip(&gradient).for_each(|(sum, g)| *sum += g),
            });
        }
        self.added();
        Ok(())
    }

    /// The gradient of a parameter.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> candle_core::Result<&[f32]> {
        match self.values.get(name) {
            Some(gradient) if !self.empty => Ok(gradient),
            _ => bail!("no gradient for '{name}'"),
        }
    }

    /// The Euclidean norm of each parameter's gradient, in the order of names.
    pub fn norms(&self) -> Vec<(&str, f64)> {
        let norm = |gradient: &Vec<f32>| {
            // Chunk sums in order: the result does not depend on the number of threads.
            let chunks = pool::map(gradient.chunks(CHUNK), |_, chunk| sum_of_squares(chunk));
            chunks.iter().sum::<f64>().sqrt()
        };
        self.values.iter().map(|(name, gradient)| (name.as_str(), norm(gradient))).collect()
    }
}

simd_fn! {
    fn adamw(c: &Coefficients, values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((p, g), m), v) in values.iter_mut().zip(gradient).zip(first).zip(second) {
            let g = g * c.factor;
            *m = c.beta1 * *m + (1.0 - c.beta1) * g;
            *v = c.beta2 * *v + (1.0 - c.beta2) * (g * g);
            *p = *p * c.keep - c.rate * *m / ((*v * c.inv_correction).sqrt() + c.eps);
        }
    }
}

simd_fn! {
    fn sum_of_squares(values: &[f32]) -> f64 {
        f64::from(math::dot(values, values))
    }
}
