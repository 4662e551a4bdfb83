//! The backward of the gated activation and the norm behind it, in one pass.
use super::norm::norm_backward;
use super::{Norm, TOKEN_CHUNK, add_up};
use crate::math::Activation;
use crate::{pool, simd_fn};

/// Gradients of `norm(act(gate) * up)`, or of `act(gate) * up` where there is no norm.
///
/// Writes `grad_gate` and `grad_up`; the gain's gradient is `keep * grad_weight + Σ_tokens dw`, untouched without a norm.
///
/// # Shapes
/// `gate, up, grad, grad_gate, grad_up [tokens, features], grad_weight [features]`
///
/// # Panics
/// If the shapes do not fit.
#[allow(clippy::too_many_arguments)] // the operands of one formula
pub fn gated_backward(
    activation: Activation,
    norm: Option<Norm<'_>>,
    [gate, up, grad]: [&[f32]; 3],
    features: usize,
    keep: f32,
    grad_gate: &mut [f32],
    grad_up: &mut [f32],
    grad_weight: &mut [f32],
) {
    assert!([up.len(), grad.len(), grad_gate.len(), grad_up.len()] == [gate.len(); 4]);
    let chunk = TOKEN_CHUNK * features;
    let inputs = gate.chunks(chunk).zip(up.chunks(chunk)).zip(grad.chunks(chunk));
    let outputs = grad_gate.chunks_mut(chunk).zip(grad_up.chunks_mut(chunk));
    let parts = pool::map(inputs.zip(outputs), |_, (((gate, up), grad), (grad_gate, grad_up))| {
        let mut grad_weight = vec![0f32; norm.map_or(0, |_| features)];
        rows(activation, norm, features, gate, up, grad, grad_gate, grad_up, &mut grad_weight);
        grad_weight
    });
    if norm.is_some() {
        add_up(&parts, keep, grad_weight);
    }
}

simd_fn! {
    fn rows(
        activation: Activation,
        norm: Option<Norm<'_>>,
        features: usize,
        gate: &[f32],
        up: &[f32],
        grad: &[f32],
        grad_gate: &mut [f32],
        grad_up: &mut [f32],
        grad_weight: &mut [f32],
    ) {
        let Some(norm) = norm else {
            return activation.gated_backward(gate, up, grad, grad_gate, grad_up);
        };
        let (mut product, mut room) = (vec![0f32; features], vec![0f32; 2 * features]);
        let mut grad_product = vec![0f32; features];
        let inputs = gate.chunks_exact(features).zip(up.chunks_exact(features)).zip(grad.chunks_exact(features));
        let outputs = grad_gate.chunks_exact_mut(features).zip(grad_up.chunks_exact_mut(features));
        for (((gate, up), grad), (grad_gate, grad_up)) in inputs.zip(outputs) {
            activation.gated(gate, up, &mut product);
            grad_product.fill(0.0);
            norm_backward(norm, &product, grad, &mut room, &mut grad_product, grad_weight);
            activation.gated_backward(gate, up, &grad_product, grad_gate, grad_up);
        }
    }
}
