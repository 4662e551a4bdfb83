//! A bias of a projection's outputs, and its backward.
use super::{TOKEN_CHUNK, add_up};
use crate::{pool, simd_fn};

/// `rows[t] += bias` for each token `t`. The gradient of `rows` is that of the sum.
///
/// # Shapes
/// `rows [tokens, features], bias [features]`
///
/// # Panics
/// If there are no features, or `rows` are no whole rows of them.
pub fn add_bias(rows: &mut [f32], bias: &[f32]) {
    check(rows, bias);
    pool::for_chunks(rows, TOKEN_CHUNK * bias.len(), |_, rows| {
        for row in rows.chunks_exact_mut(bias.len()) {
            add(bias, row);
        }
    });
}

/// Gradient of the bias of [`add_bias`]: `grad_bias = keep * grad_bias + Σ_t grad[t]`; `keep` 0 does not read `grad_bias`.
///
/// # Shapes
/// `grad [tokens, features], grad_bias [features]`
///
/// # Panics
/// As [`add_bias`].
pub fn bias_backward(grad: &[f32], keep: f32, grad_bias: &mut [f32]) {
    check(grad, grad_bias);
    let features = grad_bias.len();
    let parts = pool::map(grad.chunks(TOKEN_CHUNK * features), |_, grad| {
        let mut sum = vec![0f32; features];
        grad.chunks_exact(features).for_each(|row| add(row, &mut sum));
        sum
    });
    add_up(&parts, keep, grad_bias);
}

fn check(rows: &[f32], bias: &[f32]) {
    assert!(!bias.is_empty() && rows.len().is_multiple_of(bias.len()), "rows as wide as their bias");
}

simd_fn! {
    /// `sum += values`
    fn add(values: &[f32], sum: &mut [f32]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += value;
        }
    }
}
