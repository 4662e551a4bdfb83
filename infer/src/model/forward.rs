//! The forward pass: tokens in, logits out.
//!
//! The functions of `bitlinear::math` in the order that the trainer calls them, row by row. A row's result depends on
//! neither the number of threads nor on the rows beside it, so a prompt read at once, in pieces or token by token
//! gives the same bits. Long prompts run in pieces of [`CHUNK`] tokens, which bounds the memory between the layers.

use bitlinear::kernels::{Bits, Kernel, QuantizedRows, int_matmul, matmul_all};
use bitlinear::math::{self, Activation, RopeTable, Widen};
use bitlinear::{pool, simd_fn};

use super::cache::{Heads, LayerCache};
use super::{F32Data, KvCache, Layer, Model, ModelError, Part, Parts, Projection, with_table};

/// Tokens that pass the layers at once.
const CHUNK: usize = 512;
/// Multiply-adds that are worth a task of their own.
const GRAIN: usize = 1 << 15;
/// Rows of activations that a tile of a dense product is used for while it is in the cache.
const ROW_TILE: usize = 8;
/// Outputs of a tile of a dense product.
const OUT_TILE: usize = 32;

/// How far below the largest one, in nats, an int4 head's logits are computed anew: what lies lower has about e^-8 of the
/// likeliest token's probability at most.
const REFINED_NATS: f32 = 8.0;

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
    /// Inputs of width `hidden_size`, and those of width `intermediate_size`: of one width each, they stay as they are.
    hidden: Inputs,
    inner: Inputs,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    out: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    pub(super) parts: Option<Parts>,
}

impl Scratch {
    fn begin(&mut self) {
        if let Some(parts) = &mut self.parts {
            parts.begin();
        }
    }

    fn end(&mut self, part: Part) {
        if let Some(parts) = &mut self.parts {
            parts.end(part);
        }
    }
}

/// What goes into projections: quantized for ternary weights, as it is for dense ones, both where they share it.
#[derive(Debug, Clone, Default)]
struct Inputs {
    quantized: QuantizedRows,
    dense: Vec<f32>,
    columns: usize,
}

impl Inputs {
    /// Takes `rows` rows of `columns` values, each written by `make`, in the forms that the weights need.
    fn fill<const N: usize>(
        &mut self,
        weights: [&Projection; N],
        rows: usize,
        columns: usize,
        make: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        self.columns = columns;
        let ternary = weights.iter().filter(|weight| matches!(weight, Projection::Ternary(_))).count();
        if ternary == N {
            return self.quantized.fill_with(rows, columns, make);
        }
        self.dense.resize(rows * columns, 0.0);
        for_chunks(&mut self.dense, columns, columns * 4, make);
        if ternary > 0 {
            let dense = &self.dense;
            self.quantized.fill_with(rows, columns, |row, out| {
                out.copy_from_slice(&dense[row * columns..][..columns]);
            });
        }
    }

    /// Products with several weights; the ternary ones share one dispatch.
    fn project<const N: usize>(&self, products: [(&Projection, &mut [f32]); N]) -> Result<(), ModelError> {
        let mut ternary = Vec::with_capacity(N);
        for (weight, out) in products {
            match weight {
                Projection::Ternary(weight) => ternary.push((weight, out)),
                Projection::Dense(weight) => dense(&self.dense, self.columns, weight, out),
            }
        }
        Ok(matmul_all(Kernel::active()?, &self.quantized, &mut ternary)?)
    }
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
                Logits::All => logits.extend(self.logits(&hidden)?),
                Logits::Last if rest == 0 => {
                    logits = self.logits(&hidden[hidden.len() - self.config.hidden_size..])?;
                }
                Logits::Last | Logits::None => {}
            }
            cache.scratch.end(Part::Head);
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
    /// With an int4 head that is rounded, except for the tokens within 8 nats of the likeliest one, by the rounded
    /// logits: theirs are exact.
    ///
    /// # Shapes
    /// `[tokens, hidden_size] -> [tokens, vocab_size]`
    ///
    /// # Errors
    /// No kernel can run.
    pub fn logits(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        let width = self.config.hidden_size;
        let mut logits = vec![0.0; hidden.len() / width * self.config.vocab_size];
        let Some(rounded) = &self.int_head else {
            with_table!(self.head(), head => dense(hidden, width, head, &mut logits));
            return Ok(logits);
        };
        int_matmul(Kernel::active()?, hidden, rounded, &mut logits)?;
        if rounded.bits() == Bits::Four {
            let vocab_size = self.config.vocab_size;
            for (logits, hidden) in logits.chunks_exact_mut(vocab_size).zip(hidden.chunks_exact(width)) {
                with_table!(self.head(), head => refine(logits, hidden, head));
            }
        }
        Ok(logits)
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
        scratch.begin();
        if rope.positions() < *len + ids.len() {
            let positions = (*len + ids.len()).next_power_of_two().min(*capacity);
            *rope = RopeTable::new(self.config.head_dim, positions, self.config.rope_theta);
        }
        let width = self.config.hidden_size;
        let mut x = vec![0.0; ids.len() * width];
        for (id, x) in ids.iter().zip(x.chunks_exact_mut(width)) {
            self.weights.embed_tokens.row(*id as usize, x);
        }
        scratch.end(Part::Other);
        for (layer, cache) in self.weights.layers.iter().zip(layers) {
            self.attention_block(layer, cache, rope, *len, &mut x, scratch)?;
            self.mlp_block(layer, &mut x, scratch)?;
        }
        *len += ids.len();
        let (norm, eps) = (&self.weights.norm, self.config.rms_norm_eps);
        for_chunks(&mut x, width, width * 4, |_, x| norm_in_place(x, norm, eps));
        scratch.end(Part::NormQuantize);
        Ok(x)
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
        let (config, eps) = (&self.config, self.config.rms_norm_eps);
        let (hidden, width, kv_width) = (config.hidden_size, config.attention_width(), config.kv_width());
        let tokens = x.len() / hidden;
        scratch.hidden.fill([&layer.q_proj, &layer.k_proj, &layer.v_proj], tokens, hidden, |t, out| {
            norm_row(&x[t * hidden..][..hidden], &layer.input_layernorm, eps, out);
        });
        scratch.end(Part::NormQuantize);
        scratch.hidden.project([
            (&layer.q_proj, resized(&mut scratch.q, tokens * width)),
            (&layer.k_proj, resized(&mut scratch.k, tokens * kv_width)),
            (&layer.v_proj, resized(&mut scratch.v, tokens * kv_width)),
        ])?;
        for (bias, out) in
            layer.qkv_bias.iter().flatten().zip([&mut scratch.q, &mut scratch.k, &mut scratch.v])
        {
            for_chunks(out, bias.len(), bias.len(), |_, row| add_row(row, bias));
        }
        scratch.end(Part::Qkv);
        let [q_norm, k_norm] = layer.qk_norm.as_ref().map_or([None; 2], |norms| norms.each_ref().map(Some));
        self.place(q_norm, rope, start, width, &mut scratch.q);
        self.place(k_norm, rope, start, kv_width, &mut scratch.k);
        cache.append(config.head_dim, start, [&scratch.k, &scratch.v]);
        scratch.end(Part::Other);
        let mixed = resized(&mut scratch.mixed, tokens * width);
        match cache {
            LayerCache::F32(heads) => self.attention(&scratch.q, heads, start, mixed),
            LayerCache::F16(heads) => self.attention(&scratch.q, heads, start, mixed),
        }
        scratch.end(Part::Attention);
        let mixed = &scratch.mixed;
        // As wide as the residual stream where there is a sub-norm, and nearly always.
        scratch.hidden.fill([&layer.o_proj], tokens, width, |t, out| {
            let row = &mixed[t * width..][..width];
            match &layer.attn_sub_norm {
                Some(weight) => norm_row(row, weight, eps, out),
                None => out.copy_from_slice(row),
            }
        });
        scratch.end(Part::NormQuantize);
        scratch.hidden.project([(&layer.o_proj, resized(&mut scratch.out, x.len()))])?;
        scratch.end(Part::Output);
        add(x, &scratch.out);
        scratch.end(Part::Other);
        Ok(())
    }

    /// Queries or keys with their norm and at their positions: `rope(norm(x[t, head]))` for tokens from `start` on.
    fn place(&self, norm: Option<&F32Data>, rope: &RopeTable, start: usize, width: usize, x: &mut [f32]) {
        let (head_dim, eps) = (self.config.head_dim, self.config.rms_norm_eps);
        for_chunks(x, width, width * 4, |t, row| {
            if let Some(weight) = norm {
                row.chunks_exact_mut(head_dim).for_each(|head| norm_in_place(head, weight, eps));
            }
            rotate_row(rope, start + t, row);
        });
    }

    /// `mixed[t, h] = softmax(q[t, h] · keys[..= t] / sqrt(head_dim)) · values[..= t]`, each head with its group's keys.
    fn attention<T: Widen>(&self, q: &[f32], cache: &Heads<T>, start: usize, mixed: &mut [f32]) {
        let (heads, head_dim) = (self.config.num_attention_heads, self.config.head_dim);
        let group = heads / self.config.num_key_value_heads;
        let tokens = mixed.len() / (heads * head_dim);
        // Heads of a group share what they read: as many together as leave a few tasks for each thread.
        let enough = |together: &usize| {
            group.is_multiple_of(*together) && tokens * heads / together >= 4 * pool::threads()
        };
        let together = (1..=group).rev().find(enough).unwrap_or(1);
        let width = together * head_dim;
        for_chunks(mixed, width, (start + tokens) * width * 2, |index, out| {
            let (token, head) = (index * together / heads, index * together % heads);
            let (keys, values) = (&cache.keys[head / group], &cache.values[head / group]);
            let mut weights = vec![0.0; (start + token + 1) * together];
            attend(&q[index * width..][..width], head_dim, keys, values, tokens == 1, &mut weights, out);
        });
    }

    /// `x += down_proj(sub_norm(act(gate_proj(norm(x))) * up_proj(norm(x))))`
    fn mlp_block(&self, layer: &Layer, x: &mut [f32], scratch: &mut Scratch) -> Result<(), ModelError> {
        let (config, eps, act) = (&self.config, self.config.rms_norm_eps, self.config.hidden_act);
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        let tokens = x.len() / hidden;
        scratch.hidden.fill([&layer.gate_proj, &layer.up_proj], tokens, hidden, |t, out| {
            norm_row(&x[t * hidden..][..hidden], &layer.post_attention_layernorm, eps, out);
        });
        scratch.end(Part::NormQuantize);
        scratch.hidden.project([
            (&layer.gate_proj, resized(&mut scratch.gate, tokens * width)),
            (&layer.up_proj, resized(&mut scratch.up, tokens * width)),
        ])?;
        scratch.end(Part::GateUp);
        let (gate, up) = (&scratch.gate, &scratch.up);
        scratch.inner.fill([&layer.down_proj], tokens, width, |t, out| {
            gate_row(act, &gate[t * width..][..width], &up[t * width..][..width], out);
            if let Some(weight) = &layer.ffn_sub_norm {
                norm_in_place(out, weight, eps);
            }
        });
        scratch.end(Part::NormQuantize);
        scratch.inner.project([(&layer.down_proj, resized(&mut scratch.out, x.len()))])?;
        scratch.end(Part::Down);
        add(x, &scratch.out);
        scratch.end(Part::Other);
        Ok(())
    }
}

/// Replaces the logits of the likeliest tokens by exact ones.
fn refine<T: Widen>(logits: &mut [f32], hidden: &[f32], head: &[T]) {
    let least = maximum(logits) - REFINED_NATS;
    let ids: Vec<usize> = (0..logits.len()).filter(|id| logits[*id] >= least).collect();
    let mut exact = vec![0.0; ids.len()];
    for_chunks(&mut exact, 1, hidden.len(), |index, out| {
        dense_tile(hidden, hidden.len(), &head[ids[index] * hidden.len()..][..hidden.len()], out);
    });
    for (id, exact) in ids.into_iter().zip(exact) {
        logits[id] = exact;
    }
}

simd_fn! {
    fn maximum(x: &[f32]) -> f32 {
        math::maximum(x)
    }
}

/// `out[r, o] = weight[o] · x[r]`, with `weight` `[outs, columns]` and `x` `[rows, columns]`.
fn dense<T: Widen>(x: &[f32], columns: usize, weight: &[T], out: &mut [f32]) {
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
    /// A part of [`dense`]: whole rows of `x` with whole rows of `weight`, a tile of which then serves all rows of `x`.
    fn dense_tile<T: Widen>(x: &[f32], columns: usize, weight: &[T], out: &mut [f32]) {
        let outs = weight.len() / columns;
        for first in (0..outs).step_by(OUT_TILE) {
            let tile = first..outs.min(first + OUT_TILE);
            for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(outs)) {
                math::dots(&weight[first * columns..], columns, x, &mut out[tile.clone()]);
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
    fn norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
        math::rms_norm_in_place(x, weight, eps)
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
    /// [`math::attention`], compiled for each instruction set.
    fn attend<T: Widen>(
        queries: &[f32],
        head_dim: usize,
        keys: &[T],
        values: &[T],
        cold: bool,
        weights: &mut [f32],
        out: &mut [f32],
    ) {
        math::attention(queries, head_dim, keys, values, cold, weights, out)
    }
}

simd_fn! {
    fn add_row(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }
}

/// `x += y`
fn add(x: &mut [f32], y: &[f32]) {
    for_chunks(x, GRAIN, GRAIN, |index, x| add_row(x, &y[index * GRAIN..]));
}

/// The buffer at a given length; what it held before is of no interest.
fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

/// Calls `work(i, chunk i)` for every chunk of `width` values, each worth `cost` multiply-adds: on several threads
/// where that pays. `width` is a size of a valid config, so it is not zero.
fn for_chunks(out: &mut [f32], width: usize, cost: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let at_once = (GRAIN / cost.max(1)).max(1);
    pool::for_chunks(out, width * at_once, |first, out| {
        out.chunks_mut(width).enumerate().for_each(|(index, chunk)| work(first * at_once + index, chunk));
    });
}
