//! x86-64 with AVX2: products of unsigned weight codes 0, 1, 2 with int8 activations in `vpmaddubsw`.
//!
//! That instruction adds two products into an int16, which holds many of them here: the pair is at most 512, where two
//! bytes of full range would saturate at once.

use std::arch::x86_64::*;

use super::{Block, Tile, tiled};
use crate::packed::{BLOCK, BLOCK_BYTES};

/// Proof that the processor has AVX2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx2(());

/// Blocks whose products an int16 lane holds: 4 pairs a block, each in [2 * 2 * -128, 2 * 2 * 127] = [-512, 508], and
/// 16 * 4 * -512 = -32,768, which just fits.
const NARROW_BLOCKS: usize = 16;

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }

    pub(super) fn sums(self, block: &Block<'_>, out: &mut [i32]) {
        tiled::<4, 1, 2>(self, block, out);
    }
}

impl Tile for Avx2 {
    fn tile<const R: usize, const O: usize>(
        self,
        x: [&[[i8; BLOCK]]; R],
        w: [&[[u8; BLOCK_BYTES]]; O],
    ) -> [[i32; O]; R] {
        // SAFETY: a value of this type exists only where `new` has seen AVX2.
        unsafe { tile(x, w) }
    }
}

#[target_feature(enable = "avx2")]
fn tile<const R: usize, const O: usize>(
    x: [&[[i8; BLOCK]]; R],
    w: [&[[u8; BLOCK_BYTES]]; O],
) -> [[i32; O]; R] {
    let ones = _mm256_set1_epi16(1);
    let blocks = w[0].len();
    let (x, w) = (x.map(|row| &row[..blocks]), w.map(|row| &row[..blocks]));
    let mut wide = [[_mm256_setzero_si256(); O]; R];
    for first in (0..blocks).step_by(NARROW_BLOCKS) {
        let mut narrow = [[_mm256_setzero_si256(); O]; R];
        for b in first..blocks.min(first + NARROW_BLOCKS) {
            for o in 0..O {
                let codes = unpack(&w[o][b]);
                for r in 0..R {
                    let (planes, _) = x[r][b].as_chunks();
                    let products = [
                        _mm256_maddubs_epi16(codes[0], load(&planes[0])),
                        _mm256_maddubs_epi16(codes[1], load(&planes[1])),
                        _mm256_maddubs_epi16(codes[2], load(&planes[2])),
                        _mm256_maddubs_epi16(codes[3], load(&planes[3])),
                    ];
                    let half = _mm256_add_epi16(products[0], products[1]);
                    let rest = _mm256_add_epi16(products[2], products[3]);
                    narrow[r][o] = _mm256_add_epi16(narrow[r][o], _mm256_add_epi16(half, rest));
                }
            }
        }
        for r in 0..R {
            for o in 0..O {
                wide[r][o] = _mm256_add_epi32(wide[r][o], _mm256_madd_epi16(narrow[r][o], ones));
            }
        }
    }
    let mut sums = [[0; O]; R];
    for r in 0..R {
        for o in 0..O {
            sums[r][o] = lane_sum(wide[r][o]);
        }
    }
    sums
}

/// The 128 codes of a block, in order.
#[target_feature(enable = "avx2")]
fn unpack(block: &[u8; BLOCK_BYTES]) -> [__m256i; 4] {
    // SAFETY: the reference is to 32 bytes, and the load needs no alignment.
    let packed = unsafe { _mm256_loadu_si256(block.as_ptr().cast()) };
    // Shifts of 16 bits drag bits of the neighbouring byte along; the mask takes them off.
    let mask = _mm256_set1_epi8(0b11);
    [
        _mm256_and_si256(packed, mask),
        _mm256_and_si256(_mm256_srli_epi16::<2>(packed), mask),
        _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask),
        _mm256_and_si256(_mm256_srli_epi16::<6>(packed), mask),
    ]
}

#[target_feature(enable = "avx2")]
fn load(codes: &[i8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 bytes, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
}

/// Sum of the eight lanes, modulo 2^32.
#[target_feature(enable = "avx2")]
fn lane_sum(lanes: __m256i) -> i32 {
    let four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256::<1>(lanes));
    let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
}
