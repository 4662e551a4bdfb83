//! Attention of one position: the same bits whether heads, positions and halves come alone or together.

use super::{Widen, axpy, dots, softmax};

/// Attention weights of one query over the first `weights.len()` keys: `softmax(query . key_j / sqrt(head_dim))`.
///
/// Key `j` is `keys[j * stride ..][.. query.len()]`. Source: "Attention Is All You Need" (arXiv 1706.03762, equation 1).
///
/// # Panics
/// If `keys` is too short.
#[inline(always)]
pub fn attention_weights(query: &[f32], keys: &[f32], stride: usize, weights: &mut [f32]) {
    let scale = 1.0 / (query.len() as f32).sqrt();
    dots(keys, stride, query, weights);
    weights.iter_mut().for_each(|weight| *weight *= scale);
    softmax(weights);
}

/// Positions whose keys, then values, serve all heads of [`attention`] while they are in the first-level cache.
const POSITION_TILE: usize = 32;

/// Attention of some heads that share keys and values, for one position: for each head what [`attention_weights`] and
/// [`weighted_sum`] give, bit for bit.
///
/// # Shapes
/// `queries [heads, head_dim], keys [.., head_dim], values [.., head_dim], weights [heads, positions] (written)
/// -> out [heads, head_dim]`
///
/// `cold` says that keys and values are not in the cache, and so are worth asking for ahead.
///
/// # Panics
/// If keys or values are fewer than positions, or `head_dim` is 0.
#[inline(always)]
pub fn attention<T: Widen>(
    queries: &[f32],
    head_dim: usize,
    keys: &[T],
    values: &[T],
    cold: bool,
    weights: &mut [f32],
    out: &mut [f32],
) {
    let positions = weights.len() / (queries.len() / head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut scratch = Vec::new();
    let tiles = || {
        let starts = (0..positions).step_by(POSITION_TILE);
        starts.map(move |first| first..positions.min(first + POSITION_TILE))
    };
    for tile in tiles() {
        let keys = tile_rows(keys, head_dim, &tile, cold, &mut scratch);
        for (query, weights) in queries.chunks_exact(head_dim).zip(weights.chunks_exact_mut(positions)) {
            dots(keys, head_dim, query, &mut weights[tile.clone()]);
            weights[tile.clone()].iter_mut().for_each(|weight| *weight *= scale);
        }
    }
    for weights in weights.chunks_exact_mut(positions) {
        softmax(weights);
    }
    out.fill(0.0);
    for tile in tiles() {
        let values = tile_rows(values, head_dim, &tile, cold, &mut scratch);
        for (weights, out) in weights.chunks_exact(positions).zip(out.chunks_exact_mut(head_dim)) {
            add_weighted(&weights[tile.clone()], values, head_dim, out);
        }
    }
}

/// The rows of a tile as f32; those of the next one are asked for if they are `cold`.
#[inline(always)]
fn tile_rows<'a, T: Widen>(
    rows: &'a [T],
    width: usize,
    tile: &std::ops::Range<usize>,
    cold: bool,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    if cold {
        prefetch(rows, tile.end * width..(tile.end + POSITION_TILE) * width);
    }
    T::widen_all(&rows[tile.start * width..tile.end * width], scratch)
}

/// Asks for what will be read soon: what a new token sees of the cache lies in memory that weights have passed through the
/// processor's caches since, and a page at a time the processor notices too late.
#[inline(always)]
fn prefetch<T>(values: &[T], range: std::ops::Range<usize>) {
    #[cfg(target_arch = "x86_64")]
    for line in values[range.start.min(values.len())..range.end.min(values.len())]
        .chunks((64 / size_of::<T>()).max(1))
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, part of every x86-64; it reads and writes nothing that the program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, range);
}

/// `out = Σ_j weights_j * rows_j`, where row `j` is `rows[j * stride ..][.. out.len()]`.
///
/// # Panics
/// If `rows` is too short.
#[inline(always)]
pub fn weighted_sum(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    out.fill(0.0);
    add_weighted(weights, rows, stride, out);
}

/// `out += Σ_j weights_j * rows_j`, one `j` after the other.
#[inline(always)]
fn add_weighted(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    // As many elements at a time as stay in registers while all rows pass.
    let done = add_chunks::<128>(weights, rows, stride, 0, out);
    let done = add_chunks::<32>(weights, rows, stride, done, out);
    let done = add_chunks::<8>(weights, rows, stride, done, out);
    let rest = &mut out[done..];
    if !rest.is_empty() {
        for (j, weight) in weights.iter().enumerate() {
            axpy(*weight, &rows[j * stride + done..][..rest.len()], rest);
        }
    }
}

/// [`add_weighted`] for the whole chunks of `N` elements from `first` on; returns where they end.
#[inline(always)]
fn add_chunks<const N: usize>(
    weights: &[f32],
    rows: &[f32],
    stride: usize,
    first: usize,
    out: &mut [f32],
) -> usize {
    let (chunks, _) = out[first..].as_chunks_mut::<N>();
    let mut at = first;
    for out in chunks {
        let mut acc = *out;
        for (j, weight) in weights.iter().enumerate() {
            let row = &rows[j * stride + at..][..N];
            for lane in 0..N {
                acc[lane] = weight.mul_add(row[lane], acc[lane]);
            }
        }
        *out = acc;
        at += N;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_together_give_the_bits_of_each_alone() {
        for (heads, head_dim, positions) in [(1, 8, 1), (3, 80, 33), (4, 128, 100)] {
            let stride = head_dim;
            let wave = |len: usize, f: f32| (0..len).map(|i| (i as f32 * f).sin()).collect::<Vec<f32>>();
            let (queries, keys) = (wave(heads * head_dim, 0.7), wave(positions * stride, 0.3));
            let values = wave(positions * stride, 0.9);
            let (mut weights, mut out) = (vec![9.0; heads * positions], vec![9.0; heads * head_dim]);
            attention(&queries, head_dim, &keys, &values, true, &mut weights, &mut out);
            for (head, out) in out.chunks_exact(head_dim).enumerate() {
                let (mut weights, mut alone) = (vec![0.0; positions], vec![0.0; head_dim]);
                attention_weights(&queries[head * head_dim..][..head_dim], &keys, stride, &mut weights);
                weighted_sum(&weights, &values, stride, &mut alone);
                assert_eq!(out, alone);
            }
            // Halves give what the same values in f32 give.
            let half = |values: &[f32]| values.iter().map(|x| half::f16::from_f32(*x)).collect::<Vec<_>>();
            let (half_keys, half_values) = (half(&keys), half(&values));
            let f32s = |halves: &[half::f16]| halves.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
            let mut other = out.clone();
            attention(&queries, head_dim, &half_keys, &half_values, false, &mut weights, &mut out);
            let (keys, values) = (f32s(&half_keys), f32s(&half_values));
            attention(&queries, head_dim, &keys, &values, false, &mut weights, &mut other);
            assert_eq!(out, other);
        }
    }
}
