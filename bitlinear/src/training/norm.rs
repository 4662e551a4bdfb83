//! RMSNorm, whole or blended in, and its backward.
use super::{TOKEN_CHUNK, add_up};
use crate::{math, pool, simd_fn};

/// An RMSNorm of which a share is blended in: `y = x + share (rms_norm(x) - x)`.
///
/// A share of 1 is the plain norm, 0 the identity: so a model that was trained without a norm can be given one without a
/// jump in what it computes.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// Its gain, `[features]`.
    pub weight: &'a [f32],
    /// Its epsilon.
    pub eps: f32,
    /// How much of it is blended in, 0 to 1.
    pub share: f32,
}

impl<'a> Norm<'a> {
    /// The plain norm.
    pub fn new(weight: &'a [f32], eps: f32) -> Self {
        Self { weight, eps, share: 1.0 }
    }

    /// The norm of some rows, `[rows, features]`, in this thread.
    pub fn forward(self, x: &[f32], out: &mut [f32]) {
        forward_rows(self, x, out);
    }

    /// [`Norm::forward`] in place.
    pub fn forward_in_place(self, x: &mut [f32]) {
        forward_rows_in_place(self, x);
    }
}

/// Gradients of [`Norm`] of all tokens ([`math::rms_norm_backward`]): adds to `grad_x`, and
/// `grad_weight = keep * grad_weight + Σ_tokens dw`.
///
/// # Shapes
/// `x, grad, grad_x [tokens, features], norm.weight, grad_weight [features]`
///
/// # Panics
/// If the shapes do not fit.
pub fn rms_norm_backward(
    norm: Norm<'_>,
    x: &[f32],
    grad: &[f32],
    keep: f32,
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    let features = norm.weight.len();
    assert!(x.len() == grad.len() && x.len() == grad_x.len() && features == grad_weight.len());
    let chunk = TOKEN_CHUNK * features;
    let chunks = x.chunks(chunk).zip(grad.chunks(chunk)).zip(grad_x.chunks_mut(chunk));
    let parts = pool::map(chunks, |_, ((x, grad), grad_x)| {
        let mut grad_weight = vec![0f32; features];
        backward_rows(norm, x, grad, grad_x, &mut grad_weight);
        grad_weight
    });
    add_up(&parts, keep, grad_weight);
}

simd_fn! {
    fn forward_rows(norm: Norm<'_>, x: &[f32], out: &mut [f32]) {
        let features = norm.weight.len();
        for (x, out) in x.chunks_exact(features).zip(out.chunks_exact_mut(features)) {
            math::rms_norm(x, norm.weight, norm.eps, out);
            if norm.share != 1.0 {
                for (out, x) in out.iter_mut().zip(x) {
                    *out = x + norm.share * (*out - x);
                }
            }
        }
    }
}

simd_fn! {
    fn forward_rows_in_place(norm: Norm<'_>, x: &mut [f32]) {
        let mut plain = Vec::new();
        for x in x.chunks_exact_mut(norm.weight.len()) {
            if norm.share != 1.0 {
                plain.clear();
                plain.extend_from_slice(x);
            }
            math::rms_norm_in_place(x, norm.weight, norm.eps);
            for (x, plain) in x.iter_mut().zip(&plain) {
                *x = plain + norm.share * (*x - plain);
            }
        }
    }
}

simd_fn! {
    fn backward_rows(norm: Norm<'_>, x: &[f32], grad: &[f32], grad_x: &mut [f32], grad_w: &mut [f32]) {
        let features = norm.weight.len();
        let mut room = vec![0f32; 2 * features];
        let rows = x.chunks_exact(features).zip(grad.chunks_exact(features));
        for ((x, grad), grad_x) in rows.zip(grad_x.chunks_exact_mut(features)) {
            norm_backward(norm, x, grad, &mut room, grad_x, grad_w);
        }
    }
}

/// The backward of one token: adds to `grad_x` and `grad_weight`. `room` is for twice as many values as there are features.
#[inline(always)]
pub(super) fn norm_backward(
    norm: Norm<'_>,
    x: &[f32],
    grad: &[f32],
    room: &mut [f32],
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    let (weighted, shared) = room.split_at_mut(x.len());
    if norm.share == 1.0 {
        return math::rms_norm_backward(x, norm.weight, grad, norm.eps, weighted, grad_x, grad_weight);
    }
    // The norm sees its share of the gradient, the way around it the rest.
    for ((shared, grad_x), grad) in shared.iter_mut().zip(grad_x.iter_mut()).zip(grad) {
        *shared = norm.share * grad;
        *grad_x += (1.0 - norm.share) * grad;
    }
    math::rms_norm_backward(x, norm.weight, shared, norm.eps, weighted, grad_x, grad_weight);
}
