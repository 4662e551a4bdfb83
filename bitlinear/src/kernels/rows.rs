//! Rows of activations as the kernels read them.

use super::MAX_IN_FEATURES;
use crate::packed::{Line, zeroed};
use crate::pool::{self, Pointer};
use crate::quant;

/// Rows are stored in multiples of this, one AMX tile; those that are not there are zero.
pub(super) const ROW_ALIGN: usize = 16;
/// Columns are stored in whole lines after being filled up to whole groups of five steps, the longest of a layout.
const COLUMN_ALIGN: usize = 20;
/// Values of a row that a thread makes in one go.
const GRAIN: usize = 1 << 12;

/// Largest 15-bit code: its high plane is 127.
const PLANES_MAX: f32 = 127.0 * 256.0;

/// Rows of activations, quantized to int8 with one scale each ([`quant::quantize_row`]).
#[derive(Clone, Default)]
pub struct QuantizedRows {
    rows: usize,
    columns: usize,
    /// `rows` rows of `stride()` lines, up to the next multiple of [`ROW_ALIGN`]; zeros beyond `rows` and `columns`.
    codes: Vec<Line>,
    scales: Vec<f32>,
    /// Sum of the codes of each row: the kernels multiply by code + 1 and take this off again.
    sums: Vec<i32>,
}

impl QuantizedRows {
    /// Quantizes `activations`, row-major `[rows, columns]`.
    ///
    /// # Panics
    /// If the length of `activations` is not a multiple of `columns`, or `columns` is 0 or over [`MAX_IN_FEATURES`].
    pub fn quantize(activations: &[f32], columns: usize) -> Self {
        let mut rows = Self::default();
        rows.fill(activations, columns);
        rows
    }

    /// [`QuantizedRows::quantize`] into buffers that are already there.
    ///
    /// # Panics
    /// As [`QuantizedRows::quantize`].
    pub fn fill(&mut self, activations: &[f32], columns: usize) {
        check_columns(columns);
        assert_eq!(activations.len() % columns, 0, "activations are whole rows of {columns}");
        self.fill_with(activations.len() / columns, columns, |row, out| {
            out.copy_from_slice(&activations[row * columns..][..columns]);
        });
    }

    /// Quantizes rows that `make` writes: what comes before a product (a norm, a gated activation) and the quantizer
    /// share one pass over a row, which never leaves the first-level cache.
    ///
    /// # Panics
    /// If `columns` is 0 or over [`MAX_IN_FEATURES`], memory has no room for the rows, or `make` panics.
    pub fn fill_with(&mut self, rows: usize, columns: usize, make: impl Fn(usize, &mut [f32]) + Sync) {
        self.fill_rows(rows, columns, quant::EPS, make);
    }

    /// [`QuantizedRows::fill_with`] for gradients, which may be small as a whole: their scale has no floor to speak of.
    ///
    /// # Panics
    /// As [`QuantizedRows::fill_with`].
    pub fn fill_gradients_with(
        &mut self,
        rows: usize,
        columns: usize,
        make: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        self.fill_rows(rows, columns, quant::GRADIENT_EPS, make);
    }

    fn fill_rows(&mut self, rows: usize, columns: usize, eps: f32, make: impl Fn(usize, &mut [f32]) + Sync) {
        check_columns(columns);
        self.resize(rows, columns);
        let stride = self.stride();
        let codes = Pointer(self.codes.as_mut_ptr());
        let (scales, sums) = (Pointer(self.scales.as_mut_ptr()), Pointer(self.sums.as_mut_ptr()));
        let at_once = (GRAIN / columns).max(1);
        pool::run(rows.div_ceil(at_once), &|task| {
            let mut values = vec![0f32; columns];
            for row in task * at_once..rows.min((task + 1) * at_once) {
                make(row, &mut values);
                // SAFETY: `codes` holds `stride` lines (at least `columns` bytes, any of which is an i8) for every row,
                // `scales` and `sums` a value each (all made so by `resize`); each row belongs to one task.
                unsafe {
                    let codes = codes.get().add(row * stride).cast::<i8>();
                    let codes = std::slice::from_raw_parts_mut(codes, columns);
                    *scales.get().add(row) = quant::quantize_row_above(&values, eps, codes);
                    *sums.get().add(row) = code_sum(codes);
                }
            }
        });
    }

    /// Two rows for each row of `activations`: the high and the low int8 plane of 15-bit codes, `x16 = 256 high + low`. Both have
    /// the scale of `x16`.
    pub(super) fn fill_planes(&mut self, activations: &[f32], columns: usize) {
        self.resize(2 * (activations.len() / columns), columns);
        let stride = self.stride();
        for (row, values) in activations.chunks_exact(columns).enumerate() {
            let max = quant::absmax(values, quant::EPS);
            let inv_scale = PLANES_MAX / max;
            let planes = &mut self.codes[2 * row * stride..][..2 * stride];
            let mut sums = [0, 0];
            for (at, x) in values.iter().enumerate() {
                // NaN becomes 0; its scale is NaN already.
                let code = (x * inv_scale).round_ties_even().clamp(-PLANES_MAX, PLANES_MAX) as i32;
                let low = code as i8;
                let high = ((code - i32::from(low)) >> 8) as i8;
                for (plane, code) in [high, low].into_iter().enumerate() {
                    planes[plane * stride + at / 64].0[at % 64] = code as u8;
                    sums[plane] += i32::from(code);
                }
            }
            self.sums[2 * row..][..2].copy_from_slice(&sums);
            self.scales[2 * row..][..2].fill(max / PLANES_MAX);
        }
    }

    /// Rows of given codes, with a scale of 1 each: for codes that quantizing never gives.
    #[cfg(test)]
    pub(super) fn from_codes(codes: &[i8], columns: usize) -> Self {
        let mut rows = Self::default();
        rows.resize(codes.len() / columns, columns);
        let stride = rows.stride();
        for (row, codes) in codes.chunks_exact(columns).enumerate() {
            for (at, code) in codes.iter().enumerate() {
                rows.codes[row * stride + at / 64].0[at % 64] = *code as u8;
            }
            (rows.scales[row], rows.sums[row]) = (1.0, code_sum(codes));
        }
        rows
    }

    /// Makes room for rows; what is beyond `rows` and `columns` is zero, the rest has to be written.
    fn resize(&mut self, rows: usize, columns: usize) {
        let lines =
            rows.checked_next_multiple_of(ROW_ALIGN).and_then(|rows| rows.checked_mul(stride(columns)));
        let lines = lines.expect("rows of activations that memory has addresses for");
        if columns != self.columns || rows < self.rows || lines > self.codes.len() {
            // Of other rows nothing may be left where zeros belong.
            if lines > self.codes.capacity() {
                self.codes = zeroed(lines);
            } else {
                self.codes.clear();
                self.codes.resize(lines, Line::ZERO);
            }
        }
        (self.rows, self.columns) = (rows, columns);
        self.scales.resize(rows, 0.0);
        self.sums.resize(rows, 0);
    }

    /// Number of rows (tokens).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row without its padding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Codes of one row and the scale that each is multiplied by.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> (Vec<i8>, f32) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let bytes = self.lines(row).iter().flat_map(|line| line.0);
        (bytes.take(self.columns).map(|byte| byte as i8).collect(), self.scales[row])
    }

    /// Lines of a row, of which the padding at the end is also one.
    pub(super) fn lines(&self, row: usize) -> &[Line] {
        &self.codes[row * self.stride()..][..self.stride()]
    }

    /// Lines of the rows from `row` on, in whole tiles of [`ROW_ALIGN`] if `row` is a multiple of that.
    pub(super) fn lines_from(&self, row: usize) -> &[Line] {
        &self.codes[row * self.stride()..]
    }

    /// What the codes of each row are multiplied by.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    pub(super) fn scale(&self, row: usize) -> f32 {
        self.scales[row]
    }

    pub(super) fn sum(&self, row: usize) -> i32 {
        self.sums[row]
    }

    /// Lines from a row to the next.
    pub(super) fn stride(&self) -> usize {
        stride(self.columns)
    }
}

fn stride(columns: usize) -> usize {
    columns.next_multiple_of(COLUMN_ALIGN).div_ceil(size_of::<Line>())
}

fn check_columns(columns: usize) {
    assert!((1..=MAX_IN_FEATURES).contains(&columns), "{columns} columns of activations");
}

crate::simd_fn! {
    fn code_sum(codes: &[i8]) -> i32 {
        codes.iter().map(|&code| i32::from(code)).sum()
    }
}

impl std::fmt::Debug for QuantizedRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantizedRows {{ {} x {} }}", self.rows, self.columns)
    }
}
