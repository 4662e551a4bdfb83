//! x86-64 with AVX2: `vpmaddubsw` multiplies 32 unsigned codes 0, 1, 2 with 32 int8 activations and adds neighbours
//! into int16 lanes, which are widened to int32 before they could wrap. Half a panel, eight rows, fills a vector.

use std::arch::x86_64::*;

use super::gradient::{Outer, Outputs, STEPS, TILE_ROWS, ZERO};
use super::{GROUP, GROUP_OUTS, Isa, LINE_STEPS, Unpacked};
use crate::packed::{Layout, Line, PANEL};

/// Steps whose products an int16 lane holds: two a step, each in [2 * -128, 2 * 127], so 64 * -512 = -32,768 just fits
/// (and 64 * 508 = 32,512).
const NARROW_STEPS: usize = 64;

/// Rows of activations that pass a panel at once: 4 * 2 sums, 2 vectors of codes, activations and products.
const ROWS: usize = 4;

/// Proof that the processor has AVX2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn new() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }
}

impl Isa for Avx2 {
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        let lines = (panel.len() * layout.vectors()).div_ceil(LINE_STEPS);
        assert!(x.iter().all(|x| x.len() >= lines), "activations for every step");
        match layout {
            // SAFETY: a value of this type exists only where `new` has seen AVX2; the rows are long enough (above).
            Layout::TwoBit => unsafe { two_bit(panel, x) },
            // SAFETY: as above.
            Layout::FiveTrit => unsafe { five_trit(panel, x) },
        }
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        assert!(x.iter().all(|x| x.len() >= panel.len().div_ceil(LINE_STEPS)), "activations for every step");
        // SAFETY: a value of this type exists only where `new` has seen AVX2; the rows are long enough (above).
        unsafe { bytes(panel, x) }
    }

    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]) {
        assert!(sums.len() >= group.rows * GROUP_OUTS, "sums for every row");
        for panel in 0..GROUP {
            for first in (0..group.rows).step_by(ROWS) {
                let sums = &mut sums[first * GROUP_OUTS + panel * PANEL..];
                // SAFETY: a value of this type exists only where `new` has seen AVX2.
                unsafe {
                    match group.rows - first {
                        1 => strip::<1>(group, panel, first, sums),
                        2 => strip::<2>(group, panel, first, sums),
                        3 => strip::<3>(group, panel, first, sums),
                        _ => strip::<ROWS>(group, panel, first, sums),
                    }
                }
            }
        }
    }

    fn outer(self, block: &Outer<'_>, tile: &mut [Outputs]) {
        assert!(tile.len() == block.rows() && tile.len() <= TILE_ROWS, "outputs for every row of a tile");
        // SAFETY: a value of this type exists only where `new` has seen AVX2.
        unsafe { outer(block, tile) };
    }
}

/// Lines of the two-bit layout whose sums int16 lanes hold.
const TWO_BIT_LINES: usize = NARROW_STEPS / 4;
/// Lines of the 1.6-bit layout whose sums int16 lanes hold.
const FIVE_TRIT_LINES: usize = NARROW_STEPS / 5;

/// # Safety
/// Every row of `x` has activations for `4 * panel.len()` steps.
#[target_feature(enable = "avx2")]
unsafe fn two_bit<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let mask = _mm256_set1_epi8(0b11);
    let mut wide = [[_mm256_setzero_si256(); R]; 2];
    for (chunk, lines) in panel.chunks(TWO_BIT_LINES).enumerate() {
        let mut narrow = [[_mm256_setzero_si256(); R]; 2];
        for (index, line) in lines.iter().enumerate() {
            for (half, narrow) in narrow.iter_mut().enumerate() {
                let packed = load(line, half);
                // Shifts of 16 bits drag bits of the neighbouring byte along; the mask takes them off.
                let codes = [
                    _mm256_and_si256(packed, mask),
                    _mm256_and_si256(_mm256_srli_epi16::<2>(packed), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(packed), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<6>(packed), mask),
                ];
                for r in 0..R {
                    let first = 4 * (chunk * TWO_BIT_LINES + index);
                    // SAFETY: the steps first .. first + 4 belong to this line of the panel, as the caller promises.
                    let p = unsafe {
                        [0, 1, 2, 3].map(|i| _mm256_maddubs_epi16(codes[i], step(x[r], first + i)))
                    };
                    let sum = _mm256_add_epi16(_mm256_add_epi16(p[0], p[1]), _mm256_add_epi16(p[2], p[3]));
                    narrow[r] = _mm256_add_epi16(narrow[r], sum);
                }
            }
        }
        widen(&mut wide, &narrow);
    }
    rows(wide)
}

/// # Safety
/// Every row of `x` has activations for `5 * panel.len()` steps.
#[target_feature(enable = "avx2")]
unsafe fn five_trit<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let (mask, one, zero) = (_mm256_set1_epi8(0b11), _mm256_set1_epi8(1), _mm256_setzero_si256());
    let mut wide = [[zero; R]; 2];
    for (chunk, lines) in panel.chunks(FIVE_TRIT_LINES).enumerate() {
        let mut narrow = [[zero; R]; 2];
        for (index, line) in lines.iter().enumerate() {
            for (half, narrow) in narrow.iter_mut().enumerate() {
                let mut bytes = load(line, half);
                for i in 0..5 {
                    // floor(3 b / 256) = floor(floor(3 b / 4) / 64). Means round up, so that of b - 1 is taken: exact for every b.
                    let less = _mm256_subs_epu8(bytes, one);
                    let most = _mm256_avg_epu8(less, _mm256_avg_epu8(less, zero));
                    let codes = _mm256_and_si256(_mm256_srli_epi16::<6>(most), mask);
                    bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(bytes, bytes));
                    for r in 0..R {
                        // SAFETY: this step belongs to this line of the panel, as the caller promises.
                        let x = unsafe { step(x[r], 5 * (chunk * FIVE_TRIT_LINES + index) + i) };
                        narrow[r] = _mm256_add_epi16(narrow[r], _mm256_maddubs_epi16(codes, x));
                    }
                }
            }
        }
        widen(&mut wide, &narrow);
    }
    rows(wide)
}

/// Sums of `R` rows from `first` on with one panel of the group; `sums` begins where they go.
#[target_feature(enable = "avx2")]
fn strip<const R: usize>(group: &Unpacked<'_>, panel: usize, first: usize, sums: &mut [i32]) {
    let codes = group.panel(panel);
    let x: [&[Line]; R] = std::array::from_fn(|row| group.row(first + row));
    let mut wide = [[_mm256_setzero_si256(); R]; 2];
    for (chunk, codes) in codes.chunks(NARROW_STEPS).enumerate() {
        let mut narrow = [[_mm256_setzero_si256(); R]; 2];
        for (index, codes) in codes.iter().enumerate() {
            let codes = [load(codes, 0), load(codes, 1)];
            for r in 0..R {
                // SAFETY: the step is below steps() = 16 * stride, and a row has `stride` lines.
                let x = unsafe { step(x[r], chunk * NARROW_STEPS + index) };
                for (narrow, codes) in narrow.iter_mut().zip(codes) {
                    narrow[r] = _mm256_add_epi16(narrow[r], _mm256_maddubs_epi16(codes, x));
                }
            }
        }
        widen(&mut wide, &narrow);
    }
    for (r, of_row) in rows(wide).iter().enumerate() {
        sums[r * GROUP_OUTS..][..PANEL].copy_from_slice(of_row);
    }
}

/// Rows of a gradient that pass a panel at once: 6 * 2 sums, 2 vectors of codes, one of the gradient, one of products.
const OUTER_ROWS: usize = 6;

/// Two lines of int16 for each line of a panel.
type Widened = [Line; 2 * STEPS];

/// Codes up to 255 would saturate `vpmaddubsw`: both sides are widened to int16, once for all products of the call.
#[target_feature(enable = "avx2")]
fn outer(block: &Outer<'_>, tile: &mut [Outputs]) {
    let mut gradient = [[Line::ZERO; 2 * STEPS]; TILE_ROWS / PANEL];
    let panels = &mut gradient[..tile.len().div_ceil(PANEL)];
    for (wide, panel) in panels.iter_mut().zip(block.gradient) {
        widen_panel(panel, 0, wide);
    }
    let mut codes = [Line::ZERO; 2 * STEPS];
    for (panel, lines) in block.activations.iter().enumerate() {
        widen_panel(lines, ZERO, &mut codes);
        for (strip, tile) in tile.chunks_mut(OUTER_ROWS).enumerate() {
            let (first, scales) = (strip * OUTER_ROWS, &block.scales[strip * OUTER_ROWS..]);
            match tile.len() {
                1 => outer_strip::<1>(&gradient, first, &codes, scales, panel, tile),
                2 => outer_strip::<2>(&gradient, first, &codes, scales, panel, tile),
                3 => outer_strip::<3>(&gradient, first, &codes, scales, panel, tile),
                4 => outer_strip::<4>(&gradient, first, &codes, scales, panel, tile),
                5 => outer_strip::<5>(&gradient, first, &codes, scales, panel, tile),
                _ => outer_strip::<OUTER_ROWS>(&gradient, first, &codes, scales, panel, tile),
            }
        }
    }
}

/// The bytes of a panel, with the bits of `flipped` flipped, as int16: of each line first the even ones, then the odd ones. A
/// 32-bit lane has one feature as before, tokens 0 and 2 or 1 and 3 of it, and needs no shuffle.
#[target_feature(enable = "avx2")]
fn widen_panel(panel: &[Line; STEPS], flipped: u8, wide: &mut Widened) {
    let flipped = _mm256_set1_epi8(flipped as i8);
    for (line, [even, odd]) in panel.iter().zip(wide.as_chunks_mut::<2>().0) {
        for half in 0..2 {
            let bytes = _mm256_xor_si256(load(line, half), flipped);
            put(even, half, _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes)));
            put(odd, half, _mm256_srai_epi16::<8>(bytes));
        }
    }
}

/// What a block adds to `R` rows of a tile from `first` on, in the columns of one panel; `scales` and `tile` begin with them.
#[target_feature(enable = "avx2")]
fn outer_strip<const R: usize>(
    gradient: &[Widened; TILE_ROWS / PANEL],
    first: usize,
    codes: &Widened,
    scales: &[f32],
    panel: usize,
    tile: &mut [Outputs],
) {
    let rows: [(&Widened, usize); R] =
        std::array::from_fn(|row| (&gradient[(first + row) / PANEL], (first + row) % PANEL));
    let mut lanes = [[_mm256_setzero_si256(); 2]; R];
    for (index, codes) in codes.iter().enumerate() {
        let codes = [load(codes, 0), load(codes, 1)];
        for r in 0..R {
            let (gradient, lane) = rows[r];
            // SAFETY: lane < 16 and index < 2 * STEPS: in one of the lines of `gradient`.
            let g = unsafe { step(gradient, index * PANEL + lane) };
            for half in 0..2 {
                lanes[r][half] = _mm256_add_epi32(lanes[r][half], _mm256_madd_epi16(codes[half], g));
            }
        }
    }
    for ((outputs, scale), lanes) in tile.iter_mut().zip(scales).zip(lanes) {
        let outputs = outputs.0.as_chunks_mut::<PANEL>().0[panel].as_chunks_mut::<8>().0;
        for (outputs, sums) in outputs.iter_mut().zip(lanes) {
            let product = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(*scale));
            // SAFETY: the reference is to 32 bytes, and neither load nor store needs an alignment.
            unsafe {
                let sum = _mm256_add_ps(_mm256_loadu_ps(outputs.as_ptr()), product);
                _mm256_storeu_ps(outputs.as_mut_ptr(), sum);
            }
        }
    }
}

/// Codes up to 255 would saturate `vpmaddubsw`: both sides are widened to int16 first.
///
/// # Safety
/// Every row of `x` has activations for `panel.len()` steps.
#[target_feature(enable = "avx2")]
unsafe fn bytes<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    // Lanes alternate between the first and the second two columns of a row; four rows a vector.
    let mut lanes = [[_mm256_setzero_si256(); 4]; R];
    for (index, codes) in panel.iter().enumerate() {
        let (quarters, _) = codes.0.as_chunks::<16>();
        // SAFETY: the references are to 16 bytes, and the loads need no alignment.
        let codes = [0, 1, 2, 3].map(|q| unsafe { _mm_loadu_si128(quarters[q].as_ptr().cast()) });
        let codes = codes.map(|codes| _mm256_cvtepu8_epi16(codes));
        for r in 0..R {
            // SAFETY: index < panel.len(), which the caller promises.
            let x = unsafe { step(x[r], index) };
            let x = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
            for q in 0..4 {
                lanes[r][q] = _mm256_add_epi32(lanes[r][q], _mm256_madd_epi16(codes[q], x));
            }
        }
    }
    lanes.map(|quarters| {
        // `vphaddd` adds neighbours within 128 bits: rows 0, 1, 4, 5 | 2, 3, 6, 7 of eight, put in order by the permutation.
        let pairs = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(a, b));
        store([pairs(quarters[0], quarters[1]), pairs(quarters[2], quarters[3])])
    })
}

/// Adds neighbouring int16 lanes, two columns each of one row, to the row's int32 lane.
#[target_feature(enable = "avx2")]
fn widen<const R: usize>(wide: &mut [[__m256i; R]; 2], narrow: &[[__m256i; R]; 2]) {
    let ones = _mm256_set1_epi16(1);
    for (wide, narrow) in wide.iter_mut().flatten().zip(narrow.iter().flatten()) {
        *wide = _mm256_add_epi32(*wide, _mm256_madd_epi16(*narrow, ones));
    }
}

/// The sums of each row of activations, from both halves of the panel.
#[target_feature(enable = "avx2")]
fn rows<const R: usize>([first, second]: [[__m256i; R]; 2]) -> [[i32; PANEL]; R] {
    let mut sums = [[0; PANEL]; R];
    for r in 0..R {
        sums[r] = store([first[r], second[r]]);
    }
    sums
}

/// The four activations of a step, in every lane.
///
/// # Safety
/// `x` has more than `step / 16` lines.
#[target_feature(enable = "avx2")]
unsafe fn step(x: &[Line], step: usize) -> __m256i {
    // SAFETY: the lines are 16 steps of 4 bytes each, one after the other, and aligned for a 32-bit read.
    _mm256_set1_epi32(unsafe { *x.as_ptr().cast::<i32>().add(step) })
}

/// Half of a line: eight rows of the panel.
#[target_feature(enable = "avx2")]
fn load(line: &Line, half: usize) -> __m256i {
    let (halves, _) = line.0.as_chunks::<32>();
    // SAFETY: the reference is to 32 bytes, aligned to 32.
    unsafe { _mm256_load_si256(halves[half].as_ptr().cast()) }
}

/// Writes half of a line.
#[target_feature(enable = "avx2")]
fn put(line: &mut Line, half: usize, bytes: __m256i) {
    let (halves, _) = line.0.as_chunks_mut::<32>();
    // SAFETY: the reference is to 32 bytes, aligned to 32.
    unsafe { _mm256_store_si256(halves[half].as_mut_ptr().cast(), bytes) };
}

#[target_feature(enable = "avx2")]
fn store(lanes: [__m256i; 2]) -> [i32; PANEL] {
    let mut sums = [0; PANEL];
    for (lanes, sums) in lanes.iter().zip(sums.as_chunks_mut::<8>().0) {
        // SAFETY: the reference is to 32 bytes, and the store needs no alignment.
        unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), *lanes) };
    }
    sums
}
