//! f32 matrix products on plain slices: the one place that calls the `gemm` crate.
use gemm::Parallelism;

/// A row-major matrix, or its transpose.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major `values` with rows of `columns`.
    pub(super) fn new(values: &'a [f32], columns: usize) -> Self {
        assert!(
            columns > 0 && values.len().is_multiple_of(columns),
            "{} values in rows of {columns}",
            values.len()
        );
        Self { values, rows: values.len() / columns, columns, row_stride: columns, column_stride: 1 }
    }

    /// Its transpose, without moving a value.
    pub(super) fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// `a b`, row-major.
pub(super) fn product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    let mut out = vec![0.0; a.rows * b.columns];
    multiply(a, b, 0.0, &mut out);
    out
}

/// `out = keep * out + a b`, row-major; `keep` 0 does not read `out`.
///
/// Each value is summed over the inner dimension in an order that does not depend on the number of threads.
///
/// # Panics
/// If the shapes do not fit.
pub(super) fn multiply(a: Matrix<'_>, b: Matrix<'_>, keep: f32, out: &mut [f32]) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(b.rows, k, "inner dimensions of a product");
    assert_eq!(out.len(), m * n, "values of a product");
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: the strides of `Matrix` address only values inside its slice (rows * columns values, checked in
    // `Matrix::new` and kept by `t`); `out` holds m * n values (checked above) and is borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
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
            Parallelism::Rayon(rayon::current_num_threads()),
        );
    }
}
