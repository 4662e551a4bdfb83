//! x86-64 with AVX-512 and its VNNI extension: `vpdpbusd` multiplies 64 unsigned codes 0, 1, 2 with 64 int8 activations
//! and adds them four by four into int32 lanes, with no narrower step that could overflow. The activations of a step
//! are the same for all 16 rows of a panel: one 32-bit broadcast.

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::gradient::{Outer, Outputs, STEPS};
use super::{GROUP, GROUP_OUTS, Isa, LINE_STEPS, Unpacked};
use crate::packed::{Layout, Line, PANEL};

/// Rows of activations that pass a group at once: 6 * 4 sums, 4 vectors of codes and one of activations are 29 registers.
const ROWS: usize = 6;

/// Proof that the processor has AVX-512 F, BW and VNNI; and whether it has VBMI too, as all but the first of them do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Avx512Vnni {
    /// What computes the 1.6-bit layout where there is no VBMI.
    without_vbmi: Option<Avx2>,
}

impl Avx512Vnni {
    pub(super) fn new() -> Option<Self> {
        let vnni = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        if !vnni {
            return None;
        }
        if is_x86_feature_detected!("avx512vbmi") {
            return Some(Self { without_vbmi: None });
        }
        Some(Self { without_vbmi: Some(Avx2::new()?) })
    }

    /// Whether 1.6-bit codes are looked up, which is what makes them fast.
    pub(super) fn has_vbmi(self) -> bool {
        self.without_vbmi.is_none()
    }
}

impl Isa for Avx512Vnni {
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        let lines = (panel.len() * layout.vectors()).div_ceil(LINE_STEPS);
        assert!(x.iter().all(|x| x.len() >= lines), "activations for every step");
        match (layout, self.without_vbmi) {
            // SAFETY: a value of this type exists only where `new` has seen the features; the rows are long enough (above).
            (Layout::TwoBit, _) => unsafe { two_bit(panel, x) },
            // SAFETY: as above; `new` has seen VBMI, or there would be an `Avx2`.
            (Layout::FiveTrit, None) => unsafe { five_trit(panel, x) },
            (Layout::FiveTrit, Some(avx2)) => avx2.packed(layout, panel, x),
        }
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        assert!(x.iter().all(|x| x.len() >= panel.len().div_ceil(LINE_STEPS)), "activations for every step");
        // SAFETY: a value of this type exists only where `new` has seen the features; the rows are long enough (above).
        unsafe { bytes(panel, x) }
    }

    fn halves<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        let lines = (2 * panel.len()).div_ceil(LINE_STEPS);
        assert!(x.iter().all(|x| x.len() >= lines), "activations for every step");
        // SAFETY: a value of this type exists only where `new` has seen the features; the rows are long enough (above).
        unsafe { halves(panel, x) }
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

    fn outer(self, block: &Outer<'_>, tile: &mut [Outputs]) {
        assert_eq!(tile.len(), block.rows(), "outputs for every row");
        for (strip, tile) in tile.chunks_mut(ROWS).enumerate() {
            let first = strip * ROWS;
            // SAFETY: a value of this type exists only where `new` has seen the features.
            unsafe {
                match tile.len() {
                    1 => outer_strip::<1>(block, first, tile),
                    2 => outer_strip::<2>(block, first, tile),
                    3 => outer_strip::<3>(block, first, tile),
                    4 => outer_strip::<4>(block, first, tile),
                    5 => outer_strip::<5>(block, first, tile),
                    _ => outer_strip::<ROWS>(block, first, tile),
                }
            }
        }
    }
}

/// Lines of the 2-bit layout whose sums stay in range, see [`two_bit`]: 4 * (2 * 64 * 128) a line, below 2^31.
const TWO_BIT_LINES: usize = 1 << 14;

/// The codes are not shifted into place: vector `i` of a line is taken as `4^i` times its codes, and its sum divided at the
/// end, exactly, while it fits in an i32 over [`TWO_BIT_LINES`].
///
/// # Safety
/// Every row of `x` has activations for `4 * panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn two_bit<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let masks = [0, 2, 4, 6].map(|shift| _mm512_set1_epi8((0b11u8 << shift) as i8));
    let mut sums = [_mm512_setzero_si512(); R];
    for (chunk, lines) in panel.chunks(TWO_BIT_LINES).enumerate() {
        let mut lanes = [[_mm512_setzero_si512(); 4]; R];
        for (index, line) in lines.iter().enumerate() {
            let packed = load(line);
            for i in 0..4 {
                let codes = _mm512_and_si512(packed, masks[i]);
                for r in 0..R {
                    // SAFETY: this step belongs to this line of the panel, as the caller promises.
                    let x = unsafe { step(x[r], 4 * (chunk * TWO_BIT_LINES + index) + i) };
                    lanes[r][i] = _mm512_dpbusd_epi32(lanes[r][i], codes, x);
                }
            }
        }
        for r in 0..R {
            sums[r] = _mm512_add_epi32(sums[r], unscaled(lanes[r]));
        }
    }
    sums.map(|sums| store(sums))
}

/// Lines of the 1.6-bit layout whose sums stay in range, see [`five_trit`]: 256 * (4 * 2 * 128) a line, below 2^31.
const FIVE_TRIT_LINES: usize = 1 << 12;

/// The last four codes of each byte of the 1.6-bit layout, as the 2-bit layout has them.
static FOUR_CODES: [Line; 4] = {
    let mut table = [Line::ZERO; 4];
    let mut byte = 0;
    while byte < 256 {
        let (mut rest, mut shift) = (byte * 3 % 256, 0);
        while shift < 8 {
            table[byte / 64].0[byte % 64] |= ((rest * 3 / 256) << shift) as u8;
            (rest, shift) = (rest * 3 % 256, shift + 2);
        }
        byte += 1;
    }
    table
};

/// A table gives four codes of a byte at once, which then are as in [`two_bit`]. The first code is never unpacked: with byte
/// `b` and `b' = 3 b mod 256` it is what the modulus took off, `256 c = 3 b - b'`. So `256 Σ x c = 3 Σ x b - Σ x b'`: exact modulo
/// 2^32, and a multiple of 256 that fits in an i32 over [`FIVE_TRIT_LINES`].
///
/// # Safety
/// Every row of `x` has activations for `5 * panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn five_trit<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let masks = [0, 2, 4, 6].map(|shift| _mm512_set1_epi8((0b11u8 << shift) as i8));
    let [a, b, c, d] = [0, 1, 2, 3].map(|quarter| load(&FOUR_CODES[quarter]));
    let mut sums = [_mm512_setzero_si512(); R];
    for (chunk, lines) in panel.chunks(FIVE_TRIT_LINES).enumerate() {
        let mut lanes = [[_mm512_setzero_si512(); 6]; R];
        for (index, line) in lines.iter().enumerate() {
            let bytes = load(line);
            let (low, high) = (_mm512_permutex2var_epi8(a, bytes, b), _mm512_permutex2var_epi8(c, bytes, d));
            let four = _mm512_mask_blend_epi8(_mm512_movepi8_mask(bytes), low, high);
            let tripled = _mm512_add_epi8(bytes, _mm512_add_epi8(bytes, bytes));
            let first = 5 * (chunk * FIVE_TRIT_LINES + index);
            for r in 0..R {
                // SAFETY: this step belongs to this line of the panel, as the caller promises.
                let x = unsafe { step(x[r], first) };
                lanes[r][4] = _mm512_dpbusd_epi32(lanes[r][4], bytes, x);
                lanes[r][5] = _mm512_dpbusd_epi32(lanes[r][5], tripled, x);
            }
            for i in 0..4 {
                let codes = _mm512_and_si512(four, masks[i]);
                for r in 0..R {
                    // SAFETY: as above.
                    let x = unsafe { step(x[r], first + 1 + i) };
                    lanes[r][i] = _mm512_dpbusd_epi32(lanes[r][i], codes, x);
                }
            }
        }
        for r in 0..R {
            let [a, b, c, d, with, without] = lanes[r];
            let times_three = _mm512_add_epi32(with, _mm512_add_epi32(with, with));
            let first = _mm512_srai_epi32::<8>(_mm512_sub_epi32(times_three, without));
            sums[r] = _mm512_add_epi32(sums[r], _mm512_add_epi32(first, unscaled([a, b, c, d])));
        }
    }
    sums.map(|sums| store(sums))
}

/// The sum of the four vectors of a line, of which vector `i` is `4^i` times too large.
#[target_feature(enable = "avx512f")]
fn unscaled([a, b, c, d]: [__m512i; 4]) -> __m512i {
    total([a, _mm512_srai_epi32::<2>(b), _mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d)])
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

/// What a block adds to `R` rows of a tile from `first` on; `tile` begins with them.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn outer_strip<const R: usize>(block: &Outer<'_>, first: usize, tile: &mut [Outputs]) {
    let gradient: [(&[Line; STEPS], usize); R] = std::array::from_fn(|row| block.row(first + row));
    let mut lanes: [[__m512i; GROUP]; R] =
        std::array::from_fn(|row| [_mm512_set1_epi32(block.start(first + row)); GROUP]);
    for index in 0..STEPS {
        let codes: [__m512i; GROUP] = std::array::from_fn(|panel| load(&block.activations[panel][index]));
        for r in 0..R {
            let (gradient, lane) = gradient[r];
            // SAFETY: lane < 16, so that this is in the line `index` of STEPS.
            let g = unsafe { step(gradient, index * PANEL + lane) };
            for panel in 0..GROUP {
                lanes[r][panel] = _mm512_dpbusd_epi32(lanes[r][panel], codes[panel], g);
            }
        }
    }
    for (r, outputs) in tile.iter_mut().enumerate().take(R) {
        let scale = _mm512_set1_ps(block.scales[first + r]);
        for (outputs, sums) in outputs.0.as_chunks_mut::<PANEL>().0.iter_mut().zip(lanes[r]) {
            let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale);
            // SAFETY: the reference is to 64 bytes, and neither load nor store needs an alignment.
            unsafe {
                let sum = _mm512_add_ps(_mm512_loadu_ps(outputs.as_ptr()), product);
                _mm512_storeu_ps(outputs.as_mut_ptr(), sum);
            }
        }
    }
}

/// # Safety
/// Every row of `x` has activations for `panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn bytes<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    // Two sums a row, so that each waits less for the one before.
    let mut lanes = [[_mm512_setzero_si512(); 2]; R];
    let (pairs, rest) = panel.as_chunks::<2>();
    for (index, pair) in pairs.iter().enumerate() {
        for i in 0..2 {
            let codes = load(&pair[i]);
            for r in 0..R {
                // SAFETY: 2 * index + i < panel.len(), which the caller promises.
                let x = unsafe { step(x[r], 2 * index + i) };
                lanes[r][i] = _mm512_dpbusd_epi32(lanes[r][i], codes, x);
            }
        }
    }
    if let [last] = rest {
        for r in 0..R {
            // SAFETY: the last step of the panel, which the caller promises.
            let x = unsafe { step(x[r], panel.len() - 1) };
            lanes[r][0] = _mm512_dpbusd_epi32(lanes[r][0], load(last), x);
        }
    }
    lanes.map(|lanes| store(total(lanes)))
}

/// The high halves are not shifted into place: their sum is 16 times too large. It fits in an i32, since a row of an integer
/// weight has at most `MAX_INT_FEATURES` = 65,793 columns, 8,225 lines of at most 4 * 240 * 128 each.
///
/// # Safety
/// Every row of `x` has activations for `2 * panel.len()` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn halves<const R: usize>(panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
    let masks = [0x0f, 0xf0u8].map(|mask| _mm512_set1_epi8(mask as i8));
    let mut lanes = [[_mm512_setzero_si512(); 2]; R];
    for (index, line) in panel.iter().enumerate() {
        let packed = load(line);
        for half in 0..2 {
            let codes = _mm512_and_si512(packed, masks[half]);
            for r in 0..R {
                // SAFETY: 2 * index + half < 2 * panel.len(), which the caller promises.
                let x = unsafe { step(x[r], 2 * index + half) };
                lanes[r][half] = _mm512_dpbusd_epi32(lanes[r][half], codes, x);
            }
        }
    }
    lanes.map(|[low, high]| store(_mm512_add_epi32(low, _mm512_srai_epi32::<4>(high))))
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
