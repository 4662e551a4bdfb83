//! Ternary weights, packed as the kernels read them: at two bits a weight, or at 1.6.
//!
//! The layouts are drawn in [`Layout`]'s module; both are layouts in memory. Hugging Face's files have another one,
//! which the `infer` crate packs and unpacks.

mod layout;
mod lines;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

pub use layout::{Layout, PANEL, STEP};
pub(crate) use layout::{interleave, unpack_lines};
pub use lines::{Line, zeroed};

use crate::pool;
use crate::quant;

/// What is wrong with a ternary weight.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PackError {
    /// The number of codes is not `out_features * in_features`.
    #[error(
        "{found} codes for a ternary weight of {out_features} x {in_features}; expected one for each weight; check the shape"
    )]
    Shape {
        /// Rows of the weight.
        out_features: usize,
        /// Columns of the weight.
        in_features: usize,
        /// Codes given.
        found: usize,
    },
    /// A code is not -1, 0 or +1.
    #[error("code {code} at row {row}, column {column} is not ternary; only -1, 0 and 1 can be packed")]
    Code {
        /// Row of the code.
        row: usize,
        /// Column of the code.
        column: usize,
        /// The code.
        code: i8,
    },
    /// The scale is not a positive finite number.
    #[error("weight scale {0} is not a positive finite number; the tensor it belongs to is damaged")]
    Scale(f32),
}

/// A ternary weight matrix `[out_features, in_features]` with its shape and its one scale.
///
/// The weight that a model computes with is `code * weight_scale`.
#[derive(Clone, PartialEq)]
pub struct TernaryWeight {
    out_features: usize,
    in_features: usize,
    weight_scale: f32,
    layout: Layout,
    /// `panels()` times `layout.lines(in_features)`; checked on construction, private, and so true ever after.
    lines: Vec<Line>,
}

impl TernaryWeight {
    /// Packs ternary codes, row after row, at two bits each.
    ///
    /// # Errors
    /// The number of codes does not fit the shape, a code is not ternary, or the scale is not positive and finite.
    pub fn pack(
        codes: &[i8],
        out_features: usize,
        in_features: usize,
        weight_scale: f32,
    ) -> Result<Self, PackError> {
        if out_features.checked_mul(in_features) != Some(codes.len()) {
            return Err(PackError::Shape { out_features, in_features, found: codes.len() });
        }
        Self::from_rows(out_features, in_features, weight_scale, Layout::TwoBit, |row, out| {
            for (out, code) in out.iter_mut().zip(&codes[row * in_features..]) {
                *out = code.wrapping_add(1) as u8;
            }
        })
    }

    /// Packs rows that `fill` writes one at a time, as codes `w + 1`: 0, 1 or 2. They never are in memory all at once.
    ///
    /// # Errors
    /// A code is above 2 (the first one in the order of rows and columns is named), or the scale is not positive and finite.
    pub fn from_rows(
        out_features: usize,
        in_features: usize,
        weight_scale: f32,
        layout: Layout,
        fill: impl Fn(usize, &mut [u8]) + Sync,
    ) -> Result<Self, PackError> {
        if !(weight_scale.is_finite() && weight_scale > 0.0) {
            return Err(PackError::Scale(weight_scale));
        }
        let panel_lines = layout.lines(in_features);
        let mut lines = zeroed(out_features.div_ceil(PANEL) * panel_lines);
        let row_len = in_features.next_multiple_of(STEP);
        let bad: Mutex<Option<(usize, usize, u8)>> = Mutex::new(None);
        if in_features > 0 {
            pool::for_chunks(&mut lines, panel_lines, |panel, lines| {
                let mut rows = vec![1u8; PANEL * row_len];
                for row in panel * PANEL..out_features.min((panel + 1) * PANEL) {
                    let codes = &mut rows[row % PANEL * row_len..][..in_features];
                    fill(row, codes);
                    // A maximum vectorises; a search is for when there is something to find.
                    if codes.iter().fold(0, |max, code| max.max(*code)) > 2 {
                        let column = codes.iter().position(|code| *code > 2).unwrap_or(0);
                        let mut bad = bad.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        if bad.is_none_or(|(first, ..)| row < first) {
                            *bad = Some((row, column, codes[column]));
                        }
                        return;
                    }
                }
                layout::pack_panel(layout, &rows, row_len, lines);
            });
        }
        match bad.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some((row, column, code)) => {
                Err(PackError::Code { row, column, code: code.wrapping_sub(1) as i8 })
            }
            None => Ok(Self { out_features, in_features, weight_scale, layout, lines }),
        }
    }

    /// Ternarizes latent f32 weights `[out_features, in_features]` by [`quant::absmean`] and packs them.
    ///
    /// # Errors
    /// As [`TernaryWeight::pack`]; NaN or infinite weights show up as a bad scale.
    pub fn from_latent(latent: &[f32], out_features: usize, in_features: usize) -> Result<Self, PackError> {
        let weight_scale = quant::absmean(latent);
        let mut codes = vec![0; latent.len()];
        quant::ternarize(latent, weight_scale, &mut codes);
        Self::pack(&codes, out_features, in_features, weight_scale)
    }

    /// Packs the transpose of matrices of ternary codes, each row-major `[out_k, in_features]`, one after the other: a weight
    /// `[in_features, Σ out_k]` at two bits, with a scale of 1. Its product with the rows `[g_1 w_1, g_2 w_2, ..]`, gradients of
    /// the outputs of weights with scales `w_k`, is the gradient of the input that these weights share.
    ///
    /// # Errors
    /// A part is not whole rows of `in_features`, or a code is not ternary (the first one in the order of the transpose's rows
    /// and columns is named).
    pub fn transposed(parts: &[&[i8]], in_features: usize) -> Result<Self, PackError> {
        for part in parts {
            if !part.len().is_multiple_of(in_features) {
                let out_features = part.len().checked_div(in_features).unwrap_or(0);
                return Err(PackError::Shape { out_features, in_features, found: part.len() });
            }
        }
        let rows: Vec<&[i8]> = parts.iter().flat_map(|part| part.chunks_exact(in_features.max(1))).collect();
        let panel_lines = Layout::TwoBit.lines(rows.len());
        let mut lines = zeroed(in_features.div_ceil(PANEL) * panel_lines);
        let bad = AtomicBool::new(false);
        if !lines.is_empty() {
            pool::for_chunks(&mut lines, layout::WIDE / PANEL * panel_lines, |chunk, lines| {
                if !layout::pack_columns(&rows, chunk * layout::WIDE, panel_lines, lines) {
                    bad.store(true, Ordering::Relaxed);
                }
            });
        }
        if bad.into_inner() {
            for row in 0..in_features {
                for (column, codes) in rows.iter().enumerate() {
                    if !(-1..=1).contains(&codes[row]) {
                        return Err(PackError::Code { row, column, code: codes[row] });
                    }
                }
            }
        }
        Ok(Self {
            out_features: in_features,
            in_features: rows.len(),
            weight_scale: 1.0,
            layout: Layout::TwoBit,
            lines,
        })
    }

    /// The same weight in another layout, one panel at a time.
    pub fn with_layout(&self, layout: Layout) -> Self {
        if layout == self.layout {
            return self.clone();
        }
        let panel_lines = layout.lines(self.in_features);
        let mut lines = zeroed(self.panels() * panel_lines);
        let row_len = self.in_features.next_multiple_of(STEP);
        if self.in_features > 0 {
            pool::for_chunks(&mut lines, panel_lines, |panel, lines| {
                let mut rows = vec![0; PANEL * row_len];
                self.unpack_panel(panel, row_len, &mut rows);
                layout::pack_panel(layout, &rows, row_len, lines);
            });
        }
        Self { layout, lines, ..*self }
    }

    /// The ternary codes, row after row: the inverse of [`TernaryWeight::pack`].
    pub fn unpack(&self) -> Vec<i8> {
        let mut codes = vec![0i8; self.out_features * self.in_features];
        let row_len = self.in_features.next_multiple_of(STEP);
        if self.in_features > 0 {
            pool::for_chunks(&mut codes, PANEL * self.in_features, |panel, codes| {
                let mut rows = vec![0; PANEL * row_len];
                self.unpack_panel(panel, row_len, &mut rows);
                for (codes, row) in codes.chunks_exact_mut(self.in_features).zip(rows.chunks_exact(row_len)) {
                    codes.iter_mut().zip(row).for_each(|(code, stored)| *code = *stored as i8 - 1);
                }
            });
        }
        codes
    }

    /// The codes `w + 1` of a panel, 16 rows of `row_len` (the columns in whole steps).
    fn unpack_panel(&self, panel: usize, row_len: usize, rows: &mut [u8]) {
        let lines = self.panel(panel);
        let mut vectors = vec![Line::ZERO; lines.len() * self.layout.vectors()];
        unpack_lines(self.layout, lines, &mut vectors);
        for (step, vector) in vectors[..row_len / STEP].iter().enumerate() {
            for (r, codes) in vector.0.as_chunks::<STEP>().0.iter().enumerate() {
                rows[r * row_len + step * STEP..][..STEP].copy_from_slice(codes);
            }
        }
    }

    /// Rows: the length of an output.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns: the length of an input.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// What a code is multiplied by to give the weight.
    pub fn weight_scale(&self) -> f32 {
        self.weight_scale
    }

    /// How the codes are packed.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes of the packed codes.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.lines)
    }

    /// Number of panels: the rows, 16 at a time.
    pub fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    /// The lines of one panel.
    ///
    /// # Panics
    /// If there is no such panel.
    pub fn panel(&self, panel: usize) -> &[Line] {
        let lines = self.layout.lines(self.in_features);
        &self.lines[panel * lines..][..lines]
    }
}

impl std::fmt::Debug for TernaryWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { out_features, in_features, weight_scale, layout, .. } = self;
        let layout = layout.name();
        write!(
            f,
            "TernaryWeight {{ {out_features} x {in_features}, {layout}, weight_scale: {weight_scale} }}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bad_input_is_refused() {
        assert!(matches!(TernaryWeight::pack(&[0; 5], 2, 3, 1.0), Err(PackError::Shape { .. })));
        assert!(matches!(TernaryWeight::pack(&[], usize::MAX, 2, 1.0), Err(PackError::Shape { .. })));
        let error = TernaryWeight::pack(&[0, 1, -1, 2], 2, 2, 1.0).unwrap_err();
        assert_eq!(error, PackError::Code { row: 1, column: 1, code: 2 });
        for code in [i8::MIN, -2, 2, i8::MAX] {
            let mut codes = vec![0; 100 * 3];
            (codes[40 * 3 + 1], codes[40 * 3 + 2], codes[90 * 3]) = (code, 5, 5);
            let error = TernaryWeight::pack(&codes, 100, 3, 1.0).unwrap_err();
            assert_eq!(error, PackError::Code { row: 40, column: 1, code });
        }
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(TernaryWeight::pack(&[0], 1, 1, scale), Err(PackError::Scale(_))));
        }
        assert!(TernaryWeight::from_latent(&[f32::NAN], 1, 1).is_err());
    }

    /// Ternary codes with no pattern.
    fn some_codes(len: usize) -> Vec<i8> {
        (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as i8 % 2).collect()
    }

    /// [`TernaryWeight::transposed`] by its definition.
    fn transpose_and_pack(parts: &[&[i8]], in_features: usize) -> TernaryWeight {
        let rows: Vec<&[i8]> = parts.iter().flat_map(|part| part.chunks_exact(in_features)).collect();
        let codes: Vec<i8> = (0..in_features).flat_map(|i| rows.iter().map(move |row| row[i])).collect();
        TernaryWeight::pack(&codes, in_features, rows.len(), 1.0).unwrap()
    }

    #[test]
    fn transposed_packs_the_transpose() {
        let columns = [1, 2, 15, 16, 17, 48, 49, 63, 64, 65, 80, 127, 128, 130, 200];
        for in_features in columns {
            for outs in [&[1][..], &[3, 5], &[16], &[15, 1, 17], &[0, 33, 2, 0], &[64, 64], &[7; 9], &[]] {
                let codes: Vec<Vec<i8>> = outs.iter().map(|out| some_codes(out * in_features)).collect();
                let parts: Vec<&[i8]> = codes.iter().map(|codes| &**codes).collect();
                let weight = TernaryWeight::transposed(&parts, in_features).unwrap();
                assert!(weight == transpose_and_pack(&parts, in_features), "{outs:?} x {in_features}");
            }
        }
        let nothing = TernaryWeight::transposed(&[&[], &[]], 0).unwrap();
        assert_eq!((nothing.out_features(), nothing.in_features()), (0, 0));
    }

    #[test]
    fn transposed_refuses_what_it_cannot_pack() {
        for (parts, in_features, found) in [([&[1, 0, 1][..], &[0; 4][..]], 3, 4), ([&[], &[1]], 0, 1)] {
            let error = TernaryWeight::transposed(&parts, in_features).unwrap_err();
            assert!(matches!(error, PackError::Shape { found: named, .. } if named == found), "{error}");
        }
        for code in [i8::MIN, -2, 2, i8::MAX] {
            let (mut first, mut second) = (some_codes(17 * 90), some_codes(5 * 90));
            (first[3 * 90 + 80], second[2 * 90 + 70], second[4 * 90 + 70]) = (3, code, 3);
            let error = TernaryWeight::transposed(&[&first, &second], 90).unwrap_err();
            assert_eq!(error, PackError::Code { row: 70, column: 17 + 2, code });
        }
    }

    #[test]
    fn a_weight_takes_the_bits_that_its_layout_promises() {
        let weight = TernaryWeight::pack(&vec![1; 64 * 6912], 64, 6912, 1.0).unwrap();
        let bits = |weight: &TernaryWeight| weight.bytes() as f64 * 8.0 / (64.0 * 6912.0);
        assert_eq!(bits(&weight), 2.0);
        let small = bits(&weight.with_layout(Layout::FiveTrit));
        assert!((1.6..=1.63).contains(&small), "{small}");
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack_in_every_layout(out in 0usize..40, columns in 0usize..90, seed in any::<u64>()) {
            let mut state = seed;
            let codes: Vec<i8> = (0..out * columns).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as i8 % 2
            }).collect();
            let weight = TernaryWeight::pack(&codes, out, columns, 0.25).unwrap();
            for layout in Layout::ALL {
                let other = weight.with_layout(layout);
                prop_assert_eq!(other.unpack(), &*codes);
                prop_assert!(other.with_layout(Layout::TwoBit) == weight);
            }
        }
    }
}
