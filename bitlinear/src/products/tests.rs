use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::pool::Pool;

/// A matrix of `rows` and `columns` with random values, stored as it is or transposed.
struct Stored {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
    transposed: bool,
}

impl Stored {
    fn new(rows: usize, columns: usize, transposed: bool, mut value: impl FnMut() -> f32) -> Self {
        Self { values: (0..rows * columns).map(|_| value()).collect(), rows, columns, transposed }
    }

    fn matrix(&self) -> Matrix<'_> {
        let Self { rows, columns, .. } = *self;
        let (row_stride, column_stride) = if self.transposed { (1, rows) } else { (columns, 1) };
        Matrix { values: &self.values, rows, columns, row_stride, column_stride }
    }
}

fn at(matrix: Matrix<'_>, row: usize, column: usize) -> f32 {
    matrix.values[row * matrix.row_stride + column * matrix.column_stride]
}

fn bits(values: &[f32]) -> Vec<u32> {
    // Which NaN is of no interest.
    values.iter().map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
}

/// Sizes and ways of storing: all edges of tiles, panels and blocks.
fn cases(random: &mut ChaCha8Rng) -> Vec<(usize, usize, usize, bool, bool)> {
    let mut sizes: Vec<(usize, usize, usize)> = (0..150)
        .map(|_| (random.random_range(0..=70), random.random_range(0..=70), random.random_range(0..=70)))
        .collect();
    sizes.extend([
        (1, 1, 1),
        (8, 48, 512),
        (9, 49, 513),
        (37, 500, 1025),
        (1030, 5, 70),
        (3, 1930, 40),
        (130, 65, 1600),
    ]);
    let mut cases = Vec::new();
    for (index, (m, n, k)) in sizes.into_iter().enumerate() {
        if index < 150 {
            cases.push((m, n, k, index & 1 != 0, index & 2 != 0));
        } else {
            cases.extend([0, 1, 2, 3].map(|ways| (m, n, k, ways & 1 != 0, ways & 2 != 0)));
        }
    }
    cases
}

#[test]
fn products_are_close_to_their_f64_values() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for (m, n, k, a_transposed, b_transposed) in cases(&mut random) {
        let mut value = || random.random_range(-1f32..1.0);
        let a = Stored::new(m, k, a_transposed, &mut value);
        let b = Stored::new(k, n, b_transposed, &mut value);
        let before: Vec<f32> = (0..m * n).map(|_| value()).collect();
        let (a, b) = (a.matrix(), b.matrix());
        // Two roundings of one part in 2^9 each; sums of k random values are about sqrt(k) long, a few times that at most.
        for (precision, unit) in [(Precision::F32, 1e-6), (Precision::Bf16, 1.0 / 512.0)] {
            for keep in [0.0, 1.0, 0.5] {
                let mut out = if keep == 0.0 { vec![f32::NAN; m * n] } else { before.clone() };
                multiply(precision, a, b, keep, &mut out);
                for (index, out) in out.iter().enumerate() {
                    let (i, j) = (index / n, index % n);
                    let sum: f64 = (0..k).map(|l| f64::from(at(a, i, l)) * f64::from(at(b, l, j))).sum();
                    let truth = f64::from(keep * before[index]) + sum;
                    let limit = 4.0 * unit * (k as f64).sqrt() + 1e-6;
                    assert!(
                        (f64::from(*out) - truth).abs() < limit,
                        "{precision:?} {m} {n} {k}: {out} for {truth}"
                    );
                }
            }
        }
        assert_eq!(product(Precision::F32, a, b).len(), m * n);
    }
}

#[test]
fn sums_of_small_integers_are_exact() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    for (m, n, k, a_transposed, b_transposed) in cases(&mut random) {
        let mut value = || random.random_range(-8i32..=8) as f32;
        let a = Stored::new(m, k, a_transposed, &mut value);
        let b = Stored::new(k, n, b_transposed, &mut value);
        let (a, b) = (a.matrix(), b.matrix());
        let bf16 = product(Precision::Bf16, a, b);
        assert_eq!(bf16, product(Precision::F32, a, b), "{m} {n} {k}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let pools = [1, 2, 3].map(|threads| Arc::new(Pool::new(threads).unwrap()));
    for (m, n, k, a_transposed, b_transposed) in [
        (700, 1100, 600, false, true),
        (600, 2000, 40, false, false),
        (1100, 96, 1030, true, false),
        (130, 530, 70, true, true),
    ] {
        let mut value = || random.random_range(-1f32..1.0);
        let a = Stored::new(m, k, a_transposed, &mut value);
        let b = Stored::new(k, n, b_transposed, &mut value);
        for precision in [Precision::F32, Precision::Bf16] {
            let [one, two, three] = pools
                .each_ref()
                .map(|pool| bits(&pool.install(|| product(precision, a.matrix(), b.matrix()))));
            assert!(one == two && one == three, "{precision:?} {m} {n} {k}");
        }
    }
}

#[test]
fn nan_and_infinity_reach_what_they_are_multiplied_with() {
    for precision in [Precision::F32, Precision::Bf16] {
        for (bad, sum) in [(f32::NAN, f32::NAN), (f32::INFINITY, f32::INFINITY), (f32::MAX, f32::INFINITY)] {
            let (mut a, b) = (vec![1f32; 20 * 30], vec![2f32; 30 * 50]);
            a[7 * 30 + 3] = bad;
            let out = product(precision, Matrix::new(&a, 30), Matrix::new(&b, 50));
            for (index, out) in out.into_iter().enumerate() {
                let expected = if index / 50 == 7 { sum } else { 60.0 };
                assert!(out == expected || out.is_nan() && expected.is_nan(), "{precision:?} {bad}: {out}");
            }
        }
        // An output that is kept stays what it is.
        let (one, mut out) = ([1f32], [f32::NAN]);
        multiply(precision, Matrix::new(&one, 1), Matrix::new(&one, 1), 1.0, &mut out);
        assert!(out[0].is_nan());
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let values = [0f32; 6];
    let (wide, high) = (Matrix::new(&values, 3), Matrix::new(&values, 2));
    for precision in [Precision::F32, Precision::Bf16] {
        let refused = |a, b, len| {
            std::panic::catch_unwind(|| multiply(precision, a, b, 0.0, &mut vec![0.0; len])).is_err()
        };
        assert!(refused(wide, wide, 6) && refused(wide, high, 5) && !refused(wide, high, 4));
    }
    assert!(std::panic::catch_unwind(|| Matrix::new(&values, 4)).is_err());
}

#[test]
fn blocks_cover_a_length() {
    for len in 0..300 {
        let blocks = Blocks::new(len, 96, 48);
        let mut next = 0;
        for (first, len) in blocks.iter() {
            assert!(first == next && (1..=96).contains(&len));
            next += len;
        }
        assert_eq!(next, len);
    }
    assert_eq!(Blocks::new(768, 480, 48).iter().collect::<Vec<_>>(), [(0, 384), (384, 384)]);
}

#[cfg(target_arch = "x86_64")]
mod twin {
    use super::super::avx512bf16::{Avx512Bf16, INNER};
    use super::*;

    /// Values near 1, and some of any size.
    fn wild(random: &mut ChaCha8Rng) -> f32 {
        if random.random_ratio(1, 8) {
            f32::from_bits(random.random::<u32>() & 0xbfff_ffff)
        } else {
            random.random_range(-2f32..2.0)
        }
    }

    /// Denormal numbers count as zero.
    fn flushed(x: f32) -> f32 {
        if x.is_subnormal() { 0f32.copysign(x) } else { x }
    }

    fn rounded(x: f32) -> f32 {
        half::bf16::from_f32(flushed(x)).to_f32()
    }

    /// `sum + a b` as `vdpbf16ps` has it.
    fn multiply_add(sum: f32, a: f32, b: f32) -> f32 {
        let next = a.mul_add(b, sum);
        // The least normal number may have been rounded up from a number that is denormal at 24 bits. (Such sums are exact in f64.)
        let least = f64::from(f32::MIN_POSITIVE) * (1.0 - 0.5f64.powi(25));
        let up = next.abs() == f32::MIN_POSITIVE
            && f64::from(a).mul_add(f64::from(b), f64::from(sum)).abs() < least;
        if up { 0f32.copysign(next) } else { flushed(next) }
    }

    /// What [`super::super::avx512bf16`] says that it computes.
    fn multiply(a: Matrix<'_>, b: Matrix<'_>, keep: f32, out: &mut [f32]) {
        let (n, k) = (b.columns, a.columns);
        let parts = k.div_ceil(INNER).max(1);
        let block = 2 * k.div_ceil(2 * parts);
        let [a_rounded, b_rounded] = [a, b].map(|x| {
            let rows = 0..x.rows;
            let values = rows.flat_map(|i| (0..x.columns).map(move |j| rounded(at(x, i, j))));
            values.chain([0.0]).collect::<Vec<f32>>()
        });
        let value = |i: usize, j: usize, l: usize| {
            if l < k { (a_rounded[i * k + l], b_rounded[l * n + j]) } else { (0.0, 0.0) }
        };
        for (index, out) in out.iter_mut().enumerate() {
            for part in 0..parts {
                let mut sum = 0f32;
                for even in (part * block..k.min((part + 1) * block)).step_by(2) {
                    for l in [even + 1, even] {
                        let (a, b) = value(index / n, index % n, l);
                        sum = multiply_add(sum, a, b);
                    }
                }
                *out = match (part, keep) {
                    (0, 0.0) => sum,
                    (0, keep) => keep.mul_add(*out, sum),
                    _ => *out + sum,
                };
            }
        }
    }

    #[test]
    fn every_bit_is_that_of_the_scalar_twin() {
        let Some(isa) = Avx512Bf16::new() else {
            println!("no AVX512_BF16 here");
            return;
        };
        let mut random = ChaCha8Rng::seed_from_u64(4);
        for (m, n, k, a_transposed, b_transposed) in cases(&mut random) {
            let mut value = || wild(&mut random);
            let a = Stored::new(m, k, a_transposed, &mut value);
            let b = Stored::new(k, n, b_transposed, &mut value);
            let before: Vec<f32> = (0..m * n).map(|_| value()).collect();
            for keep in [0.0, 1.0, 0.5] {
                let (mut out, mut expected) = (before.clone(), before.clone());
                isa.multiply(a.matrix(), b.matrix(), keep, &mut out);
                multiply(a.matrix(), b.matrix(), keep, &mut expected);
                assert!(bits(&out) == bits(&expected), "{m} {n} {k}, keep {keep}");
            }
        }
    }

    #[test]
    fn the_least_numbers_are_those_of_the_scalar_twin() {
        let Some(isa) = Avx512Bf16::new() else {
            println!("no AVX512_BF16 here");
            return;
        };
        let power = |e: i32| 2f32.powi(e);
        // [sum so far, a, b]: the sum is taken first, as the odd product of a pair, 2^-126 = 2^-63 * 2^-63.
        for exponent in -155..=-126 {
            for mantissa in [1.0, 1.0078125, 1.5, 1.9921875] {
                for sign in [1.0, -1.0] {
                    let a = [sign * mantissa * power(exponent + 70), power(-63)];
                    let b = [-power(-70), power(-63)];
                    let (mut out, mut expected) = ([0.0], [0.0]);
                    isa.multiply(Matrix::new(&a, 2), Matrix::new(&b, 1), 0.0, &mut out);
                    multiply(Matrix::new(&a, 2), Matrix::new(&b, 1), 0.0, &mut expected);
                    assert_eq!(out[0].to_bits(), expected[0].to_bits(), "{sign} {mantissa} 2^{exponent}");
                }
            }
        }
        // Denormal factors, and one that would round up to a normal number.
        for tiny in [1u32, 0x8000_0001, 0x007f_ffff, 0x807f_ffff, 0x0080_0000].map(f32::from_bits) {
            let (b, mut out, mut expected) = ([power(100)], [0.0], [0.0]);
            isa.multiply(Matrix::new(&[tiny], 1), Matrix::new(&b, 1), 0.0, &mut out);
            multiply(Matrix::new(&[tiny], 1), Matrix::new(&b, 1), 0.0, &mut expected);
            assert_eq!(out[0].to_bits(), expected[0].to_bits(), "{tiny:e}");
        }
    }
}
