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
        let vectors = layout.vectors();
        for (index, line) in lines.iter_mut().enumerate() {
            let mut codes = [[1u8; 64]; 5];
            for (i, vector) in codes[..vectors].iter_mut().enumerate() {
                let column = (index * vectors + i) * STEP;
                if column < row_len {
                    for (r, step) in vector.as_chunks_mut::<STEP>().0.iter_mut().enumerate() {
                        step.copy_from_slice(&rows[r * row_len + column..][..STEP]);
                    }
                }
            }
            for (at, byte) in line.0.iter_mut().enumerate() {
                let code = |i: usize| codes[i][at];
                *byte = match layout {
                    Layout::TwoBit => code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6,
                    Layout::FiveTrit => {
                        let value = [1, 2, 3, 4].into_iter().fold(u16::from(code(0)), |v, i| 3 * v + u16::from(code(i)));
                        (value * 256).div_ceil(243) as u8
                    }
                };
            }
        }
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
    fn a_layout_goes_by_its_name() {
        for layout in Layout::ALL {
            assert_eq!(Layout::from_name(layout.name()), Some(layout));
        }
        assert_eq!(Layout::from_name("tq2_0"), None);
    }
}
