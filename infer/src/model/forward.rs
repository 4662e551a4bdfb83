//! The forward pass: tokens in, logits out.
//!
//! The functions of `bitlinear::math` in the order that the trainer calls them, row by row. A row's result depends on
//! neither the number of threads nor on the rows beside it, so a prompt read at once, in pieces or token by token
//! gives the same bits. Long prompts run in pieces of [`CHUNK`] tokens, which bounds the memory between the layers.

use bitlinear::kernels::{self, QuantizedRows};
use bitlinear::math::{self, Activation, RopeTable};
use bitlinear::simd_fn;
use rayon::prelude::*;

use super::{KvCache, Layer, LayerCache, Model, ModelError, Projection};

/// Tokens that pass the layers at once.
const CHUNK: usize = 256;
/// Multiply-adds that are worth a thread of their own.
const GRAIN: usize = 1 << 15;
/// Rows that a weight row of a dense product is used for while it is in the first-level cache.
const ROW_TILE: usize = 4;
/// Outputs that a task of a dense product computes for a single row.
const OUT_TILE: usize = 64;

/// Which tokens' logits a forward pass returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Of every token: `[tokens, vocab_size]`.
    All,
    /// Of the last token: `[vocab_size]`.
    Last,
    /// None: the tokens only enter the cache.
    None,
}

/// Buffers between the steps of a layer, kept from token to token.
#[derive(Debug, Clone, Default)]
pub(super) struct Scratch {
    rows: QuantizedRows,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    out: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
}

impl Model {
    /// Reads tokens after those in the cache and returns logits: `head · RMSNorm(hidden)`.
    ///
    /// # Shapes
    /// `[tokens] -> [tokens, vocab_size]`, `[vocab_size]` or nothing, as `which` says; no tokens give nothing.
    ///
    /// # Errors
    /// An id is not in the vocabulary, the cache has no room or belongs to another model, or no kernel can run. The
    /// cache then holds the whole pieces that were read before.
    pub fn forward(&self, ids: &[u32], cache: &mut KvCache, which: Logits) -> Result<Vec<f32>, ModelError> {
        self.check(ids, cache)?;
        let mut logits = Vec::new();
        let mut rest = ids.len();
        for chunk in ids.chunks(CHUNK) {
            rest -= chunk.len();
            let hidden = self.advance(chunk, cache)?;
            match which {
                Logits::All => logits.extend(self.logits(&hidden)),
                Logits::Last if rest == 0 => {
                    logits = self.logits(&hidden[hidden.len() - self.config.hidden_size..]);
                }
                Logits::Last | Logits::None => {}
            }
        }
        Ok(logits)
    }

    /// Reads tokens after those in the cache and returns what the head sees: the last norm's output.
    ///
    /// # Shapes
    /// `[tokens] -> [tokens, hidden_size]`
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn hidden(&self, ids: &[u32], cache: &mut KvCache) -> Result<Vec<f32>, ModelError> {
        self.check(ids, cache)?;
        let mut hidden = Vec::with_capacity(ids.len() * self.config.hidden_size);
        for chunk in ids.chunks(CHUNK) {
            hidden.extend(self.advance(chunk, cache)?);
        }
        Ok(hidden)
    }

    /// The head: `logit[t, v] = head[v] · hidden[t]`, of whole rows of [`Model::hidden`].
    ///
    /// # Shapes
    /// `[tokens, hidden_size] -> [tokens, vocab_size]`
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        let rows = hidden.len() / self.config.hidden_size;
        let mut logits = vec![0.0; rows * self.config.vocab_size];
        dense(hidden, self.config.hidden_size, self.head(), &mut logits);
        logits
    }

    fn check(&self, ids: &[u32], cache: &KvCache) -> Result<(), ModelError> {
        let vocab_size = self.config.vocab_size;
        if let Some(position) = ids.iter().position(|id| *id as usize >= vocab_size) {
            return Err(ModelError::Token { id: ids[position], position, vocab_size });
        }
        if cache.shape != KvCache::shape(&self.config) || cache.layers.len() != self.config.num_hidden_layers
        {
            return Err(ModelError::ForeignCache);
        }
        if ids.len() > cache.capacity - cache.len {
            return Err(ModelError::CacheFull {
                tokens: ids.len(),
                used: cache.len,
                capacity: cache.capacity,
            });
        }
        Ok(())
    }

    /// Takes checked ids through all layers and the last norm.
    fn advance(&self, ids: &[u32], cache: &mut KvCache) -> Result<Vec<f32>, ModelError> {
        let KvCache { capacity, len, rope, layers, scratch, .. } = cache;
        if rope.positions() < *len + ids.len() {
            let positions = (*len + ids.len()).next_power_of_two().min(*capacity);
            *rope = RopeTable::new(self.config.head_dim, positions, self.config.rope_theta);
        }
        let width = self.config.hidden_size;
        let embed = &self.weights.embed_tokens;
        let mut x: Vec<f32> = Vec::with_capacity(ids.len() * width);
        for id in ids {
            x.extend_from_slice(&embed[*id as usize * width..][..width]);
        }
        for (layer, cache) in self.weights.layers.iter().zip(layers) {
            self.attention_block(layer, cache, rope, *len, &mut x, scratch)?;
            self.mlp_block(layer, &mut x, scratch)?;
        }
        *len += ids.len();
        let mut normed = Vec::new();
        self.norm(&x, &self.weights.norm, &mut normed);
        Ok(normed)
    }

    /// `x += o_proj(sub_norm(attention(norm(x))))`, for the tokens from position `start` on.
    fn attention_block(
        &self,
        layer: &Layer,
        cache: &mut LayerCache,
        rope: &RopeTable,
        start: usize,
        x: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), ModelError> {
        let Scratch { rows, normed, q, k, v, mixed, out, .. } = scratch;
        let (hidden, width, kv_width) =
            (self.config.hidden_size, self.config.attention_width(), self.config.kv_width());
        let tokens = x.len() / hidden;
        self.norm(x, &layer.input_layernorm, normed);
        let projections = [
            (&layer.q_proj, resized(q, tokens * width)),
            (&layer.k_proj, resized(k, tokens * kv_width)),
            (&layer.v_proj, resized(v, tokens * kv_width)),
        ];
        project(normed, hidden, rows, projections)?;
        for (rotated, width) in [(&mut *q, width), (&mut *k, kv_width)] {
            for_chunks(rotated, width, width * 4, |t, row| rotate_row(rope, start + t, row));
        }
        // What a failed call may have left behind the end goes.
        cache.keys.truncate(start * kv_width);
        cache.values.truncate(start * kv_width);
        cache.keys.extend_from_slice(k);
        cache.values.extend_from_slice(v);
        self.attention(q, cache, start, resized(mixed, tokens * width));
        let input = match &layer.attn_sub_norm {
            Some(weight) => {
                self.norm(mixed, weight, normed);
                &*normed
            }
            None => &*mixed,
        };
        project(input, width, rows, [(&layer.o_proj, resized(out, x.len()))])?;
        add(x, out);
        Ok(())
    }

    /// `mixed[t, h] = softmax(q[t, h] · keys[..= t] / sqrt(head_dim)) · values[..= t]`, each head with its group's keys.
    fn attention(&self, q: &[f32], cache: &LayerCache, start: usize, mixed: &mut [f32]) {
        let (heads, head_dim) = (self.config.num_attention_heads, self.config.head_dim);
        let (group, stride) = (heads / self.config.num_key_value_heads, self.config.kv_width());
        let longest = start + mixed.len() / (heads * head_dim);
        for_chunks(mixed, head_dim, longest * head_dim * 2, |index, out| {
            let (token, head) = (index / heads, index % heads);
            let offset = head / group * head_dim;
            let query = &q[index * head_dim..][..head_dim];
            let (keys, values) = (&cache.keys[offset..], &cache.values[offset..]);
            attend(query, keys, values, stride, &mut vec![0.0; start + token + 1], out);
        });
    }

    /// `x += down_proj(sub_norm(act(gate_proj(norm(x))) * up_proj(norm(x))))`
    fn mlp_block(&self, layer: &Layer, x: &mut [f32], scratch: &mut Scratch) -> Result<(), ModelError> {
        let Scratch { rows, normed, out, gate, up, inner, .. } = scratch;
        let (hidden, width, act) =
            (self.config.hidden_size, self.config.intermediate_size, self.config.hidden_act);
        let len = x.len() / hidden * width;
        self.norm(x, &layer.post_attention_layernorm, normed);
        let projections = [(&layer.gate_proj, resized(gate, len)), (&layer.up_proj, resized(up, len))];
        project(normed, hidden, rows, projections)?;
        for_chunks(resized(inner, len), width, width * 16, |t, out| {
            let (gate, up) = (&gate[t * width..][..width], &up[t * width..][..width]);
            gate_row(act, gate, up, out);
        });
        let input = match &layer.ffn_sub_norm {
            Some(weight) => {
                self.norm(inner, weight, normed);
                &*normed
            }
            None => &*inner,
        };
        project(input, width, rows, [(&layer.down_proj, resized(out, x.len()))])?;
        add(x, out);
        Ok(())
    }

    /// RMSNorm of every row.
    fn norm(&self, x: &[f32], weight: &[f32], out: &mut Vec<f32>) {
        let (width, eps) = (weight.len(), self.config.rms_norm_eps);
        for_chunks(resized(out, x.len()), width, width * 4, |t, out| {
            norm_row(&x[t * width..][..width], weight, eps, out);
        });
    }
}

/// Products of rows of activations with several weights; the ternary ones share one quantization of the rows.
fn project<const N: usize>(
    x: &[f32],
    columns: usize,
    rows: &mut QuantizedRows,
    products: [(&Projection, &mut [f32]); N],
) -> Result<(), ModelError> {
    if products.iter().any(|(weight, _)| matches!(weight, Projection::Ternary(_))) {
        rows.fill(x, columns);
    }
    for (weight, out) in products {
        match weight {
            Projection::Ternary(weight) => kernels::matmul(rows, weight, out)?,
            Projection::Dense(weight) => dense(x, columns, weight, out),
        }
    }
    Ok(())
}

/// `out[r, o] = weight[o] · x[r]`, with `weight` `[outs, columns]` and `x` `[rows, columns]`.
fn dense(x: &[f32], columns: usize, weight: &[f32], out: &mut [f32]) {
    let outs = weight.len() / columns;
    if x.len() == columns {
        for_chunks(out, OUT_TILE, OUT_TILE * columns, |tile, out| {
            let first = tile * OUT_TILE * columns;
            dense_tile(x, columns, &weight[first..first + out.len() * columns], out);
        });
    } else {
        for_chunks(out, ROW_TILE * outs, ROW_TILE * weight.len(), |tile, out| {
            let first = tile * ROW_TILE * columns;
            dense_tile(&x[first..first + out.len() / outs * columns], columns, weight, out);
        });
    }
}

simd_fn! {
    /// A part of [`dense`]: whole rows of `x` with whole rows of `weight`, each of which then serves all rows of `x`.
    fn dense_tile(x: &[f32], columns: usize, weight: &[f32], out: &mut [f32]) {
        let outs = weight.len() / columns;
        for (o, weight) in weight.chunks_exact(columns).enumerate() {
            for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(outs)) {
                out[o] = math::dot(weight, x);
            }
        }
    }
}

simd_fn! {
    fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        math::rms_norm(x, weight, eps, out)
    }
}

simd_fn! {
    fn rotate_row(rope: &RopeTable, position: usize, row: &mut [f32]) {
        rope.rotate(position, row)
    }
}

simd_fn! {
    fn gate_row(act: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        act.gated(gate, up, out)
    }
}

simd_fn! {
    /// One head of one token; `weights` has room for one of each position up to the token's own.
    fn attend(query: &[f32], keys: &[f32], values: &[f32], stride: usize, weights: &mut [f32], out: &mut [f32]) {
        math::attention_weights(query, keys, stride, weights);
        math::weighted_sum(weights, values, stride, out);
    }
}

/// `x += y`
fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// The buffer at a given length; what it held before is of no interest.
fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// Calls `work(i, chunk i)` for every chunk of `width` values, each worth `cost` multiply-adds: on several threads
/// where that pays. `width` is a size of a valid config, so it is not zero.
fn for_chunks(out: &mut [f32], width: usize, cost: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let least = (GRAIN / cost.max(1)).max(1);
    if out.len() / width <= least {
        out.chunks_mut(width).enumerate().for_each(|(index, chunk)| work(index, chunk));
    } else {
        let chunks = out.par_chunks_mut(width).enumerate().with_min_len(least);
        chunks.for_each(|(index, chunk)| work(index, chunk));
    }
}
