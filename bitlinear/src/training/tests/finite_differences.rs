//! Backwards against differences of their forwards.
use std::sync::Arc;

use super::*;
use crate::math;
use crate::pool::Pool;

/// Largest error of a derivative along a direction, in units of the gradient's length.
///
/// Outputs of magnitude 2 are rounded to 2^-23, which the division by twice the step makes 1e-5; extrapolated differences are
/// exact up to the fourth power of the step. A wrong term, sign or factor shows as 1e-2 and more.
const TOLERANCE: f64 = 2e-4;

const STEP: f32 = 1.0 / 64.0;

/// The derivative of `Σ upstream * forward` along a direction: a central difference with Richardson's extrapolation.
fn slope(forward: &dyn Fn(&[f32]) -> Vec<f32>, at: &[f32], direction: &[f32], upstream: &[f32]) -> f64 {
    let output =
        |step: f32| forward(&at.iter().zip(direction).map(|(x, d)| x + step * d).collect::<Vec<f32>>());
    let difference = |step: f32| {
        let outputs = output(step).into_iter().zip(output(-step)).zip(upstream);
        let sum = outputs.map(|((a, b), u)| (f64::from(a) - f64::from(b)) * f64::from(*u)).sum::<f64>();
        sum / (2.0 * f64::from(step))
    };
    (4.0 * difference(STEP) - difference(2.0 * STEP)) / 3.0
}

/// Checks a gradient along some directions of signs and some single coordinates.
fn check(
    what: &str,
    forward: &dyn Fn(&[f32]) -> Vec<f32>,
    at: &[f32],
    upstream: &[f32],
    gradient: &[f32],
    r: &mut Random,
) {
    let count = at.len();
    let length = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    for attempt in 0..16 {
        let one = r.0.random_range(0..count);
        let sign = |i: usize, random: bool| match attempt < 8 {
            true => {
                if random {
                    1.0
                } else {
                    -1.0
                }
            }
            false => f32::from(u8::from(i == one)),
        };
        let direction: Vec<f32> = (0..count).map(|i| sign(i, r.0.random())).collect();
        let found = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum::<f64>();
        let error = (found - slope(forward, at, &direction, upstream)).abs() / length;
        assert!(error < TOLERANCE, "{what}: {error:.1e}");
    }
}

#[test]
fn a_bias_has_its_derivative() {
    let mut r = random(20);
    for (tokens, features) in [(1, 1), (5, 17), (70, 33), (100, 64)] {
        let (x, grad) = (r.values(tokens * features), r.values(tokens * features));
        let (bias, start) = (r.values(features), r.values(features));
        let sum = |x: &[f32], bias: &[f32]| {
            let mut rows = x.to_vec();
            add_bias(&mut rows, bias);
            rows
        };
        for (at, y) in sum(&x, &bias).into_iter().enumerate() {
            assert_eq!(y, x[at] + bias[at % features]);
        }
        let mut grad_bias = vec![f32::NAN; features];
        bias_backward(&grad, 0.0, &mut grad_bias);
        check("bias", &|bias| sum(&x, bias), &bias, &grad, &grad_bias, &mut r);
        check("rows", &|x| sum(x, &bias), &x, &grad, &grad, &mut r);
        let mut added = start.clone();
        bias_backward(&grad, 0.5, &mut added);
        let expected: Vec<f32> = grad_bias.iter().zip(&start).map(|(g, s)| g + 0.5 * s).collect();
        assert_close("added", &added, &expected, 1e-6);
    }
    let mut untouched = [1.0];
    bias_backward(&[], 0.5, &mut untouched);
    assert_eq!(untouched, [0.5]);
}

#[test]
fn the_number_of_threads_changes_no_bit_of_a_bias() {
    let mut r = random(21);
    let (rows, grad, bias) = (r.values(700 * 37), r.values(700 * 37), r.values(37));
    let with = |threads: usize| {
        Arc::new(Pool::new(threads).unwrap()).install(|| {
            let (mut rows, mut grad_bias) = (rows.clone(), bias.clone());
            add_bias(&mut rows, &bias);
            bias_backward(&grad, 1.0, &mut grad_bias);
            (rows, grad_bias)
        })
    };
    let one = with(1);
    assert_eq!(one, with(2));
    assert_eq!(one, with(5));
}

#[test]
fn rows_that_do_not_fit_a_bias_are_refused() {
    for (rows, features) in [(5, 2), (4, 0), (0, 0)] {
        assert!(std::panic::catch_unwind(|| add_bias(&mut vec![0.0; rows], &vec![0.0; features])).is_err());
        let backward = || bias_backward(&vec![0.0; rows], 0.0, &mut vec![0.0; features]);
        assert!(std::panic::catch_unwind(backward).is_err());
    }
}

#[test]
fn the_norm_of_heads_has_its_derivative() {
    let mut r = random(22);
    // One gain for all heads of all tokens: rows of heads are rows as any others.
    for (tokens, heads, head_dim) in [(1, 2, 4), (3, 5, 16), (40, 4, 64)] {
        let [x, grad] = [0; 2].map(|_| r.values(tokens * heads * head_dim));
        let weight = r.values(head_dim);
        let forward = |x: &[f32], weight: &[f32]| {
            let mut out = vec![0f32; x.len()];
            for (out, x) in out.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
                math::rms_norm(x, weight, 1e-5, out);
            }
            out
        };
        let (mut grad_x, mut grad_w) = (vec![0f32; x.len()], vec![f32::NAN; head_dim]);
        rms_norm_backward(Norm::new(&weight, 1e-5), &x, &grad, 0.0, &mut grad_x, &mut grad_w);
        check("heads", &|x| forward(x, &weight), &x, &grad, &grad_x, &mut r);
        check("gain", &|weight| forward(&x, weight), &weight, &grad, &grad_w, &mut r);
    }
}
