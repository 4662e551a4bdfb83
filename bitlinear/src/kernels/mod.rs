//! Integer products of packed ternary weights with int8 activations.
//!
//! One file an instruction set, each behind a type that exists only where the processor has that set; one scalar truth
//! that all equal bit for bit, since integer sums are exact; one safe entry point, [`matmul`], which checks every
//! shape, picks the kernel once a product, spreads the work over rayon's threads and applies the scales in the one
//! shared epilogue. Results depend neither on the kernel nor on the number of threads.
//!
//! `BITLINEAR_KERNEL=scalar|avx2|avx512vnni|neon|neondot` forces a kernel.

use std::sync::OnceLock;

use rayon::prelude::*;

use crate::packed::{BLOCK, BLOCK_BYTES, TernaryWeight};
use crate::quant;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

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
}

/// Rows of activations, quantized to int8 with one scale each ([`quant::quantize_row`]), as the kernels read them.
#[derive(Debug, Clone, Default)]
pub struct QuantizedRows {
    rows: usize,
    columns: usize,
    /// `rows` rows of `stride()` codes, zeros beyond `columns`.
    codes: Vec<i8>,
    scales: Vec<f32>,
    /// Sum of the codes of each row: the kernels multiply by code + 1 and take this off again.
    sums: Vec<i32>,
}

impl QuantizedRows {
    /// Quantizes `activations`, row-major `[rows, columns]`.
    ///
    /// # Panics
    /// If the length of `activations` is not a multiple of `columns`, or `columns` is 0 or over [`MAX_IN_FEATURES`].
    pub fn quantize(activations: &[f32], columns: usize) -> Self {
        let mut rows = Self::default();
        rows.fill(activations, columns);
        rows
    }

    /// [`QuantizedRows::quantize`] into buffers that are already there.
    ///
    /// # Panics
    /// As [`QuantizedRows::quantize`].
    pub fn fill(&mut self, activations: &[f32], columns: usize) {
        assert!((1..=MAX_IN_FEATURES).contains(&columns), "{columns} columns of activations");
        assert_eq!(activations.len() % columns, 0, "activations are whole rows of {columns}");
        self.rows = activations.len() / columns;
        self.columns = columns;
        let stride = self.stride();
        self.codes.clear();
        self.codes.resize(self.rows * stride, 0);
        self.scales.clear();
        self.sums.clear();
        for (row, codes) in activations.chunks_exact(columns).zip(self.codes.chunks_exact_mut(stride)) {
            self.scales.push(quant::quantize_row(row, &mut codes[..columns]));
            self.sums.push(codes.iter().map(|&c| i32::from(c)).sum());
        }
    }

    /// Number of rows (tokens).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of a row without its padding.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Codes of one row and the scale that each is multiplied by.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> (&[i8], f32) {
        (&self.codes[row * self.stride()..][..self.columns], self.scales[row])
    }

    /// Distance between rows: whole blocks.
    fn stride(&self) -> usize {
        self.columns.div_ceil(BLOCK) * BLOCK
    }
}

/// A block of a product: integer sums of some rows of activations with some rows of a weight.
///
/// Made only by [`matmul`], which checks the lengths that the fields' docs name; kernels rely on them.
struct Block<'a> {
    /// Codes of the activations: whole rows of `stride` codes.
    codes: &'a [i8],
    /// The sum of each row's codes.
    sums: &'a [i32],
    /// Packed weight rows: whole rows of `stride / 4` bytes.
    weights: &'a [u8],
    /// Codes in a row, a multiple of [`BLOCK`], not zero.
    stride: usize,
}

impl<'a> Block<'a> {
    /// Rows of activations.
    fn rows(&self) -> usize {
        self.sums.len()
    }

    /// Rows of weights.
    fn outs(&self) -> usize {
        self.weights.len() / (self.stride / 4)
    }

    /// One row of activations.
    fn row(&self, row: usize) -> &'a [[i8; BLOCK]] {
        self.codes[row * self.stride..][..self.stride].as_chunks().0
    }

    /// One row of weights, as many blocks as a row of activations.
    fn weight(&self, out: usize) -> &'a [[u8; BLOCK_BYTES]] {
        let bytes = self.stride / 4;
        self.weights[out * bytes..][..bytes].as_chunks().0
    }
}

/// What an instruction set brings: the sums of a small tile, with weights as they are stored, one too large.
trait Tile: Copy {
    /// `sum[r][o] = Σ_j x[r][j] * (w[o][j] + 1)`, modulo 2^32. All rows have the same number of blocks.
    fn tile<const R: usize, const O: usize>(
        self,
        x: [&[[i8; BLOCK]]; R],
        w: [&[[u8; BLOCK_BYTES]]; O],
    ) -> [[i32; O]; R];
}

/// Sums of a block in tiles: `R` rows by `O` outputs, so that an unpacked weight serves several rows; what is left over,
/// and a single row, in tiles of one row by `P` outputs.
fn tiled<const R: usize, const O: usize, const P: usize>(isa: impl Tile, block: &Block<'_>, out: &mut [i32]) {
    let whole = block.rows() - block.rows() % R;
    for row in (0..whole).step_by(R) {
        strip::<R, O>(isa, block, row, out);
    }
    for row in whole..block.rows() {
        strip::<1, P>(isa, block, row, out);
    }
}

/// Sums of `R` rows with every output.
fn strip<const R: usize, const O: usize>(isa: impl Tile, block: &Block<'_>, row: usize, out: &mut [i32]) {
    let whole = block.outs() - block.outs() % O;
    for first in (0..whole).step_by(O) {
        place::<R, O>(isa, block, row, first, out);
    }
    for first in whole..block.outs() {
        place::<R, 1>(isa, block, row, first, out);
    }
}

/// Sums of one tile, put in their places.
fn place<const R: usize, const O: usize>(
    isa: impl Tile,
    block: &Block<'_>,
    row: usize,
    first: usize,
    out: &mut [i32],
) {
    let x = std::array::from_fn(|r| block.row(row + r));
    let w = std::array::from_fn(|o| block.weight(first + o));
    let sums: [[i32; O]; R] = isa.tile(x, w);
    for (r, sums) in sums.iter().enumerate() {
        for (o, &sum) in sums.iter().enumerate() {
            // Σ x * (w + 1) - Σ x = Σ x * w. The first may wrap; the result fits (MAX_IN_FEATURES), so it is right.
            out[(row + r) * block.outs() + first + o] = sum.wrapping_sub(block.sums[row + r]);
        }
    }
}

/// A set of instructions to compute with; the ones that this processor has are in [`Kernel::available`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel(Isa);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(avx512vnni::Avx512Vnni),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDot(neon::NeonDot),
}

impl Kernel {
    /// The kernels that this processor can run, slowest first.
    pub fn available() -> Vec<Kernel> {
        let mut kernels = vec![Kernel(Isa::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            kernels.extend(avx2::Avx2::new().map(|isa| Kernel(Isa::Avx2(isa))));
            kernels.extend(avx512vnni::Avx512Vnni::new().map(|isa| Kernel(Isa::Avx512Vnni(isa))));
        }
        #[cfg(target_arch = "aarch64")]
        {
            kernels.extend(neon::Neon::new().map(|isa| Kernel(Isa::Neon(isa))));
            kernels.extend(neon::NeonDot::new().map(|isa| Kernel(Isa::NeonDot(isa))));
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

    /// The name that `BITLINEAR_KERNEL` takes.
    pub fn name(self) -> &'static str {
        match self.0 {
            Isa::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni(_) => "avx512vnni",
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot(_) => "neondot",
        }
    }

    /// Sums of a block, `[activation rows, weight rows]`.
    fn sums(self, block: &Block<'_>, out: &mut [i32]) {
        match self.0 {
            Isa::Scalar => scalar::sums(block, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(isa) => isa.sums(block, out),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni(isa) => isa.sums(block, out),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(isa) => isa.sums(block, out),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot(isa) => isa.sums(block, out),
        }
    }
}

/// Rows of activations that a task takes at once, so that unpacked weights serve several.
const ROW_TILE: usize = 8;
/// Rows of a weight that a task takes at once: their packed bytes stay in the first-level cache.
const OUT_TILE: usize = 32;

/// `output[r, o] = (Σ_j code_x[r, j] * code_w[o, j]) * (act_scale[r] * weight_scale)` with the fastest kernel.
///
/// # Shapes
/// `[rows, in_features] x [out_features, in_features] -> [rows, out_features]`
///
/// # Errors
/// The shapes do not fit, or `BITLINEAR_KERNEL` names a kernel that cannot run here.
pub fn matmul(x: &QuantizedRows, weight: &TernaryWeight, output: &mut [f32]) -> Result<(), KernelError> {
    matmul_with(Kernel::active()?, x, weight, output)
}

/// [`matmul`] with a given kernel.
///
/// # Errors
/// The shapes do not fit.
pub fn matmul_with(
    kernel: Kernel,
    x: &QuantizedRows,
    weight: &TernaryWeight,
    output: &mut [f32],
) -> Result<(), KernelError> {
    let out_features = weight.out_features();
    if x.columns != weight.in_features() || x.rows.checked_mul(out_features) != Some(output.len()) {
        return Err(KernelError::Shape {
            rows: x.rows,
            columns: x.columns,
            out_features,
            in_features: weight.in_features(),
            output: output.len(),
        });
    }
    if output.is_empty() {
        return Ok(());
    }
    if x.rows == 1 {
        // One token: the outputs are shared out.
        output.par_chunks_mut(OUT_TILE * 4).enumerate().for_each(|(chunk, output)| {
            tile(kernel, x, 0, weight, chunk * OUT_TILE * 4, output.len(), output);
        });
    } else {
        // Many tokens: the tokens are shared out.
        output.par_chunks_mut(ROW_TILE * out_features).enumerate().for_each(|(chunk, output)| {
            tile(kernel, x, chunk * ROW_TILE, weight, 0, out_features, output);
        });
    }
    Ok(())
}

/// Computes `output`, whole rows of `outs` values: the product of `x` from `row` on with the weight rows from `out` on.
fn tile(
    kernel: Kernel,
    x: &QuantizedRows,
    row: usize,
    weight: &TernaryWeight,
    out: usize,
    outs: usize,
    output: &mut [f32],
) {
    let (stride, rows) = (x.stride(), output.len() / outs);
    let mut sums = [0i32; ROW_TILE * OUT_TILE];
    for first in (0..outs).step_by(OUT_TILE) {
        let width = OUT_TILE.min(outs - first);
        let sums = &mut sums[..rows * width];
        let block = Block {
            codes: &x.codes[row * stride..(row + rows) * stride],
            sums: &x.sums[row..row + rows],
            weights: weight.rows(out + first..out + first + width),
            stride,
        };
        kernel.sums(&block, sums);
        for (r, sums) in sums.chunks_exact(width).enumerate() {
            let act_scale = x.scales[row + r];
            for (y, &sum) in output[r * outs + first..].iter_mut().zip(sums) {
                *y = quant::epilogue(sum as f32, act_scale, weight.weight_scale());
            }
        }
    }
}

#[cfg(test)]
mod tests;
