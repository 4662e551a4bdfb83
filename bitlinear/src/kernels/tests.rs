//! Every kernel that this processor can run against a triple loop, bit for bit.

use std::ffi::OsStr;

use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// A quarter, a half, one, two and three blocks, with one weight more and less.
const TAILS: [usize; 17] = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 383, 384, 385];

/// The most rows or outputs that a kernel takes at once.
const KERNEL_TILE: usize = 4;

/// What is compared. Printed, so that a log shows what a green test stands for.
fn compared() -> Vec<Kernel> {
    let kernels = Kernel::available();
    println!("kernels compared: {}", kernels.iter().map(|k| k.name()).collect::<Vec<_>>().join(" "));
    kernels
}

/// The triple loop, `[rows, outs]`, over codes with no padding.
fn oracle(x: &[i8], w: &[i8], columns: usize) -> Vec<i64> {
    let product = |x: &[i8], w: &[i8]| x.iter().zip(w).map(|(&x, &w)| i64::from(x) * i64::from(w)).sum();
    x.chunks_exact(columns).flat_map(|x| w.chunks_exact(columns).map(move |w| product(x, w))).collect()
}

/// A product and what it must give.
struct Case {
    x: QuantizedRows,
    weight: TernaryWeight,
    expected: Vec<u32>,
}

impl Case {
    fn new(activations: &[f32], codes: &[i8], columns: usize) -> Self {
        let x = QuantizedRows::quantize(activations, columns);
        let weight = TernaryWeight::pack(codes, codes.len() / columns, columns, 0.37).unwrap();
        let int8: Vec<i8> = (0..x.rows()).flat_map(|r| x.row(r).0.to_vec()).collect();
        let sums = oracle(&int8, codes, columns);
        let outs = weight.out_features();
        let expected = sums.iter().enumerate().map(|(at, &sum)| {
            quant::epilogue(sum as f32, x.row(at / outs).1, weight.weight_scale()).to_bits()
        });
        Self { expected: expected.collect(), x, weight }
    }

    fn random(rng: &mut ChaCha8Rng, rows: usize, outs: usize, columns: usize) -> Self {
        let activations: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-3.0..3.0)).collect();
        let codes: Vec<i8> = (0..outs * columns).map(|_| rng.random_range(-1..=1)).collect();
        Self::new(&activations, &codes, columns)
    }

    fn run(&self, kernel: Kernel) -> Vec<u32> {
        // NaN where nothing is written.
        let mut output = vec![f32::NAN; self.x.rows() * self.weight.out_features()];
        matmul_with(kernel, &self.x, &self.weight, &mut output).unwrap();
        output.iter().map(|y| y.to_bits()).collect()
    }

    fn check(&self, kernels: &[Kernel]) {
        for kernel in kernels {
            let name = kernel.name();
            assert!(self.run(*kernel) == self.expected, "{name}: {} rows, {:?}", self.x.rows(), self.weight);
        }
    }
}

/// Kernels on a block of whole rows, with codes that quantizing never gives.
fn check_block(kernels: &[Kernel], codes: &[i8], weights: &[i8], stride: usize) {
    let (rows, outs) = (codes.len() / stride, weights.len() / stride);
    let weight = TernaryWeight::pack(weights, outs, stride, 1.0).unwrap();
    let sums: Vec<i32> =
        codes.chunks_exact(stride).map(|row| row.iter().map(|&c| i32::from(c)).sum()).collect();
    let block = Block { codes, sums: &sums, weights: weight.rows(0..outs), stride };
    let expected = oracle(codes, weights, stride);
    for kernel in kernels {
        let mut out = vec![i32::MIN; rows * outs];
        kernel.sums(&block, &mut out);
        let out: Vec<i64> = out.iter().map(|&sum| i64::from(sum)).collect();
        assert!(out == expected, "{}: {rows} x {outs} x {stride}", kernel.name());
    }
}

#[test]
fn the_kernels_that_the_processor_promises_are_compared() {
    let kernels = compared();
    let names: Vec<_> = kernels.iter().map(|k| k.name()).collect();
    let mut promised = vec!["scalar"];
    #[cfg(target_arch = "x86_64")]
    {
        promised.extend(is_x86_feature_detected!("avx2").then_some("avx2"));
        let vnni = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        promised.extend(vnni.then_some("avx512vnni"));
    }
    #[cfg(target_arch = "aarch64")]
    {
        promised.push("neon");
        promised.extend(std::arch::is_aarch64_feature_detected!("dotprod").then_some("neondot"));
    }
    assert_eq!(names, promised);
    // A script that knows its processor says what must be there.
    if let Ok(demanded) = std::env::var("BITLINEAR_TEST_KERNELS") {
        assert_eq!(names.join(" "), demanded);
    }
}

#[test]
fn every_size_up_to_two_tiles_and_one() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(1));
    let mut tails = TAILS.iter().cycle();
    for rows in 0..=2 * ROW_TILE + 1 {
        for outs in 0..=2 * OUT_TILE + 1 {
            Case::random(&mut rng, rows, outs, *tails.next().unwrap()).check(&kernels);
        }
    }
    // A single row is cut into chunks of four tiles.
    for outs in 0..=8 * OUT_TILE + 1 {
        Case::random(&mut rng, 1, outs, *tails.next().unwrap()).check(&kernels);
    }
}

#[test]
fn every_tail_with_every_tile_of_the_kernels() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(2));
    for columns in TAILS {
        for rows in 0..=2 * KERNEL_TILE + 1 {
            for outs in 0..=2 * KERNEL_TILE + 1 {
                Case::random(&mut rng, rows, outs, columns).check(&kernels);
            }
        }
    }
    for columns in 1..=300 {
        Case::random(&mut rng, 1, 5, columns).check(&kernels);
        Case::random(&mut rng, 5, 3, columns).check(&kernels);
    }
}

#[test]
fn a_model_sized_product() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    Case::random(&mut rng, 11, 45, 6912).check(&compared());
}

/// Fills of a row that push sums to their limits: all one value, and two that alternate every 1, 2, 32 and 128.
fn fills<T: Copy>(up: T, down: T) -> Vec<impl Fn(usize) -> T> {
    let fill = |period: usize, a: T, b: T| move |at: usize| [a, b][at / period % 2];
    [usize::MAX, 1, 2, 32, 128]
        .into_iter()
        .flat_map(|period| [fill(period, up, down), fill(period, down, up)])
        .collect()
}

#[test]
fn extremes_do_not_wrap() {
    let kernels = compared();
    // 2,048 columns are what the narrow sums hold; 2,304 would wrap them if they were never widened.
    for columns in [127, 2048, 2049, 2304, 20_000] {
        let x: Vec<f32> = fills(1.0, -1.0).into_iter().flat_map(|fill| (0..columns).map(fill)).collect();
        let w: Vec<i8> = fills(1, -1).into_iter().flat_map(|fill| (0..columns).map(fill)).collect();
        Case::new(&x, &w, columns).check(&kernels);
        Case::new(&x[..columns], &w, columns).check(&kernels);
    }
}

#[test]
fn extremes_that_quantizing_never_gives_do_not_wrap() {
    let kernels = compared();
    for stride in [128, 2048, 2176, 2304, 20_096] {
        let x: Vec<i8> = fills(127, -128)
            .into_iter()
            .chain(fills(-128, 0))
            .flat_map(|fill| (0..stride).map(fill))
            .collect();
        let w: Vec<i8> =
            fills(1, -1).into_iter().chain(fills(1, 0)).flat_map(|fill| (0..stride).map(fill)).collect();
        check_block(&kernels, &x, &w, stride);
        for row in x.chunks_exact(stride) {
            check_block(&kernels, row, &w, stride);
        }
    }
}

#[test]
fn the_longest_row_fits() {
    // The sum with weights of 2 in place of +1 wraps around; with the row's sum taken off it is right again.
    let stride = MAX_IN_FEATURES.next_multiple_of(BLOCK);
    let codes: Vec<i8> = (0..stride).map(|at| if at < MAX_IN_FEATURES { -128 } else { 0 }).collect();
    let weights = vec![1i8; stride];
    assert_eq!(oracle(&codes, &weights, stride), [-128 * MAX_IN_FEATURES as i64]);
    check_block(&compared(), &codes, &weights, stride);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(4));
    for (rows, outs) in [(1, 700), (37, 70)] {
        let case = Case::random(&mut rng, rows, outs, 200);
        for threads in 1..=3 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.check(&kernels));
        }
    }
}

#[test]
fn bad_rows_stay_bad_and_leave_the_others_alone() {
    let (columns, outs) = (130, 5);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let good: Vec<f32> = (0..9 * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
    let codes: Vec<i8> = (0..outs * columns).map(|_| rng.random_range(-1..=1)).collect();
    let case = Case::new(&good, &codes, columns);
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut activations = good.clone();
        activations[3 * columns + 7] = bad;
        let x = QuantizedRows::quantize(&activations, columns);
        for kernel in compared() {
            let mut output = vec![0f32; 9 * outs];
            matmul_with(kernel, &x, &case.weight, &mut output).unwrap();
            for (at, (y, expected)) in output.iter().zip(&case.expected).enumerate() {
                if at / outs == 3 {
                    assert!(!y.is_finite(), "{}: {bad} became {y}", kernel.name());
                } else {
                    assert_eq!(y.to_bits(), *expected, "{}: {bad} reached row {}", kernel.name(), at / outs);
                }
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let x = QuantizedRows::quantize(&[1.0; 6], 3);
    let weight = |outs, columns| TernaryWeight::pack(&vec![1; outs * columns], outs, columns, 1.0).unwrap();
    for kernel in compared() {
        for (weight, len) in [(weight(4, 2), 8), (weight(4, 3), 7), (weight(4, 3), 9), (weight(4, 0), 8)] {
            let error = matmul_with(kernel, &x, &weight, &mut vec![0.0; len]).unwrap_err();
            let expected = KernelError::Shape {
                rows: 2,
                columns: 3,
                out_features: 4,
                in_features: weight.in_features(),
                output: len,
            };
            assert_eq!(error, expected);
        }
        assert_eq!(matmul_with(kernel, &x, &weight(0, 3), &mut []), Ok(()));
        assert_eq!(matmul_with(kernel, &QuantizedRows::quantize(&[], 3), &weight(4, 3), &mut []), Ok(()));
        assert_eq!(matmul_with(kernel, &QuantizedRows::default(), &weight(4, 0), &mut []), Ok(()));
    }
    let error = matmul(&x, &weight(4, 3), &mut [0.0; 7]).unwrap_err().to_string();
    assert!(error.contains("[2, 3] with a weight [4, 3] into 7 values"), "{error}");
}

#[test]
#[should_panic(expected = "0 columns of activations")]
fn activations_have_columns() {
    QuantizedRows::quantize(&[], 0);
}

#[test]
#[should_panic(expected = "activations are whole rows of 4")]
fn activations_are_whole_rows() {
    QuantizedRows::quantize(&[1.0; 6], 4);
}

#[test]
fn kernels_go_by_their_names() {
    let available = compared();
    assert_eq!(Kernel::named(None).unwrap(), available[available.len() - 1]);
    for kernel in &available {
        assert_eq!(Kernel::named(Some(OsStr::new(kernel.name()))).unwrap(), *kernel);
    }
    let names = available.iter().map(|k| k.name()).collect::<Vec<_>>().join(", ");
    for asked in ["", "AVX2", "scalar ", "amx"] {
        let error = Kernel::named(Some(OsStr::new(asked))).unwrap_err();
        assert_eq!(error, KernelError::Unavailable { asked: asked.into(), available: names.clone() });
        assert!(error.to_string().starts_with(&format!("kernel '{asked}' in BITLINEAR_KERNEL")));
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let error = Kernel::named(Some(OsStr::from_bytes(b"scalar\xff"))).unwrap_err();
        assert_eq!(error, KernelError::Unavailable { asked: "scalar\u{fffd}".into(), available: names });
    }
}

fn bits(output: &[f32]) -> Vec<u32> {
    output.iter().map(|y| y.to_bits()).collect()
}

/// [`matmul`] of activations with weight codes.
fn product(activations: &[f32], codes: &[i8], columns: usize) -> Vec<f32> {
    let weight = TernaryWeight::pack(codes, codes.len() / columns, columns, 0.61).unwrap();
    let x = QuantizedRows::quantize(activations, columns);
    let mut output = vec![f32::NAN; x.rows() * weight.out_features()];
    matmul(&x, &weight, &mut output).unwrap();
    output
}

/// Activations and weight codes of a product of these sizes.
fn operands(rows: usize, outs: usize, columns: usize, seed: u64) -> (Vec<f32>, Vec<i8>, ChaCha8Rng) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let activations = (0..rows * columns).map(|_| rng.random_range(-9.0..9.0)).collect();
    let codes = (0..outs * columns).map(|_| rng.random_range(-1..=1)).collect();
    (activations, codes, rng)
}

proptest! {
    #[test]
    fn permuting_weight_rows_permutes_outputs(
        rows in 1usize..10, outs in 1usize..70, columns in 1usize..400, seed in any::<u64>()
    ) {
        let (activations, codes, mut rng) = operands(rows, outs, columns, seed);
        let mut order: Vec<usize> = (0..outs).collect();
        order.shuffle(&mut rng);
        let permuted: Vec<i8> = order.iter().flat_map(|&o| codes[o * columns..][..columns].to_vec()).collect();
        let (plain, permuted) = (product(&activations, &codes, columns), product(&activations, &permuted, columns));
        for (plain, permuted) in plain.chunks_exact(outs).zip(permuted.chunks_exact(outs)) {
            for (at, &o) in order.iter().enumerate() {
                prop_assert_eq!(permuted[at].to_bits(), plain[o].to_bits());
            }
        }
    }

    #[test]
    fn splitting_rows_changes_no_bit(
        rows in 2usize..20, at in 1usize..19, outs in 1usize..70, columns in 1usize..400, seed in any::<u64>()
    ) {
        let (activations, codes, _) = operands(rows, outs, columns, seed);
        let (first, rest) = activations.split_at(at.min(rows) * columns);
        let mut split = product(first, &codes, columns);
        split.extend(product(rest, &codes, columns));
        prop_assert_eq!(bits(&split), bits(&product(&activations, &codes, columns)));
    }

    /// What training relies on: a f32 product of whole numbers is exact in any order while 127 * K < 2^24.
    #[test]
    fn a_float_product_of_the_codes_is_the_same(
        rows in 1usize..5, outs in 1usize..40, columns in 1usize..5000, seed in any::<u64>()
    ) {
        prop_assume!(127 * columns < 1 << 24);
        let (activations, codes, _) = operands(rows, outs, columns, seed);
        let mut expected = Vec::new();
        let mut x = vec![0f32; columns];
        for row in activations.chunks_exact(columns) {
            let act_scale = quant::quantize_row_f32(row, &mut x);
            for w in codes.chunks_exact(columns) {
                let sum = x.iter().zip(w).map(|(x, &w)| x * f32::from(w)).sum();
                expected.push(quant::epilogue(sum, act_scale, 0.61));
            }
        }
        // -0.0 and 0.0 are both the empty sum.
        expected.iter_mut().for_each(|y| *y += 0.0);
        prop_assert_eq!(bits(&product(&activations, &codes, columns)), bits(&expected));
    }
}
