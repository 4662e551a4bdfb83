//! The backward of RMSNorm.
use super::{TOKEN_CHUNK, add_up};
use crate::{math, pool, simd_fn};

/// Gradients of RMSNorm ([`math::rms_norm_backward`]) of all tokens: adds to `grad_x`, and
/// `grad_weight = keep * grad_weight + Σ_tokens dw`.
///
/// # Shapes
/// `x, grad, grad_x [tokens, features], weight, grad_weight [features]`
///
/// # Panics
/// If the shapes do not fit.
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    grad: &[f32],
    eps: f32,
    keep: f32,
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    assert!(x.len() == grad.len() && x.len() == grad_x.len() && weight.len() == grad_weight.len());
    let chunk = TOKEN_CHUNK * weight.len();
    let chunks = x.chunks(chunk).zip(grad.chunks(chunk)).zip(grad_x.chunks_mut(chunk));
    let parts = pool::map(chunks, |_, ((x, grad), grad_x)| {
        let mut grad_weight = vec![0f32; weight.len()];
        rows(x, weight, grad, eps, grad_x, &mut grad_weight);
        grad_weight
    });
    add_up(&parts, keep, grad_weight);
}

simd_fn! {
    fn rows(x: &[f32], weight: &[f32], grad: &[f32], eps: f32, grad_x: &mut [f32], grad_w: &mut [f32]) {
        let features = weight.len();
        let mut weighted = vec![0f32; features];
        let rows = x.chunks_exact(features).zip(grad.chunks_exact(features));
        for ((x, grad), grad_x) in rows.zip(grad_x.chunks_exact_mut(features)) {
            math::rms_norm_backward(x, weight, grad, eps, &mut weighted, grad_x, grad_w);
        }
    }
}
