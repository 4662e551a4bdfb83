//! The gated activation of the MLP with a backward.
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{rows, tensor_like, values, with_values};
use crate::math::Activation;
use crate::{simd_fn, training};

/// Elements that a task works on at once.
const CHUNK: usize = 8192;

/// `act(gate) * up`, element by element ([`Activation::gated`]). Source: "GLU Variants Improve Transformer" (arXiv
/// 2002.05202, equation 5); squared ReLU: arXiv 2109.08668.
///
/// # Shapes
/// `gate, up: the same -> the same`
///
/// # Errors
/// The shapes differ, or a tensor is not contiguous f32 on the CPU.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!("gated activation of {:?} with {:?}; the shapes must agree", gate.dims(), up.dims());
    }
    gate.apply_op2(up, Op { activation })
}

struct Op {
    activation: Activation,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gate = values(gate, gate_layout, self.name())?;
        let up = values(up, up_layout, self.name())?;
        let mut out = vec![0f32; gate.len()];
        (out.par_chunks_mut(CHUNK), gate.par_chunks(CHUNK), up.par_chunks(CHUNK))
            .into_par_iter()
            .for_each(|(out, gate, up)| forward(self.activation, gate, up, out));
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, columns) = rows(gate.layout());
        let (grad_gate, grad_up) = with_values([gate, up, grad], self.name(), |[gate, up, grad]| {
            let (mut grad_gate, mut grad_up) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
            let inputs = [gate, up, grad];
            let act = self.activation;
            training::gated_backward(
                act,
                None,
                inputs,
                columns.max(1),
                0.0,
                &mut grad_gate,
                &mut grad_up,
                &mut [],
            );
            Ok((grad_gate, grad_up))
        })?;
        Ok((Some(tensor_like(grad_gate, gate)?), Some(tensor_like(grad_up, up)?)))
    }
}

simd_fn! {
    fn forward(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        activation.gated(gate, up, out);
    }
}
