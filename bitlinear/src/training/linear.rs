//! BitLinear projections of one input: the products of a step, forward and back.
use crate::kernels::{
    ActivationPanels, GradientPanels, Kernel, KernelError, QuantizedRows, matmul_all, weight_gradient,
};
use crate::packed::{Layout, PackError, TernaryWeight};
use crate::products::{Matrix, Precision, multiply};
use crate::{pool, quant, simd_fn};

/// Rows of a dense input that a task makes.
const ROW_CHUNK: usize = 8;

/// A latent weight `[out_features, in_features]` of [`Projections`].
#[derive(Debug, Clone, Copy)]
pub struct Latent<'a> {
    /// Its values.
    pub weight: &'a [f32],
    /// Whether it has the group's share of quantization; otherwise it is dense throughout, on an input that is not quantized.
    pub quantized: bool,
}

/// The weights of projections that share an input (q, k and v; gate and up; or one alone), as one step computes with them.
///
/// Made from latent f32 weights once a step, and used for all its micro-batches and directions. With `t` the ternary codes,
/// `W~ = W + lambda (t * weight_scale - W)`, where `lambda` is 0 for a weight that is not quantized. Those at `lambda = 1` are
/// packed, and all their products are integer products.
///
/// Sources: as [`crate::quant`]; the straight-through estimator: arXiv 1308.3432.
pub struct Projections<'a> {
    in_features: usize,
    out_features: Vec<usize>,
    lambda: f32,
    precision: Precision,
    weights: Vec<Weight<'a>>,
    /// There if any weight is ternary.
    integer: Option<Integer>,
}

enum Weight<'a> {
    Ternary(TernaryWeight),
    /// Quantized in part.
    Mixed(Vec<f32>),
    Plain(&'a [f32]),
}

/// What integer products need besides their weights.
struct Integer {
    kernel: Kernel,
    /// `[in_features, Σ out_features]`, the transposed codes of the ternary weights side by side.
    backward: TernaryWeight,
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

/// The input of projections, kept from the forward to the backward in the forms that their weights take: int8 codes for ternary
/// ones, f32 that is quantized in part, f32 as it is.
#[derive(Default)]
pub struct Input {
    codes: Option<QuantizedRows>,
    mixed: Option<Vec<f32>>,
    plain: Option<Vec<f32>>,
}

/// Room for a backward, used again by the next.
#[derive(Default)]
pub struct Scratch {
    rows: QuantizedRows,
    activations: ActivationPanels,
    gradients: GradientPanels,
}

impl<'a> Projections<'a> {
    /// Projections with these latent weights, at a share `lambda` of quantization (0 for a full-precision layer). Dense
    /// products round their operands as `precision` says.
    ///
    /// # Errors
    /// At full quantization, a quantized weight is not finite, or `BITLINEAR_KERNEL` names a kernel that cannot run here.
    ///
    /// # Panics
    /// If there is no latent weight, or one is not whole rows of `in_features`.
    pub fn new(
        latents: &[Latent<'a>],
        in_features: usize,
        lambda: f32,
        precision: Precision,
    ) -> Result<Self, ProjectionError> {
        assert!(in_features > 0 && !latents.is_empty());
        assert!(latents.iter().all(|latent| latent.weight.len().is_multiple_of(in_features)));
        let out_features = latents.iter().map(|latent| latent.weight.len() / in_features).collect();
        let mut codes = Vec::new();
        let weights = latents.iter().map(|&Latent { weight, quantized }| {
            Ok(if !quantized || lambda == 0.0 {
                Weight::Plain(weight)
            } else if lambda == 1.0 {
                let (weight, part) = ternary(weight, in_features)?;
                codes.push(part);
                Weight::Ternary(weight)
            } else {
                Weight::Mixed(mixed(weight, lambda))
            })
        });
        let weights = weights.collect::<Result<Vec<_>, PackError>>()?;
        let integer = if codes.is_empty() {
            None
        } else {
            let parts: Vec<&[i8]> = codes.iter().map(Vec::as_slice).collect();
            let backward = TernaryWeight::transposed(&parts, in_features)?;
            Some(Integer { kernel: Kernel::active()?, backward })
        };
        Ok(Self { in_features, out_features, lambda, precision, weights, integer })
    }

    /// Makes the input of these projections: row `i` is what `make(i, row)` writes, called once for each row. Unless a weight
    /// needs the row as it is, it is quantized there and then.
    ///
    /// # Panics
    /// If `make` does.
    pub fn input(&self, input: &mut Input, rows: usize, make: impl Fn(usize, &mut [f32]) + Sync) {
        let any = |kind: fn(&Weight<'_>) -> bool| self.weights.iter().any(kind);
        let codes = form(&mut input.codes, self.integer.is_some());
        let mixed = form(&mut input.mixed, any(|weight| matches!(weight, Weight::Mixed(_))));
        let plain = form(&mut input.plain, any(|weight| matches!(weight, Weight::Plain(_))));
        let width = self.in_features;
        let plain: Option<&[f32]> = plain.map(|plain| {
            fill_rows(plain, rows, width, 0.0, &make);
            plain.as_slice()
        });
        let make = |row: usize, out: &mut [f32]| match plain {
            Some(plain) => out.copy_from_slice(&plain[row * width..][..width]),
            None => make(row, out),
        };
        if let Some(codes) = codes {
            codes.fill_with(rows, width, make);
        } else if let Some(mixed) = mixed {
            fill_rows(mixed, rows, width, self.lambda, make);
        }
    }

    /// `outs[p] = x~ W~[p]^T` for each projection `p`.
    ///
    /// # Shapes
    /// `outs[p] [rows, out_features[p]]`
    ///
    /// # Errors
    /// An output of an integer product has another shape.
    ///
    /// # Panics
    /// If the input was made by other projections, there is not an output for each projection, or one of a dense product has
    /// another shape.
    pub fn forward(&self, input: &Input, outs: &mut [&mut [f32]]) -> Result<(), KernelError> {
        assert_eq!(outs.len(), self.weights.len(), "an output for each projection");
        if let Some(Integer { kernel, .. }) = &self.integer {
            let products = self.weights.iter().zip(outs.iter_mut());
            let mut products: Vec<_> =
                products.filter_map(|(weight, out)| Some((weight.ternary()?, &mut **out))).collect();
            matmul_all(*kernel, kept(&input.codes), &mut products)?;
        }
        for (weight, out) in self.weights.iter().zip(outs) {
            if let Some([x, weight]) = self.dense(weight, input) {
                multiply(self.precision, x, weight.t(), 0.0, out);
            }
        }
        Ok(())
    }

    /// `grad_input = Σ_p grads[p] W~[p]` and `grad_weights[p] = keep * grad_weights[p] + grads[p]^T x~` (straight-through
    /// estimator). Gradients of ternary weights' outputs are rounded to int8, see [`crate::training`].
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
        assert_eq!(
            [grads.len(), grad_weights.len()],
            [self.weights.len(); 2],
            "gradients for each projection"
        );
        let mut sum = 0.0;
        if let Some(integer) = &self.integer {
            let operands = self.weights.iter().zip(grads).zip(grad_weights.iter_mut());
            let operands = operands.filter_map(|((weight, grad), grad_weight)| {
                Some(((weight.ternary()?, *grad), &mut **grad_weight))
            });
            let (products, mut grad_weights) = operands.unzip::<_, _, Vec<_>, Vec<_>>();
            integer.backward(kept(&input.codes), &products, keep, scratch, grad_input, &mut grad_weights)?;
            sum = 1.0;
        }
        let operands = self.weights.iter().zip(grads).zip(&self.out_features).zip(grad_weights);
        for (((weight, grad), width), grad_weight) in operands {
            if let Some([x, weight]) = self.dense(weight, input) {
                let grad = Matrix::new(grad, *width);
                multiply(self.precision, grad, weight, sum, grad_input);
                multiply(self.precision, grad.t(), x, keep, grad_weight);
                sum = 1.0;
            }
        }
        Ok(())
    }

    /// The operands of a dense product, input and weight; nothing for a ternary weight.
    fn dense<'b>(&self, weight: &'b Weight<'_>, input: &'b Input) -> Option<[Matrix<'b>; 2]> {
        let (x, weight): (&Vec<f32>, &[f32]) = match weight {
            Weight::Ternary(_) => return None,
            Weight::Mixed(weight) => (kept(&input.mixed), weight),
            Weight::Plain(weight) => (kept(&input.plain), weight),
        };
        Some([x, weight].map(|values| Matrix::new(values, self.in_features)))
    }
}

impl Weight<'_> {
    fn ternary(&self) -> Option<&TernaryWeight> {
        match self {
            Weight::Ternary(weight) => Some(weight),
            Weight::Mixed(_) | Weight::Plain(_) => None,
        }
    }
}

impl Integer {
    /// [`Projections::backward`] of the ternary weights, each with the gradient of its output.
    fn backward(
        &self,
        codes: &QuantizedRows,
        products: &[(&TernaryWeight, &[f32])],
        keep: f32,
        scratch: &mut Scratch,
        grad_input: &mut [f32],
        grad_weights: &mut [&mut [f32]],
    ) -> Result<(), KernelError> {
        let Scratch { rows, activations, gradients } = scratch;
        rows.fill_gradients_with(codes.rows(), self.backward.in_features(), |row, out| {
            let mut out = out;
            for (weight, grad) in products {
                let width = weight.out_features();
                let (here, rest) = out.split_at_mut(width);
                times(&grad[row * width..][..width], weight.weight_scale(), here);
                out = rest;
            }
        });
        matmul_all(self.kernel, rows, &mut [(&self.backward, grad_input)])?;
        activations.fill(codes);
        for ((weight, grad), grad_weight) in products.iter().zip(grad_weights) {
            gradients.fill(grad, weight.out_features(), codes.scales());
            weight_gradient(self.kernel, gradients, activations, keep, grad_weight)?;
        }
        Ok(())
    }
}

/// A form of an input, if it is needed; otherwise nothing of it is left.
fn form<T: Default>(form: &mut Option<T>, needed: bool) -> Option<&mut T> {
    if !needed {
        *form = None;
    }
    needed.then(|| form.get_or_insert_default())
}

/// A form of an input that these projections' [`Projections::input`] has made.
fn kept<T>(form: &Option<T>) -> &T {
    form.as_ref().expect("an input of these projections")
}

/// Rows of `width` that `make` writes, at a share `lambda` of quantization.
fn fill_rows(
    values: &mut Vec<f32>,
    rows: usize,
    width: usize,
    lambda: f32,
    make: impl Fn(usize, &mut [f32]) + Sync,
) {
    values.resize(rows * width, 0.0);
    pool::for_chunks(values, ROW_CHUNK * width, |chunk, values| {
        let mut codes = vec![0f32; width];
        for (i, row) in values.chunks_exact_mut(width).enumerate() {
            make(chunk * ROW_CHUNK + i, row);
            if lambda > 0.0 {
                let scale = quant::quantize_row_f32(row, &mut codes);
                mix(row, &codes, scale, lambda);
            }
        }
    });
}

/// A latent weight packed, and its codes.
fn ternary(latent: &[f32], in_features: usize) -> Result<(TernaryWeight, Vec<i8>), PackError> {
    let scale = quant::absmean(latent);
    let mut codes = vec![0i8; latent.len()];
    quant::ternarize(latent, scale, &mut codes);
    let rows = latent.len() / in_features;
    let weight = TernaryWeight::from_rows(rows, in_features, scale, Layout::TwoBit, |row, out| {
        for (out, code) in out.iter_mut().zip(&codes[row * in_features..]) {
            *out = code.wrapping_add(1) as u8;
        }
    })?;
    Ok((weight, codes))
}

/// `W~ = W + lambda (t * weight_scale - W)`
fn mixed(latent: &[f32], lambda: f32) -> Vec<f32> {
    let scale = quant::absmean(latent);
    let mut weights = latent.to_vec();
    mix_weights(&mut weights, scale, lambda);
    weights
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
