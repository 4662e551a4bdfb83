//! What must be equal bit for bit: training and the packed kernels, training and the slice functions that inference
//! runs, and any number of threads.
use std::sync::Arc;

use super::*;
use crate::kernels;
use crate::math::{self, Activation, RopeTable};
use crate::pool::Pool;
use crate::quant;

/// Forward of the fully quantized layer, and the same by its definition: whole sums, and the scales at the end.
fn both_products(x: &Tensor, w: &Tensor) -> (Vec<u32>, Vec<u32>) {
    let (ins, w_values) = (w.dim(1).unwrap(), flat(w));
    let weight_scale = quant::absmean(&w_values);
    let mut ternary = vec![0i8; w_values.len()];
    quant::ternarize(&w_values, weight_scale, &mut ternary);
    let (mut expected, mut codes) = (Vec::new(), vec![0i8; ins]);
    for x in flat(x).chunks_exact(ins) {
        let act_scale = quant::quantize_row(x, &mut codes);
        for row in ternary.chunks_exact(ins) {
            let sum: i64 = row.iter().zip(&codes).map(|(t, q)| i64::from(*t) * i64::from(*q)).sum();
            expected.push(quant::epilogue(sum as f32, act_scale, weight_scale));
        }
    }
    (bits(&flat(&bit_linear(x, w, 1.0).unwrap())), bits(&expected))
}

#[test]
fn the_quantized_layer_is_the_integer_product() {
    println!("kernel: {}", kernels::Kernel::active().unwrap().name());
    let mut rng = rng(30);
    for ins in 1..=300 {
        let (rows, outs) = (rng.random_range(1..70), rng.random_range(1..50));
        // From tiny, where the scales rest on their floor, to large.
        let [scale_x, scale_w] = [0, 0].map(|_| 10f64.powi(rng.random_range(-8..9)));
        let x = (random(&mut rng, &[rows, ins]) * scale_x).unwrap();
        let w = (random(&mut rng, &[outs, ins]) * scale_w).unwrap();
        let (found, expected) = both_products(&x, &w);
        assert!(found == expected, "[{rows}, {ins}] to {outs}, x times {scale_x}, w times {scale_w}");
    }
}

#[test]
fn large_products_use_several_blocks_and_still_agree() {
    let mut rng = rng(31);
    for (rows, ins, outs) in [(1, 4097, 300), (300, 1030, 1), (130, 2048, 70)] {
        let (found, expected) =
            both_products(&random(&mut rng, &[rows, ins]), &random(&mut rng, &[outs, ins]));
        assert!(found == expected, "[{rows}, {ins}] to {outs}");
    }
}

#[test]
fn the_largest_sum_that_f32_holds_exactly_is_exact() {
    let ins = (1 << 24) / 127; // 127 * ins < 2^24
    let ones = Tensor::ones((2, ins), candle_core::DType::F32, &Device::Cpu).unwrap();
    let (found, expected) = both_products(&ones, &ones.neg().unwrap());
    assert_eq!(found, expected);
    assert_eq!(f32::from_bits(found[0]), -((127 * ins) as f32) * (1.0 / 127.0));
}

#[test]
fn values_on_ties_and_tokens_of_zeros_agree() {
    let mut rng = rng(32);
    let halves = |rng: &mut ChaCha8Rng, count| -> Vec<f32> {
        (0..count).map(|_| rng.random_range(-254..=254) as f32 * 0.5).collect()
    };
    for ins in [4, 96, 131] {
        let mut x = halves(&mut rng, 6 * ins);
        x[..ins].fill(0.0);
        // The largest is 127, so the scale is 1 and every half is a tie.
        x.chunks_exact_mut(ins).skip(1).for_each(|row| row[0] = 127.0);
        let x = Tensor::from_vec(x, (6, ins), &Device::Cpu).unwrap();
        let w: Vec<f32> = (0..8 * ins).map(|_| f32::from(rng.random_range(-4i8..=4)) * 0.5).collect();
        let (found, expected) = both_products(&x, &Tensor::from_vec(w, (8, ins), &Device::Cpu).unwrap());
        assert_eq!(found, expected, "{ins}");
    }
}

#[test]
fn a_sum_of_zeros_has_no_sign() {
    // 0 * -1 is -0 in f32: alone in a sum it would stay.
    let [x, w] = [[[-3f32, 0.0]], [[0.0, 2.0]]].map(|v| Tensor::new(&v, &Device::Cpu).unwrap());
    for (x, w) in [(x.clone(), w.clone()), (x.narrow(1, 0, 1).unwrap(), w.narrow(1, 0, 1).unwrap())] {
        let (found, expected) = both_products(&x.copy().unwrap(), &w.copy().unwrap());
        assert_eq!((found, expected), (vec![0], vec![0]));
    }
}

#[test]
fn rms_norm_is_the_slice_function_of_every_row() {
    let mut rng = rng(33);
    for (tokens, features) in [(1, 1), (7, 15), (33, 16), (70, 129)] {
        let (x, w) = (random(&mut rng, &[tokens, features]), random(&mut rng, &[features]));
        let mut expected = vec![0.0; tokens * features];
        for (out, x) in expected.chunks_exact_mut(features).zip(flat(&x).chunks_exact(features)) {
            math::rms_norm(x, &flat(&w), 1e-5, out);
        }
        assert_eq!(bits(&flat(&rms_norm(&x, &w, 1e-5).unwrap())), bits(&expected), "[{tokens}, {features}]");
    }
}

#[test]
fn gated_is_the_slice_function_of_every_row() {
    let mut rng = rng(34);
    for activation in [Activation::Silu, Activation::Relu2] {
        for (tokens, features) in [(1, 1), (3, 33), (40, 500)] {
            let [gate, up] = [0, 0].map(|_| random(&mut rng, &[tokens, features]));
            let mut expected = vec![0.0; tokens * features];
            let (gates, ups) = (flat(&gate), flat(&up));
            let rows = gates.chunks_exact(features).zip(ups.chunks_exact(features));
            for (out, (gate, up)) in expected.chunks_exact_mut(features).zip(rows) {
                activation.gated(gate, up, out);
            }
            assert_eq!(
                bits(&flat(&gated(&gate, &up, activation).unwrap())),
                bits(&expected),
                "{activation:?}"
            );
        }
    }
}

/// One token after the other over a growing cache of rotated keys, as a runtime does it.
fn attention_with_a_cache(q: &[f32], k: &[f32], v: &[f32], heads: &Heads) -> Vec<f32> {
    let (dim, kv_width) = (heads.head_dim, heads.kv_heads * heads.head_dim);
    let mut out = vec![0.0; q.len()];
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let rows = q.chunks_exact(heads.heads * dim).zip(k.chunks_exact(kv_width)).zip(v.chunks_exact(kv_width));
    let positions = heads.sequences.iter().flat_map(|length| 0..*length);
    for (position, (((q, k), v), out)) in positions.zip(rows.zip(out.chunks_exact_mut(heads.heads * dim))) {
        if position == 0 {
            keys.clear();
            values.clear();
        }
        let (mut q, mut k) = (q.to_vec(), k.to_vec());
        heads.rope.rotate(position, &mut q);
        heads.rope.rotate(position, &mut k);
        keys.extend(k);
        values.extend_from_slice(v);
        for (head, (q, out)) in q.chunks_exact(dim).zip(out.chunks_exact_mut(dim)).enumerate() {
            let at = head / (heads.heads / heads.kv_heads) * dim;
            let mut weights = vec![0.0; position + 1];
            math::attention_weights(q, &keys[at..], kv_width, &mut weights);
            math::weighted_sum(&weights, &values[at..], kv_width, out);
        }
    }
    out
}

#[test]
fn attention_is_the_slice_functions_over_a_cache() {
    let mut rng = rng(35);
    for (sequences, heads, kv_heads, head_dim) in [
        (vec![1], 1, 1, 2),
        (vec![2; 3], 4, 2, 6),
        (vec![33; 2], 6, 2, 16),
        (vec![70], 2, 1, 130),
        (vec![5, 1, 17, 64, 65, 3], 6, 2, 16),
    ] {
        let rope = Arc::new(RopeTable::new(head_dim, *sequences.iter().max().unwrap(), 1e4));
        let tokens = sequences.iter().sum();
        let shape = Heads { sequences, heads, kv_heads, head_dim, rope };
        let [q, k, v] =
            [heads, kv_heads, kv_heads].map(|heads| random(&mut rng, &[tokens, heads * head_dim]));
        let expected = attention_with_a_cache(&flat(&q), &flat(&k), &flat(&v), &shape);
        let found = flat(&attention(&q, &k, &v, &shape).unwrap());
        assert_eq!(bits(&found), bits(&expected), "{:?}, {heads}/{kv_heads} of {head_dim}", shape.sequences);
    }
}

/// Output and gradients of an operation, one after the other.
fn all_bits(op: Op<'_>, inputs: &[Tensor], upstream: &Tensor) -> Vec<u32> {
    let (y, gradients) = run(op, inputs, upstream);
    bits(&[y, gradients.concat()].concat())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let mut rng = rng(36);
    // Several chunks of every kind of work, and products far beyond what one thread keeps to itself.
    let (tokens, ins, outs, vocab) = (616, 258, 130, 301);
    let x = random(&mut rng, &[tokens, ins]);
    let (w, gain, head) =
        (random(&mut rng, &[outs, ins]), random(&mut rng, &[ins]), random(&mut rng, &[vocab, ins]));
    let up = random(&mut rng, &[tokens, ins]);
    let (q, kv) = (random(&mut rng, &[tokens, 48]), random(&mut rng, &[tokens, 24]));
    let rope = Arc::new(RopeTable::new(12, 300, 1e4));
    let heads =
        Heads { sequences: vec![77, 77, 1, 300, 5, 130, 26], heads: 4, kv_heads: 2, head_dim: 12, rope };
    let targets: Arc<[u32]> = random_targets(&mut rng, tokens, vocab as u32).into();
    let (wide, narrow) = (random(&mut rng, &[tokens, ins]), random(&mut rng, &[tokens, outs]));
    let (of_q, scalar) = (random(&mut rng, &[tokens, 48]), Tensor::new(0.7f32, &Device::Cpu).unwrap());
    let (one_row, of_one_row) = (random(&mut rng, &[1, ins]), random(&mut rng, &[1, outs]));

    let linear = |lambda: f32| move |x: &[Tensor]| bit_linear(&x[0], &x[1], lambda);
    let [full, half, none] = [1.0, 0.5, 0.0].map(linear);
    let cases: [(&str, Op<'_>, Vec<Tensor>, &Tensor); 10] = [
        ("bit_linear, lambda 1", &full, vec![x.clone(), w.clone()], &narrow),
        ("bit_linear, lambda 0.5", &half, vec![x.clone(), w.clone()], &narrow),
        ("bit_linear, lambda 0", &none, vec![x.clone(), w.clone()], &narrow),
        ("bit_linear of one token", &none, vec![one_row.clone(), w.clone()], &of_one_row),
        ("quantized bit_linear of one token", &full, vec![one_row, w], &of_one_row),
        ("rms_norm", &|x| rms_norm(&x[0], &x[1], 1e-5), vec![x.clone(), gain], &wide),
        ("silu", &|x| gated(&x[0], &x[1], Activation::Silu), vec![x.clone(), up.clone()], &wide),
        ("relu2", &|x| gated(&x[0], &x[1], Activation::Relu2), vec![x.clone(), up], &wide),
        (
            "attention",
            &|x| attention(&x[0], &x[1], &x[2], &heads),
            vec![q, kv.clone(), (&kv * 0.5).unwrap()],
            &of_q,
        ),
        (
            "cross-entropy",
            &|x| head_cross_entropy(&x[0], &x[1], Arc::clone(&targets)),
            vec![x, head],
            &scalar,
        ),
    ];
    // rayon's threads for the passes over tokens, ours for the products.
    let pools = [1, 2, 3].map(|threads| {
        let rayon = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        (rayon, Arc::new(Pool::new(threads).unwrap()))
    });
    for (name, op, inputs, upstream) in cases {
        let [one, two, three] = pools
            .each_ref()
            .map(|(rayon, pool)| rayon.install(|| pool.install(|| all_bits(op, &inputs, upstream))));
        assert!(one == two && one == three, "{name}");
    }
}

#[test]
fn a_dense_layer_beside_ternary_ones_has_the_bits_of_dots() {
    let mut rng = rng(11);
    // Whole and broken tiles of tokens and of rows; a width that `dots` keeps in registers, and others.
    for (tokens, inputs, outputs) in [(1, 7, 5), (8, 64, 32), (19, 100, 67)] {
        let var = |shape: &[usize], rng: &mut ChaCha8Rng| Var::from_tensor(&random(rng, shape)).unwrap();
        let (x, w) = (var(&[tokens, inputs], &mut rng), var(&[outputs, inputs], &mut rng));
        let (y, plain) = (dense_linear(&x, &w).unwrap(), bit_linear(&x, &w, 0.0).unwrap());
        let (xs, ws) = (flat(&x), flat(&w));
        let rows = xs.chunks_exact(inputs);
        let dots = rows.flat_map(|x| ws.chunks_exact(inputs).map(|w| crate::math::dot(w, x).to_bits()));
        assert!(flat(&y).iter().map(|y| y.to_bits()).eq(dots), "{tokens} {inputs} {outputs}");
        let gradients = [&y, &plain].map(|y| y.sum_all().unwrap().backward().unwrap());
        for var in [&x, &w] {
            let [found, expected] = gradients.each_ref().map(|all| flat(all.get(var).unwrap()));
            assert_eq!(found, expected);
        }
    }
}
