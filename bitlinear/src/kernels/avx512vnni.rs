//! x86-64 with AVX-512 and its VNNI extension: `vpdpbusd` multiplies 64 unsigned codes 0, 1, 2 with 64 int8 activations
//! and adds them four by four into int32 lanes, with no narrower step that could overflow. The activations of a step
//! are the same for all 16 rows of a panel: one 32-bit broadcast.

use std::arch::x86_64::*;

use super::{GROUP, GROUP_OUTS, Isa, LINE_STEPS, Unpacked};
use crate::packed::{Layout, Line, PANEL};

/// Rows of activations that pass a group at once: 6 * 4 sums, 4 vectors of codes and one of activations are 29 registers.
const ROWS: usize = 6;

/// Proof that the processor has AVX-512 F, BW and VNNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx512Vnni(());

impl Avx512Vnni {
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni"))
        .then_some(Self(()))
    }
}

impl Isa for Avx512Vnni {
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        let lines = (panel.len() * layout.vectors()).div_ceil(LINE_STEPS);
        assert!(x.iter().all(|x| x.len() >= lines), "activations for every step");
        match layout {
            // SAFETY: a value of this type exists only where `new` has seen the features; the rows are long enough (above).
            Layout::TwoBit => unsafe { two_bit(panel, x) },
            // SAFETY: as above.
            Layout::FiveTrit => unsafe {
                match R {
                    1 => five_trit::<R, 5>(panel, x),
                    2 => five_trit::<R, 2>(panel, x),
                    _ => five_trit::<R, 1>(panel, x),
                }
            },
        }
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        assert!(x.iter().all(|x| x.len() >= panel.len().div_ceil(LINE_STEPS)), "activations for every step");
        // SAFETY: a value of this type exists only where `new` has seen the features; the rows are long enough (above).
        unsafe { bytes(panel, x) }
    }

    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]) {
        assert!(sums.len() >= group.rows * GROUP_OUTS, "sums for every row");
        for first in (0..group.rows).step_by(ROWS) {
            let sums = &mut sums[first * GROUP_OUTS..];
            // SAFETY: a value of this type exists only where `new` has seen the features.
            unsafe {
                match group.rows - first {
                    1 => strip::<1>(group, first, sums),
                    2 => strip::<2>(group, first, sums),
                    3 => strip::<3>(group, first, sums),
                    4 => strip::<4>(group, first, sums),
                    5 => strip::<5>(group, first, sums),
                    _ => strip::<ROWS>(group, first, sums),
                }
            }
        }
    }
}

/// # Safety
/// Every row of `x` has activations for `4 * panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn two_bit<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let mask = _mm512_set1_epi8(0b11);
    // A sum of its own for each vector of a line: none waits for the one before. `vpdpbusd` does not saturate: a lane is
    // right modulo 2^32, which is all that `Isa` asks for.
    let mut lanes = [[_mm512_setzero_si512(); 4]; R];
    for (index, line) in panel.iter().enumerate() {
        let packed = load(line);
        // Shifts of 16 bits drag bits of the neighbouring byte along; the mask takes them off.
        let codes = [
            _mm512_and_si512(packed, mask),
            _mm512_and_si512(_mm512_srli_epi16::<2>(packed), mask),
            _mm512_and_si512(_mm512_srli_epi16::<4>(packed), mask),
            _mm512_and_si512(_mm512_srli_epi16::<6>(packed), mask),
        ];
        for r in 0..R {
            for i in 0..4 {
                // SAFETY: step 4 * index + i < 4 * panel.len(), which the caller promises.
                let x = unsafe { step(x[r], 4 * index + i) };
                lanes[r][i] = _mm512_dpbusd_epi32(lanes[r][i], codes[i], x);
            }
        }
    }
    lanes.map(|lanes| store(total(lanes)))
}

/// Lines of the 1.6-bit layout whose sums stay in range, see [`five_trit`]: 256 * (20 * 2 * 128) a line, below 2^31.
const FIVE_TRIT_LINES: usize = 1024;

/// The codes are never unpacked. With `b_0` the byte and `b_{i+1} = 3 b_i mod 256`, code `c_i` is what the modulus took
/// off: `256 c_i = 3 b_i - b_{i+1}`. So `256 Σ_i x_i c_i = 3 Σ_i x_i b_i - Σ_i x_i b_{i+1}`: two products a code, of bytes that
/// two additions give. The difference is exact modulo 2^32, and a multiple of 256 that fits in an i32 over
/// [`FIVE_TRIT_LINES`].
///
/// `A` sums of each kind a row, so that none waits for the one before.
///
/// # Safety
/// Every row of `x` has activations for `5 * panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn five_trit<const R: usize, const A: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let zero = _mm512_setzero_si512();
    let mut sums = [zero; R];
    for (chunk, lines) in panel.chunks(FIVE_TRIT_LINES).enumerate() {
        let (mut with, mut without) = ([[zero; A]; R], [[zero; A]; R]);
        for (index, line) in lines.iter().enumerate() {
            let mut bytes = load(line);
            for i in 0..5 {
                let next = _mm512_add_epi8(bytes, _mm512_add_epi8(bytes, bytes));
                for r in 0..R {
                    // SAFETY: this step belongs to this line of the panel, as the caller promises.
                    let x = unsafe { step(x[r], 5 * (chunk * FIVE_TRIT_LINES + index) + i) };
                    with[r][i % A] = _mm512_dpbusd_epi32(with[r][i % A], bytes, x);
                    without[r][i % A] = _mm512_dpbusd_epi32(without[r][i % A], next, x);
                }
                bytes = next;
            }
        }
        for r in 0..R {
            let (with, without) = (total(with[r]), total(without[r]));
            let times_three = _mm512_add_epi32(with, _mm512_add_epi32(with, with));
            let codes = _mm512_srai_epi32::<8>(_mm512_sub_epi32(times_three, without));
            sums[r] = _mm512_add_epi32(sums[r], codes);
        }
    }
    sums.map(|sums| store(sums))
}

#[target_feature(enable = "avx512f")]
fn total<const A: usize>(lanes: [__m512i; A]) -> __m512i {
    let mut sum = lanes[0];
    for lanes in &lanes[1..] {
        sum = _mm512_add_epi32(sum, *lanes);
    }
    sum
}

/// Sums of `R` rows from `first` on with the whole group.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn strip<const R: usize>(group: &Unpacked<'_>, first: usize, sums: &mut [i32]) {
    let codes: [&[Line]; GROUP] = std::array::from_fn(|panel| group.panel(panel));
    let x: [&[Line]; R] = std::array::from_fn(|row| group.row(first + row));
    let mut lanes = [[_mm512_setzero_si512(); GROUP]; R];
    for index in 0..group.steps() {
        // SAFETY: index < steps(), the number of code vectors in each panel. (A check here would cost registers.)
        let codes = codes.map(|codes| load(unsafe { codes.get_unchecked(index) }));
        for r in 0..R {
            // SAFETY: index < steps() = 16 * stride, and a row has `stride` lines.
            let x = unsafe { step(x[r], index) };
            for panel in 0..GROUP {
                lanes[r][panel] = _mm512_dpbusd_epi32(lanes[r][panel], codes[panel], x);
            }
        }
    }
    for (lanes, sums) in lanes.iter().zip(sums.chunks_exact_mut(GROUP_OUTS)) {
        for (lanes, sums) in lanes.iter().zip(sums.as_chunks_mut::<PANEL>().0) {
            *sums = store(*lanes);
        }
    }
}

/// # Safety
/// Every row of `x` has activations for `panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn bytes<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    // Two sums a row, so that each waits less for the one before.
    let mut lanes = [[_mm512_setzero_si512(); 2]; R];
    for (index, codes) in panel.iter().enumerate() {
        let codes = load(codes);
        for r in 0..R {
            // SAFETY: index < panel.len(), which the caller promises.
            let x = unsafe { step(x[r], index) };
            lanes[r][index % 2] = _mm512_dpbusd_epi32(lanes[r][index % 2], codes, x);
        }
    }
    lanes.map(|lanes| store(total(lanes)))
}

/// The four activations of a step, in every lane.
///
/// # Safety
/// `x` has more than `step / 16` lines.
#[target_feature(enable = "avx512f")]
unsafe fn step(x: &[Line], step: usize) -> __m512i {
    // SAFETY: the lines are 16 steps of 4 bytes each, one after the other, and aligned for a 32-bit read.
    _mm512_set1_epi32(unsafe { *x.as_ptr().cast::<i32>().add(step) })
}

#[target_feature(enable = "avx512f")]
fn load(line: &Line) -> __m512i {
    // SAFETY: the reference is to 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn store(lanes: __m512i) -> [i32; PANEL] {
    let mut sums = [0; PANEL];
    // SAFETY: the array holds 64 bytes, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), lanes) };
    sums
}
