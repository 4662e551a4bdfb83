//! Tile instructions on a processor without them, for tests: each raises SIGILL, and the handler does what Intel's manual
//! (volume 2, the instructions' own pages) says it does. What would be a fault ends the process with a message.
//!
//! Only the six instructions of the kernel are known; every other illegal one has the default effect.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::Once;

/// Bytes of a row of a tile, and rows, at most: palette 1.
const ROW: usize = 64;
const ROWS: usize = 16;
const TILES: usize = 8;

/// The tiles of a thread.
pub(super) struct Tiles {
    configured: bool,
    rows: [u8; TILES],
    /// Bytes of a row.
    row_bytes: [u16; TILES],
    data: [[[u8; ROW]; ROWS]; TILES],
}

/// What an instruction says; tiles by number, addresses as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instruction {
    LoadConfig {
        from: u64,
    },
    Release,
    Zero {
        tile: u8,
    },
    Load {
        tile: u8,
        from: u64,
        stride: u64,
    },
    Store {
        tile: u8,
        to: u64,
        stride: u64,
    },
    /// Signed bytes of `a` times unsigned bytes of `b`, added to `c`.
    Dot {
        c: u8,
        a: u8,
        b: u8,
    },
}

impl Tiles {
    pub(super) const RELEASED: Self =
        Self { configured: false, rows: [0; TILES], row_bytes: [0; TILES], data: [[[0; ROW]; ROWS]; TILES] };

    /// Executes one instruction, or says why a processor would not.
    ///
    /// # Safety
    /// The memory that the instruction reads or writes is there for it.
    pub(super) unsafe fn execute(&mut self, instruction: Instruction) -> Result<(), &'static str> {
        match instruction {
            Instruction::LoadConfig { from } => {
                let mut config = [0; 64];
                // SAFETY: the instruction reads these 64 bytes, see above.
                unsafe { read(from, &mut config) };
                self.configure(&config)?;
            }
            Instruction::Release => *self = Self::RELEASED,
            Instruction::Zero { tile } => {
                let tile = self.valid(tile)?;
                self.data[tile] = [[0; ROW]; ROWS];
            }
            Instruction::Load { tile, from, stride } => {
                let tile = self.valid(tile)?;
                let (rows, bytes) = self.size(tile);
                // What is beyond the tile's size becomes zero.
                self.data[tile] = [[0; ROW]; ROWS];
                let mut at = from;
                for row in &mut self.data[tile][..rows] {
                    // SAFETY: the instruction reads this row, see above.
                    unsafe { read(at, &mut row[..bytes]) };
                    at = at.wrapping_add(stride);
                }
            }
            Instruction::Store { tile, to, stride } => {
                let tile = self.valid(tile)?;
                let (rows, bytes) = self.size(tile);
                let mut at = to;
                for row in &self.data[tile][..rows] {
                    // SAFETY: the instruction writes this row, see above.
                    unsafe { write(at, &row[..bytes]) };
                    at = at.wrapping_add(stride);
                }
            }
            Instruction::Dot { c, a, b } => {
                let (c, a, b) = (self.valid(c)?, self.valid(a)?, self.valid(b)?);
                self.dot(c, a, b)?;
            }
        }
        Ok(())
    }

    fn configure(&mut self, config: &[u8; 64]) -> Result<(), &'static str> {
        let mut tiles = Self::RELEASED;
        match config[0] {
            // The initial state; the rest is not looked at.
            0 => {}
            1 => {
                if config[1] != 0 {
                    return Err(
                        "a configuration that continues an interrupted load, which the kernel never has",
                    );
                }
                if config[2..16].iter().chain(&config[32..48]).chain(&config[56..]).any(|byte| *byte != 0) {
                    return Err("reserved bytes of the configuration are not zero");
                }
                for tile in 0..TILES {
                    tiles.row_bytes[tile] =
                        u16::from_le_bytes([config[16 + 2 * tile], config[17 + 2 * tile]]);
                    tiles.rows[tile] = config[48 + tile];
                    if usize::from(tiles.row_bytes[tile]) > ROW || usize::from(tiles.rows[tile]) > ROWS {
                        return Err("a tile is configured larger than tiles are");
                    }
                    if (tiles.row_bytes[tile] == 0) != (tiles.rows[tile] == 0) {
                        return Err("a tile is configured with rows or columns alone");
                    }
                }
                tiles.configured = true;
            }
            _ => return Err("a palette that does not exist"),
        }
        *self = tiles;
        Ok(())
    }

    /// The tile's number, if it may be used.
    fn valid(&self, tile: u8) -> Result<usize, &'static str> {
        let tile = usize::from(tile);
        match self.configured {
            false => Err("a tile is used without a configuration"),
            true if tile >= TILES => Err("there are only eight tiles"),
            true if self.rows[tile] == 0 => Err("a tile is used that the configuration leaves out"),
            true => Ok(tile),
        }
    }

    /// Rows, and bytes of a row.
    fn size(&self, tile: usize) -> (usize, usize) {
        (self.rows[tile].into(), self.row_bytes[tile].into())
    }

    fn dot(&mut self, c: usize, a: usize, b: usize) -> Result<(), &'static str> {
        let ((c_rows, c_bytes), (a_rows, a_bytes), (b_rows, b_bytes)) =
            (self.size(c), self.size(a), self.size(b));
        if c == a || a == b || b == c {
            return Err("a product uses a tile twice");
        }
        if c_bytes % 4 != 0 || a_bytes % 4 != 0 || b_bytes % 4 != 0 {
            return Err("a product's columns are not whole steps of four bytes");
        }
        if c_rows != a_rows || a_bytes / 4 != b_rows || c_bytes != b_bytes {
            return Err("the sizes of a product's tiles do not fit");
        }
        let (a, b) = (self.data[a], self.data[b]);
        for (m, row) in self.data[c].iter_mut().enumerate() {
            let mut sums = [0i32; ROWS];
            for (sum, bytes) in sums.iter_mut().zip(row.as_chunks::<4>().0) {
                *sum = i32::from_le_bytes(*bytes);
            }
            for (a, b) in a[m][..a_bytes].as_chunks::<4>().0.iter().zip(&b) {
                for (sum, b) in sums.iter_mut().zip(b.as_chunks::<4>().0) {
                    for (a, b) in a.iter().zip(b) {
                        *sum = sum.wrapping_add(i32::from(*a as i8) * i32::from(*b));
                    }
                }
            }
            // What is beyond the tile's size becomes zero.
            *row = [0; ROW];
            if m < c_rows {
                for (bytes, sum) in row[..c_bytes].as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                    *bytes = sum.to_le_bytes();
                }
            }
        }
        Ok(())
    }
}

/// # Safety
/// There are as many bytes to read at this address.
unsafe fn read(from: u64, into: &mut [u8]) {
    let from = std::ptr::with_exposed_provenance::<u8>(from as usize);
    // SAFETY: the caller's promise; `into` is the emulator's own memory.
    unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
}

/// # Safety
/// As many bytes may be written at this address.
unsafe fn write(to: u64, from: &[u8]) {
    let to = std::ptr::with_exposed_provenance_mut::<u8>(to as usize);
    // SAFETY: the caller's promise; `from` is the emulator's own memory.
    unsafe { to.copy_from_nonoverlapping(from.as_ptr(), from.len()) };
}

/// The tile instruction that starts with `byte(0)`, and its length; `registers` in the order of their numbers. `None` for
/// what the kernel has no use for.
pub(super) fn decode(byte: impl Fn(usize) -> u8, registers: &[u64; 16]) -> Option<(Instruction, usize)> {
    // VEX in three bytes, opcodes 0F 38, 128 bits, W0. Four of its bits are stored inverted: each makes a fourth one of a
    // register's number.
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        return None;
    }
    let high = |bit: u8| !byte(1) >> bit & 1;
    let (prefix, third) = (byte(2) & 3, !byte(2) >> 3 & 15);
    let (opcode, modrm) = (byte(3), byte(4));
    let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7 | high(7) << 3, modrm & 7 | high(5) << 3);
    const NONE: u8 = 0;
    const F3: u8 = 2;
    const F2: u8 = 3;
    if mode == 3 {
        let instruction = match (opcode, prefix) {
            (0x49, NONE) if modrm == 0xc0 && third == 0 => Instruction::Release,
            (0x49, F2) if rm == 0 && third == 0 => Instruction::Zero { tile: reg },
            (0x5e, F3) => Instruction::Dot { c: reg, a: rm, b: third },
            _ => return None,
        };
        return Some((instruction, 5));
    }
    if third != 0 {
        return None;
    }
    // Of the forms of an address only those that start from a register.
    let with_index = rm & 7 == 4;
    let (base, index, length) = match with_index {
        true => {
            let sib = byte(5);
            let index = sib >> 3 & 7 | high(6) << 3;
            let index = if index == 4 { 0 } else { registers[usize::from(index)] << (sib >> 6) };
            (sib & 7 | high(5) << 3, index, 6)
        }
        false => (rm, 0, 5),
    };
    if mode == 0 && base & 7 == 5 {
        return None;
    }
    let (displacement, length) = match mode {
        0 => (0, length),
        1 => (i64::from(byte(length) as i8), length + 1),
        _ => (i64::from(i32::from_le_bytes(std::array::from_fn(|i| byte(length + i)))), length + 4),
    };
    let address = registers[usize::from(base)].wrapping_add_signed(displacement);
    let instruction = match (opcode, prefix) {
        (0x49, NONE) if reg == 0 => Instruction::LoadConfig { from: address.wrapping_add(index) },
        (0x4b, F2) if with_index => Instruction::Load { tile: reg, from: address, stride: index },
        (0x4b, F3) if with_index => Instruction::Store { tile: reg, to: address, stride: index },
        _ => return None,
    };
    Some((instruction, length))
}

/// From here on, tile instructions of this process are emulated.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: zeros are a valid `sigaction` of no handler, no flags and an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_illegal_instruction as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: the handler has the signature that SA_SIGINFO asks for, and calls only what a handler may.
        let failed = unsafe { libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) };
        assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
    });
}

thread_local! {
    // Constant and without a destructor: the first use, in a signal handler, allocates nothing.
    static STATE: UnsafeCell<Tiles> = const { UnsafeCell::new(Tiles::RELEASED) };
}

/// Whether this thread has not released its tiles, as far as they are emulated.
pub(super) fn in_use() -> bool {
    // SAFETY: only the signal handler changes them, on this thread, and it does not run now.
    STATE.with(|tiles| unsafe { (*tiles.get()).configured })
}

extern "C" fn on_illegal_instruction(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    /// The general registers in the order of their numbers.
    const GENERAL: [c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: the system hands a handler with SA_SIGINFO the context of its thread, and nobody else has it.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let code = std::ptr::with_exposed_provenance::<u8>(registers[libc::REG_RIP as usize] as usize);
    // SAFETY: `decode` goes on to another byte only while what it has seen is the beginning of a longer instruction.
    let byte = |at: usize| unsafe { code.add(at).read() };
    let general = GENERAL.map(|register| registers[register as usize] as u64);
    let Some((instruction, length)) = decode(byte, &general) else {
        // SAFETY: zeros are the default action. The instruction is tried again, and that ends the process.
        unsafe { libc::sigaction(libc::SIGILL, &std::mem::zeroed(), std::ptr::null_mut()) };
        return;
    };
    // SAFETY: the instruction's memory is there as it would have to be for a processor. Nothing else uses the thread's
    // tiles: only this handler does, and its signal is blocked while it runs.
    let result = STATE.with(|tiles| unsafe { (*tiles.get()).execute(instruction) });
    if let Err(fault) = result {
        for text in ["a tile instruction faults: ", fault, "\n"] {
            // SAFETY: the text is as long as it says; a handler may write and abort.
            unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
        }
        // SAFETY: as above.
        unsafe { libc::abort() };
    }
    registers[libc::REG_RIP as usize] += length as i64;
}
