//! x86-64 with AMX, on Linux: `tdpbsud` multiplies a tile of 16 rows by 64 columns of int8 activations with 16 code vectors,
//! which are a tile as they lie in memory, and adds to a tile of 16 x 16 int32 sums: 16,384 products in 16 cycles, eight
//! times what two `vpdpbusd` a cycle do. Sums wrap and nothing saturates, as [`Isa`] asks for. Few rows are left to
//! AVX-512: there, memory is the limit.
//!
//! The compiler knows no tiles on stable, so none lives outside one assembly block. On processors without tiles the tests
//! run this kernel in an emulator.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::avx512vnni::Avx512Vnni;
use super::gradient::{Outer, Outputs};
use super::rows::ROW_ALIGN;
use super::{GROUP, GROUP_OUTS, Isa, LINE_STEPS, Unpacked};
use crate::packed::{Layout, Line, PANEL};

/// Rows of a tile: of activations and sums, and code vectors.
const TILE: usize = 16;
/// Bytes of a row of a tile.
const LINE: usize = size_of::<Line>();
/// Bytes from a row of sums to the next.
const SUMS_ROW: usize = GROUP_OUTS * size_of::<i32>();

// What the assembly takes for granted.
const _: () =
    assert!(ROW_ALIGN == TILE && LINE_STEPS == TILE && PANEL * size_of::<i32>() == LINE && GROUP == 4);

/// Lines of a row that pass at once, 512 columns. Of 32 rows and two panels each step loads four tiles for four products,
/// 8 cycles each from the first-level cache, against 16 for a product: the loads keep up as long as half of them come from
/// there. So the codes stay there, 16 KiB of two panels, while all rows pass, 16 KiB for each 32 of them, with 4 KiB of sums:
/// 36 KiB between two uses of a code, of 48. A longer block would drive the codes out, a shorter one loads and stores the sums
/// more often (8 tiles for the 32 products of a block of this length).
const BLOCK: usize = 8;

/// Proof that the processor has AMX with int8 products, that the system keeps its tiles, and that this process may use them;
/// and AVX-512 with VNNI besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Amx(Avx512Vnni);

impl Amx {
    pub(super) fn new() -> Option<Self> {
        static USABLE: OnceLock<bool> = OnceLock::new();
        let vectors = Avx512Vnni::new()?;
        USABLE.get_or_init(|| has_tiles() && may_use_tiles()).then_some(Self(vectors))
    }

    /// For a processor without tiles: their instructions raise a signal, and the emulator does what they say.
    #[cfg(test)]
    pub(super) fn emulated() -> Option<Self> {
        let vectors = Avx512Vnni::new()?;
        if has_tiles() {
            return None;
        }
        emulator::install();
        Some(Self(vectors))
    }
}

/// Whether the processor has int8 tiles and the system keeps them when it switches threads.
fn has_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_TILE: u32 = 1 << 24;
    const AMX_INT8: u32 = 1 << 25;
    /// Configuration and data of the tiles.
    const XCR0_TILES: u32 = 1 << 17 | 1 << 18;
    let features = if __cpuid_count(0, 0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
    if features & AMX_TILE == 0 || features & AMX_INT8 == 0 || __cpuid_count(1, 0).ecx & OSXSAVE == 0 {
        return false;
    }
    let xcr0: u32;
    // SAFETY: `xgetbv` exists where the system has set OSXSAVE (just seen), register 0 wherever it exists.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    xcr0 & XCR0_TILES == XCR0_TILES
}

/// Asks the system for this process to use tiles, which it must before the first one.
fn may_use_tiles() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let refused: usize;
    // SAFETY: the call takes two numbers and touches no memory of ours; a kernel that does not know it refuses. `syscall`
    // itself changes rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => refused,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    refused == 0
}

impl Amx {
    /// As [`Avx512Vnni::has_vbmi`].
    pub(super) fn has_vbmi(self) -> bool {
        self.0.has_vbmi()
    }
}

impl Isa for Amx {
    const NARROW_ROWS: usize = 8;

    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        self.0.packed(layout, panel, x)
    }

    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        self.0.bytes(panel, x)
    }

    fn halves<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        self.0.halves(panel, x)
    }

    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]) {
        let (rows, stride) = (group.rows.next_multiple_of(TILE), group.stride);
        assert!(group.codes.len() >= GROUP * group.steps(), "codes of a whole group");
        assert!(group.x.len() >= rows * stride, "activations in whole tiles of rows");
        assert!(sums.len() >= rows * GROUP_OUTS, "room for whole tiles of sums");
        if rows == 0 || stride == 0 {
            sums.fill(0);
            return;
        }
        let (x, codes, sums) = (group.x.as_ptr(), group.codes.as_ptr(), sums.as_mut_ptr());
        // SAFETY: a value of this type exists only where `new` has seen the tiles and may use them (or tests emulate them).
        unsafe { configure() };
        for first in (0..stride).step_by(BLOCK) {
            let part = |row: usize, panel: usize| Part {
                // SAFETY: row < rows and first < stride: a line of `x`, which has `rows * stride` (checked above).
                x: unsafe { x.add(row * stride + first) },
                // SAFETY: panel < GROUP and first < stride: a line of `codes`, which has GROUP * stride * TILE (checked above).
                codes: unsafe { codes.add((panel * stride + first) * TILE) },
                // SAFETY: row < rows and panel < GROUP: one of `rows * GROUP_OUTS` sums (checked above).
                sums: unsafe { sums.add(row * GROUP_OUTS + panel * PANEL) },
                steps: BLOCK.min(stride - first),
                stride,
                fresh: first == 0,
            };
            let pairs = rows / (2 * TILE);
            for panel in (0..GROUP).step_by(2) {
                for pair in 0..pairs {
                    // SAFETY: the tiles are configured; 32 rows and two panels from here on are there, `steps` lines of each.
                    unsafe { two_by_two(&part(pair * 2 * TILE, panel)) };
                }
            }
            if pairs * 2 * TILE < rows {
                // SAFETY: the tiles are configured; 16 rows and all panels from here on are there, `steps` lines of each.
                unsafe { one_by_four(&part(pairs * 2 * TILE, 0)) };
            }
        }
        // SAFETY: as for `configure`.
        unsafe { release() };
    }

    /// Left to AVX-512: a tile of the gradient would need rows of 64 tokens, where panels have four tokens of 16 rows.
    fn outer(self, block: &Outer<'_>, tile: &mut [Outputs]) {
        self.0.outer(block, tile);
    }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row. Palette 1 has eight tiles; of the others all must be zero.
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of full size. A static: its bytes are there whatever the compiler makes of the assembly that reads them.
static FULL: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// # Safety
/// This process may use tiles.
unsafe fn configure() {
    // SAFETY: the instruction exists (the caller's promise) and reads the 64 bytes of a valid configuration.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            config = in(reg) &raw const FULL,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// Gives the tiles up: a thread that holds some takes 8 KiB more to switch, and keeps its core from deep sleep.
///
/// # Safety
/// This process may use tiles.
unsafe fn release() {
    // SAFETY: the instruction exists (the caller's promise), and no tile is in use between the assembly blocks.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// A block of columns of some rows and some panels of a group.
struct Part {
    /// Where the first row's block begins.
    x: *const Line,
    /// Where the first panel's block begins.
    codes: *const Line,
    /// The sum of the first row with the first output.
    sums: *mut i32,
    /// Lines in the block; at least one.
    steps: usize,
    /// Lines of a whole row, and code tiles of a whole panel.
    stride: usize,
    /// Whether the sums start here and not with what is in `sums`.
    fresh: bool,
}

/// 32 rows with two panels: four tiles of sums, two of activations, two of codes. Four loads for four products.
///
/// # Safety
/// The tiles are configured as [`FULL`] says, and `part` has 32 rows, two panels and their sums.
unsafe fn two_by_two(part: &Part) {
    // SAFETY: tile loads and stores stay in 16 rows of 64 bytes from their address: the rows, panels and sums that the
    // caller promises, in each of `steps` steps. Only the listed registers change, and nothing is on the stack.
    unsafe {
        asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{sums} + {sums_row}*1]",
            "tileloadd tmm1, [{sums} + {sums_row}*1 + {right}]",
            "tileloadd tmm2, [{sums} + {sums_row}*1 + {below}]",
            "tileloadd tmm3, [{sums} + {sums_row}*1 + {below} + {right}]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{x0} + {x_row}*1]",
            "tileloadd tmm6, [{codes0} + {codes_row}*1]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{codes1} + {codes_row}*1]",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + {x_row}*1]",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "add {x0}, {line}",
            "add {x1}, {line}",
            "add {codes0}, {tile}",
            "add {codes1}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{sums} + {sums_row}*1], tmm0",
            "tilestored [{sums} + {sums_row}*1 + {right}], tmm1",
            "tilestored [{sums} + {sums_row}*1 + {below}], tmm2",
            "tilestored [{sums} + {sums_row}*1 + {below} + {right}], tmm3",
            fresh = in(reg) u32::from(part.fresh),
            sums = in(reg) part.sums,
            sums_row = in(reg) SUMS_ROW,
            right = const PANEL * size_of::<i32>(),
            below = const TILE * SUMS_ROW,
            x0 = inout(reg) part.x => _,
            x1 = inout(reg) part.x.add(TILE * part.stride) => _,
            x_row = in(reg) part.stride * LINE,
            codes0 = inout(reg) part.codes => _,
            codes1 = inout(reg) part.codes.add(TILE * part.stride) => _,
            codes_row = in(reg) LINE,
            steps = inout(reg) part.steps => _,
            line = const LINE,
            tile = const TILE * LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

/// 16 rows, those that are left, with four panels: four tiles of sums, one of activations, three for the codes in turn.
/// Five loads for four products.
///
/// # Safety
/// The tiles are configured as [`FULL`] says, and `part` has 16 rows, four panels and their sums.
unsafe fn one_by_four(part: &Part) {
    // SAFETY: as in `two_by_two`.
    unsafe {
        asm!(
            "test {fresh:e}, {fresh:e}",
            "jnz 2f",
            "tileloadd tmm0, [{sums} + {sums_row}*1]",
            "tileloadd tmm1, [{sums} + {sums_row}*1 + {right}]",
            "tileloadd tmm2, [{sums} + {sums_row}*1 + 2*{right}]",
            "tileloadd tmm3, [{sums} + {sums_row}*1 + 3*{right}]",
            "jmp 3f",
            "2:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "3:",
            "tileloadd tmm4, [{x} + {x_row}*1]",
            "tileloadd tmm5, [{codes0} + {codes_row}*1]",
            "tdpbsud tmm0, tmm4, tmm5",
            "tileloadd tmm6, [{codes1} + {codes_row}*1]",
            "tdpbsud tmm1, tmm4, tmm6",
            "tileloadd tmm7, [{codes2} + {codes_row}*1]",
            "tdpbsud tmm2, tmm4, tmm7",
            "tileloadd tmm5, [{codes3} + {codes_row}*1]",
            "tdpbsud tmm3, tmm4, tmm5",
            "add {x}, {line}",
            "add {codes0}, {tile}",
            "add {codes1}, {tile}",
            "add {codes2}, {tile}",
            "add {codes3}, {tile}",
            "dec {steps}",
            "jnz 3b",
            "tilestored [{sums} + {sums_row}*1], tmm0",
            "tilestored [{sums} + {sums_row}*1 + {right}], tmm1",
            "tilestored [{sums} + {sums_row}*1 + 2*{right}], tmm2",
            "tilestored [{sums} + {sums_row}*1 + 3*{right}], tmm3",
            fresh = in(reg) u32::from(part.fresh),
            sums = in(reg) part.sums,
            sums_row = in(reg) SUMS_ROW,
            right = const PANEL * size_of::<i32>(),
            x = inout(reg) part.x => _,
            x_row = in(reg) part.stride * LINE,
            codes0 = inout(reg) part.codes => _,
            codes1 = inout(reg) part.codes.add(TILE * part.stride) => _,
            codes2 = inout(reg) part.codes.add(2 * TILE * part.stride) => _,
            codes3 = inout(reg) part.codes.add(3 * TILE * part.stride) => _,
            codes_row = in(reg) LINE,
            steps = inout(reg) part.steps => _,
            line = const LINE,
            tile = const TILE * LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

#[cfg(test)]
mod emulator;
#[cfg(test)]
pub(super) mod tests;
