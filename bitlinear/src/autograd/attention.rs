//! Causal attention with grouped heads and rotary position embedding, with a backward.
//!
//! No score matrix is kept: forward and backward work on one query row at a time, and the backward computes the
//! attention weights again. A task is one key/value head of one sequence; it gathers its heads into contiguous memory.
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{tensor_like, values, with_values};
use crate::math;
use crate::simd_fn;
use crate::training::{Group, Heads, Sequence};

/// `softmax(rope(q) rope(k)^T / sqrt(head_dim) + causal mask) v` for each sequence and head.
///
/// Sources: arXiv 1706.03762 (equation 1); rotary embedding: arXiv 2104.09864; grouped heads: arXiv 2305.13245.
///
/// # Shapes
/// `q [tokens, heads * head_dim], k and v [tokens, kv_heads * head_dim] -> [tokens, heads * head_dim]`, with tokens those
/// of all sequences.
///
/// # Errors
/// The shapes do not fit `heads`, its sequences are not the rows or one is empty, or a tensor is not contiguous f32 on the CPU.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: &Heads) -> Result<Tensor> {
    let Heads { sequences, heads: query_heads, kv_heads, head_dim, rope } = heads;
    let tokens = q.dim(0)?;
    let fits = heads.cover(tokens)
        && *kv_heads > 0
        && query_heads.is_multiple_of(*kv_heads)
        && q.dims() == [tokens, query_heads * head_dim]
        && k.dims() == [tokens, kv_heads * head_dim]
        && v.dims() == k.dims()
        && rope.head_dim() == *head_dim;
    if !fits {
        let [shortest, longest] =
            [sequences.iter().min(), sequences.iter().max()].map(|length| length.copied().unwrap_or(0));
        bail!(
            "attention of q {:?}, k {:?}, v {:?} in {} sequences of {shortest} to {longest}, together {} tokens, with \
             {query_heads} heads over {kv_heads} of {head_dim} elements, rotary embedding of {} elements at {} positions; the \
             shapes must agree, and no sequence be empty",
            q.dims(),
            k.dims(),
            v.dims(),
            sequences.len(),
            heads.tokens(),
            rope.head_dim(),
            rope.positions()
        );
    }
    q.apply_op3(k, v, Op(heads.clone()))
}

struct Op(Heads);

/// What a task computes for its group: `[heads, tokens, head_dim]` for queries, `[tokens, head_dim]` for keys and values.
struct GroupGradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Heads {
    /// The query heads of a group.
    fn query_heads(&self, group: Group) -> std::ops::Range<usize> {
        group.kv_head * self.group_size()..(group.kv_head + 1) * self.group_size()
    }

    /// [`Heads::gather`] into memory of its own.
    fn gathered(&self, rows: &[f32], heads: usize, sequence: Sequence, head: usize) -> Vec<f32> {
        let mut gathered = vec![0f32; sequence.length * self.head_dim];
        self.gather(rows, heads, sequence, head, &mut gathered);
        gathered
    }

    /// [`Heads::gathered`], then turned to each token's position.
    fn gathered_rotated(&self, rows: &[f32], heads: usize, sequence: Sequence, head: usize) -> Vec<f32> {
        let mut gathered = self.gathered(rows, heads, sequence, head);
        for (position, row) in gathered.chunks_exact_mut(self.head_dim).enumerate() {
            self.rope.rotate(position, row);
        }
        gathered
    }

    /// The inverse of [`Heads::gather`].
    fn scatter_head(
        &self,
        gathered: &[f32],
        heads: usize,
        sequence: Sequence,
        head: usize,
        rows: &mut [f32],
    ) {
        let width = heads * self.head_dim;
        let rows = &mut rows[sequence.start * width..][..sequence.length * width];
        for (row, from) in rows.chunks_exact_mut(width).zip(gathered.chunks_exact(self.head_dim)) {
            row[head * self.head_dim..][..self.head_dim].copy_from_slice(from);
        }
    }
}

simd_fn! {
    /// Outputs of a group, `[heads, tokens, head_dim]`.
    fn forward(heads: &Heads, group: Group, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (dim, len) = (heads.head_dim, group.sequence.length);
        let keys = heads.gathered_rotated(k, heads.kv_heads, group.sequence, group.kv_head);
        let values = heads.gathered(v, heads.kv_heads, group.sequence, group.kv_head);
        let mut weights = vec![0f32; len];
        let mut out = vec![0f32; heads.group_size() * len * dim];
        for (head, out) in heads.query_heads(group).zip(out.chunks_exact_mut(len * dim)) {
            let queries = heads.gathered_rotated(q, heads.heads, group.sequence, head);
            for (i, (query, out)) in queries.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
                let weights = &mut weights[..=i];
                math::attention_weights(query, &keys, dim, weights);
                math::weighted_sum(weights, &values, dim, out);
            }
        }
        out
    }
}

simd_fn! {
    /// Gradients of a group. With `p` the attention weights: `dp = dout v^T`, `ds = p (dp - Σ p dp) / sqrt(head_dim)`,
    /// `dq = ds k`, `dk = ds^T q`, `dv = p^T dout`.
    fn backward(heads: &Heads, group: Group, q: &[f32], k: &[f32], v: &[f32], grad: &[f32]) -> GroupGradients {
        let (dim, len) = (heads.head_dim, group.sequence.length);
        let scale = 1.0 / (dim as f32).sqrt();
        let keys = heads.gathered_rotated(k, heads.kv_heads, group.sequence, group.kv_head);
        let values = heads.gathered(v, heads.kv_heads, group.sequence, group.kv_head);
        let mut grads = GroupGradients {
            q: vec![0f32; heads.group_size() * len * dim],
            k: vec![0f32; len * dim],
            v: vec![0f32; len * dim],
        };
        let (mut weights, mut slopes) = (vec![0f32; len], vec![0f32; len]);
        for (head, grad_q) in heads.query_heads(group).zip(grads.q.chunks_exact_mut(len * dim)) {
            let queries = heads.gathered_rotated(q, heads.heads, group.sequence, head);
            let grad = heads.gathered(grad, heads.heads, group.sequence, head);
            let rows = queries.chunks_exact(dim).zip(grad.chunks_exact(dim)).zip(grad_q.chunks_exact_mut(dim));
            for (i, ((query, grad), grad_q)) in rows.enumerate() {
                let (weights, slopes) = (&mut weights[..=i], &mut slopes[..=i]);
                math::attention_weights(query, &keys, dim, weights);
                for (slope, value) in slopes.iter_mut().zip(values.chunks_exact(dim)) {
                    *slope = math::dot(grad, value);
                }
                let mean = math::dot(weights, slopes);
                for (slope, weight) in slopes.iter_mut().zip(weights.iter()) {
                    *slope = weight * (*slope - mean) * scale;
                }
                math::weighted_sum(slopes, &keys, dim, grad_q);
                let outputs = grads.k.chunks_exact_mut(dim).zip(grads.v.chunks_exact_mut(dim));
                for ((grad_k, grad_v), (slope, weight)) in outputs.zip(slopes.iter().zip(weights.iter())) {
                    math::axpy(*slope, query, grad_k);
                    math::axpy(*weight, grad, grad_v);
                }
                heads.rope.rotate_back(i, grad_q);
            }
        }
        for (position, grad_k) in grads.k.chunks_exact_mut(dim).enumerate() {
            heads.rope.rotate_back(position, grad_k);
        }
        grads
    }
}

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let heads = &self.0;
        let q = values(q, q_layout, self.name())?;
        let k = values(k, k_layout, self.name())?;
        let v = values(v, v_layout, self.name())?;
        let outputs: Vec<(Group, Vec<f32>)> =
            heads.groups().into_par_iter().map(|group| (group, forward(heads, group, q, k, v))).collect();
        let mut out = vec![0f32; q.len()];
        for (group, output) in outputs {
            let per_head = group.sequence.length * heads.head_dim;
            for (head, output) in heads.query_heads(group).zip(output.chunks_exact(per_head)) {
                heads.scatter_head(output, heads.heads, group.sequence, head, &mut out);
            }
        }
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let heads = &self.0;
        let (grad_q, grad_k, grad_v) = with_values([q, k, v, grad], self.name(), |[q, k, v, grad]| {
            let gradients: Vec<(Group, GroupGradients)> = heads
                .groups()
                .into_par_iter()
                .map(|group| (group, backward(heads, group, q, k, v, grad)))
                .collect();
            let (mut grad_q, mut grad_k, mut grad_v) =
                (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
            for (group, gradients) in gradients {
                let Group { sequence, kv_head } = group;
                let per_head = sequence.length * heads.head_dim;
                for (head, gradient) in heads.query_heads(group).zip(gradients.q.chunks_exact(per_head)) {
                    heads.scatter_head(gradient, heads.heads, sequence, head, &mut grad_q);
                }
                heads.scatter_head(&gradients.k, heads.kv_heads, sequence, kv_head, &mut grad_k);
                heads.scatter_head(&gradients.v, heads.kv_heads, sequence, kv_head, &mut grad_v);
            }
            Ok((grad_q, grad_k, grad_v))
        })?;
        Ok((Some(tensor_like(grad_q, q)?), Some(tensor_like(grad_k, k)?), Some(tensor_like(grad_v, v)?)))
    }
}
