//! The slice operations against candle's graph of the same formulas, whose gradients are tested against finite differences
//! and PyTorch.
use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::autograd;
use crate::math::{Activation, RopeTable};
use crate::products::Precision;

mod finite_differences;
mod head;
mod reference;
mod relations;
mod sequences;

/// Largest relative error of results that are computed in f32.
const ROUNDING: f64 = 2e-5;
/// The same where operands are rounded to bf16, or gradients to int8 by at most one part in 254 of the largest.
const COARSE: f64 = 2e-2;

struct Random(ChaCha8Rng);

impl Random {
    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.0.random_range(-2.0..2.0)).collect()
    }
}

fn random(seed: u64) -> Random {
    Random(ChaCha8Rng::seed_from_u64(seed))
}

fn var(values: &[f32], columns: usize) -> Var {
    Var::from_vec(values.to_vec(), (values.len() / columns, columns), &Device::Cpu).unwrap()
}

/// The gain of a norm is a vector.
fn gain(values: &[f32]) -> Var {
    Var::from_vec(values.to_vec(), values.len(), &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Gradients of `Σ y * upstream`.
fn gradients(y: &Tensor, upstream: &[f32], vars: &[&Var]) -> Vec<Vec<f32>> {
    let upstream = Tensor::from_vec(upstream.to_vec(), y.shape(), &Device::Cpu).unwrap();
    let store = (y * upstream).unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|var| flat(store.get(var).unwrap())).collect()
}

/// Euclidean length of the difference, in units of the expected length.
fn error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(&mut difference.into_iter()) / norm(&mut expected.iter().map(|x| f64::from(*x)))
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], bound: f64) {
    let error = error(found, expected);
    assert!(error < bound, "{what}: {error:.1e}");
}

/// `x + share (rms_norm(x) - x)`
fn blended(x: &Tensor, weight: &Tensor, share: f64) -> Tensor {
    let norm = autograd::rms_norm(x, weight, 1e-5).unwrap();
    (((norm - x).unwrap() * share).unwrap() + x).unwrap()
}

#[test]
fn rms_norm_has_the_gradients_of_the_graph() {
    let mut r = random(1);
    for (tokens, features) in [(1, 1), (7, 15), (70, 129)] {
        let [x, grad, before] = [0; 3].map(|_| r.values(tokens * features));
        let (weight, start) = (r.values(features), r.values(features));
        let (x_var, w_var) = (var(&x, features), gain(&weight));
        for share in [1.0, 0.3] {
            let y = blended(&x_var, &w_var, f64::from(share));
            let expected = gradients(&y, &grad, &[&x_var, &w_var]);
            let norm = Norm { weight: &weight, eps: 1e-5, share };
            let (mut grad_x, mut grad_w) = (before.clone(), start.clone());
            rms_norm_backward(norm, &x, &grad, 0.5, &mut grad_x, &mut grad_w);
            let sum: Vec<f32> = expected[0].iter().zip(&before).map(|(a, b)| a + b).collect();
            assert_close("x", &grad_x, &sum, ROUNDING);
            let sum: Vec<f32> = expected[1].iter().zip(&start).map(|(a, b)| a + 0.5 * b).collect();
            assert_close("weight", &grad_w, &sum, ROUNDING);

            let (mut out, mut in_place) = (vec![f32::NAN; x.len()], x.clone());
            norm.forward(&x, &mut out);
            norm.forward_in_place(&mut in_place);
            assert_close("forward", &out, &flat(&y), ROUNDING);
            assert_eq!(out, in_place);
        }
    }
}

#[test]
fn a_norm_of_which_nothing_is_blended_in_is_not_there() {
    let mut r = random(11);
    let [x, grad, weight] = [35, 35, 7].map(|count| r.values(count));
    let norm = Norm { weight: &weight, eps: 1e-5, share: 0.0 };
    let (mut out, mut grad_x, mut grad_w) = (vec![f32::NAN; 35], vec![0.0; 35], vec![f32::NAN; 7]);
    norm.forward(&x, &mut out);
    rms_norm_backward(norm, &x, &grad, 0.0, &mut grad_x, &mut grad_w);
    assert_eq!((out, grad_x, grad_w), (x, grad, vec![0.0; 7]));
}

#[test]
fn the_gated_activation_and_its_norm_have_the_gradients_of_the_graph() {
    let mut r = random(2);
    for activation in [Activation::Silu, Activation::Relu2] {
        for (tokens, features) in [(1, 3), (40, 129)] {
            let [gate, up, grad] = [0; 3].map(|_| r.values(tokens * features));
            let weight = r.values(features);
            let (gate_var, up_var) = (var(&gate, features), var(&up, features));
            let w_var = gain(&weight);
            let product = autograd::gated(&gate_var, &up_var, activation).unwrap();
            let (mut grad_gate, mut grad_up) = (vec![f32::NAN; gate.len()], vec![f32::NAN; gate.len()]);
            let mut grad_w = vec![f32::NAN; features];

            let expected = gradients(&product, &grad, &[&gate_var, &up_var]);
            let inputs = [&gate[..], &up, &grad];
            gated_backward(activation, None, inputs, features, 0.0, &mut grad_gate, &mut grad_up, &mut []);
            assert_close("gate", &grad_gate, &expected[0], ROUNDING);
            assert_close("up", &grad_up, &expected[1], ROUNDING);

            for share in [1.0, 0.3] {
                let y = blended(&product, &w_var, f64::from(share));
                let expected = gradients(&y, &grad, &[&gate_var, &up_var, &w_var]);
                let norm = Some(Norm { weight: &weight, eps: 1e-5, share });
                let (gate, up, gain) = (&mut grad_gate, &mut grad_up, &mut grad_w);
                gated_backward(activation, norm, inputs, features, 0.0, gate, up, gain);
                assert_close("gate before a norm", &grad_gate, &expected[0], ROUNDING);
                assert_close("up before a norm", &grad_up, &expected[1], ROUNDING);
                assert_close("norm", &grad_w, &expected[2], ROUNDING);
            }
        }
    }
}

#[test]
fn attention_is_that_of_the_graph() {
    let mut r = random(3);
    // One block of queries, whole blocks, and a block begun; grouped heads.
    for (sequences, sequence_length, heads, kv_heads, head_dim) in
        [(3, 1, 1, 1, 2), (2, 64, 2, 2, 16), (2, 150, 4, 2, 6), (1, 129, 3, 1, 64)]
    {
        let rope = std::sync::Arc::new(RopeTable::new(head_dim, sequence_length, 1e4));
        let shape = Heads { sequences: vec![sequence_length; sequences], heads, kv_heads, head_dim, rope };
        let tokens = sequences * sequence_length;
        let [q, grad] = [0; 2].map(|_| r.values(tokens * heads * head_dim));
        let [k, v] = [0; 2].map(|_| r.values(tokens * kv_heads * head_dim));
        let vars = [var(&q, heads * head_dim), var(&k, kv_heads * head_dim), var(&v, kv_heads * head_dim)];
        let y = autograd::attention(&vars[0], &vars[1], &vars[2], &shape).unwrap();
        let expected = gradients(&y, &grad, &vars.each_ref());

        let (mut log_sums, mut room, mut out) = (Vec::new(), Vec::new(), vec![f32::NAN; q.len()]);
        attention(&shape, &q, &k, &v, &mut log_sums, &mut room, &mut out);
        assert_close("attention", &out, &flat(&y), ROUNDING);
        let mut found = [vec![f32::NAN; q.len()], vec![f32::NAN; k.len()], vec![f32::NAN; v.len()]];
        let outs = found.each_mut().map(Vec::as_mut_slice);
        attention_backward(&shape, [&q, &k, &v], &log_sums, &grad, &mut Default::default(), outs);
        if sequence_length == 1 {
            // Its own key alone: no slope, and all of the gradient goes to the value.
            assert!(found[0].iter().chain(&found[1]).all(|g| g.abs() < 1e-6), "{found:?}");
        } else {
            assert_close("q", &found[0], &expected[0], COARSE);
            assert_close("k", &found[1], &expected[1], COARSE);
        }
        assert_close("v", &found[2], &expected[2], COARSE);
    }
}

#[test]
fn the_head_has_the_loss_and_the_gradients_of_the_graph() {
    let mut r = random(4);
    for (tokens, features, vocab) in [(1, 3, 2), (40, 65, 300), (600, 32, 70)] {
        let (hidden, head) = (r.values(tokens * features), r.values(vocab * features));
        let targets: Vec<u32> = (0..tokens).map(|_| r.0.random_range(0..vocab as u32)).collect();
        let (h_var, w_var) = (var(&hidden, features), var(&head, features));
        let ids = Tensor::new(targets.clone(), &Device::Cpu).unwrap();
        let logits = h_var.matmul(&w_var.t().unwrap()).unwrap();
        let log_sum = logits.log_sum_exp(1).unwrap();
        let chosen = logits.gather(&ids.unsqueeze(1).unwrap(), 1).unwrap().squeeze(1).unwrap();
        let loss = (log_sum - chosen).unwrap().mean_all().unwrap();
        let expected = gradients(&loss, &[1.0], &[&h_var, &w_var]);
        let start = r.values(head.len());
        for (precision, bound) in [(Precision::F32, ROUNDING), (Precision::Bf16, COARSE)] {
            let (mut grad_hidden, mut grad_head) = (vec![f32::NAN; hidden.len()], vec![f32::NAN; head.len()]);
            let mut step = |keep, grad_head: &mut [f32]| {
                let scale = 1.0 / tokens as f32;
                let operands = [&hidden[..], &head];
                let loss = HeadLoss::cross_entropy(&targets);
                let room = &mut Default::default();
                head_loss(precision, operands, &loss, scale, keep, room, &mut grad_hidden, grad_head)
            };
            let total = step(0.0, &mut grad_head).cross_entropy;
            let mean = f64::from(loss.to_scalar::<f32>().unwrap());
            assert!((total / tokens as f64 - mean).abs() < bound * mean, "{total}, {mean}");
            assert_close("head", &grad_head, &expected[1], bound);
            grad_head.copy_from_slice(&start);
            step(1.0, &mut grad_head);
            let sum: Vec<f32> = expected[1].iter().zip(&start).map(|(a, b)| a + b).collect();
            assert_close("head, added", &grad_head, &sum, bound);
            assert_close("hidden", &grad_hidden, &expected[0], bound);
        }
        let losses = head_losses(&hidden, &head, &targets);
        let expected = hidden.chunks_exact(features).zip(&targets).map(|(hidden, target)| {
            let dot = |row: &[f32]| row.iter().zip(hidden).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let logits: Vec<f64> = head.chunks_exact(features).map(dot).collect();
            (logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[*target as usize]) as f32
        });
        assert_close("losses", &losses, &expected.collect::<Vec<f32>>(), ROUNDING);
    }
}

#[test]
fn projections_are_bit_linears_with_their_gradients() {
    let mut r = random(5);
    for (tokens, ins, outs) in [(1, 1, [1, 2, 3]), (5, 17, [4, 5, 1]), (300, 130, [70, 20, 33])] {
        let x = r.values(tokens * ins);
        let latents = outs.map(|out| r.values(out * ins));
        // Gradients of all sizes, as those of single tokens are.
        let grads = outs.map(|out| {
            let mut grad = r.values(tokens * out);
            for (token, row) in grad.chunks_exact_mut(out).enumerate() {
                row.iter_mut().for_each(|g| *g *= 1e-7 * (1 + token % 9) as f32);
            }
            grad
        });
        for lambda in [0.0, 0.4, 1.0] {
            let x_var = var(&x, ins);
            let vars = latents.each_ref().map(|latent| var(latent, ins));
            let borrowed = latents.each_ref().map(|weight| Latent { weight, quantized: true });
            let projections = Projections::new(&borrowed, ins, lambda, Precision::Bf16).unwrap();
            let mut input = Input::default();
            projections.input(&mut input, tokens, |row, out| out.copy_from_slice(&x[row * ins..][..ins]));
            let mut found = outs.map(|out| vec![f32::NAN; tokens * out]);
            projections.forward(&input, &mut found.each_mut().map(Vec::as_mut_slice)).unwrap();

            let (mut grad_x, mut sum_x) = (vec![f32::NAN; x.len()], vec![0f32; x.len()]);
            let mut grad_w = outs.map(|out| vec![f32::NAN; out * ins]);
            let borrowed = grads.each_ref().map(Vec::as_slice);
            projections
                .backward(
                    &input,
                    &borrowed,
                    0.0,
                    &mut Scratch::default(),
                    &mut grad_x,
                    &mut grad_w.each_mut().map(Vec::as_mut_slice),
                )
                .unwrap();
            for p in 0..outs.len() {
                let y = autograd::bit_linear(&x_var, &vars[p], lambda).unwrap();
                let expected = gradients(&y, &grads[p], &[&x_var, &vars[p]]);
                if lambda == 1.0 {
                    assert_eq!(found[p], flat(&y), "the same bits");
                } else {
                    assert_close("forward", &found[p], &flat(&y), COARSE);
                }
                assert_close("weight", &grad_w[p], &expected[1], COARSE);
                sum_x.iter_mut().zip(&expected[0]).for_each(|(sum, g)| *sum += g);
            }
            assert_close("x", &grad_x, &sum_x, COARSE);
        }
    }
}

/// Outputs, gradient of the input and gradients of the weights of projections, which begin as ones and count half.
fn step(
    projections: &Projections<'_>,
    input: &mut Input,
    x: &[f32],
    grads: &[&[f32]],
    sizes: &[usize],
) -> (Vec<Vec<f32>>, Vec<f32>, Vec<Vec<f32>>) {
    let tokens = grads[0].len() / sizes[0];
    let ins = x.len() / tokens;
    projections.input(input, tokens, |row, out| out.copy_from_slice(&x[row * ins..][..ins]));
    let mut outs: Vec<_> = sizes.iter().map(|size| vec![f32::NAN; tokens * size]).collect();
    projections.forward(input, &mut outs.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>()).unwrap();
    let mut grad_x = vec![f32::NAN; x.len()];
    let mut grad_w: Vec<_> = sizes.iter().map(|size| vec![1f32; size * ins]).collect();
    let mut borrowed: Vec<_> = grad_w.iter_mut().map(Vec::as_mut_slice).collect();
    projections.backward(input, grads, 0.5, &mut Scratch::default(), &mut grad_x, &mut borrowed).unwrap();
    (outs, grad_x, grad_w)
}

#[test]
fn a_group_of_both_kinds_is_the_groups_of_each() {
    let mut r = random(6);
    let sizes = [70, 20, 33, 9];
    // An input that is used again holds nothing of its last use.
    let mut input = Input::default();
    for (tokens, ins) in [(1, 1), (5, 17), (300, 130), (40, 64)] {
        let x = r.values(tokens * ins);
        let weights = sizes.map(|size| r.values(size * ins));
        let grads = sizes.map(|size| r.values(tokens * size));
        for quantized in [[true, false, true, false], [false, true, false, false], [true, true, true, false]]
        {
            for lambda in [0.4, 1.0, 0.0] {
                let mut of = |chosen: &[usize], lambda, flag: fn(bool) -> bool| {
                    let latent = |p: &usize| Latent { weight: &weights[*p], quantized: flag(quantized[*p]) };
                    let latents: Vec<_> = chosen.iter().map(latent).collect();
                    let projections = Projections::new(&latents, ins, lambda, Precision::Bf16).unwrap();
                    let grads: Vec<&[f32]> = chosen.iter().map(|p| &*grads[*p]).collect();
                    let sizes: Vec<_> = chosen.iter().map(|p| sizes[*p]).collect();
                    step(&projections, &mut input, &x, &grads, &sizes)
                };
                let (outs, grad_x, grad_w) = of(&[0, 1, 2, 3], lambda, |quantized| quantized);
                let [yes, no] = [true, false]
                    .map(|kind| (0..4).filter(|p| quantized[*p] == kind).collect::<Vec<usize>>());
                // A group of one kind by its flag, and of the other by its share.
                let parts = [of(&yes, lambda, |_| true), of(&no, 0.0, |_| true)];
                let mut sum_x = vec![0f32; x.len()];
                for (chosen, part) in [yes, no].iter().zip(&parts) {
                    for (at, p) in chosen.iter().enumerate() {
                        assert_eq!(outs[*p], part.0[at], "output {p} at {lambda}, {quantized:?}");
                        assert_eq!(grad_w[*p], part.2[at], "weight {p} at {lambda}, {quantized:?}");
                    }
                    sum_x.iter_mut().zip(&part.1).for_each(|(sum, g)| *sum += g);
                }
                // The same sums of at most 132 products, added in another order.
                assert_close("x", &grad_x, &sum_x, 1e-6);
            }
        }
    }
}

#[test]
fn the_share_of_quantization_is_nothing_to_dense_projections() {
    let mut r = random(7);
    let (x, weight, grad) = (r.values(9 * 40), r.values(8 * 40), r.values(9 * 8));
    let of = |quantized, lambda| {
        let latents = [Latent { weight: &weight, quantized }];
        let projections = Projections::new(&latents, 40, lambda, Precision::F32).unwrap();
        step(&projections, &mut Input::default(), &x, &[&grad], &[8])
    };
    let dense = of(false, 0.0);
    assert_eq!(dense, of(false, 0.7));
    assert_eq!(dense, of(false, 1.0));
    assert_eq!(dense, of(true, 0.0));
    assert_ne!(dense, of(true, 0.7));
    assert_ne!(dense, of(true, 1.0));
}

#[test]
#[should_panic(expected = "an input of these projections")]
fn an_input_of_other_projections_is_refused() {
    let latent = |quantized| [Latent { weight: &[1.0, -1.0], quantized }];
    let latents = [true, false].map(latent);
    let [ternary, dense] = latents.each_ref().map(|l| Projections::new(l, 2, 1.0, Precision::F32).unwrap());
    let mut input = Input::default();
    dense.input(&mut input, 1, |_, out| out.fill(1.0));
    let _ = ternary.forward(&input, &mut [&mut [0.0]]);
}

#[test]
fn weights_that_are_not_finite_are_refused_and_gradients_that_are_not_are_seen() {
    let nan = [1.0, f32::NAN];
    let quantized = |weight| Latent { weight, quantized: true };
    let refused = Projections::new(&[quantized(&nan)], 2, 1.0, Precision::F32);
    assert!(matches!(refused, Err(ProjectionError::Pack(_))));
    let (latent, x) = ([1.0, -1.0, 0.5, 1.0], [1.0f32, 2.0]);
    let projections = Projections::new(&[quantized(&latent)], 2, 1.0, Precision::F32).unwrap();
    let mut input = Input::default();
    projections.input(&mut input, 1, |_, out| out.copy_from_slice(&x));
    for bad in [f32::NAN, f32::INFINITY] {
        let (mut grad_x, mut grad_w) = ([0f32; 2], [0f32; 4]);
        let scratch = &mut Scratch::default();
        projections.backward(&input, &[&[bad, 1.0]], 0.0, scratch, &mut grad_x, &mut [&mut grad_w]).unwrap();
        assert!(grad_x.iter().any(|g| !g.is_finite()) && grad_w.iter().any(|g| !g.is_finite()), "{bad}");
    }
}
