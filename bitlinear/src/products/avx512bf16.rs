//! x86-64 with AVX-512 and its BF16 extension: `vdpbf16ps` multiplies 32 pairs of bf16 values and adds them two by two into
//! 16 f32 lanes, twice the multiply-adds of an f32 instruction.
//!
//! Both operands are packed alike, as panels of 16 lines (rows of `a`, columns of `b`): vector `p` of a panel holds the values
//! `2p` and `2p + 1` of each line. A tile of sums takes panels of `b` as they are, and half the lanes of a panel of `a`, each
//! repeated in all lanes of a register.
//!
//! # What is computed
//! Values are rounded to bf16, to nearest, ties to even. The inner dimension is cut into even blocks of at most [`INNER`]. In a
//! block each sum starts at 0 and takes, pair by pair, first the odd value, then the even one, each with a fused multiply-add
//! that rounds to nearest, ties to even. Denormal values and sums count as zero; a sum is denormal if its magnitude is below the
//! least normal number once it is rounded to 24 bits. The sums of the blocks are added to the output in order.

use std::arch::x86_64::*;
use std::cell::Cell;

use super::{Blocks, Matrix};
use crate::packed::{Line, zeroed};
use crate::pool::{self, Pointer};

/// Lines of a panel: a vector's lanes.
const PANEL: usize = 16;
/// Rows of a tile: half a panel.
const ROWS: usize = PANEL / 2;
/// Panels of `b` in a tile: 8 * 3 sums, 3 vectors of `b` and one of `a` are 28 registers.
const PANELS: usize = 3;
/// Columns of a tile.
const COLUMNS: usize = PANELS * PANEL;
/// Most of the inner dimension that is summed at once.
pub(super) const INNER: usize = 512;
/// Panels that one task packs: lines side by side in memory are read 256 bytes at a time.
const PACK: usize = 4;
/// Rows that one task multiplies.
const TASK_ROWS: usize = 4 * PANEL;
/// Columns that one task multiplies: packed they are 480 KiB, which stay in the second cache.
const TASK_COLUMNS: usize = 10 * COLUMNS;
/// Rows that are packed at once.
const MOST_ROWS: usize = 16 * TASK_ROWS;
/// Columns that are packed at once.
const MOST_COLUMNS: usize = 4 * TASK_COLUMNS;

/// Proof that the processor has AVX-512 F, BW and BF16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx512Bf16(());

thread_local! {
    /// Memory for packed panels, kept from one product to the next: fresh pages cost as much as the packing.
    static SCRATCH: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

impl Avx512Bf16 {
    pub(super) fn new() -> Option<Self> {
        let bf16 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16");
        bf16.then_some(Self(()))
    }

    /// [`super::multiply`] with both matrices rounded to bf16.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub(super) fn multiply(self, a: Matrix<'_>, b: Matrix<'_>, keep: f32, out: &mut [f32]) {
        let (rows, columns, inner, stride) = (a.rows, b.columns, a.columns, b.columns);
        assert_eq!((b.rows, out.len()), (inner, rows * columns), "shapes of a product");
        // One block of zeros where there is nothing to sum.
        let parts = inner.div_ceil(INNER).max(1);
        let steps = inner.div_ceil(2 * parts).max(1);
        let room_a = rows.min(MOST_ROWS).div_ceil(PANEL) * steps;
        let room = room_a + columns.min(MOST_COLUMNS).div_ceil(PANEL) * steps;
        let mut scratch = SCRATCH.take();
        if scratch.len() < room {
            scratch = zeroed(room);
        }
        let (packed_a, packed_b) = scratch[..room].split_at_mut(room_a);
        let start = Pointer(out.as_mut_ptr());
        for (row, rows) in Blocks::new(rows, MOST_ROWS, PANEL).iter() {
            for (column, columns) in Blocks::new(columns, MOST_COLUMNS, PANEL).iter() {
                for part in 0..parts {
                    let first = (part * 2 * steps).min(inner);
                    let inner = (inner - first).min(2 * steps);
                    let a = self.pack(a.block((row, rows), (first, inner)), steps, packed_a);
                    let b = self.pack(b.block((first, inner), (column, columns)).t(), steps, packed_b);
                    let keep = if part == 0 { keep } else { 1.0 };
                    let row_blocks = Blocks::new(rows, TASK_ROWS, PANEL);
                    let column_blocks = Blocks::new(columns, TASK_COLUMNS, COLUMNS);
                    pool::run(row_blocks.count() * column_blocks.count(), &|task| {
                        // Those that follow one another share their columns.
                        let (r, task_rows) = row_blocks.get(task % row_blocks.count());
                        let (c, task_columns) = column_blocks.get(task / row_blocks.count());
                        let panels = Panels { a: &a[r / PANEL * steps..], b: &b[c / PANEL * steps..], steps };
                        let out = Rectangle {
                            // SAFETY: row + r and column + c lie inside the output, [.., stride] values long (checked above).
                            start: unsafe { start.get().add((row + r) * stride + column + c) },
                            stride,
                            rows: task_rows,
                            columns: task_columns,
                        };
                        // SAFETY: a value of this type exists only where `new` has seen the features; the rectangles of
                        // different tasks do not overlap, lie inside `out`, and `out` is borrowed exclusively until `run` returns.
                        unsafe { panels.multiply(keep, out) };
                    });
                }
            }
        }
        SCRATCH.set(scratch);
    }

    /// Packs `lines [lines, inner]` into panels of `steps` vectors: as many as there are lines, filled up with zeros.
    fn pack<'a>(self, lines: Matrix<'_>, steps: usize, packed: &'a mut [Line]) -> &'a [Line] {
        let packed = &mut packed[..lines.rows.div_ceil(PANEL) * steps];
        pool::for_chunks(packed, PACK * steps, |task, packed| {
            let first = task * PACK * PANEL;
            let lines = lines.block((first, (lines.rows - first).min(PACK * PANEL)), (0, lines.columns));
            // SAFETY: a value of this type exists only where `new` has seen the features.
            unsafe {
                if lines.column_stride == 1 {
                    pack_rows(lines, steps, packed)
                } else {
                    pack_columns(lines.t(), steps, packed)
                }
            }
        });
        packed
    }
}

/// Packs lines whose values lie side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_rows(lines: Matrix<'_>, steps: usize, packed: &mut [Line]) {
    for (panel, packed) in packed.chunks_exact_mut(steps).enumerate() {
        for (chunk, packed) in packed.chunks_mut(PANEL).enumerate() {
            let mut vectors = [_mm512_setzero_si512(); PANEL];
            for (line, vector) in (panel * PANEL..lines.rows).zip(&mut vectors) {
                let values = lines.row(line);
                let first = chunk * 2 * PANEL;
                *vector = rounded(load(values, first), load(values, first + PANEL));
            }
            for (vector, line) in transposed(vectors).into_iter().zip(packed) {
                store_line(vector, line);
            }
        }
    }
}

/// Packs the columns of a row-major matrix: values of different lines lie side by side.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_columns(values: Matrix<'_>, steps: usize, packed: &mut [Line]) {
    // Value `i` of the lower half, then value `i` of the upper half.
    let mut order = [0u16; 2 * PANEL];
    for (at, order) in order.iter_mut().enumerate() {
        *order = (at / 2 + at % 2 * PANEL) as u16;
    }
    // SAFETY: the array holds 64 bytes, and the load needs no alignment.
    let order = unsafe { _mm512_loadu_si512(order.as_ptr().cast()) };
    for step in 0..steps {
        let row = |row: usize| if row < values.rows { values.row(row) } else { &[] };
        let (even, odd) = (row(2 * step), row(2 * step + 1));
        for (panel, packed) in packed.chunks_exact_mut(steps).enumerate() {
            let halves = rounded(load(even, panel * PANEL), load(odd, panel * PANEL));
            store_line(_mm512_permutexvar_epi16(order, halves), &mut packed[step]);
        }
    }
}

/// Values rounded to bf16: those of `low` in the lower half.
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 64 bytes, with a meaning for each bit pattern.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Lane `j` of vector `i` becomes lane `i` of vector `j`.
#[target_feature(enable = "avx512f")]
fn transposed(x: [__m512i; PANEL]) -> [__m512i; PANEL] {
    let mut pairs = x;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    // Quarter `q` of `fours[4 i + j]` holds lane `4 q + j` of four vectors from `4 i` on.
    let mut fours = x;
    for i in 0..4 {
        for half in 0..2 {
            let (a, b) = (pairs[4 * i + half], pairs[4 * i + 2 + half]);
            fours[4 * i + 2 * half] = _mm512_unpacklo_epi64(a, b);
            fours[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    let mut result = x;
    for j in 0..4 {
        let even = |a, b| _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let odd = |a, b| _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        // Quarters 0 and 2 of two vectors, then of the other two; and so 1 and 3.
        let (a, b) = (even(fours[j], fours[4 + j]), even(fours[8 + j], fours[12 + j]));
        let (c, d) = (odd(fours[j], fours[4 + j]), odd(fours[8 + j], fours[12 + j]));
        result[j] = even(a, b);
        result[8 + j] = odd(a, b);
        result[4 + j] = even(c, d);
        result[12 + j] = odd(c, d);
    }
    result
}

/// A part of the output.
struct Rectangle {
    start: *mut f32,
    /// Values from one row to the next.
    stride: usize,
    rows: usize,
    columns: usize,
}

/// Packed panels, one after the other; at least as many as the rows and columns of the output need.
struct Panels<'a> {
    a: &'a [Line],
    b: &'a [Line],
    /// Vectors in a panel.
    steps: usize,
}

impl Panels<'_> {
    /// `out = keep * out + a b`.
    ///
    /// # Safety
    /// `out` is memory that nobody else uses meanwhile.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn multiply(&self, keep: f32, out: Rectangle) {
        for row in (0..out.rows).step_by(ROWS) {
            for column in (0..out.columns).step_by(COLUMNS) {
                let tile = Rectangle {
                    // SAFETY: row < out.rows and column < out.columns, so this is inside the rectangle.
                    start: unsafe { out.start.add(row * out.stride + column) },
                    stride: out.stride,
                    rows: (out.rows - row).min(ROWS),
                    columns: (out.columns - column).min(COLUMNS),
                };
                // SAFETY: the tile is a part of the rectangle.
                unsafe {
                    match tile.columns.div_ceil(PANEL) {
                        1 => self.tile::<1>(row, column, keep, tile),
                        2 => self.tile::<2>(row, column, keep, tile),
                        _ => self.tile::<PANELS>(row, column, keep, tile),
                    }
                }
            }
        }
    }

    /// The sums from `row` and `column` on.
    ///
    /// # Safety
    /// `out` is memory that nobody else uses meanwhile.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile<const P: usize>(&self, row: usize, column: usize, keep: f32, out: Rectangle) {
        let panel = |panels: &[Line], at: usize| panels[at / PANEL * self.steps..][..self.steps].as_ptr();
        let a = panel(self.a, row).cast::<[i32; PANEL]>();
        let b: [*const Line; P] = std::array::from_fn(|p| panel(self.b, column + p * PANEL));
        let mut sums = [[_mm512_setzero_ps(); P]; ROWS];
        for step in 0..self.steps {
            // SAFETY: step < self.steps, the vectors in each panel (sliced above), which are 64 bytes, aligned to 64.
            let b = b.map(|b| unsafe { *b.add(step).cast::<__m512bh>() });
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: as above; `row` is a multiple of 8, so row % 16 + r < 16.
                let a = _mm512_set1_epi32(unsafe { *a.add(step).cast::<i32>().add(row % PANEL + r) });
                // SAFETY: both are 64 bytes, with a meaning for each bit pattern.
                let a = unsafe { std::mem::transmute::<__m512i, __m512bh>(a) };
                for p in 0..P {
                    sums[p] = _mm512_dpbf16_ps(sums[p], a, b[p]);
                }
            }
        }
        let keeps = _mm512_set1_ps(keep);
        for (r, sums) in sums.into_iter().enumerate().take(out.rows) {
            // SAFETY: the rectangle has this row, of as many values.
            let out = unsafe { std::slice::from_raw_parts_mut(out.start.add(r * out.stride), out.columns) };
            for (sum, out) in sums.into_iter().zip(out.chunks_mut(PANEL)) {
                let sum = if keep == 0.0 { sum } else { _mm512_fmadd_ps(keeps, load(out, 0), sum) };
                // SAFETY: the mask leaves out what is not in the slice.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), first_lanes(out.len()), sum) };
            }
        }
    }
}

/// The values from `first` on, up to 16 of them; zeros beyond.
#[target_feature(enable = "avx512f")]
fn load(values: &[f32], first: usize) -> __m512 {
    let values = values.get(first..).unwrap_or(&[]);
    // SAFETY: the mask leaves out what is not in the slice.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(values.len()), values.as_ptr()) }
}

/// A mask of the first `count` lanes.
fn first_lanes(count: usize) -> __mmask16 {
    ((1u32 << count.min(PANEL)) - 1) as __mmask16
}

#[target_feature(enable = "avx512f")]
fn store_line(vector: __m512i, line: &mut Line) {
    // SAFETY: the reference is to 64 bytes, aligned to 64.
    unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), vector) };
}
