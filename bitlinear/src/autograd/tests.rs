//! The training operations against finite differences, plain candle operations, the slice functions and themselves.
use candle_core::{Device, Result, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

mod bits;
mod compositions;
mod finite_differences;
mod refusals;
mod straight_through;

/// Largest relative error of an f32 result against the same formula in another order of operations: sums of up to a
/// thousand products, each rounded to 2^-24, come out 1e-6 apart; a wrong term or factor, one part in a hundred.
const ROUNDING: f64 = 2e-5;

/// What a test differentiates: an operation on some tensors.
type Op<'a> = &'a (dyn Fn(&[Tensor]) -> Result<Tensor> + Sync);

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// Uniform values between -2 and 2.
fn random_values(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random_range(-2.0..2.0)).collect()
}

fn random(rng: &mut ChaCha8Rng, shape: &[usize]) -> Tensor {
    Tensor::from_vec(random_values(rng, shape.iter().product()), shape, &Device::Cpu).unwrap()
}

fn random_targets(rng: &mut ChaCha8Rng, count: usize, vocab: u32) -> Vec<u32> {
    (0..count).map(|_| rng.random_range(0..vocab)).collect()
}

/// The values of a tensor of any shape.
fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// `op` of the inputs, and the gradients of the inputs for the gradient `upstream` of its output.
fn run(op: Op<'_>, inputs: &[Tensor], upstream: &Tensor) -> (Vec<f32>, Vec<Vec<f32>>) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let gradients = (&y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
    (flat(&y), vars.iter().map(|v| flat(gradients.get(v).expect("a gradient for every input"))).collect())
}

/// The largest difference, in units of the largest magnitude expected. Infinite for another length, for NaN, and for
/// anything but zero where only zero is expected.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let differences = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - f64::from(*e)).abs());
    match (differences.fold(0.0, f64::max), expected.iter().map(|e| f64::from(e.abs())).fold(0.0, f64::max)) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::INFINITY,
        (difference, largest) => difference / largest,
    }
}

#[test]
fn the_relative_error_sees_what_it_should() {
    assert_eq!(relative_error(&[1.0, -4.0], &[1.0, -4.0]), 0.0);
    assert_eq!(relative_error(&[1.0, -3.0], &[1.0, -4.0]), 0.25);
    assert!(relative_error(&[1.0001], &[1.0]) > ROUNDING);
    assert_eq!(relative_error(&[0.0], &[0.0]), 0.0);
    let never: [(&[f32], &[f32]); 5] =
        [(&[1e-30], &[0.0]), (&[f32::NAN], &[1.0]), (&[1.0], &[f32::NAN]), (&[1.0], &[]), (&[], &[1.0])];
    for (found, expected) in never {
        assert_eq!(relative_error(found, expected), f64::INFINITY, "{found:?} {expected:?}");
    }
}

#[test]
fn every_variable_of_a_chain_of_all_operations_learns() {
    let (vocab, width, ffn, tokens) = (31, 24, 40, 14);
    let rope = std::sync::Arc::new(crate::math::RopeTable::new(6, 7, 1e4));
    let heads = Heads { sequences: vec![7; 2], heads: 4, kv_heads: 2, head_dim: 6, rope };
    for lambda in [0.0, 0.5, 1.0] {
        let mut rng = rng(1);
        let shapes: [(&str, &[usize]); 11] = [
            ("embedding", &[vocab, width]),
            ("norm", &[width]),
            ("q", &[width, width]),
            ("k", &[width / 2, width]),
            ("v", &[width / 2, width]),
            ("o", &[width, width]),
            ("gate", &[ffn, width]),
            ("up", &[ffn, width]),
            ("sub-norm", &[ffn]),
            ("down", &[width, ffn]),
            ("head", &[vocab, width]),
        ];
        let vars = shapes.map(|(name, shape)| (name, Var::from_tensor(&random(&mut rng, shape)).unwrap()));
        let [embedding, norm, q, k, v, o, gate, up, sub_norm, down, head] =
            vars.each_ref().map(|(_, v)| v.as_tensor());
        let linear = |x: &Tensor, w: &Tensor| bit_linear(x, w, lambda).unwrap();
        let ids = Tensor::new(random_targets(&mut rng, tokens, vocab as u32), &Device::Cpu).unwrap();
        let x = embedding.index_select(&ids, 0).unwrap();
        let h = rms_norm(&x, norm, 1e-5).unwrap();
        let a = attention(&linear(&h, q), &linear(&h, k), &linear(&h, v), &heads).unwrap();
        let x = (x + linear(&a, o)).unwrap();
        let m = gated(&linear(&x, gate), &linear(&x, up), crate::math::Activation::Silu).unwrap();
        let x = (&x + linear(&rms_norm(&m, sub_norm, 1e-5).unwrap(), down)).unwrap();
        let loss =
            head_cross_entropy(&x, head, random_targets(&mut rng, tokens, vocab as u32).into()).unwrap();
        let gradients = loss.backward().unwrap();
        for (name, var) in &vars {
            let gradient = flat(gradients.get(var).expect(name));
            assert!(gradient.iter().all(|g| g.is_finite()), "{name} at lambda {lambda}");
            assert!(gradient.iter().any(|g| *g != 0.0), "{name} at lambda {lambda}");
        }
    }
}
