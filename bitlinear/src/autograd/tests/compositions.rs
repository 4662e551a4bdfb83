//! Every operation against the same formula composed of candle's own differentiable operations, forward and backward.
use std::sync::Arc;

use candle_core::D;

use super::*;
use crate::math::{Activation, RopeTable};

/// Compares outputs and gradients of two forms of an operation.
fn compare(name: &str, ours: Op<'_>, composed: Op<'_>, inputs: &[Tensor], rng: &mut ChaCha8Rng) {
    let upstream = random(rng, composed(inputs).unwrap().dims());
    let (found, expected) = (run(ours, inputs, &upstream), run(composed, inputs, &upstream));
    let error = relative_error(&found.0, &expected.0);
    assert!(error < ROUNDING, "{name}: output {error:.1e}");
    for (which, (found, expected)) in found.1.iter().zip(&expected.1).enumerate() {
        let error = relative_error(found, expected);
        assert!(error < ROUNDING, "{name}: gradient of input {which} {error:.1e}");
    }
}

fn composed_rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(weight)
}

#[test]
fn rms_norm_is_its_composition() {
    let mut rng = rng(20);
    let shapes: [&[usize]; 5] = [&[9], &[1, 2], &[5, 17], &[3, 4, 16], &[100, 64]];
    for shape in shapes {
        let inputs = [random(&mut rng, shape), random(&mut rng, &shape[shape.len() - 1..])];
        let ours: Op<'_> = &|x| rms_norm(&x[0], &x[1], 1e-3);
        compare(
            &format!("rms_norm of {shape:?}"),
            ours,
            &|x| composed_rms_norm(&x[0], &x[1], 1e-3),
            &inputs,
            &mut rng,
        );
    }
}

/// Softmax over the last dimension.
fn composed_softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

/// Rotary embedding of `[sequences, heads, positions, dim]`, its angles computed here.
fn composed_rope(x: &Tensor, theta: f64) -> Result<Tensor> {
    let (_, _, positions, dim) = x.dims4()?;
    let half = dim / 2;
    let angle = |p: usize, i: usize| p as f64 * theta.powf(-2.0 * i as f64 / dim as f64);
    let table = |f: fn(f64) -> f64| {
        let values = (0..positions).flat_map(|p| (0..half).map(move |i| f(angle(p, i)) as f32)).collect();
        Tensor::from_vec(values, (positions, half), &Device::Cpu)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

/// For sequences of one length.
fn composed_attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: &Heads, theta: f64) -> Result<Tensor> {
    let Heads { sequences, heads: query_heads, kv_heads, head_dim, .. } = heads.clone();
    let (sequences, length, group) = (sequences.len(), sequences[0], query_heads / kv_heads);
    let split =
        |x: &Tensor, heads| x.reshape((sequences, length, heads, head_dim))?.transpose(1, 2)?.contiguous();
    // Key/value head `i` serves query heads `i * group` to `i * group + group - 1`.
    let repeat = |x: Tensor| {
        x.unsqueeze(2)?
            .broadcast_as((sequences, kv_heads, group, length, head_dim))?
            .reshape((sequences, query_heads, length, head_dim))?
            .contiguous()
    };
    let (q, k) =
        (composed_rope(&split(q, query_heads)?, theta)?, composed_rope(&split(k, kv_heads)?, theta)?);
    let scores = (q.matmul(&repeat(k)?.t()?.contiguous()?)? / (head_dim as f64).sqrt())?;
    let mask: Vec<f32> = (0..length * length)
        .map(|at| if at % length > at / length { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (length, length), &Device::Cpu)?)?;
    let mixed = composed_softmax(&scores)?.matmul(&repeat(split(v, kv_heads)?)?)?;
    mixed.transpose(1, 2)?.contiguous()?.reshape((sequences * length, query_heads * head_dim))
}

#[test]
fn attention_is_its_composition() {
    let mut rng = rng(21);
    let cases = [
        (1, 1, 1, 1, 2),
        (3, 2, 4, 2, 4),
        (2, 7, 6, 2, 8),
        (1, 33, 4, 4, 32),
        (3, 33, 6, 3, 6),
        (1, 130, 8, 1, 16),
    ];
    for (sequences, sequence_length, heads, kv_heads, head_dim) in cases {
        let rope = Arc::new(RopeTable::new(head_dim, sequence_length, 50.0));
        let shape = Heads { sequences: vec![sequence_length; sequences], heads, kv_heads, head_dim, rope };
        let tokens = sequences * sequence_length;
        let [q, kv] = [[tokens, heads * head_dim], [tokens, kv_heads * head_dim]];
        let inputs = [random(&mut rng, &q), random(&mut rng, &kv), random(&mut rng, &kv)];
        let name =
            format!("attention of {sequences} x {sequence_length}, {heads}/{kv_heads} heads of {head_dim}");
        let ours: Op<'_> = &|x| attention(&x[0], &x[1], &x[2], &shape);
        if sequence_length > 1 {
            compare(
                &name,
                ours,
                &|x| composed_attention(&x[0], &x[1], &x[2], &shape, 50.0),
                &inputs,
                &mut rng,
            );
        } else {
            // A softmax over one token is 1: queries and keys have no gradient but rounding errors of the composition.
            let found = flat(&ours(&inputs).unwrap());
            assert_eq!(found, flat(&inputs[2]), "{name}");
        }
    }
}

#[test]
fn gated_is_its_composition() {
    let mut rng = rng(22);
    let shapes: [&[usize]; 4] = [&[1], &[5, 7], &[2, 3, 4], &[9, 2000]];
    for shape in shapes {
        let inputs = [(random(&mut rng, shape) * 4.0).unwrap(), random(&mut rng, shape)];
        let silu: Op<'_> = &|x| x[0].neg()?.exp()?.affine(1.0, 1.0)?.recip()?.mul(&x[0])?.mul(&x[1]);
        let relu2: Op<'_> = &|x| x[0].relu()?.sqr()?.mul(&x[1]);
        for (activation, composed) in [(Activation::Silu, silu), (Activation::Relu2, relu2)] {
            let name = format!("{activation:?} of {shape:?}");
            compare(&name, &|x| gated(&x[0], &x[1], activation), composed, &inputs, &mut rng);
        }
    }
}

#[test]
fn head_cross_entropy_is_its_composition() {
    let mut rng = rng(23);
    for (tokens, features, vocab) in
        [(1, 1, 1), (1, 4, 9), (24, 32, 67), (511, 5, 7), (512, 5, 7), (513, 5, 7), (1300, 24, 130)]
    {
        let inputs = [random(&mut rng, &[tokens, features]), random(&mut rng, &[vocab, features])];
        let targets: Arc<[u32]> = random_targets(&mut rng, tokens, vocab as u32).into();
        let column = Tensor::from_vec(targets.to_vec(), (tokens, 1), &Device::Cpu).unwrap();
        let composed: Op<'_> = &|x| {
            let logits = x[0].matmul(&x[1].t()?)?;
            let max = logits.max_keepdim(1)?.detach();
            let normalizer = (logits.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max)?;
            (normalizer - logits.gather(&column, 1)?)?.mean_all()
        };
        let ours: Op<'_> = &|x| head_cross_entropy(&x[0], &x[1], Arc::clone(&targets));
        let name = format!("cross-entropy of [{tokens}, {features}] with {vocab}");
        if vocab > 1 {
            compare(&name, ours, composed, &inputs, &mut rng);
        } else {
            let (loss, gradients) = run(ours, &inputs, &Tensor::new(1f32, &Device::Cpu).unwrap());
            assert!(loss == [0.0] && gradients.iter().flatten().all(|g| *g == 0.0), "{name}");
        }
    }
}

/// The straight-through estimator as it is usually written. No value here sits on a tie, where candle rounds away from
/// zero and we to even.
fn composed_bit_linear(x: &Tensor, w: &Tensor, lambda: f64) -> Result<Tensor> {
    let largest = x.abs()?.max_keepdim(D::Minus1)?.detach();
    let codes = (x.broadcast_div(&largest)? * 127.0)?.round()?;
    let x = (x + ((codes.broadcast_mul(&largest)? / 127.0)? - x)?.affine(lambda, 0.0)?.detach())?;
    let mean = w.abs()?.mean_all()?.detach();
    let codes = w.broadcast_div(&mean)?.round()?.clamp(-1f32, 1f32)?;
    let w = (w + (codes.broadcast_mul(&mean)? - w)?.affine(lambda, 0.0)?.detach())?;
    x.matmul(&w.t()?)
}

#[test]
fn bit_linear_is_its_composition() {
    let mut rng = rng(24);
    for lambda in [0.0f32, 0.3, 1.0] {
        for (tokens, ins, outs) in [(1, 2, 1), (5, 33, 17), (64, 40, 130), (100, 300, 20)] {
            let inputs = [random(&mut rng, &[tokens, ins]), random(&mut rng, &[outs, ins])];
            let ours: Op<'_> = &|x| bit_linear(&x[0], &x[1], lambda);
            let composed: Op<'_> = &|x| composed_bit_linear(&x[0], &x[1], f64::from(lambda));
            compare(
                &format!("bit_linear of [{tokens}, {ins}] to {outs}, lambda {lambda}"),
                ours,
                composed,
                &inputs,
                &mut rng,
            );
        }
    }
}

#[test]
fn every_leading_dimension_is_a_token() {
    let mut rng = rng(25);
    let (x, w) = (random(&mut rng, &[3, 5, 8]), random(&mut rng, &[6, 8]));
    let upstream = random(&mut rng, &[3, 5, 6]);
    let (y, gradients) = run(&|x| bit_linear(&x[0], &x[1], 1.0), &[x.clone(), w.clone()], &upstream);
    let rows = |t: &Tensor, width| t.reshape((15, width)).unwrap();
    let (expected, expected_gradients) =
        run(&|x| bit_linear(&x[0], &x[1], 1.0), &[rows(&x, 8), w.clone()], &rows(&upstream, 6));
    assert_eq!((y, gradients), (expected, expected_gradients));
    assert_eq!(bit_linear(&x, &w, 1.0).unwrap().dims(), [3, 5, 6]);
    assert_eq!(bit_linear(&x.get(0).unwrap().get(0).unwrap(), &w, 0.5).unwrap().dims(), [6]);
}

#[test]
fn slices_of_larger_tensors_and_turned_gradients_are_understood() {
    let mut rng = rng(26);
    let (x, w) = (random(&mut rng, &[9, 8]), random(&mut rng, &[6, 8]));
    let turned = random(&mut rng, &[6, 4]);
    // Rows 3 to 6 start in the middle of a storage; the transpose's gradient arrives with turned strides.
    let part: Op<'_> = &|x| bit_linear(&x[0].narrow(0, 3, 4)?, &x[1], 0.5)?.t();
    let (y, gradients) = run(part, &[x.clone(), w.clone()], &turned);
    let whole = x.narrow(0, 3, 4).unwrap().copy().unwrap();
    let upstream = turned.t().unwrap().contiguous().unwrap();
    let (expected, expected_gradients) = run(&|x| bit_linear(&x[0], &x[1], 0.5), &[whole, w], &upstream);
    let expected = flat(&Tensor::from_vec(expected, (4, 6), &Device::Cpu).unwrap().t().unwrap());
    assert_eq!(y, expected);
    assert_eq!(gradients[0][24..56], expected_gradients[0]);
    assert!(gradients[0][..24].iter().chain(&gradients[0][56..]).all(|g| *g == 0.0));
    assert_eq!(gradients[1], expected_gradients[1]);
}

#[test]
fn bit_linear_on_other_devices_is_the_operation_of_the_cpu() {
    let mut rng = rng(27);
    for (tokens, ins, outs) in [(1, 1, 1), (5, 16, 3), (40, 130, 70)] {
        let inputs = [random(&mut rng, &[2, tokens, ins]), random(&mut rng, &[outs, ins])];
        for lambda in [0.0, 0.5, 1.0] {
            let ours: Op<'_> = &|x| bit_linear(&x[0], &x[1], lambda);
            let composed: Op<'_> = &|x| super::super::bit_linear::composed(&x[0], &x[1], lambda);
            compare(&format!("bit_linear at {lambda}"), ours, composed, &inputs, &mut rng);
        }
    }
}
