//! Matrix products of plain slices: f32, or bf16 with sums in f32.
//!
//! For the dense weights of training. The work is cut into blocks that depend on the shapes alone, for the threads of
//! [`crate::pool`]: results do not depend on their number.

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use gemm::Parallelism;

#[cfg(target_arch = "x86_64")]
use crate::kernels::KERNEL_VARIABLE;
use crate::pool::{self, Pointer};

#[cfg(target_arch = "x86_64")]
mod avx512bf16;

/// Most rows and columns of the output that one task of an f32 product computes: each packs its operands for itself, so the
/// larger ones are faster, where they are [`F32_TASKS`] at least.
const F32_BLOCKS: [usize; 3] = [1024, 512, 256];
/// Tasks that an f32 product should have for the threads.
const F32_TASKS: usize = 8;

/// How exact a product is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// Products and sums in f32.
    F32,
    /// Both matrices are rounded to bf16, to nearest, ties to even; sums are f32. Twice as fast where [`bf16_is_fast`];
    /// elsewhere it is [`Precision::F32`].
    Bf16,
}

/// A row-major matrix, or its transpose.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// From the first value of the matrix to its last, or longer.
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major `values` with rows of `columns`.
    ///
    /// # Panics
    /// If there are no columns, or the values are no whole rows.
    pub fn new(values: &'a [f32], columns: usize) -> Self {
        assert!(
            columns > 0 && values.len().is_multiple_of(columns),
            "{} values in rows of {columns}",
            values.len()
        );
        Self { values, rows: values.len() / columns, columns, row_stride: columns, column_stride: 1 }
    }

    /// Its transpose, without moving a value.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Some rows and columns, each as the first one and how many.
    ///
    /// # Panics
    /// If it has not as many.
    fn block(self, (row, rows): (usize, usize), (column, columns): (usize, usize)) -> Self {
        assert!(row + rows <= self.rows && column + columns <= self.columns, "a block of a matrix");
        // A block of nothing may start beyond the last value.
        let start = (row * self.row_stride + column * self.column_stride).min(self.values.len());
        Self { values: &self.values[start..], rows, columns, ..self }
    }

    /// A row of a matrix whose rows are not strided.
    ///
    /// # Panics
    /// If it has no such row.
    #[cfg(target_arch = "x86_64")]
    fn row(&self, row: usize) -> &'a [f32] {
        debug_assert!(self.column_stride == 1 && row < self.rows, "a row in one piece");
        &self.values[row * self.row_stride..][..self.columns]
    }
}

/// A length cut into blocks.
#[derive(Clone, Copy)]
struct Blocks {
    len: usize,
    size: usize,
}

impl Blocks {
    /// As few blocks as there must be of at most `most`, as even as multiples of `unit` (of which `most` is one) can be.
    fn new(len: usize, most: usize, unit: usize) -> Self {
        Self { len, size: len.div_ceil(len.div_ceil(most).max(1)).next_multiple_of(unit).max(unit) }
    }

    fn count(self) -> usize {
        self.len.div_ceil(self.size)
    }

    /// Where a block starts, and its length.
    fn get(self, block: usize) -> (usize, usize) {
        let first = block * self.size;
        (first, (self.len - first).min(self.size))
    }

    #[cfg(any(test, target_arch = "x86_64"))]
    fn iter(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.count()).map(move |block| self.get(block))
    }
}

/// Whether [`Precision::Bf16`] is more than another name of [`Precision::F32`] here: the processor is one of AMD's with
/// AVX512_BF16 (Intel's multiply bf16 in vectors at half the rate of f32), and `BITLINEAR_KERNEL` does not hold the process
/// to other instructions.
pub fn bf16_is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return fast_bf16().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
fn fast_bf16() -> Option<avx512bf16::Avx512Bf16> {
    use std::arch::x86_64::__cpuid;
    static FAST: OnceLock<Option<avx512bf16::Avx512Bf16>> = OnceLock::new();
    *FAST.get_or_init(|| {
        let vendor = __cpuid(0);
        let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == *b"AuthenticAMD";
        avx512bf16::Avx512Bf16::new().filter(|_| amd && std::env::var_os(KERNEL_VARIABLE).is_none())
    })
}

/// `a b`, row-major.
///
/// # Panics
/// If the inner dimensions differ.
pub fn product(precision: Precision, a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let mut out = vec![0.0; a.rows * b.columns];
    multiply(precision, a, b, 0.0, &mut out);
    out
}

/// `out = keep * out + a b`, row-major; `keep` 0 does not read `out`.
///
/// Each value is summed over the inner dimension in an order that does not depend on the number of threads.
///
/// # Shapes
/// `a [rows, inner], b [inner, columns], out [rows, columns]`
///
/// # Panics
/// If the shapes do not fit.
pub fn multiply(precision: Precision, a: Matrix<'_>, b: Matrix<'_>, keep: f32, out: &mut [f32]) {
    assert_eq!(b.rows, a.columns, "inner dimensions of a product");
    assert_eq!(out.len(), a.rows * b.columns, "values of a product");
    match precision {
        #[cfg(target_arch = "x86_64")]
        Precision::Bf16 if let Some(isa) = fast_bf16() => isa.multiply(a, b, keep, out),
        _ => multiply_f32(a, b, keep, out),
    }
}

/// [`multiply`] in f32: the one place that calls the `gemm` crate.
fn multiply_f32(a: Matrix<'_>, b: Matrix<'_>, keep: f32, out: &mut [f32]) {
    let stride = b.columns;
    let blocks = F32_BLOCKS.map(|most| (Blocks::new(a.rows, most, 16), Blocks::new(b.columns, most, 16)));
    let enough = blocks.iter().find(|(rows, columns)| rows.count() * columns.count() >= F32_TASKS);
    let (row_blocks, column_blocks) = *enough.unwrap_or(&blocks[2]);
    let start = Pointer(out.as_mut_ptr());
    pool::run(row_blocks.count() * column_blocks.count(), &|task| {
        let (row, rows) = row_blocks.get(task % row_blocks.count());
        let (column, columns) = column_blocks.get(task / row_blocks.count());
        let a = a.block((row, rows), (0, a.columns));
        let b = b.block((0, b.rows), (column, columns));
        // SAFETY: the strides of `Matrix` address only values of its slice (checked in `new` and `block`, kept by `t`); the
        // blocks of different tasks do not overlap, lie inside `out` (checked by `multiply`), and `out` is borrowed
        // exclusively until `run` returns.
        unsafe {
            gemm::gemm(
                rows,
                columns,
                a.columns,
                start.get().add(row * stride + column),
                1,
                stride as isize,
                keep != 0.0,
                a.values.as_ptr(),
                a.column_stride as isize,
                a.row_stride as isize,
                b.values.as_ptr(),
                b.column_stride as isize,
                b.row_stride as isize,
                keep,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    });
}

#[cfg(test)]
mod tests;
