//! BitLinear: a linear layer that computes with ternary weights and int8 activations and learns f32 latent weights.
use std::borrow::Cow;

use candle_core::{CpuStorage, CustomOp2, D, Error, Layout, Module, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{TOKEN_CHUNK, rows, tensor_like, values, with_values};
use crate::kernels::{QuantizedRows, matmul};
use crate::packed::{PackError, TernaryWeight};
use crate::products::{Matrix, Precision, product};
use crate::{math, quant, simd_fn};

/// Tokens that a task of [`dense_product`] computes.
const ROW_TILE: usize = 8;
/// Rows of the weights that serve these before the next ones are read.
const OUT_TILE: usize = 32;

/// A bias-free linear layer with f32 latent weights `[out_features, in_features]`, computed as in BitNet b1.58.
///
/// ```
/// use bitlinear::autograd::BitLinear;
/// use candle_core::{Device, Module, Tensor, Var};
/// # fn main() -> candle_core::Result<()> {
/// let latent = Var::from_tensor(&Tensor::new(&[[0.5f32, -1.0, 0.0], [0.9, 0.8, -0.1]], &Device::Cpu)?)?;
/// let layer = BitLinear::new(latent.as_tensor().clone(), 1.0)?;
/// let x = Tensor::new(&[[127f32, 64.0, -3.0]], &Device::Cpu)?;
/// let y = layer.forward(&x)?.to_vec2::<f32>()?;
/// // mean |W| = 0.55: codes [[1, -1, 0], [1, 1, 0]], and the activations are their own codes.
/// assert!((y[0][0] - (127.0 - 64.0) * 0.55).abs() < 1e-4 && (y[0][1] - (127.0 + 64.0) * 0.55).abs() < 1e-4);
/// let gradients = layer.forward(&x)?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&latent).unwrap().to_vec2::<f32>()?, [[127.0, 64.0, -3.0]; 2]);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct BitLinear {
    latent: Tensor,
    lambda: f32,
}

impl BitLinear {
    /// A layer over `latent`, `[out_features, in_features]`, with a share `lambda` of quantization (see [`bit_linear`]).
    ///
    /// # Errors
    /// `latent` is not a matrix, or `lambda` is not between 0 and 1.
    pub fn new(latent: Tensor, lambda: f32) -> Result<Self> {
        latent.dims2()?;
        check_lambda(lambda)?;
        Ok(Self { latent, lambda })
    }
}

impl Module for BitLinear {
    /// `[.., in_features] -> [.., out_features]`
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        bit_linear(x, &self.latent, self.lambda)
    }
}

/// `y = x~ W~^T`, where both operands are quantized and the gradient passes straight through the quantizers.
///
/// With codes `q = round(x * 127 / max|x|)` (per token) and `t = clamp(round(W / mean|W|), -1, 1)` (per tensor):
/// `x~ = x + lambda (q * act_scale - x)`, `W~ = W + lambda (t * weight_scale - W)`. At `lambda = 1` the product is taken
/// over the integers, exactly, by the packed kernels; at `lambda = 0` the layer is an ordinary linear one.
///
/// Backward (straight-through estimator): `dx = dy W~`, `dW = dy^T x~`.
///
/// Sources: arXiv 2402.17764 (equations 1 to 3); the straight-through estimator: arXiv 1308.3432; growing `lambda`: the
/// "warm-up quantization" of Hugging Face's 1.58-bit fine-tuning.
///
/// # Shapes
/// `x [.., in_features], latent [out_features, in_features] -> [.., out_features]`
///
/// # Errors
/// The shapes do not fit, a tensor is not f32 (on the CPU, contiguous f32), or `lambda` is not between 0 and 1.
pub fn bit_linear(x: &Tensor, latent: &Tensor, lambda: f32) -> Result<Tensor> {
    check_lambda(lambda)?;
    check_shapes(x, latent)?;
    let op = Op { lambda, as_runtime: false };
    if x.device().is_cpu() { x.apply_op2(latent, op) } else { composed(x, latent, lambda) }
}

/// `y = x W^T`, without quantization, beside ternary layers: each value has the bits of [`math::dot`], as in the runtime. A
/// difference in the last place is a whole code of the next ternary layer where it lies on a tie. [`bit_linear`] at
/// `lambda = 0` takes half the time.
///
/// # Shapes
/// As [`bit_linear`].
///
/// # Errors
/// As [`bit_linear`].
pub fn dense_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check_shapes(x, weight)?;
    let op = Op { lambda: 0.0, as_runtime: true };
    if x.device().is_cpu() { x.apply_op2(weight, op) } else { composed(x, weight, 0.0) }
}

fn check_shapes(x: &Tensor, latent: &Tensor) -> Result<()> {
    let (out_features, in_features) = latent.dims2()?;
    if out_features == 0 || in_features == 0 || x.dims().last() != Some(&in_features) {
        bail!(
            "bit_linear of x {:?} with weights {:?}; the last dimensions must agree and not be zero",
            x.dims(),
            latent.dims()
        );
    }
    Ok(())
}

/// [`bit_linear`] out of candle's own operations, for other devices: the same to within the rounding of an f32 sum.
pub(super) fn composed(x: &Tensor, latent: &Tensor, lambda: f32) -> Result<Tensor> {
    // To the nearest whole number, ties to even, which candle's `round` does not do.
    let round = f64::from(quant::ROUND);
    let rounded = |values: &Tensor| values.affine(1.0, round)?.affine(1.0, -round);
    // The quantized value with the gradient of the value itself; of a value minus itself nothing but that remains.
    let straight_through = |value: &Tensor, quantized: &Tensor| -> Result<Tensor> {
        let mixed = ((quantized * f64::from(lambda))? + (value * f64::from(1.0 - lambda))?)?;
        mixed.detach() + (value - value.detach())?
    };
    let largest = x.detach().abs()?.max_keepdim(D::Minus1)?.maximum(f64::from(quant::EPS))?;
    let act_scale = (&largest / f64::from(quant::ACT_MAX))?;
    // As the quantizers have it: a ratio that is rounded otherwise is another code where it lies on a tie.
    let inv_scale = (largest.ones_like()? * f64::from(quant::ACT_MAX))?.div(&largest)?;
    let codes = rounded(&x.detach().broadcast_mul(&inv_scale)?)?;
    let x = straight_through(x, &codes.broadcast_mul(&act_scale)?)?;
    let weight_scale = latent.detach().abs()?.mean_all()?.maximum(f64::from(quant::EPS))?;
    let codes = rounded(&latent.detach().broadcast_mul(&weight_scale.recip()?)?)?.clamp(-1.0, 1.0)?;
    let w = straight_through(latent, &codes.broadcast_mul(&weight_scale)?)?;
    x.broadcast_matmul(&w.t()?)
}

fn check_lambda(lambda: f32) -> Result<()> {
    if !(0.0..=1.0).contains(&lambda) {
        bail!("the share of quantization is {lambda}; it must be between 0 and 1");
    }
    Ok(())
}

struct Op {
    lambda: f32,
    /// At `lambda = 0`: summed in the runtime's order.
    as_runtime: bool,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "bit_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        latent: &CpuStorage,
        latent_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (out_features, in_features) = latent_layout.shape().dims2()?;
        let latent = values(latent, latent_layout, self.name())?;
        let x = values(x, x_layout, self.name())?;
        let y = if self.lambda == 1.0 {
            integer_product(x, latent, in_features)?
        } else if self.as_runtime {
            dense_product(x, latent, in_features)
        } else {
            let (x, w) = (activations(x, in_features, self.lambda), weights(latent, self.lambda));
            product(Precision::F32, Matrix::new(&x, in_features), Matrix::new(&w, in_features).t())
        };
        let mut dims = x_layout.dims().to_vec();
        dims[x_layout.dims().len() - 1] = out_features;
        Ok((CpuStorage::F32(y), Shape::from(dims)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        latent: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, in_features) = rows(latent.layout());
        let (_, out_features) = rows(grad.layout());
        let (grad_x, grad_w) = with_values([x, latent, grad], self.name(), |[x, latent, grad]| {
            let grad = Matrix::new(grad, out_features);
            let w = weights(latent, self.lambda);
            let grad_x = product(Precision::F32, grad, Matrix::new(&w, in_features));
            let x = activations(x, in_features, self.lambda);
            Ok((grad_x, product(Precision::F32, grad.t(), Matrix::new(&x, in_features))))
        })?;
        Ok((Some(tensor_like(grad_x, x)?), Some(tensor_like(grad_w, latent)?)))
    }
}

/// The product at full quantization, over the integers. Weights that are not finite give NaN, as any arithmetic would.
fn integer_product(x: &[f32], latent: &[f32], in_features: usize) -> Result<Vec<f32>> {
    let (rows, out_features) = (x.len() / in_features, latent.len() / in_features);
    let mut y = vec![f32::NAN; rows * out_features];
    match TernaryWeight::from_latent(latent, out_features, in_features) {
        Ok(weight) => {
            matmul(&QuantizedRows::quantize(x, in_features), &weight, &mut y).map_err(Error::wrap)?;
        }
        Err(PackError::Scale(_)) => {}
        Err(error) => return Err(Error::wrap(error)),
    }
    Ok(y)
}

/// The product without quantization, as the runtime computes it.
fn dense_product(x: &[f32], w: &[f32], in_features: usize) -> Vec<f32> {
    let (rows, out_features) = (x.len() / in_features, w.len() / in_features);
    let mut y = vec![0f32; rows * out_features];
    let tokens = y.par_chunks_mut(ROW_TILE * out_features).zip(x.par_chunks(ROW_TILE * in_features));
    tokens.for_each(|(y, x)| dense_tile(x, in_features, w, y));
    y
}

simd_fn! {
    /// Some rows of [`dense_product`]; a tile of weights serves them all while it is in the cache.
    fn dense_tile(x: &[f32], in_features: usize, w: &[f32], y: &mut [f32]) {
        let out_features = w.len() / in_features;
        for first in (0..out_features).step_by(OUT_TILE) {
            let tile = first..out_features.min(first + OUT_TILE);
            for (x, y) in x.chunks_exact(in_features).zip(y.chunks_exact_mut(out_features)) {
                math::dots(&w[first * in_features..], in_features, x, &mut y[tile.clone()]);
            }
        }
    }
}

/// The ternary codes of latent weights as f32, and their scale.
fn ternary(latent: &[f32]) -> (Vec<f32>, f32) {
    let weight_scale = quant::absmean(latent);
    let inv_scale = 1.0 / weight_scale;
    let mut codes = vec![0f32; latent.len()];
    (codes.par_chunks_mut(4096), latent.par_chunks(4096)).into_par_iter().for_each(|(codes, latent)| {
        ternarize(latent, inv_scale, codes);
    });
    (codes, weight_scale)
}

/// `W~ = W + lambda (t * weight_scale - W)`
fn weights(latent: &[f32], lambda: f32) -> Cow<'_, [f32]> {
    if lambda == 0.0 {
        return Cow::Borrowed(latent);
    }
    let (mut w, weight_scale) = ternary(latent);
    (w.par_chunks_mut(4096), latent.par_chunks(4096)).into_par_iter().for_each(|(w, latent)| {
        mix(w, weight_scale, latent, lambda);
    });
    Cow::Owned(w)
}

/// `x~ = x + lambda (q * act_scale - x)`
fn activations(x: &[f32], in_features: usize, lambda: f32) -> Cow<'_, [f32]> {
    if lambda == 0.0 {
        return Cow::Borrowed(x);
    }
    let mut mixed = vec![0f32; x.len()];
    let chunk = TOKEN_CHUNK * in_features;
    (mixed.par_chunks_mut(chunk), x.par_chunks(chunk)).into_par_iter().for_each(|(mixed, x)| {
        for (mixed, x) in mixed.chunks_exact_mut(in_features).zip(x.chunks_exact(in_features)) {
            let act_scale = quant::quantize_row_f32(x, mixed);
            mix(mixed, act_scale, x, lambda);
        }
    });
    Cow::Owned(mixed)
}

simd_fn! {
    /// `codes = real + lambda (codes * scale - real)`, exactly `codes * scale` at lambda 1.
    fn mix(codes: &mut [f32], scale: f32, real: &[f32], lambda: f32) {
        if lambda == 1.0 {
            for code in codes {
                *code *= scale;
            }
        } else {
            for (code, real) in codes.iter_mut().zip(real) {
                *code = real + lambda * (*code * scale - real);
            }
        }
    }
}

simd_fn! {
    /// [`quant::ternarize`] with the codes as f32.
    fn ternarize(latent: &[f32], inv_scale: f32, codes: &mut [f32]) {
        for (code, w) in codes.iter_mut().zip(latent) {
            *code = quant::ternary(*w, inv_scale);
        }
    }
}
