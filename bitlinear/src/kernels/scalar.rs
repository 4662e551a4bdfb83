//! The scalar kernel: the truth that every other kernel equals.

use super::Block;
use crate::packed::code_at;

/// `out[r, o] = Σ_j codes[r, j] * w[o, j]`
pub(super) fn sums(block: &Block<'_>, out: &mut [i32]) {
    let outs = block.weights.len() / (block.stride / 4);
    let mut unpacked = vec![0i8; block.stride];
    for (o, row) in block.weights.chunks_exact(block.stride / 4).enumerate() {
        for (column, code) in unpacked.iter_mut().enumerate() {
            *code = code_at(row, column);
        }
        for (r, codes) in block.codes.chunks_exact(block.stride).enumerate() {
            // |sum| <= 128 * stride, which fits in i32: MAX_IN_FEATURES.
            out[r * outs + o] = codes.iter().zip(&unpacked).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
        }
    }
}
