//! From checked operands to scaled outputs: what the instruction sets share.

use std::cell::RefCell;

use super::rows::ROW_ALIGN;
use super::{
    Choice, GROUP, GROUP_OUTS, Isa, Kernel, KernelError, LINE_STEPS, QuantizedRows, Unpacked, with_isa,
};
use crate::packed::{Layout, Line, PANEL, TernaryWeight, unpack_lines};
use crate::pool::{self, Pointer};
use crate::{quant, simd_fn};

/// Rows of activations that pass a packed panel at once.
const PACKED_ROWS: usize = 4;
/// Rows that a task takes at most: their sums stay in the second-level cache beside the unpacked codes.
const ROW_BLOCK: usize = 256;
/// Fewest rows for which a group is unpacked a second time to have work for all threads.
const LEAST_ROWS: usize = 64;
/// Tasks for each thread, so that one that was held up is helped out.
const TASKS: usize = 8;
/// Packed bytes that are worth a task of their own.
const TASK_BYTES: usize = 8 << 10;

/// `output[r, o] = (Σ_j code_x[r, j] * code_w[o, j]) * (act_scale[r] * weight_scale)` with the kernel in use.
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
    matmul_all(kernel, x, &mut [(weight, output)])
}

/// [`matmul`] of the same activations with several weights, whose work is shared out together.
///
/// # Errors
/// The shapes do not fit; then nothing is computed.
pub fn matmul_all(
    kernel: Kernel,
    x: &QuantizedRows,
    products: &mut [(&TernaryWeight, &mut [f32])],
) -> Result<(), KernelError> {
    for (weight, output) in products.iter() {
        check(x, weight, output)?;
    }
    if x.rows() == 0 {
        return Ok(());
    }
    let products: Vec<Product<'_>> = products
        .iter_mut()
        .map(|(weight, output)| Product { weight, output: Pointer(output.as_mut_ptr()) })
        .collect();
    with_isa!(kernel, isa => {
        if products.iter().all(|product| x.rows() <= narrow_rows(isa, product.weight.layout())) {
            narrow(isa, x, &products);
        } else {
            wide(isa, x, &products);
        }
    });
    Ok(())
}

/// Up to how many rows of activations a weight is used as it is packed; with more, unpacking it once is worth it.
fn narrow_rows<I: Isa>(_: I, layout: Layout) -> usize {
    match layout {
        Layout::TwoBit => I::NARROW_ROWS,
        // Unpacked again for every few rows, which costs more than the products do.
        Layout::FiveTrit => PACKED_ROWS,
    }
}

fn check(x: &QuantizedRows, weight: &TernaryWeight, output: &[f32]) -> Result<(), KernelError> {
    let (rows, columns) = (x.rows(), x.columns());
    let (out_features, in_features) = (weight.out_features(), weight.in_features());
    if columns != in_features || rows.checked_mul(out_features) != Some(output.len()) {
        let output = output.len();
        return Err(KernelError::Shape { rows, columns, out_features, in_features, output });
    }
    Ok(())
}

/// A weight and its output, of checked length; tasks write values of different outputs or rows.
struct Product<'a> {
    weight: &'a TernaryWeight,
    output: Pointer<f32>,
}

impl Product<'_> {
    /// Scales sums of row `row` with outputs from `first` on and puts them in their places.
    ///
    /// # Safety
    /// `row` is a row of `x`, and nothing else uses these outputs of that row meanwhile.
    unsafe fn place(&self, x: &QuantizedRows, row: usize, first: usize, sums: &[i32]) {
        let outs = self.weight.out_features();
        let count = sums.len().min(outs - first);
        // SAFETY: the output holds `x.rows() * outs` values (checked in `check`), and first + count <= outs; that nobody
        // else uses them is the caller's promise.
        let output =
            unsafe { std::slice::from_raw_parts_mut(self.output.get().add(row * outs + first), count) };
        scale(&sums[..count], x.sum(row), x.scale(row), self.weight.weight_scale(), output);
    }
}

simd_fn! {
    /// [`quant::epilogue`] of the sums of one row.
    fn scale(sums: &[i32], row_sum: i32, act_scale: f32, weight_scale: f32, output: &mut [f32]) {
        for (y, sum) in output.iter_mut().zip(sums) {
            // Σ x * (w + 1) - Σ x = Σ x * w. The first may have wrapped; the result fits (MAX_IN_FEATURES), so it is right.
            *y = quant::epilogue(sum.wrapping_sub(row_sum) as f32, act_scale, weight_scale);
        }
    }
}

/// Units of work of several weights, one weight after the other: `units(weight)` of each.
fn locate(
    products: &[Product<'_>],
    mut unit: usize,
    units: impl Fn(&TernaryWeight) -> usize,
) -> (usize, usize) {
    let mut index = 0;
    while unit >= units(products[index].weight) {
        unit -= units(products[index].weight);
        index += 1;
    }
    (index, unit)
}

/// A few rows: each panel with all of them, straight from its packed codes.
fn narrow(isa: impl Isa, x: &QuantizedRows, products: &[Product<'_>]) {
    let panels: usize = products.iter().map(|product| product.weight.panels()).sum();
    let bytes: usize = products.iter().map(|product| product.weight.bytes()).sum();
    let least = (TASK_BYTES * panels).div_ceil(bytes.max(1));
    let at_once = panels.div_ceil(pool::threads() * TASKS).max(least).max(1);
    pool::run(panels.div_ceil(at_once), &|task| {
        let first = task * at_once;
        let (mut index, mut panel) = locate(products, first, TernaryWeight::panels);
        for _ in first..panels.min(first + at_once) {
            while panel == products[index].weight.panels() {
                (index, panel) = (index + 1, 0);
            }
            for row in (0..x.rows()).step_by(PACKED_ROWS) {
                let product = &products[index];
                match x.rows() - row {
                    1 => packed::<1>(isa, x, row, product, panel),
                    2 => packed::<2>(isa, x, row, product, panel),
                    3 => packed::<3>(isa, x, row, product, panel),
                    _ => packed::<PACKED_ROWS>(isa, x, row, product, panel),
                }
            }
            panel += 1;
        }
    });
}

/// One panel of a task of its own with `R` rows of `x`, from `row` on.
fn packed<const R: usize>(isa: impl Isa, x: &QuantizedRows, row: usize, product: &Product<'_>, panel: usize) {
    let rows: [&[Line]; R] = std::array::from_fn(|r| x.lines(row + r));
    let sums = isa.packed::<R>(product.weight.layout(), product.weight.panel(panel), rows);
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: row + r is a row of `x` (`lines` would have panicked), and each panel belongs to one task.
        unsafe { product.place(x, row + r, panel * PANEL, sums) };
    }
}

/// What a thread keeps from group to group.
#[derive(Default)]
struct Scratch {
    codes: Vec<Line>,
    sums: Vec<i32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Many rows: a group of panels is unpacked, then every row of a block passes it.
fn wide(isa: impl Isa, x: &QuantizedRows, products: &[Product<'_>]) {
    let groups_of = |weight: &TernaryWeight| weight.panels().div_ceil(GROUP);
    let groups: usize = products.iter().map(|product| groups_of(product.weight)).sum();
    let blocks = (pool::threads() * TASKS / 2).div_ceil(groups.max(1)).min(x.rows() / LEAST_ROWS).max(1);
    let block = x.rows().div_ceil(blocks).min(ROW_BLOCK).next_multiple_of(ROW_ALIGN);
    let blocks = x.rows().div_ceil(block);
    let steps = x.stride() * LINE_STEPS;
    pool::run(groups * blocks, &|task| {
        let (index, group) = locate(products, task / blocks, groups_of);
        let (first_row, product) = (task % blocks * block, &products[index]);
        let rows = block.min(x.rows() - first_row);
        SCRATCH.with_borrow_mut(|Scratch { codes, sums }| {
            codes.resize(GROUP * steps, Line::ZERO);
            for (i, codes) in codes.chunks_exact_mut(steps).enumerate() {
                let panel = group * GROUP + i;
                let lines = if panel < product.weight.panels() { product.weight.panel(panel) } else { &[] };
                unpack_lines(product.weight.layout(), lines, codes);
            }
            sums.resize(rows.next_multiple_of(ROW_ALIGN) * GROUP_OUTS, 0);
            isa.unpacked(&Unpacked { codes, x: x.lines_from(first_row), stride: x.stride(), rows }, sums);
            for (row, sums) in sums.chunks_exact(GROUP_OUTS).take(rows).enumerate() {
                // SAFETY: first_row + row < x.rows(), and each group and block of rows belongs to one task.
                unsafe { product.place(x, first_row + row, group * GROUP_OUTS, sums) };
            }
        });
    });
}
