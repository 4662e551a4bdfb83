//! aarch64, twice: baseline NEON multiplies int8 into int16 lanes (`smlal`), which are widened to int32 before they could
//! wrap; where the processor has the dot product extension (`sdot`, in most since 2018), four products go straight into
//! an int32 lane. A vector is a quarter of a line: four rows of the panel.
//!
//! `sdot` is one line of assembly: the intrinsic for it is not stable in Rust yet.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::gradient::{Outer, Outputs, STEPS};
use super::{GROUP, GROUP_OUTS, Isa, LINE_STEPS, Unpacked};
use crate::packed::{Layout, Line, PANEL, STEP};

/// Steps whose products an int16 lane holds: one a step, in [2 * -128, 2 * 127], so 128 * -256 = -32,768 just fits (and
/// 128 * 254 = 32,512).
const NARROW_STEPS: usize = 128;

/// Code vectors in a line of each layout, as the functions below take them; 1 is a line of unpacked codes.
const TWO_BIT: usize = 4;
const FIVE_TRIT: usize = 5;
const PLAIN: usize = 1;

/// Rows of activations that pass an unpacked panel at once: 4 * 4 sums, 4 vectors of codes and 4 of activations. They
/// divide the tiles in which rows come, so none is left over.
const ROWS: usize = 4;

/// Proof that the processor has NEON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Neon(());

/// Proof that the processor has NEON and the dot product extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NeonDot(());

impl Neon {
    pub(super) fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

impl NeonDot {
    pub(super) fn new() -> Option<Self> {
        (is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")).then_some(Self(()))
    }
}

impl Isa for Neon {
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        check(&x, panel.len() * layout.vectors());
        match layout {
            // SAFETY: a value of this type exists only where `new` has seen NEON; the rows are long enough (above).
            Layout::TwoBit => unsafe { products::<R, TWO_BIT>(panel, x) },
            // SAFETY: as above.
            Layout::FiveTrit => unsafe { products::<R, FIVE_TRIT>(panel, x) },
        }
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        check(&x, panel.len());
        // SAFETY: a value of this type exists only where `new` has seen NEON; the rows are long enough (above).
        unsafe { bytes(panel, x) }
    }

    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]) {
        each_strip(group, sums, |panel, x| {
            check(&x, panel.len());
            // SAFETY: a value of this type exists only where `new` has seen NEON; the rows are long enough (above).
            unsafe { products::<ROWS, PLAIN>(panel, x) }
        });
    }

    fn outer(self, block: &Outer<'_>, tile: &mut [Outputs]) {
        // SAFETY: a value of this type exists only where `new` has seen NEON.
        each_outer(block, tile, |rows, first, panel| unsafe { outer(rows, first, panel) });
    }
}

impl Isa for NeonDot {
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        check(&x, panel.len() * layout.vectors());
        match layout {
            // SAFETY: a value of this type exists only where `new` has seen both features; the rows are long enough (above).
            Layout::TwoBit => unsafe { packed_dot::<R, TWO_BIT>(panel, x) },
            // SAFETY: as above.
            Layout::FiveTrit => unsafe { packed_dot::<R, FIVE_TRIT>(panel, x) },
        }
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        check(&x, panel.len());
        // SAFETY: a value of this type exists only where `new` has seen both features; the rows are long enough (above).
        unsafe { vectors_dot::<R, true>(panel, x) }
    }

    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]) {
        each_strip(group, sums, |panel, x| {
            check(&x, panel.len());
            // SAFETY: a value of this type exists only where `new` has seen both features; the rows are long enough (above).
            unsafe { vectors_dot::<ROWS, false>(panel, x) }
        });
    }

    fn outer(self, block: &Outer<'_>, tile: &mut [Outputs]) {
        // SAFETY: a value of this type exists only where `new` has seen both features.
        each_outer(block, tile, |rows, first, panel| unsafe { outer_dot(rows, first, panel) });
    }
}

fn check(x: &[&[Line]], steps: usize) {
    let lines = steps.div_ceil(LINE_STEPS);
    assert!(x.iter().all(|x| x.len() >= lines), "activations for every step");
}

/// Puts the sums of every panel of the group with every [`ROWS`] rows in their places. The last rows may be some that
/// only fill up a tile.
fn each_strip(
    group: &Unpacked<'_>,
    sums: &mut [i32],
    strip: impl Fn(&[Line], [&[Line]; ROWS]) -> [[i32; PANEL]; ROWS],
) {
    for panel in 0..GROUP {
        for first in (0..group.rows).step_by(ROWS) {
            let of_strip = strip(group.panel(panel), std::array::from_fn(|row| group.row(first + row)));
            for (row, of_row) in of_strip.iter().enumerate() {
                sums[(first + row) * GROUP_OUTS + panel * PANEL..][..PANEL].copy_from_slice(of_row);
            }
        }
    }
}

/// Baseline NEON, lines of `V` vectors of codes 0, 1, 2.
///
/// # Safety
/// Every row of `x` has activations for `V * panel.len()` steps.
#[target_feature(enable = "neon")]
unsafe fn products<const R: usize, const V: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let narrow_lines = NARROW_STEPS / V;
    let mut wide = [[vdupq_n_s32(0); 4]; R];
    for (chunk, lines) in panel.chunks(narrow_lines).enumerate() {
        // Half a panel after the other: with more, the sums of four rows would not stay in registers.
        for half in 0..2 {
            // Lanes are the columns of two rows: of the quarter's first two, then of its last two.
            let mut narrow = [[[vdupq_n_s16(0); 2]; 2]; R];
            for (index, line) in lines.iter().enumerate() {
                let mut packed = [load(line, 2 * half), load(line, 2 * half + 1)];
                for i in 0..V {
                    let codes = [unpack::<V>(&mut packed[0]), unpack::<V>(&mut packed[1])];
                    for r in 0..R {
                        // SAFETY: this step belongs to this line of the panel, as the caller promises.
                        let x = unsafe { step(x[r], V * (chunk * narrow_lines + index) + i) };
                        for quarter in 0..2 {
                            let [low, high] = &mut narrow[r][quarter];
                            *low = vmlal_s8(*low, vget_low_s8(codes[quarter]), vget_low_s8(x));
                            *high = vmlal_high_s8(*high, codes[quarter], x);
                        }
                    }
                }
            }
            for r in 0..R {
                for quarter in 0..2 {
                    let [low, high] = narrow[r][quarter].map(|lanes| vpaddlq_s16(lanes));
                    let wide = &mut wide[r][2 * half + quarter];
                    *wide = vaddq_s32(*wide, vpaddq_s32(low, high));
                }
            }
        }
    }
    wide.map(|lanes| store(lanes))
}

/// Baseline NEON, codes up to 255, of which int16 holds no product twice: both sides are widened to int16 first.
///
/// # Safety
/// Every row of `x` has activations for `panel.len()` steps.
#[target_feature(enable = "neon")]
unsafe fn bytes<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let mut wide = [[vdupq_n_s32(0); 4]; R];
    // As many lines as stay in the first-level cache until the last quarter has been there.
    for (chunk, lines) in panel.chunks(NARROW_STEPS).enumerate() {
        for quarter in 0..4 {
            // A vector for each row of the quarter; lanes are its columns.
            let mut rows = [[vdupq_n_s32(0); 4]; R];
            for (index, line) in lines.iter().enumerate() {
                let codes = load(line, quarter);
                let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
                let high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
                for r in 0..R {
                    // SAFETY: this line is one of the panel's, as the caller promises.
                    let x = unsafe { step(x[r], chunk * NARROW_STEPS + index) };
                    let x = vmovl_s8(vget_low_s8(x));
                    let [a, b, c, d] = &mut rows[r];
                    *a = vmlal_s16(*a, vget_low_s16(low), vget_low_s16(x));
                    *b = vmlal_high_s16(*b, low, x);
                    *c = vmlal_s16(*c, vget_low_s16(high), vget_low_s16(x));
                    *d = vmlal_high_s16(*d, high, x);
                }
            }
            for (wide, [a, b, c, d]) in wide.iter_mut().zip(rows) {
                let sums = vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
                wide[quarter] = vaddq_s32(wide[quarter], sums);
            }
        }
    }
    wide.map(|lanes| store(lanes))
}

/// Does the block for each quarter of a line, written out: the compiler leaves a loop a loop where its body is long, and
/// then keeps the sums that it indexes in memory.
macro_rules! for_quarters {
    ($quarter:ident => $body:block) => {
        for_quarters!($quarter => $body, 0, 1, 2, 3)
    };
    ($quarter:ident => $body:block, $($value:literal),*) => {
        $({
            let $quarter = $value;
            $body
        })*
    };
}

/// Dot product, packed lines of `V` vectors. `sdot` wraps: a lane is right modulo 2^32, which is all that `Isa` asks for.
///
/// # Safety
/// Every row of `x` has activations for `V * panel.len()` steps.
#[target_feature(enable = "neon,dotprod")]
unsafe fn packed_dot<const R: usize, const V: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let mut lanes = [[vdupq_n_s32(0); 4]; R];
    for (index, line) in panel.iter().enumerate() {
        let (mut four, mut last) = ([vdupq_n_s8(0); R], [vdupq_n_s8(0); R]);
        for r in 0..R {
            // SAFETY: the first four steps, and the last one, of this line of the panel, as the caller promises.
            (four[r], last[r]) = unsafe { (four_steps(x[r], V * index), step(x[r], V * index + V - 1)) };
        }
        for_quarters!(quarter => {
            let mut packed = load(line, quarter);
            let mut codes = [vdupq_n_s8(0); V];
            for codes in &mut codes {
                *codes = unpack::<V>(&mut packed);
            }
            for r in 0..R {
                let lanes = &mut lanes[r][quarter];
                *lanes = dot_four(*lanes, [codes[0], codes[1], codes[2], codes[3]], four[r]);
                if V == FIVE_TRIT {
                    *lanes = dot::<0>(*lanes, codes[V - 1], last[r]);
                }
            }
        });
    }
    lanes.map(|lanes| store(lanes))
}

/// Dot product, one vector of codes a line. `sdot` takes them as signed: where `UNSIGNED` says that they may be above 127,
/// 128 is taken off each, and `128 Σ x` added in the end. All modulo 2^32.
///
/// # Safety
/// Every row of `x` has activations for `panel.len()` steps.
#[target_feature(enable = "neon,dotprod")]
unsafe fn vectors_dot<const R: usize, const UNSIGNED: bool>(
    panel: &[Line],
    x: [&[Line]; R],
) -> [[i32; PANEL]; R] {
    let mut lanes = [[vdupq_n_s32(0); 4]; R];
    let mut x_sums = [vdupq_n_s32(0); R];
    // Filled up with codes of zero, so that it does not matter what the activations there are.
    let (whole, rest) = panel.as_chunks::<4>();
    let mut last = [Line::ZERO; 4];
    last[..rest.len()].copy_from_slice(rest);
    for index in 0..panel.len().div_ceil(4) {
        let [a, b, c, d] = whole.get(index).unwrap_or(&last);
        let mut four = [vdupq_n_s8(0); R];
        for r in 0..R {
            // SAFETY: 4 * index < panel.len(), for which there are activations, as the caller promises; and these four steps
            // are in one line of `x`, which is there as a whole.
            four[r] = unsafe { four_steps(x[r], 4 * index) };
            if UNSIGNED {
                x_sums[r] = vpadalq_s16(x_sums[r], vpaddlq_s8(four[r]));
            }
        }
        for_quarters!(quarter => {
            let codes = [
                signed::<UNSIGNED>(load(a, quarter)),
                signed::<UNSIGNED>(load(b, quarter)),
                signed::<UNSIGNED>(load(c, quarter)),
                signed::<UNSIGNED>(load(d, quarter)),
            ];
            for r in 0..R {
                lanes[r][quarter] = dot_four(lanes[r][quarter], codes, four[r]);
            }
        });
    }
    for r in 0..R {
        let taken_off = vshlq_n_s32::<7>(vdupq_n_s32(vaddvq_s32(x_sums[r])));
        lanes[r] = lanes[r].map(|lanes| vaddq_s32(lanes, taken_off));
    }
    lanes.map(|lanes| store(lanes))
}

/// Adds what a block does to every [`ROWS`] rows of a tile, one panel after the other. `strip` gets the panel of the gradient
/// that the rows are in, their number there, and a panel of activations. The last rows may be some that only fill up a panel.
fn each_outer(
    block: &Outer<'_>,
    tile: &mut [Outputs],
    strip: impl Fn(&[Line; STEPS], usize, &[Line; STEPS]) -> [[i32; PANEL]; ROWS],
) {
    assert_eq!(tile.len(), block.rows(), "outputs for every row");
    for (index, tile) in tile.chunks_mut(ROWS).enumerate() {
        let (rows, first) = block.row(index * ROWS);
        for (panel, lines) in block.activations.iter().enumerate() {
            let sums = strip(rows, first, lines);
            for (r, (outputs, sums)) in tile.iter_mut().zip(sums).enumerate() {
                let scale = block.scales[index * ROWS + r];
                for (y, sum) in outputs.0.as_chunks_mut::<PANEL>().0[panel].iter_mut().zip(sums) {
                    *y += sum as f32 * scale;
                }
            }
        }
    }
}

/// Baseline NEON: sums of four rows of a gradient's panel, from `first` on, with a panel of activations. Two products of int8
/// fit in int16, since codes of a gradient are no less than -127: 2 * 127 * 128 = 32,512.
#[target_feature(enable = "neon")]
fn outer(rows: &[Line; STEPS], first: usize, panel: &[Line; STEPS]) -> [[i32; PANEL]; ROWS] {
    assert!(first + ROWS <= PANEL, "rows of one panel");
    let mut wide = [[vdupq_n_s32(0); 4]; ROWS];
    for quarter in 0..4 {
        // Lanes are pairs of tokens: of the quarter's first two features, then of its last two.
        let mut lanes = [[vdupq_n_s32(0); 2]; ROWS];
        for (index, pair) in panel.as_chunks::<2>().0.iter().enumerate() {
            let codes = [0, 1].map(|i| signed::<true>(load(&pair[i], quarter)));
            for r in 0..ROWS {
                // SAFETY: first + r < 16 (asserted above) and 2 * index + i < STEPS: in one of the lines of `rows`.
                let g = [0, 1].map(|i| unsafe { step(rows, (2 * index + i) * PANEL + first + r) });
                let low = vmull_s8(vget_low_s8(codes[0]), vget_low_s8(g[0]));
                let low = vmlal_s8(low, vget_low_s8(codes[1]), vget_low_s8(g[1]));
                let high = vmlal_high_s8(vmull_high_s8(codes[0], g[0]), codes[1], g[1]);
                lanes[r] = [vpadalq_s16(lanes[r][0], low), vpadalq_s16(lanes[r][1], high)];
            }
        }
        for (wide, [low, high]) in wide.iter_mut().zip(lanes) {
            wide[quarter] = vpaddq_s32(low, high);
        }
    }
    wide.map(|lanes| store(lanes))
}

/// [`outer`] with the dot product: the four rows of a step lie side by side, one vector.
#[target_feature(enable = "neon,dotprod")]
fn outer_dot(rows: &[Line; STEPS], first: usize, panel: &[Line; STEPS]) -> [[i32; PANEL]; ROWS] {
    let mut lanes = [[vdupq_n_s32(0); 4]; ROWS];
    for (rows, codes) in rows.iter().zip(panel) {
        let g = signed::<false>(load(rows, first / ROWS));
        for_quarters!(quarter => {
            let codes = signed::<true>(load(codes, quarter));
            lanes[0][quarter] = dot::<0>(lanes[0][quarter], codes, g);
            lanes[1][quarter] = dot::<1>(lanes[1][quarter], codes, g);
            lanes[2][quarter] = dot::<2>(lanes[2][quarter], codes, g);
            lanes[3][quarter] = dot::<3>(lanes[3][quarter], codes, g);
        });
    }
    lanes.map(|lanes| store(lanes))
}

/// The next codes of a quarter of a line of `V` vectors, which are taken off `packed`.
#[target_feature(enable = "neon")]
fn unpack<const V: usize>(packed: &mut uint8x16_t) -> int8x16_t {
    let bytes = *packed;
    let codes = match V {
        TWO_BIT => {
            *packed = vshrq_n_u8::<2>(bytes);
            vandq_u8(bytes, vdupq_n_u8(0b11))
        }
        FIVE_TRIT => {
            *packed = vaddq_u8(bytes, vaddq_u8(bytes, bytes));
            // floor(3 b / 256) = floor(floor(3 b / 2) / 128), and floor(3 b / 2) = b + floor(b / 2). `uhadd` halves that sum
            // with no loss of its ninth bit, the shift divides by 64: exact for every b.
            vshrq_n_u8::<6>(vhaddq_u8(bytes, vshrq_n_u8::<1>(bytes)))
        }
        _ => bytes,
    };
    vreinterpretq_s8_u8(codes)
}

/// Codes, less 128 where they are `UNSIGNED`: with their highest bits flipped.
#[target_feature(enable = "neon")]
fn signed<const UNSIGNED: bool>(codes: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(if UNSIGNED { veorq_u8(codes, vdupq_n_u8(128)) } else { codes })
}

/// [`dot`] of four vectors of codes, one with each step of `x`.
#[target_feature(enable = "neon,dotprod")]
fn dot_four(sums: int32x4_t, codes: [int8x16_t; 4], x: int8x16_t) -> int32x4_t {
    let sums = dot::<1>(dot::<0>(sums, codes[0], x), codes[1], x);
    dot::<3>(dot::<2>(sums, codes[2], x), codes[3], x)
}

/// `sums[row] + Σ_c codes[4 * row + c] * x[4 * I + c]`: four rows with step `I` of four.
#[target_feature(enable = "neon,dotprod")]
fn dot<const I: usize>(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: one arithmetic instruction of a feature that this function requires; it touches its operands only.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.4b[{i}]",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            i = const I,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The four activations of a step, four times.
///
/// # Safety
/// `x` has more than `step / 16` lines.
#[target_feature(enable = "neon")]
unsafe fn step(x: &[Line], step: usize) -> int8x16_t {
    // SAFETY: the lines are 16 steps of 4 bytes each, one after the other, and aligned for a 32-bit read.
    vreinterpretq_s8_s32(unsafe { vld1q_dup_s32(x.as_ptr().cast::<i32>().add(step)) })
}

/// The activations of four steps.
///
/// # Safety
/// `x` has more than `(first + 3) / 16` lines.
#[target_feature(enable = "neon")]
unsafe fn four_steps(x: &[Line], first: usize) -> int8x16_t {
    // SAFETY: the lines are 16 steps of 4 bytes each, one after the other, and the load needs no alignment.
    unsafe { vld1q_s8(x.as_ptr().cast::<i8>().add(first * STEP)) }
}

/// A quarter of a line: four rows of the panel.
#[target_feature(enable = "neon")]
fn load(line: &Line, quarter: usize) -> uint8x16_t {
    let (quarters, _) = line.0.as_chunks::<16>();
    // SAFETY: the reference is to 16 bytes, which this loads.
    unsafe { vld1q_u8(quarters[quarter].as_ptr()) }
}

#[target_feature(enable = "neon")]
fn store(lanes: [int32x4_t; 4]) -> [i32; PANEL] {
    let mut sums = [0; PANEL];
    for (lanes, sums) in lanes.iter().zip(sums.as_chunks_mut::<4>().0) {
        // SAFETY: the reference is to 16 bytes, which this stores.
        unsafe { vst1q_s32(sums.as_mut_ptr(), *lanes) };
    }
    sums
}
