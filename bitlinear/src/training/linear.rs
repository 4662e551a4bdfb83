//! BitLinear projections of one input: the products of a step, forward and back.
use std::borrow::Cow;

use crate::kernels::{
    ActivationPanels, GradientPanels, Kernel, KernelError, QuantizedRows, matmul_all, weight_gradient,
};
use crate::packed::{Layout, PackError, TernaryWeight};
use crate::products::{Matrix, Precision, multiply};
use crate::{pool, quant, simd_fn};

/// Rows of a dense input that a task makes.
const ROW_CHUNK: usize = 8;

/// The weights of projections that share an input (q, k and v; gate and up; or one alone), as one step computes with them.
///
/// Made from latent f32 weights once a step, and used for all its micro-batches and directions. With `t` the ternary codes,
/// `W~ = W + lambda (t * weight_scale - W)`; at `lambda = 1` weights are packed and all products are integer products.
///
/// Sources: as [`crate::quant`]; the straight-through estimator: arXiv 1308.3432.
pub struct Projections<'a> {
    in_features: usize,
    out_features: Vec<usize>,
    form: Form<'a>,
}

enum Form<'a> {
    Ternary {
        kernel: Kernel,
        forward: Vec<TernaryWeight>,
        /// `[in_features, Σ out_features]`, the transposed codes side by side.
        backward: TernaryWeight,
    },
    Dense {
        weights: Vec<Cow<'a, [f32]>>,
        lambda: f32,
        precision: Precision,
    },
}

/// Why latent weights cannot be computed with.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ProjectionError {
    /// They are not finite.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// No kernel, or a row too long for one.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// The input of projections, kept from the forward to the backward: int8 codes, or f32 where weights are not ternary.
pub struct Input(Kept);

enum Kept {
    Codes(QuantizedRows),
    Dense(Vec<f32>),
}

impl Default for Input {
    fn default() -> Self {
        Self(Kept::Codes(QuantizedRows::default()))
    }
}

/// Room for a backward, used again by the next.
#[derive(Default)]
pub struct Scratch {
    rows: QuantizedRows,
    activations: ActivationPanels,
    gradients: GradientPanels,
}

impl<'a> Projections<'a> {
    /// Projections with these latent weights, each `[out_features, in_features]`, at a share `lambda` of quantization (0 for a
    /// full-precision layer). Dense products round their operands as `precision` says.
    ///
    /// # Errors
    /// At full quantization, a weight is not finite, or `BITLINEAR_KERNEL` names a kernel that cannot run here.
    ///
    /// # Panics
    /// If a latent weight is not whole rows of `in_features`.
    pub fn new(
        latents: &[&'a [f32]],
        in_features: usize,
        lambda: f32,
        precision: Precision,
    ) -> Result<Self, ProjectionError> {
        assert!(in_features > 0 && latents.iter().all(|latent| latent.len().is_multiple_of(in_features)));
        let out_features = latents.iter().map(|latent| latent.len() / in_features).collect();
        let form = if lambda == 1.0 {
            ternary(latents, in_features)?
        } else {
            let weights = latents.iter().map(|latent| mixed(latent, lambda)).collect();
            Form::Dense { weights, lambda, precision }
        };
        Ok(Self { in_features, out_features, form })
    }

    /// Makes the input of these projections: row `i` is what `make(i, row)` writes, and is quantized there and then.
    ///
    /// # Panics
    /// If `make` does.
    pub fn input(&self, input: &mut Input, rows: usize, make: impl Fn(usize, &mut [f32]) + Sync) {
        match &self.form {
            Form::Ternary { .. } => {
                if !matches!(input.0, Kept::Codes(_)) {
                    *input = Input::default();
                }
                if let Kept::Codes(codes) = &mut input.0 {
                    codes.fill_with(rows, self.in_features, make);
                }
            }
            Form::Dense { lambda, .. } => {
                let mut values = match std::mem::take(input).0 {
                    Kept::Dense(values) => values,
                    Kept::Codes(_) => Vec::new(),
                };
                values.resize(rows * self.in_features, 0.0);
                pool::for_chunks(&mut values, ROW_CHUNK * self.in_features, |chunk, values| {
                    let mut codes = vec![0f32; self.in_features];
                    for (i, row) in values.chunks_exact_mut(self.in_features).enumerate() {
                        make(chunk * ROW_CHUNK + i, row);
                        if *lambda > 0.0 {
                            let scale = quant::quantize_row_f32(row, &mut codes);
                            mix(row, &codes, scale, *lambda);
                        }
                    }
                });
                input.0 = Kept::Dense(values);
            }
        }
    }

    /// `outs[p] = x~ W~[p]^T` for each projection `p`.
    ///
    /// # Shapes
    /// `outs[p] [rows, out_features[p]]`
    ///
    /// # Errors
    /// An output has another shape.
    ///
    /// # Panics
    /// If the input was made by other projections, or an output of a dense product has another shape.
    pub fn forward(&self, input: &Input, outs: &mut [&mut [f32]]) -> Result<(), KernelError> {
        match (&self.form, &input.0) {
            (Form::Ternary { kernel, forward, .. }, Kept::Codes(rows)) => {
                let mut products: Vec<_> =
                    forward.iter().zip(outs.iter_mut()).map(|(weight, out)| (weight, &mut **out)).collect();
                matmul_all(*kernel, rows, &mut products)?;
            }
            (Form::Dense { weights, precision, .. }, Kept::Dense(x)) => {
                let x = Matrix::new(x, self.in_features);
                for (weight, out) in weights.iter().zip(outs) {
                    multiply(*precision, x, Matrix::new(weight, self.in_features).t(), 0.0, out);
                }
            }
            _ => panic!("an input of other projections"),
        }
        Ok(())
    }

    /// `grad_input = Σ_p grads[p] W~[p]` and `grad_weights[p] = keep * grad_weights[p] + grads[p]^T x~` (straight-through
    /// estimator). At full quantization gradients are rounded to int8, see [`crate::training`].
    ///
    /// # Shapes
    /// `grads[p] [rows, out_features[p]], grad_input [rows, in_features], grad_weights[p] [out_features[p], in_features]`
    ///
    /// # Errors
    /// As [`Projections::forward`].
    ///
    /// # Panics
    /// As [`Projections::forward`].
    pub fn backward(
        &self,
        input: &Input,
        grads: &[&[f32]],
        keep: f32,
        scratch: &mut Scratch,
        grad_input: &mut [f32],
        grad_weights: &mut [&mut [f32]],
    ) -> Result<(), KernelError> {
        match (&self.form, &input.0) {
            (Form::Ternary { kernel, forward, backward }, Kept::Codes(codes)) => {
                let Scratch { rows, activations, gradients } = scratch;
                rows.fill_gradients_with(codes.rows(), backward.in_features(), |row, out| {
                    let mut out = out;
                    for ((grad, weight), width) in grads.iter().zip(forward).zip(&self.out_features) {
                        let (here, rest) = out.split_at_mut(*width);
                        times(&grad[row * width..][..*width], weight.weight_scale(), here);
                        out = rest;
                    }
                });
                matmul_all(*kernel, rows, &mut [(backward, grad_input)])?;
                activations.fill(codes);
                for ((grad, width), grad_weight) in grads.iter().zip(&self.out_features).zip(grad_weights) {
                    gradients.fill(grad, *width, codes.scales());
                    weight_gradient(*kernel, gradients, activations, keep, grad_weight)?;
                }
            }
            (Form::Dense { weights, precision, .. }, Kept::Dense(x)) => {
                let x = Matrix::new(x, self.in_features);
                let operands = weights.iter().zip(grads).zip(&self.out_features).zip(grad_weights);
                for (p, (((weight, grad), width), grad_weight)) in operands.enumerate() {
                    let grad = Matrix::new(grad, *width);
                    let sum = if p == 0 { 0.0 } else { 1.0 };
                    multiply(*precision, grad, Matrix::new(weight, self.in_features), sum, grad_input);
                    multiply(*precision, grad.t(), x, keep, grad_weight);
                }
            }
            _ => panic!("an input of other projections"),
        }
        Ok(())
    }
}

fn ternary<'a>(latents: &[&'a [f32]], in_features: usize) -> Result<Form<'a>, ProjectionError> {
    let kernel = Kernel::active()?;
    let mut forward = Vec::with_capacity(latents.len());
    let mut codes = Vec::with_capacity(latents.len());
    for latent in latents {
        let scale = quant::absmean(latent);
        let mut part = vec![0i8; latent.len()];
        quant::ternarize(latent, scale, &mut part);
        let rows = latent.len() / in_features;
        forward.push(TernaryWeight::from_rows(rows, in_features, scale, Layout::TwoBit, |row, out| {
            for (out, code) in out.iter_mut().zip(&part[row * in_features..]) {
                *out = code.wrapping_add(1) as u8;
            }
        })?);
        codes.push(part);
    }
    let parts: Vec<&[i8]> = codes.iter().map(Vec::as_slice).collect();
    let backward = TernaryWeight::transposed(&parts, in_features)?;
    Ok(Form::Ternary { kernel, forward, backward })
}

/// `W~ = W + lambda (t * weight_scale - W)`
fn mixed(latent: &[f32], lambda: f32) -> Cow<'_, [f32]> {
    if lambda == 0.0 {
        return Cow::Borrowed(latent);
    }
    let scale = quant::absmean(latent);
    let mut weights = latent.to_vec();
    mix_weights(&mut weights, scale, lambda);
    Cow::Owned(weights)
}

simd_fn! {
    fn mix_weights(weights: &mut [f32], scale: f32, lambda: f32) {
        let inv_scale = 1.0 / scale;
        for w in weights {
            *w += lambda * (quant::ternary(*w, inv_scale) * scale - *w);
        }
    }
}

simd_fn! {
    /// `x~ = x + lambda (code * act_scale - x)`
    fn mix(row: &mut [f32], codes: &[f32], act_scale: f32, lambda: f32) {
        for (x, code) in row.iter_mut().zip(codes) {
            *x += lambda * (code * act_scale - *x);
        }
    }
}

simd_fn! {
    fn times(values: &[f32], factor: f32, out: &mut [f32]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = value * factor;
        }
    }
}
