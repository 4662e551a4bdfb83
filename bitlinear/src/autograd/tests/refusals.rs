//! What the operations refuse, and that NaN is never swallowed.
use std::sync::Arc;

use candle_core::DType;

use super::*;
use crate::math::{Activation, RopeTable};

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// The message of an error, which must contain all of `parts`.
fn assert_refused<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    assert_refused(rms_norm(&zeros(&[2, 3]), &zeros(&[4]), 1e-5), &["rms_norm", "[2, 3]", "[4]"]);
    assert_refused(rms_norm(&zeros(&[2, 3]), &zeros(&[1, 3]), 1e-5), &["rank"]);
    assert_refused(rms_norm(&zeros(&[]), &zeros(&[1]), 1e-5), &["rms_norm"]);
    assert_refused(rms_norm(&zeros(&[2, 0]), &zeros(&[0]), 1e-5), &["rms_norm"]);
    assert_refused(gated(&zeros(&[2, 3]), &zeros(&[3, 2]), Activation::Silu), &["gated", "[2, 3]", "[3, 2]"]);
    assert_refused(bit_linear(&zeros(&[2, 3]), &zeros(&[5, 4]), 1.0), &["bit_linear", "[2, 3]", "[5, 4]"]);
    assert_refused(bit_linear(&zeros(&[2, 3]), &zeros(&[3]), 1.0), &["rank"]);
    assert_refused(bit_linear(&zeros(&[]), &zeros(&[3, 1]), 1.0), &["bit_linear"]);
    for (out_features, in_features) in [(0, 3), (3, 0), (0, 0)] {
        for lambda in [0.0, 1.0] {
            let refused = bit_linear(&zeros(&[2, in_features]), &zeros(&[out_features, in_features]), lambda);
            assert_refused(refused, &["bit_linear"]);
        }
    }
    assert_refused(BitLinear::new(zeros(&[3]), 1.0), &["rank"]);
    let targets: Arc<[u32]> = vec![0, 1].into();
    let loss = |hidden: &[usize], head: &[usize]| {
        assert!(head_loss(&zeros(hidden), &zeros(head), &targets).is_err(), "{hidden:?} {head:?}");
        head_cross_entropy(&zeros(hidden), &zeros(head), Arc::clone(&targets))
    };
    assert_refused(loss(&[2, 3], &[5, 4]), &["cross-entropy", "[2, 3]", "[5, 4]", "2 targets"]);
    assert_refused(loss(&[3, 3], &[5, 3]), &["cross-entropy", "[3, 3]"]);
    assert_refused(loss(&[2, 0], &[5, 0]), &["cross-entropy"]);
    assert_refused(loss(&[2], &[5, 3]), &["rank"]);
    assert_refused(loss(&[2, 3], &[0, 3]), &["vocabulary"]);
    assert_refused(
        head_cross_entropy(&zeros(&[0, 3]), &zeros(&[5, 3]), Vec::new().into()),
        &["cross-entropy"],
    );
}

#[test]
fn attention_refuses_what_does_not_divide() {
    // tokens and their sequences, heads, kv_heads, head_dim, then the columns of q, k and v.
    #[allow(clippy::type_complexity)] // a table
    let cases: [(usize, &[usize], [usize; 3], [usize; 3], bool); 18] = [
        (6, &[3, 3], [4, 2, 8], [32, 16, 16], true),
        (6, &[1, 5], [4, 2, 8], [32, 16, 16], true),
        (0, &[], [4, 2, 8], [32, 16, 16], true),
        (6, &[4], [4, 2, 8], [32, 16, 16], false),
        (6, &[4, 4], [4, 2, 8], [32, 16, 16], false),
        (6, &[], [4, 2, 8], [32, 16, 16], false),
        (6, &[3, 0, 3], [4, 2, 8], [32, 16, 16], false),
        (6, &[usize::MAX, 7], [4, 2, 8], [32, 16, 16], false),
        (6, &[3, 3], [4, 3, 8], [32, 24, 24], false),
        (6, &[3, 3], [4, 0, 8], [32, 0, 0], false),
        (6, &[3, 3], [4, 2, 8], [24, 16, 16], false),
        (6, &[3, 3], [4, 2, 8], [32, 24, 16], false),
        (6, &[3, 3], [4, 2, 8], [32, 16, 24], false),
        // More positions than the table has.
        (13, &[1, 12], [4, 2, 8], [32, 16, 16], false),
        (13, &[2, 11], [4, 2, 8], [32, 16, 16], true),
        // Heads that the table does not turn as one.
        (6, &[3, 3], [2, 1, 16], [32, 16, 16], false),
        (6, &[3, 3], [8, 4, 4], [32, 16, 16], false),
        (6, &[3, 3], [4, 2, 0], [0, 0, 0], false),
    ];
    let rope = Arc::new(RopeTable::new(8, 11, 1e4));
    for (tokens, sequences, [heads, kv_heads, head_dim], columns, fits) in cases {
        let sequences = sequences.to_vec();
        let shape = Heads { sequences, heads, kv_heads, head_dim, rope: Arc::clone(&rope) };
        let [q, k, v] = columns.map(|columns| zeros(&[tokens, columns]));
        let result = attention(&q, &k, &v, &shape);
        assert_eq!(result.is_ok(), fits, "{shape:?}");
        if !fits {
            assert_refused(result, &["attention", "the shapes must agree"]);
        }
    }
    let shape = Heads { sequences: vec![3; 2], heads: 4, kv_heads: 2, head_dim: 8, rope };
    assert!(attention(&zeros(&[6, 32]), &zeros(&[3, 16]), &zeros(&[3, 16]), &shape).is_err());
    assert!(attention(&zeros(&[]), &zeros(&[3, 16]), &zeros(&[3, 16]), &shape).is_err());
}

#[test]
fn no_tokens_are_no_error() {
    assert_eq!(bit_linear(&zeros(&[0, 3]), &zeros(&[2, 3]), 1.0).unwrap().dims(), [0, 2]);
    assert_eq!(rms_norm(&zeros(&[0, 3]), &zeros(&[3]), 1e-5).unwrap().dims(), [0, 3]);
    assert_eq!(gated(&zeros(&[0, 3]), &zeros(&[0, 3]), Activation::Silu).unwrap().dims(), [0, 3]);
}

#[test]
fn a_share_of_quantization_is_between_0_and_1() {
    for lambda in [-0.1, 1.000_001, f32::NAN, f32::INFINITY] {
        assert_refused(bit_linear(&zeros(&[2, 3]), &zeros(&[4, 3]), lambda), &["share of quantization"]);
        assert_refused(BitLinear::new(zeros(&[4, 3]), lambda), &["share of quantization"]);
    }
}

#[test]
fn a_target_is_in_the_vocabulary() {
    let (hidden, head) = (zeros(&[2, 3]), zeros(&[5, 3]));
    assert_refused(head_cross_entropy(&hidden, &head, vec![0, 5].into()), &["target 5", "vocabulary of 5"]);
    assert_refused(head_loss(&hidden, &head, &[u32::MAX, 0]), &["vocabulary of 5"]);
    assert!((head_loss(&hidden, &head, &[4, 0]).unwrap()[0] - 5f32.ln()).abs() < 1e-6);
}

#[test]
fn other_types_and_strides_are_refused() {
    let wide = zeros(&[3, 3]).to_dtype(DType::F64).unwrap();
    let turned = random(&mut rng(40), &[3, 3]).t().unwrap();
    let row = zeros(&[3]);
    for (x, part) in [(&wide, "F64"), (&turned, "contiguous")] {
        assert_refused(rms_norm(x, &row, 1e-5), &[part]);
        assert_refused(gated(x, x, Activation::Relu2), &[part]);
        assert_refused(bit_linear(x, &zeros(&[2, 3]), 1.0), &[part]);
        assert_refused(bit_linear(&zeros(&[2, 3]), x, 0.0), &[part]);
        assert_refused(head_loss(x, &zeros(&[2, 3]), &[0, 0, 0]), &[part]);
        assert_refused(head_cross_entropy(x, &zeros(&[2, 3]), vec![0; 3].into()), &[part]);
    }
    let heads = Heads {
        sequences: vec![2; 2],
        heads: 2,
        kv_heads: 2,
        head_dim: 2,
        rope: Arc::new(RopeTable::new(2, 2, 9.0)),
    };
    let turned = random(&mut rng(41), &[4, 4]).t().unwrap();
    assert_refused(attention(&turned, &turned, &turned, &heads), &["contiguous"]);
}

#[test]
fn a_second_backward_through_the_loss_is_refused() {
    let mut rng = rng(42);
    let hidden = Var::from_tensor(&random(&mut rng, &[2, 3])).unwrap();
    let loss = head_cross_entropy(&hidden, &random(&mut rng, &[5, 3]), vec![0, 1].into()).unwrap();
    assert!(loss.backward().is_ok());
    assert_refused(loss.backward(), &["second backward", "compute the loss again"]);
}

/// Which rows of `[rows, ..]` values are all NaN, where the others are all finite.
fn nan_rows(values: &Tensor) -> Vec<usize> {
    let values = values.to_vec2::<f32>().unwrap();
    let bad: Vec<usize> = (0..values.len()).filter(|row| values[*row].iter().any(|x| x.is_nan())).collect();
    for (row, values) in values.iter().enumerate() {
        assert!(values.iter().all(|x| x.is_finite() != bad.contains(&row)), "row {row}: {values:?}");
    }
    bad
}

#[test]
fn nan_reaches_the_output() {
    let mut rng = rng(43);
    let with_nan = |rng: &mut ChaCha8Rng, at: usize| {
        let mut values = random_values(rng, 4 * 6);
        values[at] = f32::NAN;
        Tensor::from_vec(values, (4, 6), &Device::Cpu).unwrap()
    };
    let (good, bad) = (random(&mut rng, &[4, 6]), with_nan(&mut rng, 2 * 6 + 1));
    for lambda in [0.0, 0.3, 1.0] {
        assert_eq!(nan_rows(&bit_linear(&bad, &good, lambda).unwrap()), [2], "x, lambda {lambda}");
        let y = bit_linear(&good, &bad, lambda).unwrap();
        // One NaN in a weight spoils its output feature, and the whole layer once it is in the scale.
        let expected = if lambda == 0.0 { vec![2] } else { vec![0, 1, 2, 3] };
        assert_eq!(nan_rows(&y.t().unwrap()), expected, "W, lambda {lambda}");
    }
    let infinite = (&good * f64::INFINITY).unwrap();
    assert!(flat(&bit_linear(&infinite, &good, 1.0).unwrap()).iter().all(|y| !y.is_finite()));
    assert_eq!(nan_rows(&rms_norm(&bad, &random(&mut rng, &[6]), 1e-5).unwrap()), [2]);
    for activation in [Activation::Silu, Activation::Relu2] {
        for (gate, up) in [(&bad, &good), (&good, &bad)] {
            let y = flat(&gated(gate, up, activation).unwrap());
            assert!(y.iter().enumerate().all(|(at, y)| y.is_nan() == (at == 13)), "{activation:?}");
        }
    }
    // Token 2 is the first of the second sequence: both of its tokens see it as key and value, itself alone as query.
    let heads = Heads {
        sequences: vec![2; 2],
        heads: 1,
        kv_heads: 1,
        head_dim: 6,
        rope: Arc::new(RopeTable::new(6, 2, 9.0)),
    };
    let mixed = |q: &Tensor, k: &Tensor, v: &Tensor| {
        let y = attention(q, k, v, &heads).unwrap().to_vec2::<f32>().unwrap();
        (0..4).filter(|row| y[*row].iter().any(|y| y.is_nan())).collect::<Vec<_>>()
    };
    assert_eq!(mixed(&bad, &good, &good), [2]);
    assert_eq!(mixed(&good, &bad, &good), [2, 3]);
    assert_eq!(mixed(&good, &good, &bad), [2, 3]);
    let losses = head_loss(&bad, &good, &[0, 1, 2, 3]).unwrap();
    assert!(losses.iter().enumerate().all(|(token, loss)| loss.is_nan() == (token == 2)), "{losses:?}");
    let loss = head_cross_entropy(&bad, &good, vec![0, 1, 2, 3].into()).unwrap();
    assert!(loss.to_scalar::<f32>().unwrap().is_nan());
}
