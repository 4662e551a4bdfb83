//! aarch64, twice: baseline NEON multiplies int8 into int16 (`smlal`) and widens now and then; where the processor has
//! the dot product extension (`sdot`, in most since 2018), four products go straight into an int32 lane.
//!
//! `sdot` is one line of assembly: the intrinsic for it is not stable in Rust yet.

use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

use super::{Block, Tile, tiled};
use crate::packed::{BLOCK, BLOCK_BYTES};

/// Proof that the processor has NEON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Neon(());

/// Proof that the processor has NEON and the dot product extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NeonDot(());

/// Blocks whose products an int16 lane holds: 8 a block and half of a vector, each in [2 * -128, 2 * 127] = [-256, 254],
/// and 16 * 8 * -256 = -32,768, which just fits.
const NARROW_BLOCKS: usize = 16;

impl Neon {
    pub(super) fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    pub(super) fn sums(self, block: &Block<'_>, out: &mut [i32]) {
        tiled::<4, 1, 2>(self, block, out);
    }
}

impl NeonDot {
    pub(super) fn new() -> Option<Self> {
        (is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")).then_some(Self(()))
    }

    pub(super) fn sums(self, block: &Block<'_>, out: &mut [i32]) {
        tiled::<4, 1, 2>(self, block, out);
    }
}

impl Tile for Neon {
    fn tile<const R: usize, const O: usize>(
        self,
        x: [&[[i8; BLOCK]]; R],
        w: [&[[u8; BLOCK_BYTES]]; O],
    ) -> [[i32; O]; R] {
        // SAFETY: a value of this type exists only where `new` has seen NEON.
        unsafe { tile(x, w) }
    }
}

impl Tile for NeonDot {
    fn tile<const R: usize, const O: usize>(
        self,
        x: [&[[i8; BLOCK]]; R],
        w: [&[[u8; BLOCK_BYTES]]; O],
    ) -> [[i32; O]; R] {
        // SAFETY: a value of this type exists only where `new` has seen both features.
        unsafe { tile_dot(x, w) }
    }
}

#[target_feature(enable = "neon")]
fn tile<const R: usize, const O: usize>(
    x: [&[[i8; BLOCK]]; R],
    w: [&[[u8; BLOCK_BYTES]]; O],
) -> [[i32; O]; R] {
    let blocks = w[0].len();
    let (x, w) = (x.map(|row| &row[..blocks]), w.map(|row| &row[..blocks]));
    let mut wide = [[vdupq_n_s32(0); O]; R];
    for first in (0..blocks).step_by(NARROW_BLOCKS) {
        let mut narrow = [[[vdupq_n_s16(0); 2]; O]; R];
        for b in first..blocks.min(first + NARROW_BLOCKS) {
            for o in 0..O {
                let codes = unpack(&w[o][b]);
                for r in 0..R {
                    let [low, high] = &mut narrow[r][o];
                    for (&codes, x) in codes.iter().zip(x[r][b].as_chunks().0) {
                        let x = load(x);
                        *low = vmlal_s8(*low, vget_low_s8(codes), vget_low_s8(x));
                        *high = vmlal_high_s8(*high, codes, x);
                    }
                }
            }
        }
        for r in 0..R {
            for o in 0..O {
                let [low, high] = narrow[r][o];
                wide[r][o] = vpadalq_s16(vpadalq_s16(wide[r][o], low), high);
            }
        }
    }
    lane_sums(wide)
}

#[target_feature(enable = "neon,dotprod")]
fn tile_dot<const R: usize, const O: usize>(
    x: [&[[i8; BLOCK]]; R],
    w: [&[[u8; BLOCK_BYTES]]; O],
) -> [[i32; O]; R] {
    let blocks = w[0].len();
    let (x, w) = (x.map(|row| &row[..blocks]), w.map(|row| &row[..blocks]));
    // Two sums a pair of rows: one waits for its addition while the other starts.
    let mut lanes = [[[vdupq_n_s32(0); 2]; O]; R];
    for b in 0..blocks {
        for o in 0..O {
            let codes = unpack(&w[o][b]);
            for r in 0..R {
                for (at, (&codes, x)) in codes.iter().zip(x[r][b].as_chunks().0).enumerate() {
                    // A lane gains at most 16 * 2 * 128 = 2^12 a block: it holds 2^19 blocks, and a row has at most 2^17.
                    lanes[r][o][at % 2] = dot(lanes[r][o][at % 2], codes, load(x));
                }
            }
        }
    }
    let mut wide = [[vdupq_n_s32(0); O]; R];
    for r in 0..R {
        for o in 0..O {
            wide[r][o] = vaddq_s32(lanes[r][o][0], lanes[r][o][1]);
        }
    }
    lane_sums(wide)
}

/// `sums[lane] + Σ_i codes[4 * lane + i] * x[4 * lane + i]`
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sums: int32x4_t, codes: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: one arithmetic instruction of a feature that this function requires; it touches its operands only.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The 128 codes of a block, in order: each plane is two vectors.
#[target_feature(enable = "neon")]
fn unpack(block: &[u8; BLOCK_BYTES]) -> [int8x16_t; 8] {
    // SAFETY: the reference is to 32 bytes, which this loads.
    let uint8x16x2_t(a, b) = unsafe { vld1q_u8_x2(block.as_ptr()) };
    let mask = vdupq_n_u8(0b11);
    [
        vandq_u8(a, mask),
        vandq_u8(b, mask),
        vandq_u8(vshrq_n_u8::<2>(a), mask),
        vandq_u8(vshrq_n_u8::<2>(b), mask),
        vandq_u8(vshrq_n_u8::<4>(a), mask),
        vandq_u8(vshrq_n_u8::<4>(b), mask),
        vshrq_n_u8::<6>(a),
        vshrq_n_u8::<6>(b),
    ]
    .map(|codes| vreinterpretq_s8_u8(codes))
}

#[target_feature(enable = "neon")]
fn load(codes: &[i8; 16]) -> int8x16_t {
    // SAFETY: the reference is to 16 bytes, which this loads.
    unsafe { vld1q_s8(codes.as_ptr()) }
}

/// Sums of the four lanes, modulo 2^32.
#[target_feature(enable = "neon")]
fn lane_sums<const R: usize, const O: usize>(lanes: [[int32x4_t; O]; R]) -> [[i32; O]; R] {
    let mut sums = [[0; O]; R];
    for r in 0..R {
        for o in 0..O {
            sums[r][o] = vaddvq_s32(lanes[r][o]);
        }
    }
    sums
}
