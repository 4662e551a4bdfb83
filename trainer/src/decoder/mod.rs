//! The fast training step: forward and backward of the whole decoder on plain slices, without a graph.
//!
//! The function is that of [`crate::model`], which evaluates and exports, but for the order of sums in attention and a head in
//! bf16; gradients are those of its graph, to within the rounding that [`bitlinear::training`] describes. Buffers are kept from step to step. What the backward of a layer
//! needs is either kept from the forward or computed again from the layer's input (`train.recompute`).
mod layer;
mod lesson;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitlinear::math::RopeTable;
use bitlinear::products::Precision;
use bitlinear::training::{self, HeadLoss, Heads, Norm, ProjectionError};
use bitlinear::{pool, simd_fn};
use infer::config::ModelConfig;

use crate::data::Batch;
use crate::optimizer::Gradients;
use crate::parameters::Values;
use crate::schedule::Shares;
pub use layer::Saved;
use layer::{LayerWeights, Room};
pub use lesson::{Lesson, RelationLesson, StepLoss};

/// Values that a task adds or copies at once.
const CHUNK: usize = 1 << 14;

/// The buffers of a training step for batches of one size.
pub struct Decoder {
    config: ModelConfig,
    /// With the sequences of the batch at hand.
    heads: Heads,
    recompute: bool,
    /// The input of each layer, and the output of the last.
    residuals: Vec<Vec<f32>>,
    /// What each layer's backward needs; with recomputation one for all.
    saved: Vec<Saved>,
    /// The last norm's output.
    hidden: Vec<f32>,
    /// The gradient of the residual stream.
    grad: Vec<f32>,
    grad_hidden: Vec<f32>,
    /// The student's and the teacher's.
    logits: [Vec<f32>; 2],
    room: Room,
    times: DecoderTimes,
}

/// Where the time of steps goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct DecoderTimes {
    /// Embedding and layers.
    pub forward: Duration,
    /// The last norm, logits, cross-entropy and their gradients.
    pub head: Duration,
    /// The layers' gradients, with what is computed a second time, and the embedding's.
    pub backward: Duration,
}

/// The projections of all layers as one optimizer step computes with them.
pub struct StepWeights<'a> {
    values: &'a Values<'a>,
    layers: Vec<LayerWeights<'a>>,
}

impl<'a> StepWeights<'a> {
    /// Ternarizes and packs the latent weights, once for all micro-batches of a step; with a share of quantization
    /// below 1 they are mixed in f32.
    ///
    /// # Errors
    /// At full quantization, a latent weight is not finite, or no kernel can run.
    pub fn new(
        config: &ModelConfig,
        values: &'a Values<'a>,
        shares: Shares,
    ) -> Result<Self, ProjectionError> {
        let layers = pool::map(0..config.num_hidden_layers, |_, layer| {
            LayerWeights::new(config, values, layer, shares)
        });
        Ok(Self { values, layers: layers.into_iter().collect::<Result<_, _>>()? })
    }
}

impl Decoder {
    /// A decoder for sequences of `sequence_length` tokens; with `recompute` only the inputs of layers are kept.
    pub fn new(config: ModelConfig, sequence_length: usize, recompute: bool) -> Self {
        let heads = Heads {
            sequences: Vec::new(),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            rope: Arc::new(RopeTable::new(config.head_dim, sequence_length, config.rope_theta)),
        };
        let layers = config.num_hidden_layers;
        let mut saved = Vec::new();
        saved.resize_with(if recompute { 1 } else { layers }, Saved::default);
        Self {
            heads,
            recompute,
            residuals: vec![Vec::new(); layers + 1],
            saved,
            hidden: Vec::new(),
            grad: Vec::new(),
            grad_hidden: Vec::new(),
            logits: Default::default(),
            room: Room::default(),
            times: DecoderTimes::default(),
            config,
        }
    }

    /// The losses of a lesson on a batch, and the gradients of their total, added to `gradients`. Both are times `share`, the
    /// batch's part of an optimizer step; where the batch has weights, these say it instead.
    ///
    /// # Errors
    /// No kernel can run.
    ///
    /// # Panics
    /// If ids are not whole sequences with a target each, or one is not in the vocabulary.
    pub fn step(
        &mut self,
        weights: &StepWeights<'_>,
        batch: &Batch,
        lesson: &Lesson<'_>,
        share: f64,
        gradients: &mut Gradients,
    ) -> Result<StepLoss, ProjectionError> {
        assert_eq!(batch.ids.len(), batch.targets.len(), "a target for each token");
        let start = Instant::now();
        self.forward(weights, batch, |_, _| ())?;
        let forward = start.elapsed();
        let mut loss = self.head(weights, batch, lesson, share, gradients);
        let head = start.elapsed();
        if loss.total.is_finite() {
            loss.relations = self.backward(weights, batch, lesson.relations, share, gradients)?;
            let coefficient = lesson.relations.map_or(0.0, |relations| relations.coefficient);
            loss.total += f64::from(coefficient) * loss.relations;
        }
        self.times.forward += forward;
        self.times.head += head - forward;
        self.times.backward += start.elapsed() - head;
        Ok(loss)
    }

    /// Reads a batch without learning; shows each layer what was kept of it.
    ///
    /// Returns the last norm's output, `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// No kernel can run.
    ///
    /// # Panics
    /// As [`Decoder::step`].
    pub fn read(
        &mut self,
        weights: &StepWeights<'_>,
        batch: &Batch,
        see: impl FnMut(usize, &Saved),
    ) -> Result<&[f32], ProjectionError> {
        self.forward(weights, batch, see)?;
        self.last_norm(weights);
        Ok(&self.hidden)
    }

    /// What the last batch's last norm gave, `[tokens, hidden_size]`.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// What the parts of all steps since the last call took.
    pub fn take_times(&mut self) -> DecoderTimes {
        std::mem::take(&mut self.times)
    }

    /// Residual stream after each layer, and what the backward needs.
    fn forward(
        &mut self,
        weights: &StepWeights<'_>,
        batch: &Batch,
        mut see: impl FnMut(usize, &Saved),
    ) -> Result<(), ProjectionError> {
        let (width, ids) = (self.config.hidden_size, &batch.ids);
        self.heads.sequences.clone_from(&batch.sequences);
        for residual in &mut self.residuals {
            residual.resize(ids.len() * width, 0.0);
        }
        let embedding = weights.values.get("model.embed_tokens.weight");
        let at_once = rows_at_once(width);
        pool::map(self.residuals[0].chunks_mut(at_once * width), |chunk, rows| {
            for (row, id) in rows.chunks_exact_mut(width).zip(&ids[chunk * at_once..]) {
                row.copy_from_slice(&embedding[*id as usize * width..][..width]);
            }
        });
        for (index, layer) in weights.layers.iter().enumerate() {
            let (before, after) = self.residuals.split_at_mut(index + 1);
            let saved = &mut self.saved[if self.recompute { 0 } else { index }];
            layer.forward(
                &self.config,
                &self.heads,
                &before[index],
                saved,
                &mut self.room,
                Some(&mut after[0]),
            )?;
            see(index, saved);
        }
        Ok(())
    }

    /// The last norm of the residual stream, which it returns too.
    fn last_norm<'w>(&mut self, weights: &StepWeights<'w>) -> Norm<'w> {
        let norm = Norm::new(weights.values.get("model.norm.weight"), self.config.rms_norm_eps);
        let x = &self.residuals[self.config.num_hidden_layers];
        self.hidden.resize(x.len(), 0.0);
        norm_all(norm, x, &mut self.hidden);
        norm
    }

    /// The last norm, the head and its loss; leaves the gradient of the residual stream.
    fn head(
        &mut self,
        weights: &StepWeights<'_>,
        batch: &Batch,
        lesson: &Lesson<'_>,
        share: f64,
        gradients: &mut Gradients,
    ) -> StepLoss {
        let norm = self.last_norm(weights);
        let Self { config, residuals, hidden, grad, grad_hidden, logits, .. } = self;
        let keep = gradients.keep();
        let x = &residuals[config.num_hidden_layers];
        let name = head_name(config);
        let head = weights.values.get(name);
        grad_hidden.resize(x.len(), 0.0);
        // Weights are those of a whole step already.
        let scale = if batch.weights.is_some() { 1.0 } else { share / batch.targets.len() as f64 };
        let terms = HeadLoss {
            targets: &batch.targets,
            weights: batch.weights.as_deref(),
            cross_entropy: lesson.cross_entropy,
            teacher: lesson.logits,
        };
        let losses = gradients.with([name], |[grad_head]| {
            let operands = [&**hidden, head];
            training::head_loss(
                Precision::Bf16,
                operands,
                &terms,
                scale as f32,
                keep,
                logits,
                grad_hidden,
                grad_head,
            )
        });
        grad.clear();
        grad.resize(x.len(), 0.0);
        gradients.with(["model.norm.weight"], |[grad_gain]| {
            training::rms_norm_backward(norm, x, grad_hidden, keep, grad, grad_gain);
        });
        let (cross_entropy, divergence) = (losses.cross_entropy * scale, losses.divergence * scale);
        let weight = lesson
            .logits
            .map_or(0.0, |teacher| f64::from(teacher.coefficient) * f64::from(teacher.temperature).powi(2));
        let total = f64::from(lesson.cross_entropy) * cross_entropy + weight * divergence;
        StepLoss { total, cross_entropy, divergence, relations: 0.0 }
    }

    /// The layers' gradients and the embedding's; returns the divergence of relations.
    fn backward(
        &mut self,
        weights: &StepWeights<'_>,
        batch: &Batch,
        relations: Option<RelationLesson<'_>>,
        share: f64,
        gradients: &mut Gradients,
    ) -> Result<f64, ProjectionError> {
        let mut divergence = 0.0;
        for (index, layer) in weights.layers.iter().enumerate().rev() {
            let saved = &mut self.saved[if self.recompute { 0 } else { index }];
            let x = &self.residuals[index];
            // The last layer's is still there.
            if self.recompute && index + 1 < weights.layers.len() {
                layer.forward(&self.config, &self.heads, x, saved, &mut self.room, None)?;
            }
            let relations = relations.filter(|relations| relations.layer == index);
            divergence += layer.backward(
                &self.config,
                &self.heads,
                index,
                x,
                saved,
                relations.map(|relations| (relations, share)),
                &mut self.room,
                &mut self.grad,
                gradients,
            )?;
        }
        // Tied, the head has been here before.
        let keep = if self.config.tie_word_embeddings { 1.0 } else { gradients.keep() };
        gradients.with(["model.embed_tokens.weight"], |[grad_embedding]| {
            embedding_backward(&batch.ids, &self.grad, self.config.hidden_size, keep, grad_embedding);
        });
        gradients.added();
        Ok(divergence)
    }
}

/// The parameter that the head multiplies by.
pub fn head_name(config: &ModelConfig) -> &'static str {
    if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" }
}

/// Rows that a task takes, about [`CHUNK`] values.
fn rows_at_once(width: usize) -> usize {
    CHUNK / width + 1
}

/// `grad_embedding[id] = keep * grad_embedding[id] + Σ grad` over the tokens with this id, in their order.
fn embedding_backward(ids: &[u32], grad: &[f32], width: usize, keep: f32, grad_embedding: &mut [f32]) {
    let rows = (grad_embedding.len() / width).div_ceil(16).max(1);
    pool::for_chunks(grad_embedding, rows * width, |chunk, grad_embedding| {
        if keep == 0.0 {
            grad_embedding.fill(0.0);
        } else if keep != 1.0 {
            grad_embedding.iter_mut().for_each(|g| *g *= keep);
        }
        for (id, grad) in ids.iter().zip(grad.chunks_exact(width)) {
            let row = (*id as usize).wrapping_sub(chunk * rows);
            if let Some(sum) = grad_embedding.chunks_exact_mut(width).nth(row) {
                add_to(sum, grad);
            }
        }
    });
}

simd_fn! {
    /// `sum += values`
    fn add_to(sum: &mut [f32], values: &[f32]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += value;
        }
    }
}

simd_fn! {
    /// `out = a + b`
    fn add(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = a + b;
        }
    }
}

/// The norm of all rows.
fn norm_all(norm: Norm<'_>, x: &[f32], out: &mut [f32]) {
    let chunk = rows_at_once(norm.weight.len()) * norm.weight.len();
    pool::map(out.chunks_mut(chunk).zip(x.chunks(chunk)), |_, (out, x)| norm.forward(x, out));
}
