//! Gains for sub-norms that are put into a model which was trained without.
use bitlinear::math;
use candle_core::{Device, Tensor};
use infer::config::ModelConfig;

use super::TrainError;
use crate::data::Rows;
use crate::decoder::{Decoder, StepWeights};
use crate::parameters::Parameters;
use crate::schedule::Shares;

/// Windows of training text that gains are fitted on.
const WINDOWS: u64 = 32;
/// Windows at once.
const BATCH: usize = 4;

/// What a gain is fitted from: `Σ x n` and `Σ n^2` of each feature, with `n` the normalized `x`.
struct Sums {
    products: Vec<f64>,
    squares: Vec<f64>,
}

impl Sums {
    fn new(features: usize) -> Self {
        Self { products: vec![0.0; features], squares: vec![0.0; features] }
    }

    fn add(&mut self, x: &[f32], eps: f32) {
        let factor = math::inverse_rms(x, eps);
        for ((product, square), x) in self.products.iter_mut().zip(&mut self.squares).zip(x) {
            let n = x * factor;
            *product += f64::from(x * n);
            *square += f64::from(n * n);
        }
    }

    /// The gains that bring `gain * n` closest to `x`; 1 for a feature that is always 0.
    fn gains(&self) -> Vec<f32> {
        let gain =
            |(product, square): (&f64, &f64)| if *square > 0.0 { (product / square) as f32 } else { 1.0 };
        self.products.iter().zip(&self.squares).map(gain).collect()
    }
}

/// Sets the gain of each sub-norm to the one with which the norm changes its input least, over some training text.
///
/// # Errors
/// No kernel can run, or candle cannot change a tensor.
pub(super) fn calibrate(shape: &ModelConfig, parameters: &Parameters, rows: &Rows) -> Result<(), TrainError> {
    let (width, ffn, eps) = (shape.attention_width(), shape.intermediate_size, shape.rms_norm_eps);
    let mut sums: Vec<_> = (0..shape.num_hidden_layers).map(|_| [Sums::new(width), Sums::new(ffn)]).collect();
    let values = parameters.values()?;
    // The model as it was: nothing is quantized, and what goes into a sub-norm comes out.
    let weights = StepWeights::new(shape, &values, Shares { quantization: 0.0, sub_norm: 0.0 })?;
    let mut decoder = Decoder::new(shape.clone(), rows.sequence_length(), true);
    for chosen in rows.evaluation(WINDOWS).chunks(BATCH) {
        let read = decoder.read(&weights, &rows.batch(chosen), |layer, saved| {
            let [attention, mlp] = &mut sums[layer];
            saved.attended().chunks_exact(width).for_each(|x| attention.add(x, eps));
            let [gate, up] = saved.gate_up();
            let mut product = vec![0.0; ffn];
            for (gate, up) in gate.chunks_exact(ffn).zip(up.chunks_exact(ffn)) {
                shape.hidden_act.gated(gate, up, &mut product);
                mlp.add(&product, eps);
            }
        });
        read?;
    }
    drop(weights);
    drop(values);
    for (layer, [attention, mlp]) in sums.iter().enumerate() {
        for (part, sums) in [("self_attn.attn_sub_norm", attention), ("mlp.ffn_sub_norm", mlp)] {
            let gains = Tensor::new(sums.gains(), &Device::Cpu)?;
            parameters.set(&format!("model.layers.{layer}.{part}.weight"), &gains)?;
        }
    }
    Ok(())
}
