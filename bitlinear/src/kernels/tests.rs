//! Every kernel that this processor can run against a triple loop, bit for bit.

use std::ffi::OsStr;

use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::packed::TernaryWeight;
use crate::pool::Pool;
use crate::quant;
use std::sync::Arc;

/// Around whole steps, lines of either layout (16 and 20 columns), lines of activations (64), and AVX2's int16 sums (256).
const TAILS: [usize; 28] = [
    1, 2, 3, 4, 5, 15, 16, 17, 19, 20, 21, 31, 33, 39, 40, 41, 63, 64, 65, 79, 80, 81, 127, 129, 239, 241,
    256, 257,
];

/// Two groups of panels and one more output.
const OUTS: usize = 2 * GROUP_OUTS + 1;

/// What is compared. Printed, so that a log shows what a green test stands for.
pub(super) fn compared() -> Vec<Kernel> {
    #[allow(unused_mut)]
    let mut kernels = Kernel::available();
    print!("kernels compared: {}", kernels.iter().map(|k| k.name()).collect::<Vec<_>>().join(" "));
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if let Some(isa) = amx::Amx::emulated() {
        kernels.push(Kernel(Choice::Amx(isa)));
        print!(" amx (emulated)");
    }
    println!();
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
    /// The weight in every layout.
    weights: Vec<TernaryWeight>,
    expected: Vec<u32>,
}

impl Case {
    fn new(activations: &[f32], codes: &[i8], columns: usize) -> Self {
        Self::with_rows(QuantizedRows::quantize(activations, columns), codes)
    }

    fn with_rows(x: QuantizedRows, codes: &[i8]) -> Self {
        let columns = x.columns();
        let weight = TernaryWeight::pack(codes, codes.len() / columns, columns, 0.37).unwrap();
        let int8: Vec<i8> = (0..x.rows()).flat_map(|r| x.row(r).0).collect();
        let sums = oracle(&int8, codes, columns);
        let outs = weight.out_features();
        let expected = sums.iter().enumerate().map(|(at, &sum)| {
            let sum = i32::try_from(sum).unwrap();
            quant::epilogue(sum as f32, x.row(at / outs).1, weight.weight_scale()).to_bits()
        });
        let weights = Layout::ALL.map(|layout| weight.with_layout(layout)).into();
        Self { expected: expected.collect(), x, weights }
    }

    fn random(rng: &mut ChaCha8Rng, rows: usize, outs: usize, columns: usize) -> Self {
        let activations: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-3.0..3.0)).collect();
        let codes: Vec<i8> = (0..outs * columns).map(|_| rng.random_range(-1..=1)).collect();
        Self::new(&activations, &codes, columns)
    }

    fn run(&self, kernel: Kernel, weight: &TernaryWeight) -> Vec<u32> {
        // NaN where nothing is written.
        let mut output = vec![f32::NAN; self.x.rows() * weight.out_features()];
        matmul_with(kernel, &self.x, weight, &mut output).unwrap();
        bits(&output)
    }

    fn check(&self, kernels: &[Kernel]) {
        for weight in &self.weights {
            for kernel in kernels {
                let name = kernel.name();
                let right = self.run(*kernel, weight) == self.expected;
                assert!(right, "{name}: {:?} x {weight:?}", self.x);
            }
        }
    }
}

#[test]
fn the_kernels_that_the_processor_promises_are_compared() {
    compared();
    let kernels = Kernel::available();
    let names: Vec<_> = kernels.iter().map(|k| k.name()).collect();
    let mut promised = vec!["scalar"];
    #[cfg(target_arch = "x86_64")]
    {
        promised.extend(is_x86_feature_detected!("avx2").then_some("avx2"));
        let vnni = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
        promised.extend(vnni.then_some("avx512vnni"));
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    promised.extend(amx::tests::promised().then_some("amx"));
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
fn every_number_of_rows_up_to_65() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(1));
    let mut tails = TAILS.iter().cycle();
    for rows in 0..=2 * 32 + 1 {
        for outs in [1, 15, 16, 17, GROUP_OUTS - 1, GROUP_OUTS, GROUP_OUTS + 1] {
            Case::random(&mut rng, rows, outs, *tails.next().unwrap()).check(&kernels);
        }
    }
}

#[test]
fn every_number_of_outputs_up_to_two_groups_and_one() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(2));
    let mut tails = TAILS.iter().cycle();
    for outs in 0..=OUTS {
        for rows in [1, 2, 3, 4, 5, 16, 17] {
            Case::random(&mut rng, rows, outs, *tails.next().unwrap()).check(&kernels);
        }
    }
}

#[test]
fn every_number_of_columns_up_to_513() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(3));
    for columns in 1..=2 * 256 + 1 {
        for rows in [1, 2 + columns % 3, 5 + columns % 12] {
            Case::random(&mut rng, rows, 33, columns).check(&kernels);
        }
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
    // Beyond what any int16 sum holds: 256 columns in AVX2, 512 in NEON.
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
    // int16 sums hold 240 and 256 columns (AVX2; 1.6 and 2 bits), int32 sums of scaled codes 81,920 and 262,144 (AVX-512; see
    // also the longest row).
    for columns in [128, 240, 256, 260, 320, 2304, 20_480, 20_500, 81_920, 81_940] {
        let x: Vec<i8> = fills(127, -128)
            .into_iter()
            .chain(fills(-128, 0))
            .flat_map(|fill| (0..columns).map(fill))
            .collect();
        let w: Vec<i8> =
            fills(1, -1).into_iter().chain(fills(1, 0)).flat_map(|fill| (0..columns).map(fill)).collect();
        Case::with_rows(QuantizedRows::from_codes(&x, columns), &w).check(&kernels);
        for rows in 1..=4 {
            Case::with_rows(QuantizedRows::from_codes(&x[..rows * columns], columns), &w).check(&kernels);
        }
    }
}

#[test]
fn the_longest_row_fits() {
    // The sum with weights of 2 in place of +1 wraps around; with the row's sum taken off it is right again.
    let x = QuantizedRows::from_codes(&vec![-128; MAX_IN_FEATURES], MAX_IN_FEATURES);
    Case::with_rows(x, &vec![1; MAX_IN_FEATURES]).check(&compared());
}

/// [`int_matmul`] by its definition, in i64 and f32.
fn int_oracle(x: &[f32], w: &[f32], columns: usize, max: f32) -> Vec<u32> {
    let mut out = Vec::new();
    for x in x.chunks_exact(columns) {
        let largest = quant::absmax(x, quant::EPS);
        let codes: Vec<i64> = x.iter().map(|x| (x * (32512.0 / largest)).round_ties_even() as i64).collect();
        for w in w.chunks_exact(columns) {
            let of_row = quant::absmax(w, quant::EPS);
            let product = |(x, w): (&i64, &f32)| x * (w * (max / of_row)).round_ties_even() as i64;
            let sum: i64 = codes.iter().zip(w).map(product).sum();
            out.push((sum as f32 * (largest / 32512.0 * (of_row / max))).to_bits());
        }
    }
    out
}

#[test]
fn integer_products_of_every_kernel_are_their_definition() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(7));
    let mut check = |tokens: usize, outs: usize, columns: usize, random: bool| {
        let mut values = |len: usize| -> Vec<f32> {
            let draw = |at: usize, rng: &mut ChaCha8Rng| match random {
                true => rng.random_range(-3.0..3.0),
                false => [1.0, -1.0][at / 7 % 2],
            };
            (0..len).map(|at| draw(at, &mut rng)).collect()
        };
        let (x, w) = (values(tokens * columns), values(outs * columns));
        for (bits, max, line_columns) in [(Bits::Eight, 127.0, 4), (Bits::Four, 7.0, 8)] {
            let row = |o: usize, row: &mut [f32]| row.copy_from_slice(&w[o * columns..][..columns]);
            let weight = IntWeight::quantize(outs, columns, bits, row).unwrap();
            assert_eq!(weight.bytes(), outs.div_ceil(16) * columns.div_ceil(line_columns) * 64 + outs * 4);
            let expected = int_oracle(&x, &w, columns, max);
            for kernel in &kernels {
                let mut out = vec![f32::NAN; tokens * outs];
                int_matmul(*kernel, &x, &weight, &mut out).unwrap();
                assert!(
                    self::bits(&out) == expected,
                    "{} {bits:?}: {tokens} x {outs} x {columns}",
                    kernel.name()
                );
            }
        }
    };
    for tokens in 0..=5 {
        for outs in [0, 1, 15, 16, 17, 33] {
            check(tokens, outs, 1 + (tokens * 7 + outs * 3) % 150, true);
        }
    }
    // 512 columns of four bits are unpacked together.
    for columns in [1, 3, 4, 5, 7, 8, 9, 64, 511, 512, 513, 2560] {
        check(3, 17, columns, true);
    }
    check(2, 17, MAX_INT_FEATURES, false);
    let too_long = IntWeight::quantize(1, MAX_INT_FEATURES + 1, Bits::Eight, |_, _| ());
    assert_eq!(too_long.unwrap_err(), KernelError::IntColumns(65794));
    let weight = IntWeight::quantize(3, 4, Bits::Eight, |_, row| row.fill(1.0)).unwrap();
    for (activations, outputs) in [(5, 3), (4, 4), (8, 3)] {
        let error = int_matmul(kernels[0], &vec![1.0; activations], &weight, &mut vec![0.0; outputs]);
        assert!(matches!(error, Err(KernelError::Shape { .. })));
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(4));
    for (rows, outs) in [(1, 700), (3, 700), (37, 70), (600, 70)] {
        let case = Case::random(&mut rng, rows, outs, 200);
        for threads in 1..=3 {
            Arc::new(Pool::new(threads).unwrap()).install(|| case.check(&kernels));
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
            matmul_with(kernel, &x, &case.weights[0], &mut output).unwrap();
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
fn small_models_and_slow_unpackers_take_two_bits() {
    for kernel in compared() {
        assert_eq!(kernel.layout_for(1 << 20), Layout::TwoBit);
        let fast = ["avx512vnni", "amx"].contains(&kernel.name());
        #[cfg(target_arch = "x86_64")]
        let fast = fast && is_x86_feature_detected!("avx512vbmi");
        let expected = if fast { Layout::FiveTrit } else { Layout::TwoBit };
        assert_eq!(kernel.layout_for(2_084_044_800), expected, "{}", kernel.name());
    }
}

#[test]
fn kernels_go_by_their_names() {
    let available = Kernel::available();
    assert_eq!(Kernel::named(None).unwrap(), available[available.len() - 1]);
    for kernel in &available {
        assert_eq!(Kernel::named(Some(OsStr::new(kernel.name()))).unwrap(), *kernel);
    }
    let names = available.iter().map(|k| k.name()).collect::<Vec<_>>().join(", ");
    for asked in ["", "AVX2", "scalar ", "abacus"] {
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

pub(super) fn bits(output: &[f32]) -> Vec<u32> {
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
