//! The two quantizers of BitNet b1.58, each formula exactly once.
//!
//! Both work in f32 and round ties to even, whatever the tensors around them are stored in: in bf16 up to 8 % of the
//! int8 codes would differ. A `*_scale` always *multiplies* an integer to give the real value.
//!
//! Source: "The Era of 1-bit LLMs" (arXiv 2402.17764, equations 1 to 3), in the form of its authors' "Training Tips,
//! Code and FAQ", which clamps the scale at [`EPS`] where the paper adds it.

use crate::simd_fn;

/// Floor of the mean |W| of a weight tensor and of the largest |x| of a token: an all-zero input divides by this.
pub const EPS: f32 = 1e-5;

/// Floor of the largest |g| of a gradient: only what is as good as zero.
pub(crate) const GRADIENT_EPS: f32 = 1e-30;

/// Largest magnitude of an activation code.
pub const ACT_MAX: f32 = 127.0;

/// 1.5 * 2^23. Numbers of this size are 1 apart: added to a small number, it rounds that to an integer, ties to even, which
/// then is in the lowest bits.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Weights summed in one go by [`absmean`]: fixed, so that the result does not depend on the number of threads.
const SUM_CHUNK: usize = 4096;

simd_fn! {
    /// The scale of a weight tensor: `weight_scale = max(mean(|W|), EPS)`.
    ///
    /// Summed in f64 in fixed chunks. NaN and infinity pass through to the result. An empty slice gives [`EPS`].
    pub fn absmean(weights: &[f32]) -> f32 {
        let sum: f64 = weights.chunks(SUM_CHUNK).map(abs_sum).sum();
        let mean = (sum / weights.len().max(1) as f64) as f32;
        if mean < EPS { EPS } else { mean }
    }
}

/// Sum of magnitudes of at most [`SUM_CHUNK`] values, in eight lanes.
#[inline(always)]
fn abs_sum(chunk: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (whole, rest) = chunk.as_chunks::<8>();
    for eight in whole {
        for lane in 0..8 {
            lanes[lane] += f64::from(eight[lane].abs());
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|w| f64::from(w.abs())).sum::<f64>()
}

simd_fn! {
    /// The ternary code of each weight: `clamp(round(W * (1 / weight_scale)), -1, 1)`, ties to even.
    ///
    /// The code times `weight_scale` is the weight that the model computes with. NaN gives code 0: its scale is NaN already.
    ///
    /// # Panics
    /// If the two slices differ in length.
    pub fn ternarize(weights: &[f32], weight_scale: f32, codes: &mut [i8]) {
        assert_eq!(weights.len(), codes.len(), "one code for each weight");
        let inv_scale = 1.0 / weight_scale;
        for (code, &weight) in codes.iter_mut().zip(weights) {
            // As [`ternary`], in comparisons: those vectorise, where a conversion to i8 that must cope with NaN does not.
            let ratio = weight * inv_scale;
            *code = i8::from(ratio > 0.5) - i8::from(ratio < -0.5);
        }
    }
}

/// The ternary code of one weight, as f32: -1, 0 or 1 (NaN stays NaN).
#[inline(always)]
pub fn ternary(weight: f32, inv_scale: f32) -> f32 {
    (weight * inv_scale).round_ties_even().clamp(-1.0, 1.0)
}

/// The largest magnitude of a token's activations, at least `eps`. NaN wins over every number, so it is not lost.
#[inline(always)]
pub(crate) fn absmax(row: &[f32], eps: f32) -> f32 {
    // The bits of |x| order as |x| does, with NaN above infinity; and an integer maximum vectorises without care for order.
    let bits = row.iter().fold(0u32, |max, x| max.max(x.to_bits() & 0x7fff_ffff));
    let max = f32::from_bits(bits);
    if max < eps { eps } else { max }
}

simd_fn! {
    /// Quantizes one token's activations: `code = clamp(round(x * 127 / max(|x|, EPS)), -128, 127)`, ties to even.
    ///
    /// Returns `act_scale = max(|x|, EPS) / 127`: code times `act_scale` is the value that the model computes with. NaN or
    /// infinity in the row make the scale NaN or infinite, and so every product with it: they are never lost.
    ///
    /// ```
    /// let mut codes = [0i8; 4];
    /// let act_scale = bitlinear::quant::quantize_row(&[0.5, -1.0, 0.0, 2.0], &mut codes);
    /// assert_eq!(codes, [32, -64, 0, 127]); // 31.75, -63.5 (a tie: to even), 0, 127
    /// assert_eq!(act_scale, 2.0 / 127.0);
    /// ```
    ///
    /// # Panics
    /// If the two slices differ in length.
    pub fn quantize_row(row: &[f32], codes: &mut [i8]) -> f32 {
        quantize_above(row, EPS, codes)
    }
}

simd_fn! {
    /// [`quantize_row`] with another floor than [`EPS`].
    pub(crate) fn quantize_row_above(row: &[f32], eps: f32, codes: &mut [i8]) -> f32 {
        quantize_above(row, eps, codes)
    }
}

#[inline(always)]
fn quantize_above(row: &[f32], eps: f32, codes: &mut [i8]) -> f32 {
    assert_eq!(row.len(), codes.len(), "one code for each activation");
    let max = absmax(row, eps);
    let inv_scale = ACT_MAX / max;
    for (code, &x) in codes.iter_mut().zip(row) {
        // As [`activation`] and a conversion, which does not vectorise; |ratio| is at most 127, but for a rounding.
        let ratio = x * inv_scale;
        *code = (if ratio.is_nan() { 0.0 } else { ratio } + ROUND).to_bits() as i8;
    }
    max / ACT_MAX
}

simd_fn! {
    /// [`quantize_row`] with the codes as whole f32 numbers, the form in which a f32 product is exact.
    ///
    /// Codes and scale are the same bit for bit, except that NaN stays NaN.
    ///
    /// # Panics
    /// If the two slices differ in length.
    pub fn quantize_row_f32(row: &[f32], codes: &mut [f32]) -> f32 {
        assert_eq!(row.len(), codes.len(), "one code for each activation");
        let max = absmax(row, EPS);
        let inv_scale = ACT_MAX / max;
        for (code, &x) in codes.iter_mut().zip(row) {
            *code = activation(x, inv_scale);
        }
        max / ACT_MAX
    }
}

#[inline(always)]
fn activation(x: f32, inv_scale: f32) -> f32 {
    (x * inv_scale).round_ties_even().clamp(-128.0, ACT_MAX)
}

/// The real value of an integer sum of products: `sum * (act_scale * weight_scale)`, in this order on every path.
#[inline(always)]
pub fn epilogue(sum: f32, act_scale: f32, weight_scale: f32) -> f32 {
    sum * (act_scale * weight_scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{RngCore, SeedableRng};

    fn codes_of(weights: &[f32]) -> (f32, Vec<i8>) {
        let mut codes = vec![0; weights.len()];
        let scale = absmean(weights);
        ternarize(weights, scale, &mut codes);
        (scale, codes)
    }

    #[test]
    fn ternary_codes_round_ties_to_even() {
        // mean |W| = 1, so the ratio is the weight itself: 0.5 is a tie and goes to 0, 1.5 to 2 and is clamped.
        let (scale, codes) = codes_of(&[0.5, -0.5, 0.500_001, -1.5, 2.5, -0.499_999]);
        assert!((scale - 1.0).abs() < 1e-6);
        assert_eq!(codes, [0, 0, 1, -1, 1, 0]);
    }

    #[test]
    fn both_forms_of_the_ternary_code_agree() {
        let mut weights: Vec<f32> = vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0];
        for edge in [0.5f32, 1.0, 1.5, 2.5, 1e-45, f32::MAX] {
            let near = [edge.next_down(), edge, edge.next_up()];
            weights.extend(near.into_iter().flat_map(|w| [w, -w]));
        }
        let mut codes = vec![9; weights.len()];
        ternarize(&weights, 1.0, &mut codes);
        assert!(codes.iter().zip(&weights).all(|(code, &w)| *code == ternary(w, 1.0) as i8));
    }

    #[test]
    fn activation_codes_round_ties_to_even() {
        let mut codes = [0i8; 5];
        // absmax 127: the factor is 1, so every value is its own code.
        let scale = quantize_row(&[0.5, 1.5, -2.5, 127.0, -126.5], &mut codes);
        assert_eq!((scale, codes), (1.0, [0, 2, -2, 127, -126]));
    }

    #[test]
    fn zero_and_tiny_inputs_divide_by_eps() {
        let (scale, codes) = codes_of(&[0.0; 7]);
        assert_eq!((scale, codes), (EPS, vec![0; 7]));
        let mut codes = [1i8; 3];
        assert_eq!(quantize_row(&[0.0, 1e-6, -5e-6], &mut codes), EPS / 127.0);
        assert_eq!(codes, [0, 13, -64]); // 12.7 and -63.5
        assert_eq!(absmean(&[]), EPS);
    }

    #[test]
    fn nan_and_infinity_reach_the_scale() {
        for bad in [f32::NAN, -f32::NAN, f32::from_bits(0x7fc0_0001), f32::INFINITY, f32::NEG_INFINITY] {
            let mut codes = [9i8; 3];
            assert!(!quantize_row(&[1.0, bad, 2.0], &mut codes).is_finite());
            assert_eq!(codes[1], 0);
            assert!(!absmean(&[1.0, bad]).is_finite());
        }
    }

    #[test]
    fn gaussian_weights_split_in_thirds() {
        // For Gaussian weights the codes split 0.345 / 0.310 / 0.345 (erf of half the mean absolute deviation).
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut uniform = || (rng.next_u32() as f64 + 0.5) / 4_294_967_296.0;
        let weights: Vec<f32> = (0..100_000)
            .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
            .collect();
        let (_, codes) = codes_of(&weights);
        let zeros = codes.iter().filter(|&&c| c == 0).count() as f64 / 1e5;
        assert!((zeros - 0.310).abs() < 0.01, "{zeros}");
    }

    proptest! {
        #[test]
        fn scaling_by_a_power_of_two_changes_no_code(
            row in prop::collection::vec(-10.0f32..10.0, 1..300), power in -8i32..8
        ) {
            prop_assume!(row.iter().any(|x| x.abs() > 0.1));
            let factor = 2f32.powi(power);
            let scaled: Vec<f32> = row.iter().map(|x| x * factor).collect();
            let (mut a, mut b) = (vec![0i8; row.len()], vec![0i8; row.len()]);
            let (scale_a, scale_b) = (quantize_row(&row, &mut a), quantize_row(&scaled, &mut b));
            prop_assert_eq!(&a, &b);
            prop_assert_eq!(scale_a * factor, scale_b);
            prop_assume!(absmean(&row) > 0.01);
            prop_assert_eq!(codes_of(&row).1, codes_of(&scaled).1);
        }

        #[test]
        fn an_activation_is_off_by_half_a_step_at_most(row in prop::collection::vec(-1e3f32..1e3, 1..200)) {
            let mut codes = vec![0i8; row.len()];
            let scale = quantize_row(&row, &mut codes);
            for (x, code) in row.iter().zip(&codes) {
                prop_assert!((x - f32::from(*code) * scale).abs() <= scale * 0.5001);
            }
        }

        #[test]
        fn both_forms_of_the_activation_quantizer_agree(row in prop::collection::vec(-5.0f32..5.0, 0..200)) {
            let (mut int, mut float) = (vec![0i8; row.len()], vec![0f32; row.len()]);
            let (a, b) = (quantize_row(&row, &mut int), quantize_row_f32(&row, &mut float));
            prop_assert_eq!(a.to_bits(), b.to_bits());
            prop_assert!(int.iter().zip(&float).all(|(i, f)| f32::from(*i) == *f));
        }
    }
}
