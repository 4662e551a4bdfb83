//! Integer products of packed ternary weights with int8 activations.
//!
//! One file for each family of instructions, each behind a type that exists only where the processor has them; one scalar
//! truth that all equal bit for bit, since integer sums are exact; safe entry points ([`matmul_all`] for ternary weights,
//! [`int_matmul`] for an integer head, [`weight_gradient`] for a weight's gradient) which check every shape, turn to the kernel once a product, spread the work over the
//! threads of [`crate::pool`] and apply the scales in one epilogue. Results depend neither on the kernel, nor on the layout, nor on the number of threads.
//!
//! What an instruction set brings is an `Isa`: a panel of 16 weight rows with a few rows of activations straight from
//! the packed codes (a new token: memory is the limit), and a group of unpacked panels with many (a prompt: arithmetic
//! is); and a block of tokens of a weight's gradient.
//!
//! `BITLINEAR_KERNEL=scalar|avx2|avx512vnni|amx|neon|neondot` forces a kernel.

use std::sync::OnceLock;

use crate::packed::{Layout, Line, PANEL};

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
mod gradient;
mod int;
mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
mod rows;
mod scalar;

pub use gradient::{ActivationPanels, GradientPanels, TOKEN_BLOCK, weight_gradient};
pub use int::{Bits, IntWeight, MAX_INT_FEATURES, int_matmul};
pub use matmul::{matmul, matmul_all, matmul_with};
pub use rows::QuantizedRows;

/// The environment variable that forces a kernel.
pub const KERNEL_VARIABLE: &str = "BITLINEAR_KERNEL";

/// Longest row: |sum| <= 128 * in_features must fit in i32.
pub const MAX_IN_FEATURES: usize = i32::MAX as usize / 128;

/// What the kernels refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// `BITLINEAR_KERNEL` names a kernel that does not exist or that this processor cannot run.
    #[error(
        "kernel '{asked}' in {KERNEL_VARIABLE} cannot run here; available: {available}; unset the variable to choose the fastest"
    )]
    Unavailable {
        /// The kernel asked for.
        asked: String,
        /// Names of those that can run.
        available: String,
    },
    /// A row of an integer weight is too long, or empty.
    #[error("an integer weight with rows of {0}; use 1 to {MAX_INT_FEATURES}, or keep the weight dense")]
    IntColumns(usize),
    /// The lengths of activations and weight, or of the output, do not fit.
    #[error(
        "ternary matmul of activations [{rows}, {columns}] with a weight [{out_features}, {in_features}] into {output} values; \
         columns must equal in_features (at most {MAX_IN_FEATURES}) and the output must be rows * out_features long"
    )]
    Shape {
        /// Rows of the activations.
        rows: usize,
        /// Columns of the activations.
        columns: usize,
        /// Rows of the weight.
        out_features: usize,
        /// Columns of the weight.
        in_features: usize,
        /// Values in the output.
        output: usize,
    },
    /// The tokens of gradient and activations, or the length of the output, do not fit.
    #[error(
        "weight gradient of [{gradient_tokens}, {out_features}] with activations [{tokens}, {in_features}] into {output} values; \
         both must have the same tokens and the output must be out_features * in_features long"
    )]
    Gradient {
        /// Tokens of the gradient.
        gradient_tokens: usize,
        /// Tokens of the activations.
        tokens: usize,
        /// Rows of the weight.
        out_features: usize,
        /// Columns of the weight.
        in_features: usize,
        /// Values in the output.
        output: usize,
    },
}

/// More than the caches hold of a model beside everything else.
const CACHE_BYTES: u64 = 64 << 20;

/// Code vectors (or activations: steps of four columns) in a line.
const LINE_STEPS: usize = 16;
/// Panels that are unpacked together for many rows of activations.
const GROUP: usize = 4;
/// Outputs of a group.
const GROUP_OUTS: usize = GROUP * PANEL;

/// A group of unpacked panels and rows of activations. Made by `matmul`, which sees to what the fields' docs say.
struct Unpacked<'a> {
    /// [`GROUP`] panels of `16 * stride` code vectors, one after the other; codes are `w + 1`.
    codes: &'a [Line],
    /// Rows of `stride` lines of int8 codes, in whole tiles of [`rows::ROW_ALIGN`].
    x: &'a [Line],
    /// Lines from one row of `x` to the next.
    stride: usize,
    /// Rows that count.
    rows: usize,
}

impl<'a> Unpacked<'a> {
    /// Code vectors in a panel.
    fn steps(&self) -> usize {
        self.stride * LINE_STEPS
    }

    /// The code vectors of one panel.
    fn panel(&self, panel: usize) -> &'a [Line] {
        &self.codes[panel * self.steps()..][..self.steps()]
    }

    /// One row of activations.
    fn row(&self, row: usize) -> &'a [Line] {
        &self.x[row * self.stride..][..self.stride]
    }
}

/// What an instruction set brings. All sums are modulo 2^32: those of `w + 1` may wrap, those of `w` fit
/// ([`MAX_IN_FEATURES`]), and so come out right when the row's sum is taken off.
trait Isa: Copy + Send + Sync {
    /// Up to how many rows of activations [`Isa::packed`], four at a time, is faster than unpacking 2-bit codes first.
    const NARROW_ROWS: usize = 16;

    /// `sums[r][o] = Σ_j x[r][j] * (w[o][j] + 1)` over one packed panel.
    ///
    /// # Panics
    /// If a row of `x` is shorter than the panel.
    fn packed<const R: usize>(self, layout: Layout, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R];

    /// `sums[r][o] = Σ_j x[r][j] * code[o][j]` over one panel of code vectors with any bytes as codes.
    ///
    /// # Panics
    /// If a row of `x` is shorter than the panel.
    fn bytes<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R];

    /// [`Isa::bytes`] over a panel whose lines hold two code vectors of four bits: the low halves of the bytes, then the high
    /// ones.
    ///
    /// # Panics
    /// If a row of `x` is shorter than the panel.
    fn halves<const R: usize>(self, panel: &[Line], x: [&[Line]; R]) -> [[i32; PANEL]; R] {
        int::unpacked_halves(self, panel, x)
    }

    /// `sums[r * GROUP_OUTS + o] = Σ_j x[r][j] * (w[o][j] + 1)` over a group of unpacked panels, for all its rows. `sums` has
    /// room for whole tiles of rows; what is written beyond the last row is of no interest.
    fn unpacked(self, group: &Unpacked<'_>, sums: &mut [i32]);

    /// `tile[r][i] += (Σ_t g[t][r] * (x[t][i] - 128)) * scales[r]` of stored codes, for all rows and one group of activations
    /// over one block of tokens. The sum is exact, then rounding follows the product, and the sum with the tile.
    ///
    /// # Panics
    /// If the tile, the scales, the sums and the gradient do not have the same rows, or they are more than
    /// [`gradient::TILE_ROWS`].
    fn outer(self, block: &gradient::Outer<'_>, tile: &mut [gradient::Outputs]);
}

/// A set of instructions to compute with; the ones that this processor has are in [`Kernel::available`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel(Choice);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Scalar(scalar::Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(avx512vnni::Avx512Vnni),
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(amx::Amx),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDot(neon::NeonDot),
}

/// Evaluates an expression with `$isa` bound to the instruction set of a kernel, whatever its type.
macro_rules! with_isa {
    ($kernel:expr, $isa:ident => $body:expr) => {
        match $kernel.0 {
            Choice::Scalar($isa) => $body,
            #[cfg(target_arch = "x86_64")]
            Choice::Avx2($isa) => $body,
            #[cfg(target_arch = "x86_64")]
            Choice::Avx512Vnni($isa) => $body,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Choice::Amx($isa) => $body,
            #[cfg(target_arch = "aarch64")]
            Choice::Neon($isa) => $body,
            #[cfg(target_arch = "aarch64")]
            Choice::NeonDot($isa) => $body,
        }
    };
}
use with_isa;

impl Kernel {
    /// The kernels that this processor can run, slowest first.
    pub fn available() -> Vec<Kernel> {
        let mut kernels = vec![Kernel(Choice::Scalar(scalar::Scalar))];
        #[cfg(target_arch = "x86_64")]
        {
            kernels.extend(avx2::Avx2::new().map(|isa| Kernel(Choice::Avx2(isa))));
            kernels.extend(avx512vnni::Avx512Vnni::new().map(|isa| Kernel(Choice::Avx512Vnni(isa))));
        }
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        kernels.extend(amx::Amx::new().map(|isa| Kernel(Choice::Amx(isa))));
        #[cfg(target_arch = "aarch64")]
        {
            kernels.extend(neon::Neon::new().map(|isa| Kernel(Choice::Neon(isa))));
            kernels.extend(neon::NeonDot::new().map(|isa| Kernel(Choice::NeonDot(isa))));
        }
        kernels
    }

    /// The kernel in use: the one that `BITLINEAR_KERNEL` names, else the fastest. Decided once a process.
    ///
    /// # Errors
    /// The variable names a kernel that cannot run here.
    pub fn active() -> Result<Kernel, KernelError> {
        static ACTIVE: OnceLock<Result<Kernel, KernelError>> = OnceLock::new();
        ACTIVE.get_or_init(|| Kernel::named(std::env::var_os(KERNEL_VARIABLE).as_deref())).clone()
    }

    /// The kernel of this name, or the fastest one if there is no name.
    fn named(name: Option<&std::ffi::OsStr>) -> Result<Kernel, KernelError> {
        let available = Kernel::available();
        let Some(name) = name else { return Ok(available[available.len() - 1]) };
        available.iter().copied().find(|k| name == k.name()).ok_or_else(|| KernelError::Unavailable {
            asked: name.to_string_lossy().into_owned(),
            available: available.iter().map(|k| k.name()).collect::<Vec<_>>().join(", "),
        })
    }

    /// The layout in which a model of this many ternary weights makes new tokens fastest: 1.6 bits where memory is the limit
    /// (the weights fill more than a cache) and the kernel unpacks them as fast as they come, else 2 bits.
    pub fn layout_for(self, weights: u64) -> Layout {
        let unpacks_fast = match self.0 {
            #[cfg(target_arch = "x86_64")]
            Choice::Avx512Vnni(isa) => isa.has_vbmi(),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Choice::Amx(isa) => isa.has_vbmi(),
            _ => false,
        };
        if unpacks_fast && weights / 4 > CACHE_BYTES { Layout::FiveTrit } else { Layout::TwoBit }
    }

    /// The name that `BITLINEAR_KERNEL` takes.
    pub fn name(self) -> &'static str {
        match self.0 {
            Choice::Scalar(_) => "scalar",
            #[cfg(target_arch = "x86_64")]
            Choice::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Choice::Avx512Vnni(_) => "avx512vnni",
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Choice::Amx(_) => "amx",
            #[cfg(target_arch = "aarch64")]
            Choice::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Choice::NeonDot(_) => "neondot",
        }
    }
}

#[cfg(test)]
mod tests;
