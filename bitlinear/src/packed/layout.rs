//! The two layouts of a panel, drawn, packed and unpacked.
//!
//! A *panel* is 16 rows of a weight (output features) side by side. Its columns (input features) go in steps of four:
//! a *code vector* of 64 bytes holds one step of all 16 rows, byte `4 r + c` being row `r`, column `c` of the step, as
//! code `w + 1`. That is the order in which the dot product instructions want their operands: each 32-bit lane of a
//! vector belongs to one row, so sums need no rearranging, and 16 code vectors are one AMX tile.
//!
//! A packed line holds several consecutive code vectors, byte for byte in the same place:
//!
//! ```text
//! 2bit    4 vectors, 16 columns a line:  byte = c0 | c1 << 2 | c2 << 4 | c3 << 6       code 3 never occurs
//! 1.6bit  5 vectors, 20 columns a line:  byte = ceil(v 256 / 243),  v = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4
//! ```
//!
//! where `c_i` is the code in vector `i` of the line. In the second, `c_i = floor(3 (byte 3^i mod 256) / 256)`: no
//! division, and the first code is in the highest bits of a product. (The idea is that of llama.cpp's TQ1_0.)
//!
//! Rows and columns that a weight does not have are zero weights, code 1.

use super::Line;
use crate::simd_fn;

/// Rows of a weight in a panel.
pub const PANEL: usize = 16;
/// Columns in a code vector.
pub const STEP: usize = 4;

/// How codes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// Four codes in a byte: the fastest to unpack.
    #[default]
    TwoBit,
    /// Five codes in a byte, 1.6 bits each: the smallest, and the fastest where memory is the limit.
    FiveTrit,
}

impl Layout {
    /// Both layouts.
    pub const ALL: [Self; 2] = [Self::TwoBit, Self::FiveTrit];

    /// Its name on the command line: `2bit` or `1.6bit`.
    pub fn name(self) -> &'static str {
        match self {
            Self::TwoBit => "2bit",
            Self::FiveTrit => "1.6bit",
        }
    }

    /// The layout of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layout| layout.name() == name)
    }

    /// Code vectors in a line.
    pub fn vectors(self) -> usize {
        match self {
            Self::TwoBit => 4,
            Self::FiveTrit => 5,
        }
    }

    /// Lines of a panel with this many columns.
    pub fn lines(self, columns: usize) -> usize {
        columns.div_ceil(STEP * self.vectors())
    }
}

simd_fn! {
    /// Packs one panel: `rows` are 16 rows of `row_len` codes `w + 1`, columns beyond which count as zero weights.
    ///
    /// # Panics
    /// If there are fewer than 16 rows or `row_len` is not a multiple of 4.
    pub(super) fn pack_panel(layout: Layout, rows: &[u8], row_len: usize, lines: &mut [Line]) {
        assert!(row_len.is_multiple_of(STEP) && rows.len() >= PANEL * row_len, "16 rows of whole steps");
        let rows: [&[[u8; STEP]]; PANEL] =
            std::array::from_fn(|r| rows[r * row_len..][..row_len].as_chunks().0);
        match layout {
            Layout::TwoBit => {
                for (index, line) in lines.iter_mut().enumerate() {
                    let [a, b, c, d] = gather(&rows, 4 * index);
                    for at in 0..64 {
                        line.0[at] = a[at] | b[at] << 2 | c[at] << 4 | d[at] << 6;
                    }
                }
            }
            Layout::FiveTrit => {
                for (index, line) in lines.iter_mut().enumerate() {
                    let [a, b, c, d, e] = gather(&rows, 5 * index);
                    for at in 0..64 {
                        let value = 81 * a[at] + 27 * b[at] + 9 * c[at] + 3 * d[at] + e[at];
                        line.0[at] = (u16::from(value) * 256).div_ceil(243) as u8;
                    }
                }
            }
        }
    }
}

/// `N` code vectors from step `first` on.
#[inline(always)]
fn gather<const N: usize>(rows: &[&[[u8; STEP]]; PANEL], first: usize) -> [[u8; 64]; N] {
    let mut vectors = [[1u8; 64]; N];
    for (i, vector) in vectors.iter_mut().enumerate() {
        for (codes, row) in vector.as_chunks_mut::<STEP>().0.iter_mut().zip(rows) {
            if let Some(step) = row.get(first + i) {
                *codes = *step;
            }
        }
    }
    vectors
}

/// The code vectors of a step of four rows and 64 columns, as columns of four rows of 16 panels' rows: byte `4 f + c` of vector
/// `p` is `columns[c][16 p + f]`.
#[inline(always)]
pub(crate) fn interleave([a, b, c, d]: [&[u8; 64]; STEP]) -> [Line; 64 / PANEL] {
    let mut vectors = [Line::ZERO; 64 / PANEL];
    for (p, vector) in vectors.iter_mut().enumerate() {
        for (f, bytes) in vector.0.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
            let at = p * PANEL + f;
            // As a sum of wide lanes: that vectorises everywhere, four bytes side by side do not.
            let lane = [a[at], b[at], c[at], d[at]].map(u32::from);
            *bytes = (lane[0] | lane[1] << 8 | lane[2] << 16 | lane[3] << 24).to_le_bytes();
        }
    }
    vectors
}

/// Columns of a matrix that become rows of panels together: what a cache line holds of its codes.
pub(super) const WIDE: usize = 64;
/// Columns that a line of the 2-bit layout holds.
const TWO_BIT_COLUMNS: usize = 4 * STEP;

/// Codes of a row that is not there.
static NO_ROW: [i8; WIDE] = [0; WIDE];

simd_fn! {
    /// Packs columns `first` to `first + 64` of a matrix of ternary codes as rows of four panels of `panel_lines` lines, at two bits;
    /// `rows` are the rows of the matrix. Panels of which no line is in `lines` are left out. Tells whether all codes were ternary.
    ///
    /// # Panics
    /// If `lines` has no room for all rows.
    pub(super) fn pack_columns(rows: &[&[i8]], first: usize, panel_lines: usize, lines: &mut [Line]) -> bool {
        let mut largest = [0u8; WIDE];
        for (index, rows) in rows.chunks(TWO_BIT_COLUMNS).enumerate() {
            // Byte `c` of a step, of all columns: four codes, as they are in a byte of the line.
            let mut columns = [[0u8; WIDE]; STEP];
            for at in 0..TWO_BIT_COLUMNS {
                let mut padded = NO_ROW;
                let codes = match rows.get(at).map(|row| &row[first..]) {
                    None => &NO_ROW,
                    Some(row) => row.first_chunk().unwrap_or_else(|| {
                        padded[..row.len()].copy_from_slice(row);
                        &padded
                    }),
                };
                let (step, column) = (at / STEP, &mut columns[at % STEP]);
                for f in 0..WIDE {
                    let code = codes[f].wrapping_add(1) as u8;
                    largest[f] = largest[f].max(code);
                    column[f] |= code << (2 * step);
                }
            }
            let [a, b, c, d] = &columns;
            for (panel, line) in lines.chunks_exact_mut(panel_lines).zip(interleave([a, b, c, d])) {
                panel[index] = line;
            }
        }
        largest.iter().fold(0, |max, code| max.max(*code)) <= 2
    }
}

simd_fn! {
    /// Unpacks lines to code vectors, `layout.vectors()` of them a line; what there is more of in `vectors` becomes 0.
    ///
    /// # Panics
    /// If there are fewer vectors than the lines hold.
    pub(crate) fn unpack_lines(layout: Layout, lines: &[Line], vectors: &mut [Line]) {
        let (used, rest) = vectors.split_at_mut(lines.len() * layout.vectors());
        match layout {
            Layout::TwoBit => {
                for (line, out) in lines.iter().zip(used.as_chunks_mut::<4>().0) {
                    for (i, out) in out.iter_mut().enumerate() {
                        for (code, byte) in out.0.iter_mut().zip(line.0) {
                            *code = byte >> (2 * i) & 0b11;
                        }
                    }
                }
            }
            Layout::FiveTrit => {
                for (line, out) in lines.iter().zip(used.as_chunks_mut::<5>().0) {
                    let mut bytes = line.0;
                    for out in out {
                        for (code, byte) in out.0.iter_mut().zip(&mut bytes) {
                            *code = ((u16::from(*byte) * 3) >> 8) as u8;
                            *byte = byte.wrapping_mul(3);
                        }
                    }
                }
            }
        }
        rest.fill(Line::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_bit_layout_is_as_drawn() {
        // Row 2, columns 1 (vector 0, byte 9), 6 (vector 1, byte 10) and 15 (vector 3, byte 11).
        let mut rows = vec![1u8; 16 * 20];
        (rows[2 * 20 + 1], rows[2 * 20 + 6], rows[2 * 20 + 15], rows[2 * 20 + 16]) = (2, 0, 2, 2);
        let mut lines = [Line::ZERO; 2];
        pack_panel(Layout::TwoBit, &rows, 20, &mut lines);
        assert_eq!(lines[0].0[8..12], [0b01_01_01_01, 0b01_01_01_10, 0b01_01_00_01, 0b10_01_01_01]);
        assert_eq!(lines[1].0[8..10], [0b01_01_01_10, 0b01_01_01_01]);
    }

    #[test]
    fn the_five_trit_layout_is_as_drawn_for_every_byte() {
        for value in 0..243u16 {
            let codes = [value / 81, value / 27 % 3, value / 9 % 3, value / 3 % 3, value % 3];
            let mut rows = vec![1u8; 16 * 20];
            for (i, code) in codes.iter().enumerate() {
                rows[7 * 20 + 4 * i + 3] = *code as u8;
            }
            let mut lines = [Line::ZERO];
            pack_panel(Layout::FiveTrit, &rows, 20, &mut lines);
            assert_eq!(u16::from(lines[0].0[31]), (value * 256).div_ceil(243));
            let mut vectors = [Line([9; 64]); 6];
            unpack_lines(Layout::FiveTrit, &lines, &mut vectors);
            for (i, code) in codes.iter().enumerate() {
                assert_eq!(u16::from(vectors[i].0[31]), *code, "value {value}, code {i}");
            }
            assert!(vectors[5] == Line::ZERO);
        }
    }

    #[test]
    fn interleaved_columns_are_code_vectors() {
        let columns: [[u8; 64]; 4] = std::array::from_fn(|c| std::array::from_fn(|r| (4 * r + c) as u8));
        let vectors = interleave([&columns[0], &columns[1], &columns[2], &columns[3]]);
        let bytes = vectors.iter().flat_map(|vector| vector.0);
        assert!(bytes.enumerate().all(|(at, byte)| byte == at as u8));
    }

    #[test]
    fn a_layout_goes_by_its_name() {
        for layout in Layout::ALL {
            assert_eq!(Layout::from_name(layout.name()), Some(layout));
        }
        assert_eq!(Layout::from_name("tq2_0"), None);
    }
}
