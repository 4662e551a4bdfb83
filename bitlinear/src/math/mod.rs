//! The f32 arithmetic around the ternary products, shared by training and inference so that both round alike.
//!
//! Every function here is plain Rust, meant to be inlined into a loop inside a [`simd_fn!`](crate::simd_fn), which
//! compiles that loop for each vector instruction set and picks one at run time. The results are the same bit for bit on
//! all of them: sums run in a fixed number of lanes, multiply-adds are fused because the code says so (`mul_add`), and
//! `exp` is ours.
//! The price is that a processor without fused multiply-add pays for it in software.

mod attention;

pub use attention::{attention, attention_weights, weighted_sum};

/// Lanes of a sum: one AVX-512 register, two of AVX2, four of NEON.
const LANES: usize = 16;

/// Adds up lanes in a fixed tree, halves with halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
///
/// By hand where every processor of an architecture has vectors of four: from the plain form below, compilers make single
/// additions, and take the vectors of the loop before them apart to match.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn reduce(lanes: [f32; LANES]) -> f32 {
    use std::arch::x86_64::*;
    let (quarters, _) = lanes.as_chunks::<4>();
    // SAFETY: SSE, which x86-64 always has; each load is of one of the four arrays of 16 bytes.
    unsafe {
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| _mm_loadu_ps(quarters[i].as_ptr()));
        let four = _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<0b01>(two, two)))
    }
}

/// Adds up lanes in a fixed tree, halves with halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#[inline(always)]
#[cfg(not(target_arch = "x86_64"))]
fn reduce(lanes: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 8]);
    let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// A stored number that is computed with as f32; every f16 and bf16 value is one.
pub trait Widen: Copy + Send + Sync {
    /// The same value as f32.
    fn widen(self) -> f32;

    /// The same values as f32: in their own place, or in `scratch`.
    #[inline(always)]
    fn widen_all<'a>(values: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.clear();
        scratch.extend(values.iter().map(|value| value.widen()));
        scratch
    }
}

impl Widen for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn widen_all<'a>(values: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        values
    }
}

impl Widen for half::bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Widen for half::f16 {
    /// By plain arithmetic, which vectorises, where the library's own conversion is a call.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        // As the f32 with these fields the value is 2^112 times too small, subnormal or not; the product is exact.
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
        let infinite = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(magnitude.to_bits() | infinite | (bits & 0x8000) << 16)
    }
}

/// `Σ a_i * b_i`; elements beyond the shorter slice are left out.
#[inline(always)]
pub fn dot<T: Widen>(a: &[T], b: &[f32]) -> f32 {
    reduce(lane_sums(a, b))
}

/// The sums of a [`dot`] before its lanes are added up.
#[inline(always)]
fn lane_sums<T: Widen>(a: &[T], b: &[f32]) -> [f32; LANES] {
    let len = a.len().min(b.len());
    let (a, a_rest) = a[..len].as_chunks::<LANES>();
    let (b, b_rest) = b[..len].as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] = a[lane].widen().mul_add(b[lane], lanes[lane]);
        }
    }
    if !a_rest.is_empty() {
        lanes = through_memory(lanes);
        for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
            *lane = a.widen().mul_add(*b, *lane);
        }
    }
    lanes
}

/// The same lanes. A compiler that sees how single lanes are made or used, and the loop beside that, takes the loop's
/// vectors apart to match, and is several times slower; it cannot see through this.
#[inline(always)]
fn through_memory(lanes: [f32; LANES]) -> [f32; LANES] {
    *std::hint::black_box(&lanes)
}

/// `out_j = rows_j · x`, where row `j` is `rows[j * stride ..][.. x.len()]`: each with the bits of [`dot`].
///
/// # Panics
/// If `rows` is too short.
#[inline(always)]
pub fn dots<T: Widen>(rows: &[T], stride: usize, x: &[f32], out: &mut [f32]) {
    // The usual widths of a head: `x` stays in registers.
    match x.len() {
        8 => half_dots(rows, stride, x, out),
        64 => whole_dots::<4, T>(rows, stride, x, out),
        128 => whole_dots::<8, T>(rows, stride, x, out),
        _ => {
            for (j, out) in out.iter_mut().enumerate() {
                *out = dot(&rows[j * stride..][..x.len()], x);
            }
        }
    }
}

/// [`dots`] of 8 elements, the heads of very small models: the other lanes of [`reduce`] would be zeros.
#[inline(always)]
fn half_dots<T: Widen>(rows: &[T], stride: usize, x: &[f32], out: &mut [f32]) {
    let x: [f32; 8] = std::array::from_fn(|lane| x[lane]);
    for (j, out) in out.iter_mut().enumerate() {
        let row = &rows[j * stride..][..8];
        let eight: [f32; 8] = std::array::from_fn(|lane| row[lane].widen().mul_add(x[lane], 0.0));
        let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
        *out = (four[0] + four[2]) + (four[1] + four[3]);
    }
}

/// [`dots`] of `N` times [`LANES`] elements.
#[inline(always)]
fn whole_dots<const N: usize, T: Widen>(rows: &[T], stride: usize, x: &[f32], out: &mut [f32]) {
    let (chunks, _) = x.as_chunks::<LANES>();
    let x: [[f32; LANES]; N] = std::array::from_fn(|i| chunks[i]);
    for (j, out) in out.iter_mut().enumerate() {
        let (row, _) = rows[j * stride..][..N * LANES].as_chunks::<LANES>();
        let mut lanes = [0f32; LANES];
        for i in 0..N {
            for lane in 0..LANES {
                lanes[lane] = row[i][lane].widen().mul_add(x[i][lane], lanes[lane]);
            }
        }
        *out = reduce(lanes);
    }
}

/// `Σ x_i`
#[inline(always)]
pub fn sum(x: &[f32]) -> f32 {
    let (x, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for x in x {
        for lane in 0..LANES {
            lanes[lane] += x[lane];
        }
    }
    for (lane, x) in rest.iter().enumerate() {
        lanes[lane] += x;
    }
    reduce(lanes)
}

/// `y_i += factor * x_i`
#[inline(always)]
pub fn axpy(factor: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = factor.mul_add(*x, *y);
    }
}

/// `e^x` to within 2 units in the last place; 0 below -87.3, infinity above 88.7, NaN for NaN.
///
/// `x = n ln 2 + r`, `e^x = 2^n e^r` with a polynomial for `e^r` on `|r| <= ln 2 / 2`: no branches, so that it vectorises,
/// and no library call, so that every machine gives the same bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4; // 355/512: n * LN2_HIGH is exact
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves round(x) in the low bits
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 88.7 { 88.7 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    // 2^n in two halves, since n = 128 alone is beyond the exponent's range.
    let n = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let (half, rest) = (n >> 1, n - (n >> 1));
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let value = p * power(half) * power(rest);
    let value = if x < -87.3 { 0.0 } else { value };
    let value = if x > 88.72 { f32::INFINITY } else { value };
    if x.is_nan() { x } else { value }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The activation function of the gated MLP, by its name in `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `max(x, 0)^2`
    Relu2,
}

impl Activation {
    /// The activation called `silu` or `relu2`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "silu" => Some(Self::Silu),
            "relu2" => Some(Self::Relu2),
            _ => None,
        }
    }

    /// Its name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Relu2 => "relu2",
        }
    }

    /// `out_i = act(gate_i) * up_i`
    #[inline(always)]
    pub fn gated(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match self {
            Self::Silu => {
                for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                    *out = g * sigmoid(*g) * u;
                }
            }
            Self::Relu2 => {
                for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
                    // Written so that NaN stays NaN.
                    let positive = if *g < 0.0 { 0.0 } else { *g };
                    *out = positive * positive * u;
                }
            }
        }
    }

    /// Gradients of [`Activation::gated`]: adds nothing, writes `d gate` and `d up` for the gradient `grad` of its output.
    #[inline(always)]
    pub fn gated_backward(
        self,
        gate: &[f32],
        up: &[f32],
        grad: &[f32],
        grad_gate: &mut [f32],
        grad_up: &mut [f32],
    ) {
        let inputs = gate.iter().zip(up).zip(grad);
        for (((g, u), grad), (grad_gate, grad_up)) in inputs.zip(grad_gate.iter_mut().zip(grad_up)) {
            let (value, slope) = match self {
                Self::Silu => {
                    let s = sigmoid(*g);
                    (g * s, s * (1.0 + g * (1.0 - s)))
                }
                Self::Relu2 => {
                    let positive = if *g < 0.0 { 0.0 } else { *g };
                    (positive * positive, 2.0 * positive)
                }
            };
            *grad_gate = grad * u * slope;
            *grad_up = grad * value;
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`, the factor of RMSNorm.
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// RMSNorm of one token: `out_i = weight_i * (x_i / sqrt(mean(x^2) + eps))`.
///
/// Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467, equation 4), with the order of operations of
/// transformers' `LlamaRMSNorm`.
#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = inverse_rms(x, eps);
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = w * (x * factor);
    }
}

/// [`rms_norm`] in place.
#[inline(always)]
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = inverse_rms(x, eps);
    for (x, w) in x.iter_mut().zip(weight) {
        *x = w * (*x * factor);
    }
}

/// Gradients of [`rms_norm`] of one token, added to `grad_x` and `grad_weight`: with `f = 1 / sqrt(mean(x^2) + eps)` and `n`
/// features, `dx_i = f w_i dy_i - x_i f^3 / n Σ_j w_j dy_j x_j` and `dw_i = dy_i x_i f`.
///
/// `weighted` is room for as many values as `x` has.
#[inline(always)]
pub fn rms_norm_backward(
    x: &[f32],
    weight: &[f32],
    grad: &[f32],
    eps: f32,
    weighted: &mut [f32],
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    for ((weighted, w), g) in weighted.iter_mut().zip(weight).zip(grad) {
        *weighted = w * g;
    }
    let factor = inverse_rms(x, eps);
    let pull = dot(weighted, x) * factor * factor * factor / x.len() as f32;
    for ((grad_x, weighted), x) in grad_x.iter_mut().zip(weighted.iter()).zip(x) {
        *grad_x += weighted * factor - x * pull;
    }
    for ((grad_w, g), x) in grad_weight.iter_mut().zip(grad).zip(x) {
        *grad_w += g * (x * factor);
    }
}

/// Cosines and sines of the rotary position embedding for positions `0..positions`.
///
/// Half-split form ("NeoX", `rotate_half`): element `i` is paired with `i + head_dim / 2` and turned by the angle
/// `position * theta^(-2 i / head_dim)`. Source: "RoFormer" (arXiv 2104.09864, equation 34).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    half: usize,
    /// `[positions, half]` cosines, then sines.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The table for heads of `head_dim` elements.
    ///
    /// # Panics
    /// If `head_dim` is odd or zero.
    pub fn new(head_dim: usize, positions: usize, theta: f32) -> Self {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rotary embedding of a head of {head_dim}");
        let half = head_dim / 2;
        let frequency: Vec<f32> = (0..half)
            .map(|i| (1.0 / f64::from(theta).powf(2.0 * i as f64 / head_dim as f64)) as f32)
            .collect();
        // The angle is rounded to f32 before the cosine, as in PyTorch; the cosine itself is taken in f64, whose
        // rounding to f32 is the same with every mathematical library.
        let angles = (0..positions).flat_map(|p| frequency.iter().map(move |f| f64::from(p as f32 * f)));
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Self { half, cos, sin }
    }

    /// Elements in the heads that this table turns.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Number of positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Turns every head of a row `[heads * head_dim]` to its position.
    ///
    /// # Panics
    /// If the position is not in the table.
    #[inline(always)]
    pub fn rotate(&self, position: usize, row: &mut [f32]) {
        self.turn(position, row, 1.0);
    }

    /// The inverse of [`RopeTable::rotate`], which is also its gradient.
    ///
    /// # Panics
    /// If the position is not in the table.
    #[inline(always)]
    pub fn rotate_back(&self, position: usize, row: &mut [f32]) {
        self.turn(position, row, -1.0);
    }

    #[inline(always)]
    fn turn(&self, position: usize, row: &mut [f32], direction: f32) {
        let at = position * self.half;
        let (cos, sin) = (&self.cos[at..at + self.half], &self.sin[at..at + self.half]);
        for head in row.chunks_exact_mut(2 * self.half) {
            let (a, b) = head.split_at_mut(self.half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let sin = sin * direction;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// `x_i = e^(x_i - max) / Σ e^(x_j - max)`, in place. Returns `ln Σ e^x_j`.
#[inline(always)]
pub fn softmax(x: &mut [f32]) -> f32 {
    let max = maximum(x);
    for x in x.iter_mut() {
        *x = exp(*x - max);
    }
    let total = sum(x);
    let inverse = 1.0 / total;
    for x in x.iter_mut() {
        *x *= inverse;
    }
    max + total.ln()
}

/// The largest value, negative infinity if there is none; NaN is passed over.
#[inline(always)]
pub fn maximum(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (x, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in x {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], x[lane]);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}

/// `-ln softmax(logits)[target]`, in nats; the logits become their softmax.
///
/// # Panics
/// If there is no such target.
#[inline(always)]
pub fn cross_entropy(logits: &mut [f32], target: usize) -> f32 {
    let logit = logits[target];
    softmax(logits) - logit
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Largest difference from a f64 value, in units of the last place of that value as f32.
    fn ulps(value: f32, truth: f64) -> f64 {
        let rounded = truth as f32;
        let unit = f64::from(f32::from_bits(rounded.abs().to_bits() + 1)) - f64::from(rounded.abs());
        (f64::from(value) - truth).abs() / unit
    }

    #[test]
    fn the_ruler_measures() {
        assert_eq!(ulps(1.0, 1.0), 0.0);
        assert!(ulps(f32::from_bits(1f32.to_bits() + 3), 1.0) > 2.9);
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0f64;
        for step in -872_000..=887_000 {
            let x = step as f32 * 1e-4;
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst < 2.0, "{worst}");
        assert_eq!((exp(0.0), exp(-200.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert_eq!((exp(89.0), exp(f32::INFINITY)), (f32::INFINITY, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn halves_widen_exactly() {
        for bits in 0..=u16::MAX {
            let (f16, bf16) = (half::f16::from_bits(bits), half::bf16::from_bits(bits));
            let same = |a: f32, b: f32| if b.is_nan() { a.is_nan() } else { a.to_bits() == b.to_bits() };
            assert!(same(f16.widen(), f16.to_f32()) && same(bf16.widen(), bf16.to_f32()), "{bits:04x}");
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..777).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let keys: Vec<f32> = (0..50 * 96).map(|i| (i as f32 * 0.11).cos()).collect();
        #[inline(always)]
        fn work(x: &[f32], keys: &[f32]) -> Vec<u32> {
            let mut weights = vec![0.0; 50];
            let (mut mixed, mut normed, mut gated) = (vec![0.0; 80], vec![0.0; 777], vec![0.0; 777]);
            attention_weights(&x[..80], keys, 96, &mut weights);
            weighted_sum(&weights, keys, 96, &mut mixed);
            rms_norm(x, x, 1e-5, &mut normed);
            Activation::Silu.gated(x, &normed, &mut gated);
            let parts = [weights, mixed, normed, gated].concat();
            parts.iter().map(|x| x.to_bits()).collect()
        }
        crate::simd_fn! {
            fn fastest(x: &[f32], keys: &[f32]) -> Vec<u32> {
                work(x, keys)
            }
        }
        println!("level {:?} against the baseline", crate::simd::level());
        assert_eq!(fastest(&x, &keys), work(&x, &keys));
    }

    #[test]
    fn dots_have_the_bits_of_each_dot() {
        let wave = |len: usize, f: f32| (0..len).map(|i| (i as f32 * f).sin()).collect::<Vec<f32>>();
        for (count, len, stride) in [(0, 5, 5), (1, 16, 16), (31, 7, 9), (32, 80, 80), (70, 33, 40)] {
            let (rows, x) = (wave(count * stride, 0.3), wave(len, 0.7));
            let mut out = vec![9.0; count];
            dots(&rows, stride, &x, &mut out);
            let each: Vec<f32> = (0..count).map(|j| dot(&rows[j * stride..][..len], &x)).collect();
            assert_eq!(out, each);
        }
    }

    #[test]
    fn rope_turns_pairs_and_back() {
        let table = RopeTable::new(4, 8, 100.0);
        let mut row = [1.0, 2.0, 3.0, 4.0];
        table.rotate(3, &mut row);
        // Angles 3 and 3 / 10.
        let expected = [
            1.0 * 3f64.cos() - 3.0 * 3f64.sin(),
            2.0 * 0.3f64.cos() - 4.0 * 0.3f64.sin(),
            3.0 * 3f64.cos() + 1.0 * 3f64.sin(),
            4.0 * 0.3f64.cos() + 2.0 * 0.3f64.sin(),
        ];
        assert!(row.iter().zip(expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6), "{row:?}");
        table.rotate_back(3, &mut row);
        assert!(row.iter().zip([1.0, 2.0, 3.0, 4.0]).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn rms_norm_has_unit_mean_square() {
        let (x, ones) = ([3.0, -4.0, 12.0, 0.0], [1.0; 4]);
        let mut out = [0.0; 4];
        rms_norm(&x, &ones, 0.0, &mut out);
        assert!((out.iter().map(|x| x * x).sum::<f32>() / 4.0 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn nan_passes_through() {
        let mut scores = [1.0, f32::NAN, 2.0];
        softmax(&mut scores);
        assert!(scores.iter().all(|s| s.is_nan()));
        for act in [Activation::Silu, Activation::Relu2] {
            let mut out = [0.0];
            act.gated(&[f32::NAN], &[1.0], &mut out);
            assert!(out[0].is_nan());
        }
    }

    proptest! {
        #[test]
        fn softmax_sums_to_one(mut x in prop::collection::vec(-50f32..50.0, 1..300)) {
            softmax(&mut x);
            prop_assert!((x.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }

        #[test]
        fn dot_is_close_to_its_f64_value(pairs in prop::collection::vec((-1f32..1.0, -1f32..1.0), 0..500)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let truth: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            prop_assert!((f64::from(dot(&a, &b)) - truth).abs() < 1e-5);
        }
    }
}
