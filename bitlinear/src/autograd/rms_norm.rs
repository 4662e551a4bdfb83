//! RMSNorm with a backward.
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{TOKEN_CHUNK, tensor_like, values, with_values};
use crate::training::{self, Norm};
use crate::{math, simd_fn};

/// `y_i = weight_i * (x_i / sqrt(mean(x^2) + eps))` for each token ([`math::rms_norm`]).
///
/// Backward, with `f = 1 / sqrt(mean(x^2) + eps)` and `n` features: `dx_i = f w_i dy_i - x_i f^3 / n Σ_j w_j dy_j x_j`,
/// `dw_i = Σ_tokens dy_i x_i f`.
///
/// # Shapes
/// `x [.., features], weight [features] -> [.., features]`
///
/// # Errors
/// The shapes do not fit, or a tensor is not contiguous f32 on the CPU.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let features = weight.dims1()?;
    if features == 0 || x.dims().last() != Some(&features) {
        bail!(
            "rms_norm of x {:?} with weights {:?}; the last dimensions must agree",
            x.dims(),
            weight.dims()
        );
    }
    x.apply_op2(weight, Op { eps })
}

struct Op {
    eps: f32,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = values(weight, weight_layout, self.name())?;
        let x = values(x, x_layout, self.name())?;
        let mut out = vec![0f32; x.len()];
        let chunk = TOKEN_CHUNK * weight.len();
        (out.par_chunks_mut(chunk), x.par_chunks(chunk)).into_par_iter().for_each(|(out, x)| {
            forward(x, weight, self.eps, out);
        });
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad_x, grad_w) = with_values([x, weight, grad], self.name(), |[x, weight, grad]| {
            let (mut grad_x, mut grad_w) = (vec![0f32; x.len()], vec![0f32; weight.len()]);
            training::rms_norm_backward(Norm::new(weight, self.eps), x, grad, 0.0, &mut grad_x, &mut grad_w);
            Ok((grad_x, grad_w))
        })?;
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_w, weight)?)))
    }
}

simd_fn! {
    fn forward(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        for (out, x) in out.chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
            math::rms_norm(x, weight, eps, out);
        }
    }
}
