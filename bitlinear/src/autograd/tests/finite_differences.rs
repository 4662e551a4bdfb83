//! Every backward that is a true derivative against differences of its forward.
use std::sync::Arc;

use super::*;
use crate::math::{Activation, RopeTable};

/// Step of the differences, for inputs of magnitude about 1.
const STEP: f64 = 1.0 / 64.0;

/// Largest error of a derivative along a direction, in units of the gradient's root mean square times the direction's
/// length, plus its own magnitude.
///
/// The forward is f32: each output is rounded to about 2^-23 of its size, which the division by twice the step makes
/// 1e-5, more where an output is a sum; the extrapolated difference is exact up to the fourth power of the step, 1e-7
/// times a fifth derivative. A wrong term, sign or factor shows as 1e-2 and more.
const TOLERANCE: f64 = 1e-3;

/// Random directions and single coordinates tried for each input.
const DIRECTIONS: usize = 6;
const COORDINATES: usize = 24;

/// The derivative of `Σ upstream * op` along a direction of one input: a central difference with Richardson's
/// extrapolation.
///
/// Outputs are subtracted before they are summed, in f64, so that those a coordinate does not reach cancel exactly.
fn slope(op: Op<'_>, inputs: &[Tensor], which: usize, direction: &[f64], upstream: &[f32]) -> f64 {
    let output = |step: f64| {
        let x = flat(&inputs[which]);
        let moved = x.iter().zip(direction).map(|(x, d)| (f64::from(*x) + step * d) as f32).collect();
        let mut inputs = inputs.to_vec();
        inputs[which] = Tensor::from_vec(moved, inputs[which].shape(), &Device::Cpu).unwrap();
        flat(&op(&inputs).unwrap())
    };
    let difference = |step: f64| {
        let (ahead, behind) = (output(step), output(-step));
        let outputs = ahead.iter().zip(&behind).zip(upstream);
        outputs.map(|((a, b), u)| (f64::from(*a) - f64::from(*b)) * f64::from(*u)).sum::<f64>() / (2.0 * step)
    };
    (4.0 * difference(STEP) - difference(2.0 * STEP)) / 3.0
}

/// The worst error of `gradients` against [`slope`], in the units of [`TOLERANCE`].
fn worst_error(
    op: Op<'_>,
    inputs: &[Tensor],
    upstream: &[f32],
    gradients: &[Vec<f32>],
    rng: &mut ChaCha8Rng,
) -> f64 {
    let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut worst = 0f64;
    for (which, gradient) in gradients.iter().enumerate() {
        let gradient: Vec<f64> = gradient.iter().map(|g| f64::from(*g)).collect();
        let count = gradient.len();
        let root_mean_square = length(&gradient) / (count as f64).sqrt();
        for attempt in 0..DIRECTIONS + COORDINATES {
            let direction: Vec<f64> = if attempt < DIRECTIONS {
                // Of signs, so that no coordinate moves by less than its rounding.
                (0..count).map(|_| if rng.random() { 1.0 } else { -1.0 }).collect()
            } else {
                let coordinate = rng.random_range(0..count);
                (0..count).map(|i| f64::from(u8::from(i == coordinate))).collect()
            };
            let found: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
            let expected = slope(op, inputs, which, &direction, upstream);
            let error = (found - expected).abs() / (root_mean_square * length(&direction) + expected.abs());
            worst = worst.max(if error.is_finite() { error } else { f64::INFINITY });
        }
    }
    worst
}

/// Checks the backward of `op`, whose output has the shape `shape`.
fn check(name: &str, op: Op<'_>, inputs: &[Tensor], shape: &[usize], rng: &mut ChaCha8Rng) {
    let upstream = random(rng, shape);
    let (_, gradients) = run(op, inputs, &upstream);
    let error = worst_error(op, inputs, &flat(&upstream), &gradients, rng);
    println!("{name}: {error:.1e}");
    assert!(error < TOLERANCE, "{name}: {error:.1e}");
}

#[test]
fn wrong_gradients_are_found() {
    let mut rng = rng(2);
    let op: Op<'_> = &|x| rms_norm(&x[0], &x[1], 1e-5);
    let (inputs, upstream) = ([random(&mut rng, &[3, 8]), random(&mut rng, &[8])], random(&mut rng, &[3, 8]));
    let (_, right) = run(op, &inputs, &upstream);
    let mut error = |gradients: &[Vec<f32>]| worst_error(op, &inputs, &flat(&upstream), gradients, &mut rng);
    assert!(error(&right) < TOLERANCE);
    for which in 0..2 {
        let changes: [fn(&mut [f32]); 5] = [
            |g| g.iter_mut().for_each(|g| *g *= 1.01),
            |g| g.iter_mut().for_each(|g| *g = -*g),
            |g| g[0] += 0.1,
            |g| g[5] = f32::NAN,
            |g| g.fill(0.0),
        ];
        for (at, change) in changes.iter().enumerate() {
            let mut wrong = right.clone();
            change(&mut wrong[which]);
            assert!(error(&wrong) > TOLERANCE, "change {at} of gradient {which}");
        }
    }
}

#[test]
fn rms_norm_has_its_derivative() {
    let mut rng = rng(3);
    for (tokens, features) in [(1, 1), (3, 2), (5, 17), (70, 33)] {
        // A large epsilon is part of the formula too.
        for eps in [1e-5, 0.5] {
            let inputs = [random(&mut rng, &[tokens, features]), random(&mut rng, &[features])];
            if features == 1 && eps < 0.1 {
                continue; // x / |x|: nothing to differentiate
            }
            let name = format!("rms_norm of [{tokens}, {features}], eps {eps}");
            check(&name, &|x| rms_norm(&x[0], &x[1], eps), &inputs, &[tokens, features], &mut rng);
        }
    }
}

#[test]
fn the_norm_of_heads_has_its_derivative() {
    let mut rng = rng(8);
    for (tokens, heads, head_dim) in [(1, 2, 4), (5, 3, 16)] {
        let shape = [tokens, heads * head_dim];
        let inputs = [random(&mut rng, &shape), random(&mut rng, &[head_dim])];
        let of_heads: Op<'_> = &|x| {
            let rows = x[0].reshape((tokens * heads, head_dim))?;
            rms_norm(&rows, &x[1], 1e-5)?.reshape(&shape)
        };
        check(&format!("rms_norm of {tokens} x {heads} heads"), of_heads, &inputs, &shape, &mut rng);
    }
}

#[test]
fn a_bias_of_candle_has_its_derivative() {
    let mut rng = rng(9);
    for shape in [[1, 1], [5, 17], [70, 33]] {
        let inputs = [random(&mut rng, &shape), random(&mut rng, &shape[1..])];
        check(&format!("bias of {shape:?}"), &|x| x[0].broadcast_add(&x[1]), &inputs, &shape, &mut rng);
    }
}

#[test]
fn attention_has_its_derivative() {
    let mut rng = rng(4);
    let cases = [
        (vec![1], 2, 2, 2),
        (vec![2; 3], 4, 2, 4),
        (vec![7; 2], 6, 2, 8),
        (vec![33], 2, 1, 32),
        (vec![33; 2], 3, 3, 6),
        (vec![4, 1, 19, 2], 4, 2, 6),
    ];
    for (sequences, heads, kv_heads, head_dim) in cases {
        let rope = Arc::new(RopeTable::new(head_dim, sequences.iter().max().unwrap() + 3, 100.0));
        let tokens = sequences.iter().sum();
        let shape = Heads { sequences, heads, kv_heads, head_dim, rope };
        let [q, kv] = [[tokens, heads * head_dim], [tokens, kv_heads * head_dim]];
        let inputs = [random(&mut rng, &q), random(&mut rng, &kv), random(&mut rng, &kv)];
        let name = format!("attention of {:?}, {heads}/{kv_heads} heads of {head_dim}", shape.sequences);
        check_attention(&name, &shape, &inputs, &mut rng);
    }
}

/// With one token the weights are all 1, and queries and keys have no gradient: that is checked exactly.
fn check_attention(name: &str, heads: &Heads, inputs: &[Tensor; 3], rng: &mut ChaCha8Rng) {
    let shape = inputs[0].dims().to_vec();
    if heads.sequences != [1] {
        check(name, &|x| attention(&x[0], &x[1], &x[2], heads), inputs, &shape, rng);
        return;
    }
    let (_, gradients) = run(&|x| attention(&x[0], &x[1], &x[2], heads), inputs, &random(rng, &shape));
    assert!(gradients[..2].iter().flatten().all(|g| *g == 0.0), "{name}");
    check(name, &|v| attention(&inputs[0], &inputs[1], &v[0], heads), &inputs[2..], &shape, rng);
}

#[test]
fn gated_has_its_derivative() {
    let mut rng = rng(5);
    for activation in [Activation::Silu, Activation::Relu2] {
        for shape in [[1, 1], [3, 17], [5, 2000]] {
            // Away from the kink of the squared ReLU's slope, which a difference would straddle.
            let gate = random(&mut rng, &shape);
            let gate = (&gate + (gate.sign().unwrap() * 0.1).unwrap()).unwrap();
            let inputs = [gate, random(&mut rng, &shape)];
            let name = format!("{activation:?} of {shape:?}");
            if activation == Activation::Relu2 && shape == [1, 1] && flat(&inputs[0])[0] < 0.0 {
                continue; // no gradient, see below
            }
            check(&name, &|x| gated(&x[0], &x[1], activation), &inputs, &shape, &mut rng);
        }
    }
    // At and below zero the squared ReLU has no slope at all.
    let inputs =
        [[0f32, -0.0, -1.5, 2.0], [3f32, 3.0, 3.0, 3.0]].map(|x| Tensor::new(&x, &Device::Cpu).unwrap());
    let (y, gradients) =
        run(&|x| gated(&x[0], &x[1], Activation::Relu2), &inputs, &inputs[1].ones_like().unwrap());
    assert_eq!(y, [0.0, 0.0, 0.0, 12.0]);
    assert_eq!(gradients, [[0.0, 0.0, 0.0, 12.0], [0.0, 0.0, 0.0, 4.0]]);
}

#[test]
fn head_cross_entropy_has_its_derivative() {
    let mut rng = rng(6);
    // Fewer tokens than a chunk of logits, and some more than two of them.
    for (tokens, features, vocab) in [(1, 3, 2), (5, 16, 67), (1100, 8, 19)] {
        for upstream in [1.0f32, -0.37] {
            // Small logits: targets stay likely enough to matter.
            let inputs = [random(&mut rng, &[tokens, features]), random(&mut rng, &[vocab, features])]
                .map(|x| (x * 0.5).unwrap());
            let targets: Arc<[u32]> = random_targets(&mut rng, tokens, vocab as u32).into();
            let scalar = Tensor::new(upstream, &Device::Cpu).unwrap();
            let (loss, gradients) =
                run(&|x| head_cross_entropy(&x[0], &x[1], Arc::clone(&targets)), &inputs, &scalar);
            // The differences are taken from the losses before their mean, which would round them away.
            let losses: Op<'_> = &|x| Tensor::new(head_loss(&x[0], &x[1], &targets)?, &Device::Cpu);
            let each = flat(&losses(&inputs).unwrap());
            let mean = each.iter().map(|l| f64::from(*l)).sum::<f64>() / tokens as f64;
            assert_eq!(loss, [mean as f32]);
            let shares = vec![upstream / tokens as f32; tokens];
            let error = worst_error(losses, &inputs, &shares, &gradients, &mut rng);
            println!("cross-entropy of [{tokens}, {features}] with {vocab}: {error:.1e}");
            assert!(error < TOLERANCE, "cross-entropy of [{tokens}, {features}] with {vocab}: {error:.1e}");
        }
    }
}

#[test]
fn bit_linear_without_quantization_has_its_derivative() {
    let mut rng = rng(7);
    for (tokens, in_features, out_features) in [(1, 1, 1), (3, 7, 5), (66, 33, 17)] {
        let inputs =
            [random(&mut rng, &[tokens, in_features]), random(&mut rng, &[out_features, in_features])];
        let name = format!("bit_linear of [{tokens}, {in_features}] to {out_features}");
        check(&name, &|x| bit_linear(&x[0], &x[1], 0.0), &inputs, &[tokens, out_features], &mut rng);
    }
}
