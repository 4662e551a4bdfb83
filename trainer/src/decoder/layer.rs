//! One layer of the decoder, forward and back.
use bitlinear::kernels::KernelError;
use bitlinear::math::Activation;
use bitlinear::products::Precision;
use bitlinear::training::{
    self, Heads, Input, Latent, Norm, ProjectionError, Projections, Relations, Scratch,
};
use bitlinear::{pool, simd_fn};
use infer::config::ModelConfig;

use super::{CHUNK, RelationLesson, add, norm_all};
use crate::optimizer::Gradients;
use crate::parameters::Values;
use crate::schedule::Shares;

/// A layer's parameters as one step computes with them.
pub(super) struct LayerWeights<'a> {
    input_layernorm: Norm<'a>,
    qkv: Projections<'a>,
    qkv_bias: Option<[&'a [f32]; 3]>,
    qk_norm: Option<[Norm<'a>; 2]>,
    attn_sub_norm: Option<Norm<'a>>,
    o: Projections<'a>,
    post_attention_layernorm: Norm<'a>,
    gate_up: Projections<'a>,
    ffn_sub_norm: Option<Norm<'a>>,
    down: Projections<'a>,
}

/// What a layer's backward needs of its forward, besides its input.
#[derive(Default)]
pub struct Saved {
    /// Input of q, k and v.
    h: Input,
    /// Queries and keys before their norms, where they have any.
    before_norm: [Vec<f32>; 2],
    /// What attention sees.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Of each query, for the attention's backward.
    log_sums: Vec<f32>,
    attended: Vec<f32>,
    /// Input of o.
    a: Input,
    /// The residual stream between attention and MLP.
    middle: Vec<f32>,
    /// Input of gate and up.
    h2: Input,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Input of down.
    m: Input,
}

impl Saved {
    /// Queries, keys and values as attention sees them before the rotary embedding, `[tokens, heads * head_dim]`.
    pub fn qkv(&self) -> [&[f32]; 3] {
        [&self.q, &self.k, &self.v]
    }

    /// What attention gives, `[tokens, heads * head_dim]`.
    pub fn attended(&self) -> &[f32] {
        &self.attended
    }

    /// The outputs of the gate and the up projection, `[tokens, intermediate_size]`.
    pub fn gate_up(&self) -> [&[f32]; 2] {
        [&self.gate, &self.up]
    }
}

/// Buffers that all layers share.
#[derive(Default)]
pub(super) struct Room {
    /// `[tokens, hidden_size]`
    hidden: Vec<f32>,
    /// `[tokens, heads * head_dim]`, and what attention needs.
    heads: Vec<f32>,
    by_head: [Vec<f32>; 3],
    grad_qkv: [Vec<f32>; 3],
    /// `[tokens, intermediate_size]`
    ffn: Vec<f32>,
    grad_gate: Vec<f32>,
    grad_up: Vec<f32>,
    scratch: Scratch,
}

impl<'a> LayerWeights<'a> {
    pub(super) fn new(
        config: &ModelConfig,
        values: &'a Values<'a>,
        layer: usize,
        shares: Shares,
    ) -> Result<Self, ProjectionError> {
        let get = |part: &str| values.get(&name(layer, part));
        let norm = |part: &str| Norm::new(get(part), config.rms_norm_eps);
        let sub_norm = |part: &str| config.sub_norm.then(|| Norm { share: shares.sub_norm, ..norm(part) });
        let projections = |parts: &[&str], in_features| {
            let latent = |part: &&str| Latent {
                weight: get(part),
                quantized: config.is_ternary(&format!("model.layers.{layer}.{part}")),
            };
            let latents: Vec<_> = parts.iter().map(latent).collect();
            Projections::new(&latents, in_features, shares.quantization, Precision::Bf16)
        };
        let queries = config.num_attention_heads * config.head_dim;
        Ok(Self {
            input_layernorm: norm("input_layernorm"),
            qkv: projections(
                &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                config.hidden_size,
            )?,
            qkv_bias: config.qkv_bias.then(|| {
                ["q", "k", "v"]
                    .map(|part| values.get(&format!("model.layers.{layer}.self_attn.{part}_proj.bias")))
            }),
            qk_norm: config.qk_norm.then(|| ["self_attn.q_norm", "self_attn.k_norm"].map(norm)),
            attn_sub_norm: sub_norm("self_attn.attn_sub_norm"),
            o: projections(&["self_attn.o_proj"], queries)?,
            post_attention_layernorm: norm("post_attention_layernorm"),
            gate_up: projections(&["mlp.gate_proj", "mlp.up_proj"], config.hidden_size)?,
            ffn_sub_norm: sub_norm("mlp.ffn_sub_norm"),
            down: projections(&["mlp.down_proj"], config.intermediate_size)?,
        })
    }

    /// Fills `saved`, and writes the layer's output if anybody wants it.
    pub(super) fn forward(
        &self,
        config: &ModelConfig,
        heads: &Heads,
        x: &[f32],
        saved: &mut Saved,
        room: &mut Room,
        out: Option<&mut Vec<f32>>,
    ) -> Result<(), KernelError> {
        let (width, ffn) = (config.hidden_size, config.intermediate_size);
        let tokens = x.len() / width;
        let (queries, keys) = (heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim);
        let Saved { h, before_norm, q, k, v, log_sums, attended, a, middle, h2, gate, up, m } = saved;

        self.qkv.input(h, tokens, |row, out| self.input_layernorm.forward(row_of(x, row, width), out));
        q.resize(tokens * queries, 0.0);
        k.resize(tokens * keys, 0.0);
        v.resize(tokens * keys, 0.0);
        self.qkv.forward(h, &mut [q, k, v])?;
        if let Some(biases) = self.qkv_bias {
            for (rows, bias) in [&mut *q, k, v].into_iter().zip(biases) {
                training::add_bias(rows, bias);
            }
        }
        if let Some(norms) = self.qk_norm {
            for ((rows, before), norm) in [&mut *q, k].into_iter().zip(before_norm).zip(norms) {
                std::mem::swap(rows, before);
                rows.resize(before.len(), 0.0);
                norm_all(norm, before, rows);
            }
        }
        attended.resize(tokens * queries, 0.0);
        training::attention(heads, q, k, v, log_sums, &mut room.heads, attended);
        self.o.input(a, tokens, |row, out| match self.attn_sub_norm {
            Some(norm) => norm.forward(row_of(attended, row, queries), out),
            None => out.copy_from_slice(row_of(attended, row, queries)),
        });
        room.hidden.resize(tokens * width, 0.0);
        self.o.forward(a, &mut [&mut room.hidden])?;
        middle.resize(tokens * width, 0.0);
        sum(x, &room.hidden, middle);

        let norm = self.post_attention_layernorm;
        self.gate_up.input(h2, tokens, |row, out| norm.forward(row_of(middle, row, width), out));
        gate.resize(tokens * ffn, 0.0);
        up.resize(tokens * ffn, 0.0);
        self.gate_up.forward(h2, &mut [gate, up])?;
        self.down.input(m, tokens, |row, out| {
            let (gate, up) = (row_of(gate, row, ffn), row_of(up, row, ffn));
            gated_row(config.hidden_act, gate, up, out);
            if let Some(norm) = self.ffn_sub_norm {
                norm.forward_in_place(out);
            }
        });
        if let Some(out) = out {
            self.down.forward(m, &mut [&mut room.hidden])?;
            sum(middle, &room.hidden, out);
        }
        Ok(())
    }

    /// `grad` is the gradient of the layer's output and becomes that of its input; parameters' are added to `gradients`.
    /// Where the layer has relations to learn, times a share, it returns their divergence times the share.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward(
        &self,
        config: &ModelConfig,
        heads: &Heads,
        layer: usize,
        x: &[f32],
        saved: &Saved,
        relations: Option<(RelationLesson<'_>, f64)>,
        room: &mut Room,
        grad: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<f64, KernelError> {
        let (ffn, keep) = (config.intermediate_size, gradients.keep());
        let tokens = x.len() / config.hidden_size;
        let n = |part: &str| name(layer, part);
        let Room {
            hidden,
            heads: grad_attended,
            by_head,
            grad_qkv,
            ffn: grad_m,
            grad_gate,
            grad_up,
            scratch,
        } = room;

        grad_m.resize(tokens * ffn, 0.0);
        gradients.with([n("mlp.down_proj")], |[down]| {
            self.down.backward(&saved.m, &[grad], keep, scratch, grad_m, &mut [down])
        })?;
        grad_gate.resize(tokens * ffn, 0.0);
        grad_up.resize(tokens * ffn, 0.0);
        let inputs = [&*saved.gate, &*saved.up, &**grad_m];
        let act = config.hidden_act;
        match self.ffn_sub_norm {
            norm @ Some(_) => gradients.with([n("mlp.ffn_sub_norm")], |[gain]| {
                training::gated_backward(act, norm, inputs, ffn, keep, grad_gate, grad_up, gain);
            }),
            None => training::gated_backward(act, None, inputs, ffn, keep, grad_gate, grad_up, &mut []),
        }
        hidden.resize(grad.len(), 0.0);
        gradients.with([n("mlp.gate_proj"), n("mlp.up_proj")], |[gate, up]| {
            let grads = [&**grad_gate, &**grad_up];
            self.gate_up.backward(&saved.h2, &grads, keep, scratch, hidden, &mut [gate, up])
        })?;
        gradients.with([n("post_attention_layernorm")], |[gain]| {
            let norm = self.post_attention_layernorm;
            training::rms_norm_backward(norm, &saved.middle, hidden, keep, grad, gain);
        });

        let [grad_q, grad_k, grad_v] = grad_qkv;
        // The gradient of o's input, here until attention's own is there.
        grad_q.resize(saved.q.len(), 0.0);
        gradients.with([n("self_attn.o_proj")], |[o]| {
            self.o.backward(&saved.a, &[grad], keep, scratch, grad_q, &mut [o])
        })?;
        grad_attended.clear();
        match self.attn_sub_norm {
            Some(norm) => gradients.with([n("self_attn.attn_sub_norm")], |[gain]| {
                grad_attended.resize(saved.q.len(), 0.0);
                training::rms_norm_backward(norm, &saved.attended, grad_q, keep, grad_attended, gain);
            }),
            None => grad_attended.extend_from_slice(grad_q),
        }
        grad_k.resize(saved.k.len(), 0.0);
        grad_v.resize(saved.v.len(), 0.0);
        training::attention_backward(
            heads,
            [&saved.q, &saved.k, &saved.v],
            &saved.log_sums,
            grad_attended,
            by_head,
            [grad_q, grad_k, grad_v],
        );
        let mut divergence = 0.0;
        if let Some((lesson, share)) = relations {
            let scale = (f64::from(lesson.coefficient) * share) as f32;
            let students = saved.qkv().into_iter().zip([&mut *grad_q, grad_k, grad_v]);
            for ((student, grad), teacher) in students.zip(lesson.teacher) {
                let RelationLesson { heads: count, temperature, .. } = lesson;
                let sequence_lengths = &heads.sequences;
                let relations = Relations { heads: count, temperature, sequence_lengths };
                divergence += share * training::relation_loss(&relations, student, teacher, scale, grad);
            }
        }
        if let Some(norms) = self.qk_norm {
            let grads = [&mut *grad_q, &mut *grad_k].into_iter().zip(&saved.before_norm);
            for ((part, norm), (grad, before)) in ["q_norm", "k_norm"].into_iter().zip(norms).zip(grads) {
                gradients.with([n(&format!("self_attn.{part}"))], |[gain]| {
                    // The gradient behind the norm, which makes room for that before it.
                    grad_attended.clear();
                    grad_attended.extend_from_slice(grad);
                    grad.fill(0.0);
                    training::rms_norm_backward(norm, before, grad_attended, keep, grad, gain);
                });
            }
        }
        if self.qkv_bias.is_some() {
            for (part, grad) in ["q", "k", "v"].into_iter().zip([&*grad_q, grad_k, grad_v]) {
                gradients.with([format!("model.layers.{layer}.self_attn.{part}_proj.bias")], |[bias]| {
                    training::bias_backward(grad, keep, bias);
                });
            }
        }
        let names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(n);
        gradients.with(names, |[q, k, v]| {
            let grads = [&**grad_q, &**grad_k, &**grad_v];
            self.qkv.backward(&saved.h, &grads, keep, scratch, hidden, &mut [q, k, v])
        })?;
        gradients.with([n("input_layernorm")], |[gain]| {
            training::rms_norm_backward(self.input_layernorm, x, hidden, keep, grad, gain);
        });
        Ok(divergence)
    }
}

/// The full name of a layer's parameter.
fn name(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}

fn row_of(rows: &[f32], row: usize, width: usize) -> &[f32] {
    &rows[row * width..][..width]
}

/// `out = a + b`
fn sum(a: &[f32], b: &[f32], out: &mut [f32]) {
    let chunks = out.chunks_mut(CHUNK).zip(a.chunks(CHUNK)).zip(b.chunks(CHUNK));
    pool::map(chunks, |_, ((out, a), b)| add(a, b, out));
}

simd_fn! {
    fn gated_row(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        activation.gated(gate, up, out);
    }
}
