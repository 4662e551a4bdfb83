//! The packed ternary layout of Hugging Face's BitNet checkpoints.
//!
//! Four rows share a byte, and they lie a quarter of the matrix apart (row blocks, not neighbours). With
//! `r = out_features / 4`, the packed tensor is uint8 `[r, in_features]`:
//!
//! ```text
//!                  bits 7-6      5-4       3-2       1-0
//! byte [j, c]  | t[j+3r, c] | t[j+2r, c] | t[j+r, c] | t[j, c] |     stored as t + 1: 0, 1, 2 for -1, 0, +1
//! ```
//!
//! Code 3 is refused; transformers reads it as +2.

/// Packs ternary codes, row after row.
///
/// # Shapes
/// `[out_features, in_features] -> [out_features / 4, in_features]`
///
/// # Panics
/// If the number of codes is not a multiple of `4 * in_features`, or a code is not -1, 0 or 1 (debug builds).
pub fn pack(codes: &[i8], in_features: usize) -> Vec<u8> {
    assert!(codes.len().is_multiple_of(4 * in_features), "{} codes in rows of {in_features}", codes.len());
    let (first, rest) = codes.split_at(codes.len() / 4);
    let mut bytes: Vec<u8> = first.iter().map(|c| (c + 1) as u8).collect();
    for (i, block) in rest.chunks_exact(bytes.len().max(1)).enumerate() {
        for (byte, code) in bytes.iter_mut().zip(block) {
            debug_assert!((-1..=1).contains(code));
            *byte |= ((code + 1) as u8) << (2 * (i + 1));
        }
    }
    bytes
}

/// Unpacks one of `rows` rows to codes `t + 1`: 0, 1, 2, or 3 in a damaged file.
///
/// # Panics
/// If there is no such row, or `bytes` are not `rows / 4` rows as long as `codes`.
pub fn unpack_row(bytes: &[u8], rows: usize, row: usize, codes: &mut [u8]) {
    assert!(
        row < rows && bytes.len() == rows / 4 * codes.len(),
        "row {row} of {rows} in {} bytes",
        bytes.len()
    );
    let (block, shift) = (row % (rows / 4), 2 * (row / (rows / 4)));
    let bytes = &bytes[block * codes.len()..];
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> shift & 0b11;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_layout_is_as_drawn() {
        // Eight rows of three columns; r = 2.
        #[rustfmt::skip]
        let codes = [
            1, 0, -1,   0, 0, 0, // rows 0, 1: bits 1-0
            -1, 0, 1,   1, 1, 1, // rows 2, 3: bits 3-2
            0, 0, 0,   -1, 0, 1, // rows 4, 5: bits 5-4
            1, -1, 0,   0, 1, 1, // rows 6, 7: bits 7-6
        ];
        let bytes =
            [0b10_01_00_10, 0b00_01_01_01, 0b01_01_10_00, 0b01_00_10_01, 0b10_01_10_01, 0b10_10_10_01];
        assert_eq!(pack(&codes, 3), bytes);
        assert_eq!(unpack(&bytes, 8), codes);
    }

    fn unpack(bytes: &[u8], rows: usize) -> Vec<i8> {
        let mut codes = vec![0; bytes.len() * 4];
        if let Some(columns) = codes.len().checked_div(rows) {
            codes
                .chunks_exact_mut(columns)
                .enumerate()
                .for_each(|(row, codes)| unpack_row(bytes, rows, row, codes));
        }
        codes.into_iter().map(|code| code as i8 - 1).collect()
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(rows in 0usize..5, columns in 1usize..40, seed in any::<u64>()) {
            let codes: Vec<i8> = (0..4 * rows * columns)
                .map(|i| ((seed ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as i8 % 3 - 1)
                .collect();
            prop_assert_eq!(unpack(&pack(&codes, columns), 4 * rows), codes);
        }
    }
}
