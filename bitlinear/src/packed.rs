//! Ternary weights at two bits each, in the layout that the kernels read.
//!
//! A row (one output feature) is cut into blocks of 128 weights, 32 bytes each; the last block is filled up with zero
//! weights. Byte `p` of a block holds four weights that lie 32 apart, low bits first:
//!
//! ```text
//!            bits 7-6      5-4       3-2      1-0
//! byte p  | w[p+96] | w[p+64] | w[p+32] | w[p] |      p = 0..32,   stored as w + 1: 0, 1, 2 for -1, 0, +1
//! ```
//!
//! So one 32-byte load and three shifts give 128 codes in the order of the activations. Code 3 never occurs: packing
//! refuses every value outside -1, 0, +1.
//!
//! This is the layout in memory; Hugging Face's files have another one, which the `infer` crate packs and unpacks.

use crate::quant;

/// Weights in a block.
pub const BLOCK: usize = 128;
/// Bytes in a block.
pub const BLOCK_BYTES: usize = 32;

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
    /// `out_features` rows of `row_bytes()` bytes; checked on construction, private, and so true ever after.
    packed: Vec<u8>,
}

impl TernaryWeight {
    /// Packs ternary codes, row after row.
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
        if !(weight_scale.is_finite() && weight_scale > 0.0) {
            return Err(PackError::Scale(weight_scale));
        }
        if let Some(at) = codes.iter().position(|c| !(-1..=1).contains(c)) {
            return Err(PackError::Code { row: at / in_features, column: at % in_features, code: codes[at] });
        }
        let row_bytes = in_features.div_ceil(BLOCK) * BLOCK_BYTES;
        let mut packed = vec![0b01_01_01_01; out_features * row_bytes]; // all zero weights
        if in_features > 0 {
            for (row, bytes) in codes.chunks_exact(in_features).zip(packed.chunks_exact_mut(row_bytes)) {
                pack_row(row, bytes);
            }
        }
        Ok(Self { out_features, in_features, weight_scale, packed })
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

    /// The ternary codes, row after row: the inverse of [`TernaryWeight::pack`].
    pub fn unpack(&self) -> Vec<i8> {
        let mut codes = Vec::with_capacity(self.out_features * self.in_features);
        for row in 0..self.out_features {
            let bytes = self.row(row);
            codes.extend((0..self.in_features).map(|column| code_at(bytes, column)));
        }
        codes
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

    /// Bytes of the packed codes.
    pub fn bytes(&self) -> usize {
        self.packed.len()
    }

    /// Bytes of a packed row, a multiple of [`BLOCK_BYTES`].
    pub fn row_bytes(&self) -> usize {
        self.in_features.div_ceil(BLOCK) * BLOCK_BYTES
    }

    /// The packed bytes of one row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        self.rows(row..row + 1)
    }

    /// The packed bytes of several rows, one after the other.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> &[u8] {
        let bytes = self.row_bytes();
        &self.packed[rows.start * bytes..rows.end * bytes]
    }
}

impl std::fmt::Debug for TernaryWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { out_features, in_features, weight_scale, .. } = self;
        write!(f, "TernaryWeight {{ {out_features} x {in_features}, weight_scale: {weight_scale} }}")
    }
}

fn pack_row(codes: &[i8], bytes: &mut [u8]) {
    for (block, out) in codes.chunks(BLOCK).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
        for (at, &code) in block.iter().enumerate() {
            let shift = 2 * (at / BLOCK_BYTES);
            let byte = &mut out[at % BLOCK_BYTES];
            *byte = *byte & !(0b11 << shift) | ((code + 1) as u8) << shift;
        }
    }
}

/// The code at `column` of a packed row.
#[inline]
pub(crate) fn code_at(row: &[u8], column: usize) -> i8 {
    let (block, at) = (column / BLOCK, column % BLOCK);
    let byte = row[block * BLOCK_BYTES + at % BLOCK_BYTES];
    (byte >> (2 * (at / BLOCK_BYTES)) & 0b11) as i8 - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_as_drawn() {
        let mut codes = vec![0i8; 130];
        (codes[5], codes[37], codes[69], codes[101], codes[129]) = (1, -1, 1, -1, 1);
        let weight = TernaryWeight::pack(&codes, 1, 130, 0.5).unwrap();
        assert_eq!(weight.row_bytes(), 64);
        assert_eq!(weight.row(0)[5], 0b00_10_00_10);
        assert_eq!(weight.row(0)[4], 0b01_01_01_01);
        assert_eq!(weight.row(0)[33], 0b01_01_01_10);
    }

    #[test]
    fn bad_input_is_refused() {
        assert!(matches!(TernaryWeight::pack(&[0; 5], 2, 3, 1.0), Err(PackError::Shape { .. })));
        assert!(matches!(TernaryWeight::pack(&[], usize::MAX, 2, 1.0), Err(PackError::Shape { .. })));
        let error = TernaryWeight::pack(&[0, 1, -1, 2], 2, 2, 1.0).unwrap_err();
        assert_eq!(error, PackError::Code { row: 1, column: 1, code: 2 });
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(TernaryWeight::pack(&[0], 1, 1, scale), Err(PackError::Scale(_))));
        }
        assert!(TernaryWeight::from_latent(&[f32::NAN], 1, 1).is_err());
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(out in 0usize..9, columns in 0usize..300, seed in any::<u64>()) {
            let mut state = seed;
            let codes: Vec<i8> = (0..out * columns).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as i8 % 2
            }).collect();
            let weight = TernaryWeight::pack(&codes, out, columns, 0.25).unwrap();
            prop_assert_eq!(weight.unpack(), codes);
        }
    }
}
