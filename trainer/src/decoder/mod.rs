//! The fast training step: forward and backward of the whole decoder on plain slices, without a graph.
//!
//! The function is that of [`crate::model`], which evaluates and exports, but for the order of sums in attention and a head in
//! bf16; gradients are those of its graph, to within the rounding that [`bitlinear::training`] describes. Buffers are kept from step to step. What the backward of a layer
//! needs is either kept from the forward or computed again from the layer's input (`train.recompute`).
mod layer;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitlinear::math::{self, RopeTable};
use bitlinear::products::Precision;
use bitlinear::training::{self, HeadLoss, Heads, ProjectionError};
use bitlinear::{pool, simd_fn};
use infer::config::ModelConfig;

use crate::optimizer::Gradients;
use crate::parameters::Values;
use layer::{LayerWeights, Room, Saved};

/// Values that a task adds or copies at once.
const CHUNK: usize = 1 << 14;

/// The buffers of a training step for batches of one size.
pub struct Decoder {
    config: ModelConfig,
    sequence_length: usize,
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
    /// Ternarizes and packs the latent weights, once for all micro-batches of a step; with a share `lambda` of quantization
    /// below 1 they are mixed in f32.
    ///
    /// # Errors
    /// At full quantization, a latent weight is not finite, or no kernel can run.
    pub fn new(config: &ModelConfig, values: &'a Values<'a>, lambda: f32) -> Result<Self, ProjectionError> {
        let lambda = if config.quantized { lambda } else { 0.0 };
        let layers = pool::map(0..config.num_hidden_layers, |_, layer| {
            LayerWeights::new(config, values, layer, lambda)
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
            sequence_length,
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

    /// Mean cross-entropy of the targets in nats, and its gradients times `share`, added to `gradients`.
    ///
    /// # Errors
    /// No kernel can run.
    ///
    /// # Panics
    /// If ids are not whole sequences with a target each, or one is not in the vocabulary.
    pub fn step(
        &mut self,
        weights: &StepWeights<'_>,
        ids: &[u32],
        targets: &[u32],
        share: f64,
        gradients: &mut Gradients,
    ) -> Result<f64, ProjectionError> {
        assert_eq!(ids.len(), targets.len(), "a target for each token");
        self.heads.sequences.clear();
        self.heads.sequences.resize(ids.len() / self.sequence_length, self.sequence_length);
        let start = Instant::now();
        self.forward(weights, ids)?;
        let forward = start.elapsed();
        let loss = self.head(weights, targets, share, gradients);
        let head = start.elapsed();
        if loss.is_finite() {
            self.backward(weights, ids, gradients)?;
        }
        self.times.forward += forward;
        self.times.head += head - forward;
        self.times.backward += start.elapsed() - head;
        Ok(loss)
    }

    /// What the parts of all steps since the last call took.
    pub fn take_times(&mut self) -> DecoderTimes {
        std::mem::take(&mut self.times)
    }

    /// Residual stream after each layer, and what the backward needs.
    fn forward(&mut self, weights: &StepWeights<'_>, ids: &[u32]) -> Result<(), ProjectionError> {
        let width = self.config.hidden_size;
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
        }
        Ok(())
    }

    /// The last norm, the head and its loss; leaves the gradient of the residual stream.
    fn head(
        &mut self,
        weights: &StepWeights<'_>,
        targets: &[u32],
        share: f64,
        gradients: &mut Gradients,
    ) -> f64 {
        let Self { config, residuals, hidden, grad, grad_hidden, logits, .. } = self;
        let (width, eps, keep) = (config.hidden_size, config.rms_norm_eps, gradients.keep());
        let x = &residuals[config.num_hidden_layers];
        let gain = weights.values.get("model.norm.weight");
        hidden.resize(x.len(), 0.0);
        let chunk = rows_at_once(width) * width;
        pool::map(hidden.chunks_mut(chunk).zip(x.chunks(chunk)), |_, (out, x)| norm_rows(x, gain, eps, out));
        let name = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let head = weights.values.get(name);
        grad_hidden.resize(x.len(), 0.0);
        let scale = (share / targets.len() as f64) as f32;
        let losses = gradients.with([name], |[grad_head]| {
            training::head_loss(
                Precision::Bf16,
                [hidden, head],
                &HeadLoss::cross_entropy(targets),
                scale,
                keep,
                logits,
                grad_hidden,
                grad_head,
            )
        });
        grad.clear();
        grad.resize(x.len(), 0.0);
        gradients.with(["model.norm.weight"], |[grad_gain]| {
            training::rms_norm_backward(x, gain, grad_hidden, eps, keep, grad, grad_gain);
        });
        losses.cross_entropy / targets.len() as f64
    }

    fn backward(
        &mut self,
        weights: &StepWeights<'_>,
        ids: &[u32],
        gradients: &mut Gradients,
    ) -> Result<(), ProjectionError> {
        for (index, layer) in weights.layers.iter().enumerate().rev() {
            let saved = &mut self.saved[if self.recompute { 0 } else { index }];
            let x = &self.residuals[index];
            // The last layer's is still there.
            if self.recompute && index + 1 < weights.layers.len() {
                layer.forward(&self.config, &self.heads, x, saved, &mut self.room, None)?;
            }
            layer.backward(
                &self.config,
                &self.heads,
                index,
                x,
                saved,
                &mut self.room,
                &mut self.grad,
                gradients,
            )?;
        }
        // Tied, the head has been here before.
        let keep = if self.config.tie_word_embeddings { 1.0 } else { gradients.keep() };
        gradients.with(["model.embed_tokens.weight"], |[grad_embedding]| {
            embedding_backward(ids, &self.grad, self.config.hidden_size, keep, grad_embedding);
        });
        gradients.added();
        Ok(())
    }
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

simd_fn! {
    /// RMSNorm of some tokens.
    fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        for (out, x) in out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
            math::rms_norm(x, weight, eps, out);
        }
    }
}
