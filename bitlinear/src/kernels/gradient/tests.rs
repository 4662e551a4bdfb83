//! Every kernel against sums in i64, bit for bit, and the whole against f64.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::kernels::tests::{bits, compared};
use crate::pool::Pool;
use std::sync::Arc;

/// The definition, from the operands' codes.
fn oracle(gradient: &GradientPanels, x: &QuantizedRows, keep: f32, before: &[f32]) -> Vec<f32> {
    let (outs, columns) = (gradient.features(), x.columns());
    let x: Vec<Vec<i8>> = (0..x.rows()).map(|row| x.row(row).0).collect();
    let mut out: Vec<f32> = before.iter().map(|y| if keep == 0.0 { 0.0 } else { keep * y }).collect();
    for first in (0..x.len()).step_by(TOKEN_BLOCK) {
        let tokens = first..x.len().min(first + TOKEN_BLOCK);
        for o in 0..outs {
            let mut sums = vec![0i64; columns];
            for token in tokens.clone() {
                let code = i64::from(gradient.code(token, o).0);
                sums.iter_mut().zip(&x[token]).for_each(|(sum, x)| *sum += code * i64::from(*x));
            }
            let scale = gradient.code(first, o).1;
            let row = &mut out[o * columns..][..columns];
            row.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum as f32 * scale);
        }
    }
    out
}

/// Operands and what their product must be.
struct Case {
    gradient: GradientPanels,
    x: QuantizedRows,
    activations: ActivationPanels,
}

impl Case {
    fn new(gradient: &[f32], outs: usize, x: QuantizedRows) -> Self {
        let gradient = GradientPanels::quantize(gradient, outs, x.scales());
        Self { gradient, activations: ActivationPanels::of_codes(&x), x }
    }

    fn random(rng: &mut ChaCha8Rng, tokens: usize, outs: usize, columns: usize) -> Self {
        let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-3.0..3.0)).collect() };
        let x = QuantizedRows::quantize(&values(tokens * columns), columns);
        Self::new(&values(tokens * outs), outs, x)
    }

    fn run(&self, kernel: Kernel, keep: f32, before: &[f32]) -> Vec<f32> {
        let mut out = before.to_vec();
        weight_gradient(kernel, &self.gradient, &self.activations, keep, &mut out).unwrap();
        out
    }

    fn check(&self, kernels: &[Kernel], keep: f32) {
        let len = self.gradient.features() * self.x.columns();
        let before: Vec<f32> = if keep == 0.0 {
            vec![f32::NAN; len]
        } else {
            (0..len).map(|at| at as f32 * 0.7 - 3.0).collect()
        };
        let expected = bits(&oracle(&self.gradient, &self.x, keep, &before));
        for kernel in kernels {
            let right = bits(&self.run(*kernel, keep, &before)) == expected;
            assert!(right, "{}: {:?} x {:?}, keep {keep}", kernel.name(), self.gradient, self.activations);
        }
    }
}

#[test]
fn small_sizes_of_every_kind() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(1));
    let mut keeps = [0.0, 1.0, 0.5].iter().cycle();
    let tokens = [0, 1, 2, 3, 4, 5, 7, 16, 17, 63, 97, 126, 127, 128, 129, 131, 255, 256, 257, 260];
    for tokens in tokens {
        for outs in 1..=40 {
            Case::random(&mut rng, tokens, outs, 1 + (outs * 37 + tokens * 11) % 140)
                .check(&kernels, *keeps.next().unwrap());
        }
    }
    for columns in 1..=140 {
        Case::random(&mut rng, 1 + columns * 13 % 140, 1 + columns % 40, columns)
            .check(&kernels, *keeps.next().unwrap());
    }
}

#[test]
fn more_than_one_tile_each_way() {
    let (kernels, mut rng) = (compared(), ChaCha8Rng::seed_from_u64(2));
    for outs in TILE_ROWS - 1..=TILE_ROWS + 7 {
        let columns = TILE_GROUPS * GROUP_OUTS * (1 + outs % 3) + outs - TILE_ROWS + 1;
        Case::random(&mut rng, 130, outs, columns).check(&kernels, 0.5);
    }
}

#[test]
fn extremes_are_exact() {
    let kernels = compared();
    let signs: [fn(usize) -> bool; 4] =
        [|_| true, |_| false, |at| at.is_multiple_of(2), |at| at / 3 % 2 == 1];
    for tokens in [1, 128, 200, 256] {
        for x_sign in signs {
            let codes: Vec<i8> =
                (0..tokens * 70).map(|at| if x_sign(at / 70) { 127 } else { -128 }).collect();
            for g_sign in signs {
                let gradient: Vec<f32> =
                    (0..tokens * 17).map(|at| if g_sign(at / 17) { 127.0 } else { -127.0 }).collect();
                let case = Case::new(&gradient, 17, QuantizedRows::from_codes(&codes, 70));
                assert_eq!(case.gradient.code(0, 0), (if g_sign(0) { 127 } else { -127 }, 1.0));
                case.check(&kernels, 0.0);
                case.check(&kernels, 1.0);
            }
        }
    }
}

#[test]
fn codes_and_scales_are_their_definition() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut panels = GradientPanels::default();
    // Buffers are used again, for more and for less.
    for (tokens, features) in [(5, 3), (300, 130), (128, 64), (129, 1), (260, 200), (3, 65)] {
        let gradient: Vec<f32> = (0..tokens * features).map(|_| rng.random_range(-1.0..1.0)).collect();
        let scales: Vec<f32> = (0..tokens).map(|_| rng.random_range(0.01..0.1)).collect();
        panels.fill(&gradient, features, &scales);
        for first in (0..tokens).step_by(TOKEN_BLOCK) {
            for f in 0..features {
                let block = first..tokens.min(first + TOKEN_BLOCK);
                let value = |t: usize| gradient[t * features + f] * scales[t];
                let max = block.clone().fold(0f32, |max, t| max.max(value(t).abs()));
                for t in block {
                    let code = (value(t) * (127.0 / max)).round_ties_even() as i8;
                    assert_eq!(panels.code(t, f), (code, max / 127.0), "{tokens} x {features}: {t}, {f}");
                }
            }
        }
    }
}

#[test]
fn ties_go_to_even() {
    let panels = GradientPanels::quantize(&[127.0, 0.5, 1.5, -2.5, -126.5, 0.0], 1, &[1.0; 6]);
    assert_eq!([0, 1, 2, 3, 4, 5].map(|t| panels.code(t, 0).0), [127, 0, 2, -2, -126, 0]);
}

#[test]
fn nothing_and_next_to_nothing_give_zero() {
    let x = || QuantizedRows::from_codes(&[100; 130 * 3], 3);
    for value in [0.0, -0.0, 1e-45, -1e-40, 9e-37] {
        let case = Case::new(&[value; 130 * 2], 2, x());
        assert_eq!(case.gradient.code(7, 1).0, 0);
        for kernel in compared() {
            assert!(case.run(kernel, 0.0, &[f32::NAN; 6]).iter().all(|y| *y == 0.0));
        }
    }
    // One that counts, and that others in its block do not.
    let case = Case::new(&[2e-36; 130 * 2], 2, x());
    assert_eq!(case.gradient.code(7, 1).0, 127);
    case.check(&compared(), 0.0);
}

#[test]
fn bad_gradients_reach_their_row_and_leave_the_others_alone() {
    let (tokens, outs, columns) = (200, 9, 70);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (good, activations) = (values(tokens * outs), values(tokens * columns));
    let x = || QuantizedRows::quantize(&activations, columns);
    let expected = Case::new(&good, outs, x());
    for bad in [f32::NAN, -f32::NAN, f32::from_bits(0x7fc0_0080), f32::INFINITY, f32::NEG_INFINITY] {
        let mut gradient = good.clone();
        gradient[150 * outs + 4] = bad;
        let case = Case::new(&gradient, outs, x());
        for kernel in compared() {
            let before = vec![f32::NAN; outs * columns];
            let (out, expected) = (case.run(kernel, 0.0, &before), expected.run(kernel, 0.0, &before));
            for (at, (y, expected)) in out.iter().zip(&expected).enumerate() {
                if at / columns == 4 {
                    assert!(!y.is_finite(), "{}: {bad} became {y}", kernel.name());
                } else {
                    assert_eq!(y.to_bits(), expected.to_bits(), "{}: {bad}", kernel.name());
                }
            }
        }
    }
    // A bad token is one whose scale is bad.
    let mut activations = activations.clone();
    activations[3 * columns] = f32::NAN;
    let case = Case::new(&good, outs, QuantizedRows::quantize(&activations, columns));
    for kernel in compared() {
        assert!(case.run(kernel, 0.0, &vec![0.0; outs * columns]).iter().all(|y| y.is_nan()));
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let kernels = compared();
    for (tokens, outs, columns) in [(260, 100, 300), (40, 30, 1000), (700, 200, 70)] {
        for threads in 1..=3 {
            let pool = Arc::new(Pool::new(threads).unwrap());
            // The operands are made with these threads too.
            pool.install(|| {
                Case::random(&mut ChaCha8Rng::seed_from_u64(5), tokens, outs, columns).check(&kernels, 1.0);
            });
        }
    }
}

#[test]
fn gaussian_gradients_are_right_to_a_hundredth() {
    let (tokens, outs, columns) = (512, 40, 96);
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let mut gaussian = |len: usize| -> Vec<f32> {
        let mut uniform = || rng.random_range(1e-7f64..1.0);
        let radius = |u: f64| (-2.0 * u.ln()).sqrt();
        (0..len).map(|_| (radius(uniform()) * (std::f64::consts::TAU * uniform()).cos()) as f32).collect()
    };
    let (gradient, activations) = (gaussian(tokens * outs), gaussian(tokens * columns));
    let case = Case::new(&gradient, outs, QuantizedRows::quantize(&activations, columns));
    let out = case.run(Kernel::active().unwrap(), 0.0, &vec![0.0; outs * columns]);
    // The activations that the forward pass has computed with: what they were before, it has not.
    let mut exact = vec![0f64; outs * columns];
    for token in 0..tokens {
        let (codes, scale) = case.x.row(token);
        for o in 0..outs {
            let g = f64::from(gradient[token * outs + o]) * f64::from(scale);
            for (y, code) in exact[o * columns..].iter_mut().zip(&codes) {
                *y += g * f64::from(*code);
            }
        }
    }
    let off: f64 = out.iter().zip(&exact).map(|(y, exact)| (f64::from(*y) - exact).powi(2)).sum();
    let error = (off / exact.iter().map(|y| y * y).sum::<f64>()).sqrt();
    println!("error of a gaussian gradient: {error:.5}");
    assert!(error < 0.01, "{error}");
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let activations = ActivationPanels::of_codes(&QuantizedRows::quantize(&[1.0; 6], 3));
    for (tokens, output) in [(1, 12), (3, 12), (2, 11), (2, 13)] {
        let gradient = GradientPanels::quantize(&vec![1.0; tokens * 4], 4, &vec![1.0; tokens]);
        for kernel in compared() {
            let error = weight_gradient(kernel, &gradient, &activations, 0.0, &mut vec![0.0; output]);
            let expected = KernelError::Gradient {
                gradient_tokens: tokens,
                tokens: 2,
                out_features: 4,
                in_features: 3,
                output,
            };
            assert_eq!(error, Err(expected));
        }
    }
    for kernel in compared() {
        let (gradient, activations) = (GradientPanels::default(), ActivationPanels::default());
        assert_eq!(weight_gradient(kernel, &gradient, &activations, 0.0, &mut []), Ok(()));
        let gradient = GradientPanels::quantize(&[], 2, &[]);
        let activations = ActivationPanels::of_codes(&QuantizedRows::quantize(&[], 2));
        for (keep, expected) in [(0.0, [0.0; 4]), (0.5, [1.0; 4])] {
            let mut out = [2.0; 4];
            weight_gradient(kernel, &gradient, &activations, keep, &mut out).unwrap();
            assert_eq!(out, expected);
        }
    }
}

#[test]
#[should_panic(expected = "a gradient of 2 rows of 4")]
fn gradients_are_whole_rows() {
    GradientPanels::quantize(&[1.0; 7], 4, &[1.0; 2]);
}
