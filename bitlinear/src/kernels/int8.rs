//! A dense weight at eight bits: the head of a model, half of what a new token reads once the rest is ternary.
//!
//! Weights are int8 with one scale a row (output). Activations keep 15 bits, as two int8 planes `x = 256 high + low`, so
//! that the weights' rounding is the only one that counts: the product is two integer products, exact on every kernel.

use super::rows::QuantizedRows;
use super::{Choice, Isa, Kernel, KernelError, with_isa};
use crate::packed::{Line, PANEL, STEP, zeroed};
use crate::pool::{self, Pointer};

/// Longest row: 255 * 128 * in_features must fit in i32.
pub const MAX_INT8_FEATURES: usize = i32::MAX as usize / (255 * 128);

/// Codes are stored with this added: bytes are unsigned.
const ZERO: u8 = 128;

/// A dense weight matrix `[out_features, in_features]`, quantized to int8 with a scale for each row.
#[derive(Clone)]
pub struct Int8Weight {
    out_features: usize,
    in_features: usize,
    /// Panels of 16 rows, as [`crate::packed`]'s unpacked codes: a line holds four columns of each row.
    lines: Vec<Line>,
    /// `max|w| / 127` of each row.
    scales: Vec<f32>,
}

impl Int8Weight {
    /// Quantizes rows that `row` writes one at a time: `code = round(w * 127 / max|w|)`, ties to even.
    ///
    /// # Errors
    /// `in_features` is 0 or over [`MAX_INT8_FEATURES`].
    pub fn quantize(
        out_features: usize,
        in_features: usize,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Self, KernelError> {
        if !(1..=MAX_INT8_FEATURES).contains(&in_features) {
            return Err(KernelError::Int8Columns(in_features));
        }
        let steps = in_features.div_ceil(STEP);
        let mut lines = zeroed(out_features.div_ceil(PANEL) * steps);
        let mut scales = vec![0f32; out_features];
        let scales_start = Pointer(scales.as_mut_ptr());
        pool::for_chunks(&mut lines, steps, |panel, lines| {
            let (mut values, mut codes) = (vec![0f32; in_features], vec![0i8; in_features]);
            lines.fill(Line([ZERO; 64]));
            for o in panel * PANEL..out_features.min((panel + 1) * PANEL) {
                row(o, &mut values);
                // The formula is that of the activations' quantizer.
                let scale = crate::quant::quantize_row(&values, &mut codes);
                // SAFETY: o < out_features = scales.len(), and each panel, so each row, belongs to one task.
                unsafe { *scales_start.get().add(o) = scale };
                for (line, codes) in lines.iter_mut().zip(codes.chunks(STEP)) {
                    for (byte, code) in line.0[o % PANEL * STEP..].iter_mut().zip(codes) {
                        *byte = (*code as u8).wrapping_add(ZERO);
                    }
                }
            }
        });
        Ok(Self { out_features, in_features, lines, scales })
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

    fn panel(&self, panel: usize) -> &[Line] {
        let steps = self.in_features.div_ceil(STEP);
        &self.lines[panel * steps..][..steps]
    }
}

impl std::fmt::Debug for Int8Weight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Int8Weight {{ {} x {} }}", self.out_features, self.in_features)
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
pub fn int8_matmul(
    kernel: Kernel,
    activations: &[f32],
    weight: &Int8Weight,
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
            let off = |sum: &i32, row: usize| sum.wrapping_sub(planes.sum(row).wrapping_mul(i32::from(ZERO)));
            let (high, low) = (off(high, 2 * token), off(low, 2 * token + 1));
            let sum = (i64::from(high) * 256 + i64::from(low)) as f32;
            let scale = planes.scale(2 * token) * weight.scales[first + o];
            // SAFETY: the output holds `tokens * outs` values (checked above); each panel belongs to one task.
            unsafe { *output.get().add(token * outs + first + o) = sum * scale };
        }
    };
    with_isa!(kernel, isa => pool::run(panels.div_ceil(at_once), &|task| {
        for panel in task * at_once..panels.min((task + 1) * at_once) {
            let lines = weight.panel(panel);
            for token in (0..tokens - tokens % 2).step_by(2) {
                let rows = [0, 1, 2, 3].map(|row| planes.lines(2 * token + row));
                let [a, b, c, d] = isa.bytes(lines, rows);
                place(token, panel, &a, &b);
                place(token + 1, panel, &c, &d);
            }
            if tokens % 2 == 1 {
                let token = tokens - 1;
                let [a, b] = isa.bytes(lines, [planes.lines(2 * token), planes.lines(2 * token + 1)]);
                place(token, panel, &a, &b);
            }
        }
    }));
    Ok(())
}
