//! A dense weight at eight or four bits: the head of a model, half of what a new token reads once the rest is ternary.
//!
//! Weights are integers with one scale a row (output). Activations keep 15 bits, as two int8 planes `x = 256 high + low`, so
//! that the weights' rounding is the only one that counts: the product is two integer products, exact on every kernel.
//!
//! Bytes of codes are stored as panels of 16 rows, as [`crate::packed`]'s unpacked codes are: a line holds four columns
//! of each row. At four bits a line holds eight: the first four in the low halves of its bytes, the others in the high ones.

use super::rows::QuantizedRows;
use super::{Choice, Isa, Kernel, KernelError, LINE_STEPS, with_isa};
use crate::packed::{Line, PANEL, STEP, zeroed};
use crate::pool::{self, Pointer};
use crate::{quant, simd_fn};

/// Longest row: 255 * 128 * in_features must fit in i32.
pub const MAX_INT_FEATURES: usize = i32::MAX as usize / (255 * 128);

/// Bits of a weight's codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// Codes from -127 to 127.
    Eight,
    /// Codes from -7 to 7.
    Four,
}

impl Bits {
    /// The largest code.
    fn max(self) -> f32 {
        match self {
            Self::Eight => 127.0,
            Self::Four => 7.0,
        }
    }

    /// Codes are stored with this added: what is stored is unsigned.
    fn zero(self) -> u8 {
        match self {
            Self::Eight => 128,
            Self::Four => 8,
        }
    }

    /// Lines of a panel with this many columns.
    fn lines(self, columns: usize) -> usize {
        match self {
            Self::Eight => columns.div_ceil(STEP),
            Self::Four => columns.div_ceil(2 * STEP),
        }
    }
}

/// A dense weight matrix `[out_features, in_features]`, quantized to integers with a scale for each row.
#[derive(Clone)]
pub struct IntWeight {
    out_features: usize,
    in_features: usize,
    bits: Bits,
    /// Panels of `bits.lines(in_features)` lines.
    lines: Vec<Line>,
    /// `max|w| / bits.max()` of each row.
    scales: Vec<f32>,
}

impl IntWeight {
    /// Quantizes rows that `row` writes one at a time: `code = round(w * max / max|w|)`, ties to even, where `max` is 127 at
    /// eight bits and 7 at four.
    ///
    /// # Errors
    /// `in_features` is 0 or over [`MAX_INT_FEATURES`].
    pub fn quantize(
        out_features: usize,
        in_features: usize,
        bits: Bits,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Self, KernelError> {
        if !(1..=MAX_INT_FEATURES).contains(&in_features) {
            return Err(KernelError::IntColumns(in_features));
        }
        let panel_lines = bits.lines(in_features);
        let mut lines = zeroed(out_features.div_ceil(PANEL) * panel_lines);
        let mut scales = vec![0f32; out_features];
        let scales_start = Pointer(scales.as_mut_ptr());
        pool::for_chunks(&mut lines, panel_lines, |panel, lines| {
            let (mut values, mut codes) = (vec![0f32; in_features], vec![0u8; in_features]);
            for o in panel * PANEL..out_features.min((panel + 1) * PANEL) {
                row(o, &mut values);
                let scale = stored_codes(&values, bits.max(), bits.zero(), &mut codes);
                // SAFETY: o < out_features = scales.len(), and each panel, so each row, belongs to one task.
                unsafe { *scales_start.get().add(o) = scale };
                for (step, codes) in codes.chunks(STEP).enumerate() {
                    let (line, shift) = match bits {
                        Bits::Eight => (step, 0),
                        Bits::Four => (step / 2, step % 2 * 4),
                    };
                    for (byte, code) in lines[line].0[o % PANEL * STEP..].iter_mut().zip(codes) {
                        *byte |= code << shift;
                    }
                }
            }
        });
        Ok(Self { out_features, in_features, bits, lines, scales })
    }

    /// Rows: the length of an output.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns: the length of an input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.lines) + size_of_val(&*self.scales)
    }

    /// Bits of the codes.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    fn panel(&self, panel: usize) -> &[Line] {
        let lines = self.bits.lines(self.in_features);
        &self.lines[panel * lines..][..lines]
    }

    /// `Σ_j x[r][j] * stored[o][j]` of `R` rows with a panel, modulo 2^32.
    fn products<const R: usize>(&self, isa: impl Isa, panel: usize, x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        match self.bits {
            Bits::Eight => isa.bytes(self.panel(panel), x),
            Bits::Four => isa.halves(self.panel(panel), x),
        }
    }
}

simd_fn! {
    /// The codes of one row as they are stored; returns what a code is multiplied by.
    fn stored_codes(row: &[f32], max: f32, zero: u8, codes: &mut [u8]) -> f32 {
        let largest = quant::absmax(row, quant::EPS);
        let inv_scale = max / largest;
        for (code, w) in codes.iter_mut().zip(row) {
            *code = ((w * inv_scale).round_ties_even().clamp(-max, max) as i8 as u8).wrapping_add(zero);
        }
        largest / max
    }
}

/// Lines of a panel that are unpacked together: they stay in the first-level cache.
const UNPACKED: usize = 64;

/// [`Isa::halves`] by [`Isa::bytes`].
pub(super) fn unpacked_halves<const R: usize>(
    isa: impl Isa,
    panel: &[Line],
    x: [&[Line]; R],
) -> [[i32; PANEL]; R] {
    let mut unpacked = [Line::ZERO; 2 * UNPACKED];
    let mut sums = [[0i32; PANEL]; R];
    for (chunk, lines) in panel.chunks(UNPACKED).enumerate() {
        let vectors = &mut unpacked[..2 * lines.len()];
        unpack_halves(lines, vectors);
        // Two vectors a line: `UNPACKED` lines are a whole number of lines of activations.
        const LINES: usize = 2 * UNPACKED / LINE_STEPS;
        let parts: [[i32; PANEL]; R] = isa.bytes(vectors, x.map(|x| &x[chunk * LINES..]));
        for (sum, part) in sums.as_flattened_mut().iter_mut().zip(parts.as_flattened()) {
            *sum = sum.wrapping_add(*part);
        }
    }
    sums
}

simd_fn! {
    /// The low halves of a line's bytes, then the high ones.
    fn unpack_halves(lines: &[Line], vectors: &mut [Line]) {
        for (line, [low, high]) in lines.iter().zip(vectors.as_chunks_mut::<2>().0) {
            for ((byte, low), high) in line.0.iter().zip(&mut low.0).zip(&mut high.0) {
                (*low, *high) = (byte & 0xf, byte >> 4);
            }
        }
    }
}

impl std::fmt::Debug for IntWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IntWeight {{ {} x {} }}", self.out_features, self.in_features)
    }
}

/// `output[t, o] = (Σ_j x16[t, j] * code[o, j]) * (act_scale[t] * scale[o])` for f32 activations `[tokens, in_features]`, which
/// are quantized to 15 bits a token, `x16 = round(x * 32512 / max|x|)`.
///
/// # Shapes
/// `[tokens, in_features] x [out_features, in_features] -> [tokens, out_features]`
///
/// # Errors
/// The shapes do not fit.
pub fn int_matmul(
    kernel: Kernel,
    activations: &[f32],
    weight: &IntWeight,
    output: &mut [f32],
) -> Result<(), KernelError> {
    let (outs, columns) = (weight.out_features, weight.in_features);
    let tokens = activations.len() / columns;
    if !activations.len().is_multiple_of(columns) || tokens.checked_mul(outs) != Some(output.len()) {
        return Err(KernelError::Shape {
            rows: tokens,
            columns,
            out_features: outs,
            in_features: columns,
            output: output.len(),
        });
    }
    let mut planes = QuantizedRows::default();
    planes.fill_planes(activations, columns);
    let output = Pointer(output.as_mut_ptr());
    let panels = outs.div_ceil(PANEL);
    let at_once = panels.div_ceil(pool::threads() * 8).max(1);
    let place = |token: usize, panel: usize, high: &[i32; PANEL], low: &[i32; PANEL]| {
        let first = panel * PANEL;
        for (o, (high, low)) in high.iter().zip(low).enumerate().take(outs - first) {
            let zero = i32::from(weight.bits.zero());
            let off = |sum: &i32, row: usize| sum.wrapping_sub(planes.sum(row).wrapping_mul(zero));
            let (high, low) = (off(high, 2 * token), off(low, 2 * token + 1));
            let sum = (i64::from(high) * 256 + i64::from(low)) as f32;
            let scale = planes.scale(2 * token) * weight.scales[first + o];
            // SAFETY: the output holds `tokens * outs` values (checked above); each panel belongs to one task.
            unsafe { *output.get().add(token * outs + first + o) = sum * scale };
        }
    };
    with_isa!(kernel, isa => pool::run(panels.div_ceil(at_once), &|task| {
        for panel in task * at_once..panels.min((task + 1) * at_once) {
            for token in (0..tokens - tokens % 2).step_by(2) {
                let rows = [0, 1, 2, 3].map(|row| planes.lines(2 * token + row));
                let [a, b, c, d] = weight.products(isa, panel, rows);
                place(token, panel, &a, &b);
                place(token + 1, panel, &c, &d);
            }
            if tokens % 2 == 1 {
                let token = tokens - 1;
                let [a, b] = weight.products(isa, panel, [planes.lines(2 * token), planes.lines(2 * token + 1)]);
                place(token, panel, &a, &b);
            }
        }
    }));
    Ok(())
}
