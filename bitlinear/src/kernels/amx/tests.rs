//! Tiles as such; that the kernel's products are right is tested with those of all kernels.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::emulator::{self, Instruction, Tiles, decode};
use super::*;
use crate::kernels::scalar::Scalar;

/// Whether system and processor promise what the kernel needs, by the system's word and not by the kernel's own questions.
pub(in crate::kernels) fn promised() -> bool {
    const ARCH_GET_XCOMP_SUPP: usize = 0x1021;
    let mut supported = 0u64;
    // SAFETY: the system writes a u64 there, or refuses.
    let failed = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &raw mut supported) };
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
    failed == 0 && supported >> 17 & 3 == 3 && ["amx_tile", "amx_int8", "avx512_vnni"].into_iter().all(has)
}

/// The kernel on the processor's tiles, or on emulated ones.
fn amx() -> Option<Amx> {
    let isa = Amx::new().or_else(Amx::emulated);
    if isa.is_none() {
        println!("not tested: no AVX-512 with VNNI, or no permission to use tiles");
    }
    isa
}

/// Every number of whole tiles and one row more, over no, one and two ends of a block of columns; with codes that no
/// ternary weight has, so that sums reach every bit, and with exactly the memory that the kernel asks for.
#[test]
fn groups_of_every_shape_are_those_of_the_scalar_kernel() {
    let Some(isa) = amx() else { return };
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for stride in [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1] {
        let mut lines = |count: usize, any: bool| -> Vec<Line> {
            let mut byte = || if any { rng.random() } else { [0, 127, 128, 255][rng.random_range(0..4)] };
            (0..count).map(|_| Line(std::array::from_fn(|_| byte()))).collect()
        };
        let codes = lines(GROUP * TILE * stride, true);
        for rows in [0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 97] {
            let x = lines(usize::next_multiple_of(rows, TILE) * stride, false);
            let group = Unpacked { codes: &codes, x: &x, stride, rows };
            let room = usize::next_multiple_of(rows, TILE) * GROUP_OUTS;
            let (mut sums, mut expected) = (vec![-1; room + GROUP_OUTS], vec![-1; rows * GROUP_OUTS]);
            isa.unpacked(&group, &mut sums[..room]);
            Scalar.unpacked(&group, &mut expected);
            assert!(sums[..expected.len()] == expected, "{rows} rows of {stride} lines");
            assert!(sums[room..].iter().all(|sum| *sum == -1), "written beyond the sums");
            assert!(!emulator::in_use(), "the tiles are still in use");
        }
    }
}

#[test]
fn memory_that_is_too_short_is_refused() {
    let Some(isa) = amx() else { return };
    let (codes, x) = (vec![Line::ZERO; GROUP * TILE * 3], vec![Line::ZERO; 32 * 3]);
    let run = |codes: &[Line], x: &[Line], sums: usize| {
        let group = Unpacked { codes, x, stride: 3, rows: 17 };
        std::panic::catch_unwind(|| isa.unpacked(&group, &mut vec![0; sums])).is_ok()
    };
    assert!(run(&codes, &x, 32 * GROUP_OUTS));
    assert!(!run(&codes[1..], &x, 32 * GROUP_OUTS));
    assert!(!run(&codes, &x[1..], 32 * GROUP_OUTS));
    assert!(!run(&codes, &x, 32 * GROUP_OUTS - 1));
}

/// On a processor with tiles this checks what the emulator takes for granted.
#[test]
fn tiles_of_any_size_multiply_as_the_manual_says() {
    if amx().is_none() {
        return;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    for _ in 0..200 {
        let (m, n, k) = (rng.random_range(1..=16), rng.random_range(1..=16), rng.random_range(1..=16));
        let (a_row, b_row, c_row) = (4 * k + rng.random_range(0..9), 4 * n + rng.random_range(0..9), n + 1);
        let a: Vec<u8> = (0..m * a_row).map(|_| rng.random()).collect();
        let b: Vec<u8> = (0..k * b_row).map(|_| rng.random()).collect();
        let mut c: Vec<i32> = (0..m * c_row).map(|_| rng.random()).collect();
        let mut expected = c.clone();
        for (i, j, l) in (0..m * n * k).map(|at| (at / k / n, at / k % n, at % k)) {
            for byte in 0..4 {
                let (a, b) = (a[i * a_row + 4 * l + byte] as i8, b[l * b_row + 4 * j + byte]);
                let sum = &mut expected[i * c_row + j];
                *sum = sum.wrapping_add(i32::from(a) * i32::from(b));
            }
        }
        let mut config = Config { row_bytes: [0; 16], rows: [0; 16], ..FULL };
        for (tile, rows, columns) in [(3, m, n), (6, m, k), (7, k, n)] {
            (config.rows[tile], config.row_bytes[tile]) = (rows as u8, 4 * columns as u16);
        }
        // SAFETY: there are tiles (`amx`); the configuration is valid, and each tile has its rows in the buffer that it
        // is loaded from or stored to.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tileloadd tmm3, [{c} + {c_row}*1]",
                "tileloadd tmm6, [{a} + {a_row}*1]",
                "tileloadd tmm7, [{b} + {b_row}*1]",
                "tdpbsud tmm3, tmm6, tmm7",
                "tilestored [{c} + {c_row}*1], tmm3",
                "tilezero tmm3",
                "tilerelease",
                config = in(reg) &raw const config,
                a = in(reg) a.as_ptr(),
                b = in(reg) b.as_ptr(),
                c = in(reg) c.as_mut_ptr(),
                a_row = in(reg) a_row,
                b_row = in(reg) b_row,
                c_row = in(reg) 4 * c_row,
                out("tmm3") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        assert!(c == expected, "{m} x {k} x {n}");
    }
}

/// Executes what touches no memory but `config`.
fn execute(tiles: &mut Tiles, instruction: Instruction) -> Result<(), &'static str> {
    // SAFETY: see the callers: the only memory that an instruction here gets to is a configuration of theirs.
    unsafe { tiles.execute(instruction) }
}

fn configured(config: &Config) -> Result<Tiles, &'static str> {
    let mut tiles = Tiles::RELEASED;
    let from = std::ptr::from_ref(config).expose_provenance() as u64;
    execute(&mut tiles, Instruction::LoadConfig { from }).map(|()| tiles)
}

#[test]
fn the_emulator_refuses_what_a_processor_would() {
    let changed = |change: fn(&mut Config)| {
        let mut config = Config { ..FULL };
        change(&mut config);
        configured(&config)
    };
    assert!(configured(&FULL).is_ok());
    let bad: [(fn(&mut Config), _); 10] = [
        (|c| c.palette = 2, "palette"),
        (|c| c.start_row = 1, "interrupted load"),
        (|c| c.reserved[0] = 1, "reserved bytes"),
        (|c| c.reserved[13] = 1, "reserved bytes"),
        (|c| c.row_bytes[8] = 64, "reserved bytes"),
        (|c| c.rows[15] = 1, "reserved bytes"),
        (|c| c.row_bytes[7] = 65, "larger"),
        (|c| c.rows[0] = 17, "larger"),
        (|c| c.rows[3] = 0, "alone"),
        (|c| c.row_bytes[3] = 0, "alone"),
    ];
    for (change, expected) in bad {
        let error = changed(change).err().unwrap();
        assert!(error.contains(expected), "{error}");
    }

    let dot = |c, a, b| Instruction::Dot { c, a, b };
    let no_memory = |tile| {
        [Instruction::Load { tile, from: 0, stride: 0 }, Instruction::Store { tile, to: 0, stride: 0 }]
    };
    let refused = |tiles: &mut Tiles, instruction, expected: &str| {
        let error = execute(tiles, instruction).unwrap_err();
        assert!(error.contains(expected), "{instruction:?}: {error}");
    };
    let without = |tiles: &mut Tiles| {
        for instruction in no_memory(0).into_iter().chain([Instruction::Zero { tile: 0 }, dot(0, 1, 2)]) {
            refused(tiles, instruction, "without a configuration");
        }
    };
    let mut tiles = Tiles::RELEASED;
    without(&mut tiles);
    without(&mut changed(|c| c.palette = 0).ok().unwrap());
    tiles = configured(&FULL).ok().unwrap();
    assert_eq!(execute(&mut tiles, dot(0, 1, 2)), Ok(()));
    assert_eq!(execute(&mut tiles, Instruction::Zero { tile: 7 }), Ok(()));
    for instruction in no_memory(8).into_iter().chain([dot(8, 1, 2), dot(0, 8, 2), dot(0, 1, 8)]) {
        refused(&mut tiles, instruction, "only eight tiles");
    }
    for instruction in [dot(1, 1, 2), dot(1, 2, 1), dot(1, 2, 2)] {
        refused(&mut tiles, instruction, "twice");
    }
    assert_eq!(execute(&mut tiles, Instruction::Release), Ok(()));
    without(&mut tiles);

    tiles = changed(|c| (c.rows[1], c.row_bytes[1]) = (0, 0)).ok().unwrap();
    refused(&mut tiles, Instruction::Zero { tile: 1 }, "leaves out");
    let sizes: [(fn(&mut Config), _); 5] = [
        (|c| c.rows[0] = 15, "do not fit"),
        (|c| c.row_bytes[1] = 60, "do not fit"),
        (|c| c.rows[2] = 15, "do not fit"),
        (|c| c.row_bytes[2] = 60, "do not fit"),
        (|c| c.row_bytes[1] = 62, "whole steps"),
    ];
    for (change, expected) in sizes {
        refused(&mut changed(change).ok().unwrap(), dot(0, 1, 2), expected);
    }
}

/// Register `n` holds `1000 n`. The bytes are what GNU as makes of the text.
#[test]
fn the_emulator_decodes_the_instructions_of_the_kernel_and_no_others() {
    use Instruction::{Dot, Load, LoadConfig, Release, Store, Zero};
    let registers: [u64; 16] = std::array::from_fn(|register| 1000 * register as u64);
    let decoded = |code: &[u8]| decode(|at| code[at], &registers);
    let known: [(&str, &[u8], Instruction); 15] = [
        ("ldtilecfg [rax]", &[0xc4, 0xe2, 0x78, 0x49, 0], LoadConfig { from: 0 }),
        ("ldtilecfg [r12]", &[0xc4, 0xc2, 0x78, 0x49, 4, 0x24], LoadConfig { from: 12000 }),
        ("ldtilecfg [rbp]", &[0xc4, 0xe2, 0x78, 0x49, 0x45, 0], LoadConfig { from: 5000 }),
        ("ldtilecfg [rsp+rcx*4-128]", &[0xc4, 0xe2, 0x78, 0x49, 0x44, 0x8c, 0x80], LoadConfig { from: 7872 }),
        ("tilerelease", &[0xc4, 0xe2, 0x78, 0x49, 0xc0], Release),
        ("tilezero tmm0", &[0xc4, 0xe2, 0x7b, 0x49, 0xc0], Zero { tile: 0 }),
        ("tilezero tmm7", &[0xc4, 0xe2, 0x7b, 0x49, 0xf8], Zero { tile: 7 }),
        (
            "tileloadd tmm1, [rbx+rsi*1+64]",
            &[0xc4, 0xe2, 0x7b, 0x4b, 0x4c, 0x33, 0x40],
            Load { tile: 1, from: 3064, stride: 6000 },
        ),
        (
            "tileloadd tmm6, [r13+r12*2]",
            &[0xc4, 0x82, 0x7b, 0x4b, 0x74, 0x65, 0],
            Load { tile: 6, from: 13000, stride: 24000 },
        ),
        (
            "tileloadd tmm2, [r9+rdx*1+0x1040]",
            &[0xc4, 0xc2, 0x7b, 0x4b, 0x94, 0x11, 0x40, 0x10, 0, 0],
            Load { tile: 2, from: 9000 + 0x1040, stride: 2000 },
        ),
        (
            "tileloadd tmm3, [rcx]",
            &[0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x21],
            Load { tile: 3, from: 1000, stride: 0 },
        ),
        (
            "tilestored [rdi+r8*1-1], tmm5",
            &[0xc4, 0xa2, 0x7a, 0x4b, 0x6c, 0x07, 0xff],
            Store { tile: 5, to: 6999, stride: 8000 },
        ),
        (
            "tilestored [rsi+r15*8+0x1000], tmm0",
            &[0xc4, 0xa2, 0x7a, 0x4b, 0x84, 0xfe, 0, 0x10, 0, 0],
            Store { tile: 0, to: 6000 + 0x1000, stride: 120_000 },
        ),
        ("tdpbsud tmm0, tmm4, tmm6", &[0xc4, 0xe2, 0x4a, 0x5e, 0xc4], Dot { c: 0, a: 4, b: 6 }),
        ("tdpbsud tmm7, tmm1, tmm2", &[0xc4, 0xe2, 0x6a, 0x5e, 0xf9], Dot { c: 7, a: 1, b: 2 }),
    ];
    for (text, code, instruction) in known {
        assert_eq!(decoded(code), Some((instruction, code.len())), "{text}");
    }
    let unknown: [(&str, &[u8]); 12] = [
        ("tileloaddt1 tmm1, [rbx+rax*1]", &[0xc4, 0xe2, 0x79, 0x4b, 0x0c, 0x03]),
        ("sttilecfg [rax]", &[0xc4, 0xe2, 0x79, 0x49, 0]),
        ("tdpbssd tmm0, tmm4, tmm6", &[0xc4, 0xe2, 0x4b, 0x5e, 0xc4]),
        ("tdpbusd tmm0, tmm4, tmm6", &[0xc4, 0xe2, 0x49, 0x5e, 0xc4]),
        ("tdpbuud tmm0, tmm4, tmm6", &[0xc4, 0xe2, 0x48, 0x5e, 0xc4]),
        ("tdpbf16ps tmm0, tmm4, tmm6", &[0xc4, 0xe2, 0x4a, 0x5c, 0xc4]),
        ("ldtilecfg [rip+5]", &[0xc4, 0xe2, 0x78, 0x49, 0x05, 5, 0, 0, 0]),
        ("tileloadd tmm1, [rax*1+64]", &[0xc4, 0xe2, 0x7b, 0x4b, 0x0c, 0x05, 0x40, 0, 0, 0]),
        ("ud2", &[0x0f, 0x0b]),
        ("vpdpbusd xmm0, xmm1, xmm2", &[0x62, 0xf2, 0x75, 0x08, 0x50, 0xc2]),
        ("{vex} vpdpbusd ymm0, ymm1, ymm2", &[0xc4, 0xe2, 0x75, 0x50, 0xc2]),
        ("andn eax, ebx, ecx", &[0xc4, 0xe2, 0x60, 0xf2, 0xc1]),
    ];
    for (text, code) in unknown {
        assert_eq!(decoded(code), None, "{text}");
    }
}
