//! The gradient of the quantizers against its definition: it is not a derivative, so differences say nothing.
use super::*;

/// `x~` of every row and `W~` of a matrix, by the formulas of the paper in f64, on their own.
struct Quantized {
    x: Vec<f64>,
    w: Vec<f64>,
}

impl Quantized {
    fn new(x: &[f32], w: &[f32], in_features: usize, lambda: f64) -> Self {
        let wide = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<f64>>();
        let (x, w) = (wide(x), wide(w));
        let weight_scale = w.iter().map(|w| w.abs()).sum::<f64>() / w.len() as f64;
        let mix = |real: f64, quantized: f64| (1.0 - lambda) * real + lambda * quantized;
        let rows = x.chunks_exact(in_features).flat_map(|row| {
            let largest = row.iter().fold(0f64, |max, x| max.max(x.abs()));
            row.iter().map(move |x| mix(*x, (x * 127.0 / largest).round_ties_even() * largest / 127.0))
        });
        let ternary = |w: &f64| mix(*w, (w / weight_scale).round_ties_even().clamp(-1.0, 1.0) * weight_scale);
        Self { x: rows.collect(), w: w.iter().map(ternary).collect() }
    }
}

/// `a b` with `a [m, k]`, `b [k, n]`, both addressed by a function of row and column.
fn product(
    m: usize,
    k: usize,
    n: usize,
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> Vec<f32> {
    let at = |i: usize, j: usize| (0..k).map(|l| a(i, l) * b(l, j)).sum::<f64>() as f32;
    (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| at(i, j)).collect()
}

#[test]
fn gradients_pass_straight_through_the_quantizers() {
    let mut rng = rng(10);
    for lambda in [1.0f32, 0.3, 0.0] {
        for (tokens, ins, outs) in [(1, 1, 1), (2, 5, 3), (37, 130, 41), (65, 33, 9)] {
            let inputs = [random(&mut rng, &[tokens, ins]), random(&mut rng, &[outs, ins])];
            let upstream = random(&mut rng, &[tokens, outs]);
            let (y, gradients) = run(&|x| bit_linear(&x[0], &x[1], lambda), &inputs, &upstream);
            let Quantized { x, w } =
                Quantized::new(&flat(&inputs[0]), &flat(&inputs[1]), ins, f64::from(lambda));
            let dy: Vec<f64> = flat(&upstream).into_iter().map(f64::from).collect();
            let expected = [
                product(tokens, ins, outs, |t, i| x[t * ins + i], |i, o| w[o * ins + i]),
                product(tokens, outs, ins, |t, o| dy[t * outs + o], |o, i| w[o * ins + i]),
                product(outs, tokens, ins, |o, t| dy[t * outs + o], |t, i| x[t * ins + i]),
            ];
            let found = [&y, &gradients[0], &gradients[1]];
            for ((name, found), expected) in ["y", "dx", "dW"].iter().zip(found).zip(&expected) {
                let error = relative_error(found, expected);
                assert!(
                    error < ROUNDING,
                    "{name} of [{tokens}, {ins}] to {outs} at lambda {lambda}: {error:.1e}"
                );
            }
        }
    }
}

#[test]
fn a_token_of_zeros_and_weights_of_zeros_have_gradients() {
    let mut rng = rng(11);
    let (zeros, w) =
        (Tensor::zeros((2, 6), candle_core::DType::F32, &Device::Cpu).unwrap(), random(&mut rng, &[3, 6]));
    let upstream = random(&mut rng, &[2, 3]);
    let (y, gradients) = run(&|x| bit_linear(&x[0], &x[1], 1.0), &[zeros.clone(), w.clone()], &upstream);
    assert!(y.iter().chain(&gradients[1]).all(|v| *v == 0.0));
    assert!(gradients[0].iter().all(|g| g.is_finite()) && gradients[0].iter().any(|g| *g != 0.0));
    let (y, gradients) = run(&|x| bit_linear(&x[0], &x[1], 1.0), &[w, zeros], &random(&mut rng, &[3, 2]));
    assert!(y.iter().chain(&gradients[0]).all(|v| *v == 0.0));
    assert!(gradients[1].iter().all(|g| g.is_finite()) && gradients[1].iter().any(|g| *g != 0.0));
}
