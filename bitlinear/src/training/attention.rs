//! Causal attention with grouped heads and rotary position embedding, a block of queries at a time.
//!
//! The forward is in f32: a rounding there would move int8 codes behind it, and what is trained would not be what is run.
//!
//! The score matrix never exists: the weights of a block of queries with all keys before it do, and the backward computes
//! them again from the logarithm of each row's sum, as FlashAttention does (arXiv 2205.14135, algorithms 1 and 4).
use std::cell::RefCell;
use std::sync::Arc;

use crate::math::{self, RopeTable};
use crate::products::{Matrix, Precision, multiply};
use crate::{pool, simd_fn};

/// Queries whose weights exist at once.
const QUERY_BLOCK: usize = 64;
/// Tokens that a task copies.
const COPY_CHUNK: usize = 64;

/// How rows of queries, keys and values divide into sequences and heads.
#[derive(Debug, Clone)]
pub struct Heads {
    /// Tokens in each sequence, at least one. Rows are these sequences, one after the other, each starting at position 0; no
    /// token attends to another sequence.
    pub sequences: Vec<usize>,
    /// Query heads; query head `i` attends to key/value head `i / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements in a head.
    pub head_dim: usize,
    /// Rotary embedding of `head_dim` elements for at least as many positions as the longest sequence has.
    pub rope: Arc<RopeTable>,
}

/// The rows of a sequence.
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    pub(crate) start: usize,
    pub(crate) length: usize,
}

/// What a task works on: a key/value head of one sequence with the query heads that attend to it.
#[derive(Clone, Copy)]
pub(crate) struct Group {
    pub(crate) sequence: Sequence,
    pub(crate) kv_head: usize,
}

impl Heads {
    /// Query heads for each key/value head.
    pub(crate) fn group_size(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens of all sequences; `usize::MAX` if they are more.
    pub(crate) fn tokens(&self) -> usize {
        self.sequences.iter().fold(0, |sum, length| sum.saturating_add(*length))
    }

    /// Whether the sequences make up these many rows, none of them empty or longer than the rotary embedding.
    pub(crate) fn cover(&self, rows: usize) -> bool {
        let lengths = 1..=self.rope.positions();
        self.sequences.iter().all(|length| lengths.contains(length)) && self.tokens() == rows
    }

    /// Where each sequence lies.
    fn spans(&self) -> impl Iterator<Item = Sequence> {
        self.sequences.iter().scan(0, |end, &length| {
            let start = *end;
            *end += length;
            Some(Sequence { start, length })
        })
    }

    /// The groups of all sequences.
    pub(crate) fn groups(&self) -> Vec<Group> {
        let groups = |sequence| (0..self.kv_heads).map(move |kv_head| Group { sequence, kv_head });
        self.spans().flat_map(groups).collect()
    }

    /// Copies one head of one sequence out of rows of `heads` heads: `[length, head_dim]`.
    pub(crate) fn gather(
        &self,
        rows: &[f32],
        heads: usize,
        sequence: Sequence,
        head: usize,
        out: &mut [f32],
    ) {
        let width = heads * self.head_dim;
        let rows = &rows[sequence.start * width..][..sequence.length * width];
        for (out, row) in out.chunks_exact_mut(self.head_dim).zip(rows.chunks_exact(width)) {
            out.copy_from_slice(&row[head * self.head_dim..][..self.head_dim]);
        }
    }

    /// The inverse of [`Heads::gather`] for all heads: `[heads, length, head_dim]` of each sequence to rows of heads.
    fn scatter(&self, by_head: &[f32], heads: usize, rows: &mut [f32]) {
        let (width, dim) = (heads * self.head_dim, self.head_dim);
        let spans: Vec<Sequence> = self.spans().collect();
        pool::for_chunks(rows, COPY_CHUNK * width, |chunk, rows| {
            for (token, row) in (chunk * COPY_CHUNK..).zip(rows.chunks_exact_mut(width)) {
                let Sequence { start, length } = spans[spans.partition_point(|span| span.start <= token) - 1];
                for (head, out) in row.chunks_exact_mut(dim).enumerate() {
                    let at = (start * heads + head * length + token - start) * dim;
                    out.copy_from_slice(&by_head[at..at + dim]);
                }
            }
        });
    }

    fn check(&self, q: &[f32], k: &[f32], v: &[f32]) {
        let tokens = q.len() / (self.heads * self.head_dim);
        assert!(
            self.cover(tokens),
            "sequences of {} tokens for {tokens} rows, or one that is empty or too long",
            self.tokens()
        );
        assert!(self.heads.is_multiple_of(self.kv_heads), "as many query heads for each key/value head");
        assert_eq!(q.len(), tokens * self.heads * self.head_dim, "queries");
        assert_eq!([k.len(), v.len()], [tokens * self.kv_heads * self.head_dim; 2], "keys and values");
    }
}

/// The values of each group, `width` for a token, which lie one after the other.
fn parts<'a>(
    groups: &'a [Group],
    width: usize,
    mut values: &'a mut [f32],
) -> impl Iterator<Item = &'a mut [f32]> {
    groups.iter().map(move |group| {
        let (part, rest) = std::mem::take(&mut values).split_at_mut(group.sequence.length * width);
        values = rest;
        part
    })
}

/// What a task needs besides its operands, kept from task to task.
#[derive(Default)]
struct Buffers {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    grad: Vec<f32>,
    weights: Vec<f32>,
    slopes: Vec<f32>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// `out = softmax(rope(q) rope(k)^T / sqrt(head_dim) + causal mask) v` for each sequence and head.
///
/// `log_sums` gets `ln Σ_j e^score` of each query, `[heads, length]` of each sequence, for the backward.
///
/// # Shapes
/// `q, out [tokens, heads * head_dim], k and v [tokens, kv_heads * head_dim]`; `scratch` is used as room.
///
/// # Panics
/// If the shapes do not fit `heads`, or its sequences are not the rows.
pub fn attention(
    heads: &Heads,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    log_sums: &mut Vec<f32>,
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    heads.check(q, k, v);
    assert_eq!(out.len(), q.len(), "outputs");
    let (dim, group_size, groups) = (heads.head_dim, heads.group_size(), heads.groups());
    scratch.resize(q.len(), 0.0);
    log_sums.resize(q.len() / dim, 0.0);
    let outputs = parts(&groups, group_size * dim, scratch).zip(parts(&groups, group_size, log_sums));
    pool::map(groups.iter().zip(outputs), |_, (group, (out, log_sums))| {
        let Group { sequence, kv_head } = *group;
        BUFFERS.with_borrow_mut(|buffers| {
            load_keys_and_values(heads, *group, k, v, buffers);
            let outputs = out.chunks_exact_mut(sequence.length * dim);
            let outputs = outputs.zip(log_sums.chunks_exact_mut(sequence.length));
            for (i, (out, log_sums)) in outputs.enumerate() {
                load(heads, q, heads.heads, sequence, kv_head * group_size + i, true, &mut buffers.q);
                forward(heads, buffers, log_sums, out);
            }
        });
    });
    heads.scatter(scratch, heads.heads, out);
}

/// Gradients of [`attention`]. With `p` the weights: `dp = dout v^T`, `ds = p (dp - Σ p dp) / sqrt(head_dim)`,
/// `dq = ds k`, `dk = ds^T q`, `dv = p^T dout`.
///
/// # Shapes
/// As [`attention`]; `grad` and `grad_q` are like `q`, `grad_k` and `grad_v` like `k`.
///
/// # Panics
/// If the shapes do not fit `heads`, or its sequences are not the rows.
pub fn attention_backward(
    heads: &Heads,
    [q, k, v]: [&[f32]; 3],
    log_sums: &[f32],
    grad: &[f32],
    scratch: &mut [Vec<f32>; 3],
    [grad_q, grad_k, grad_v]: [&mut [f32]; 3],
) {
    heads.check(q, k, v);
    assert!(grad.len() == q.len() && log_sums.len() * heads.head_dim == q.len());
    assert!(grad_q.len() == q.len() && grad_k.len() == k.len() && grad_v.len() == v.len());
    let (dim, group_size, groups) = (heads.head_dim, heads.group_size(), heads.groups());
    let [by_head_q, by_head_k, by_head_v] = scratch;
    by_head_q.resize(q.len(), 0.0);
    by_head_k.resize(k.len(), 0.0);
    by_head_v.resize(v.len(), 0.0);
    let outputs = parts(&groups, dim, by_head_k).zip(parts(&groups, dim, by_head_v));
    let outputs = parts(&groups, group_size * dim, by_head_q).zip(outputs);
    pool::map(groups.iter().zip(outputs), |_, (group, (grad_q, (grad_k, grad_v)))| {
        let Group { sequence, kv_head } = *group;
        BUFFERS.with_borrow_mut(|buffers| {
            load_keys_and_values(heads, *group, k, v, buffers);
            grad_k.fill(0.0);
            grad_v.fill(0.0);
            for (i, grad_q) in grad_q.chunks_exact_mut(sequence.length * dim).enumerate() {
                let head = kv_head * group_size + i;
                let first = sequence.start * heads.heads + head * sequence.length;
                let log_sums = &log_sums[first..][..sequence.length];
                load(heads, q, heads.heads, sequence, head, true, &mut buffers.q);
                load(heads, grad, heads.heads, sequence, head, false, &mut buffers.grad);
                backward(heads, buffers, log_sums, grad_q, grad_k, grad_v);
                rotate(heads, grad_q, false);
            }
            rotate(heads, grad_k, false);
        });
    });
    heads.scatter(by_head_q, heads.heads, grad_q);
    heads.scatter(by_head_k, heads.kv_heads, grad_k);
    heads.scatter(by_head_v, heads.kv_heads, grad_v);
}

fn load_keys_and_values(heads: &Heads, group: Group, k: &[f32], v: &[f32], buffers: &mut Buffers) {
    let Group { sequence, kv_head } = group;
    load(heads, k, heads.kv_heads, sequence, kv_head, true, &mut buffers.k);
    load(heads, v, heads.kv_heads, sequence, kv_head, false, &mut buffers.v);
}

/// One head of one sequence, turned to each token's position if `rotated`.
fn load(
    heads: &Heads,
    rows: &[f32],
    count: usize,
    sequence: Sequence,
    head: usize,
    rotated: bool,
    out: &mut Vec<f32>,
) {
    out.resize(sequence.length * heads.head_dim, 0.0);
    heads.gather(rows, count, sequence, head, out);
    if rotated {
        rotate(heads, out, true);
    }
}

simd_fn! {
    /// Turns the rows of a head to their positions, or back.
    fn rotate(heads: &Heads, rows: &mut [f32], forward: bool) {
        for (position, row) in rows.chunks_exact_mut(heads.head_dim).enumerate() {
            if forward { heads.rope.rotate(position, row) } else { heads.rope.rotate_back(position, row) }
        }
    }
}

/// `a b^T`: each row of `a` with each of `b`.
fn rows_by_rows(precision: Precision, a: &[f32], b: &[f32], dim: usize, out: &mut Vec<f32>) {
    out.resize(a.len() / dim * (b.len() / dim), 0.0);
    multiply(precision, Matrix::new(a, dim), Matrix::new(b, dim).t(), 0.0, out);
}

/// One head: outputs and log-sums of all its queries.
fn forward(heads: &Heads, buffers: &mut Buffers, log_sums: &mut [f32], out: &mut [f32]) {
    let dim = heads.head_dim;
    let Buffers { q, k, v, weights, .. } = buffers;
    let blocks = q.chunks(QUERY_BLOCK * dim).zip(log_sums.chunks_mut(QUERY_BLOCK));
    for (block, ((queries, log_sums), out)) in blocks.zip(out.chunks_mut(QUERY_BLOCK * dim)).enumerate() {
        let first = block * QUERY_BLOCK;
        let keys = first + log_sums.len();
        rows_by_rows(Precision::F32, queries, &k[..keys * dim], dim, weights);
        softmax_rows(weights, keys, first, 1.0 / (dim as f32).sqrt(), log_sums);
        let values = Matrix::new(&v[..keys * dim], dim);
        multiply(Precision::F32, Matrix::new(weights, keys), values, 0.0, out);
    }
}

/// One head: writes `grad_q`, adds to `grad_k` and `grad_v`; queries and keys are turned to their positions.
fn backward(
    heads: &Heads,
    buffers: &mut Buffers,
    log_sums: &[f32],
    grad_q: &mut [f32],
    grad_k: &mut [f32],
    grad_v: &mut [f32],
) {
    let dim = heads.head_dim;
    let Buffers { q, k, v, grad, weights, slopes } = buffers;
    let inputs = q.chunks(QUERY_BLOCK * dim).zip(grad.chunks(QUERY_BLOCK * dim));
    let inputs = inputs.zip(log_sums.chunks(QUERY_BLOCK));
    let blocks = inputs.zip(grad_q.chunks_mut(QUERY_BLOCK * dim));
    for (block, (((queries, grad), log_sums), grad_q)) in blocks.enumerate() {
        let first = block * QUERY_BLOCK;
        let keys = first + log_sums.len();
        rows_by_rows(Precision::F32, queries, &k[..keys * dim], dim, weights);
        rows_by_rows(Precision::Bf16, grad, &v[..keys * dim], dim, slopes);
        let scale = 1.0 / (dim as f32).sqrt();
        slope_rows(weights, slopes, keys, first, scale, log_sums);
        let (weights, slopes) = (Matrix::new(weights, keys), Matrix::new(slopes, keys));
        multiply(Precision::Bf16, slopes, Matrix::new(&k[..keys * dim], dim), 0.0, grad_q);
        multiply(Precision::Bf16, slopes.t(), Matrix::new(queries, dim), 1.0, &mut grad_k[..keys * dim]);
        multiply(Precision::Bf16, weights.t(), Matrix::new(grad, dim), 1.0, &mut grad_v[..keys * dim]);
    }
}

simd_fn! {
    /// Scores of queries `first..` with keys `0..keys` become weights: each row its softmax up to its own key, then zeros (the
    /// causal mask).
    fn softmax_rows(scores: &mut [f32], keys: usize, first: usize, scale: f32, log_sums: &mut [f32]) {
        for ((i, row), log_sum) in scores.chunks_exact_mut(keys).enumerate().zip(log_sums) {
            let (seen, hidden) = row.split_at_mut(first + i + 1);
            seen.iter_mut().for_each(|score| *score *= scale);
            *log_sum = math::softmax(seen);
            hidden.fill(0.0);
        }
    }
}

simd_fn! {
    /// Scores become weights, `dout v^T` becomes the scores' gradient.
    fn slope_rows(
        weights: &mut [f32],
        slopes: &mut [f32],
        keys: usize,
        first: usize,
        scale: f32,
        log_sums: &[f32],
    ) {
        let rows = weights.chunks_exact_mut(keys).zip(slopes.chunks_exact_mut(keys));
        for ((i, (weights, slopes)), log_sum) in rows.enumerate().zip(log_sums) {
            let seen = first + i + 1;
            for weight in &mut weights[..seen] {
                *weight = math::exp(*weight * scale - log_sum);
            }
            // Of these very weights and slopes: where all slopes are nearly alike, their differences count.
            let mean = math::dot(&weights[..seen], &slopes[..seen]);
            for (weight, slope) in weights[..seen].iter().zip(&mut slopes[..seen]) {
                *slope = weight * (*slope - mean) * scale;
            }
            weights[seen..].fill(0.0);
            slopes[seen..].fill(0.0);
        }
    }
}
