//! x86-64 with AVX-512 and its VNNI extension: `vpdpbusd` multiplies 64 unsigned weight codes 0, 1, 2 with 64 int8
//! activations and adds them four by four into int32 lanes, with no narrower step that could overflow.
//!
//! A packed block is half a vector, so it is loaded into both halves and each half shifted by its own amount.

use std::arch::x86_64::*;

use super::{Block, Tile, tiled};
use crate::packed::{BLOCK, BLOCK_BYTES};

/// Proof that the processor has AVX-512 F and VNNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx512Vnni(());

impl Avx512Vnni {
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")).then_some(Self(()))
    }

    pub(super) fn sums(self, block: &Block<'_>, out: &mut [i32]) {
        tiled::<4, 2, 4>(self, block, out);
    }
}

impl Tile for Avx512Vnni {
    fn tile<const R: usize, const O: usize>(
        self,
        x: [&[[i8; BLOCK]]; R],
        w: [&[[u8; BLOCK_BYTES]]; O],
    ) -> [[i32; O]; R] {
        // SAFETY: a value of this type exists only where `new` has seen both features.
        unsafe { tile(x, w) }
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn tile<const R: usize, const O: usize>(
    x: [&[[i8; BLOCK]]; R],
    w: [&[[u8; BLOCK_BYTES]]; O],
) -> [[i32; O]; R] {
    let blocks = w[0].len();
    let (x, w) = (x.map(|row| &row[..blocks]), w.map(|row| &row[..blocks]));
    // Two sums a pair of rows: one waits for its addition while the other starts.
    let mut lanes = [[[_mm512_setzero_si512(); 2]; O]; R];
    for b in 0..blocks {
        for o in 0..O {
            let codes = unpack(&w[o][b]);
            for r in 0..R {
                let (halves, _) = x[r][b].as_chunks();
                for half in 0..2 {
                    // A lane gains at most 4 * 2 * 128 = 2^10 a block: it holds 2^21 blocks, and a row has at most 2^17.
                    lanes[r][o][half] =
                        _mm512_dpbusd_epi32(lanes[r][o][half], codes[half], load(&halves[half]));
                }
            }
        }
    }
    let mut sums = [[0; O]; R];
    for r in 0..R {
        for o in 0..O {
            // This sum over the lanes may wrap, as `Tile` allows.
            sums[r][o] = _mm512_reduce_add_epi32(_mm512_add_epi32(lanes[r][o][0], lanes[r][o][1]));
        }
    }
    sums
}

/// The 128 codes of a block, in order.
#[target_feature(enable = "avx512f")]
fn unpack(block: &[u8; BLOCK_BYTES]) -> [__m512i; 2] {
    // SAFETY: the reference is to 32 bytes, and the load needs no alignment.
    let packed = unsafe { _mm256_loadu_si256(block.as_ptr().cast()) };
    let twice = _mm512_broadcast_i64x4(packed);
    // Shifts of 64 bits drag bits of the neighbouring byte along; the mask takes them off.
    let mask = _mm512_set1_epi8(0b11);
    [
        _mm512_and_si512(_mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2)), mask),
        _mm512_and_si512(_mm512_srlv_epi64(twice, _mm512_setr_epi64(4, 4, 4, 4, 6, 6, 6, 6)), mask),
    ]
}

#[target_feature(enable = "avx512f")]
fn load(codes: &[i8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 bytes, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
}
