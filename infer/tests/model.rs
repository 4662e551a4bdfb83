//! The forward pass against an independent one, and everything that must not change its result.

mod common;

use std::ops::ControlFlow;
use std::sync::Arc;

use bitlinear::kernels::Bits;
use bitlinear::math::Activation;
use bitlinear::packed::Layout;
use bitlinear::pool::Pool;
use common::{bits, config, ids, mixed, model, qwens, variants};
use infer::generate::{GenerateError, GenerateOptions, Stop, generate};
use infer::model::{F32Data, KvPrecision, Part, Projection, Table, Weights};
use infer::sampler::{SamplingOptions, argmax};
use infer::{KvCache, Logits, Model, ModelConfig, ModelError, bench, eval};

/// A forward pass as the formulas say it, in f64, a token at a time, without a cache; shares no code with the model's.
mod oracle {
    use super::*;

    type Rows = Vec<Vec<f64>>;

    fn norm(x: &[f64], weight: &[f32], eps: f32) -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        x.iter().zip(weight).map(|(x, w)| f64::from(*w) * x * factor).collect()
    }

    fn linear(projection: &Projection, x: &[f64], out: usize) -> Vec<f64> {
        match projection {
            Projection::Dense(weight) => product(weight.iter().map(|w| f64::from(*w)).collect(), x, out),
            Projection::Ternary(weight) => {
                let max = x.iter().fold(1e-5f64, |max, x| max.max(x.abs()));
                let codes: Vec<f64> =
                    x.iter().map(|x| (x * 127.0 / max).round_ties_even().clamp(-128.0, 127.0)).collect();
                let sums = product(weight.unpack().into_iter().map(f64::from).collect(), &codes, out);
                sums.iter().map(|sum| sum * max / 127.0 * f64::from(weight.weight_scale())).collect()
            }
        }
    }

    fn product(weight: Vec<f64>, x: &[f64], out: usize) -> Vec<f64> {
        assert_eq!(weight.len(), out * x.len());
        weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    fn rotate(row: &mut [f64], position: usize, config: &ModelConfig) {
        let half = config.head_dim / 2;
        for head in row.chunks_mut(config.head_dim) {
            for i in 0..half {
                let power = -2.0 * i as f64 / config.head_dim as f64;
                let angle = position as f64 * f64::from(config.rope_theta).powf(power);
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * angle.cos() - b * angle.sin();
                head[i + half] = b * angle.cos() + a * angle.sin();
            }
        }
    }

    fn attend(q: &[f64], keys: &Rows, values: &Rows, config: &ModelConfig) -> Vec<f64> {
        let group = config.num_attention_heads / config.num_key_value_heads;
        let dim = config.head_dim;
        let mut out = Vec::new();
        for (head, q) in q.chunks(dim).enumerate() {
            let at = head / group * dim;
            let scores: Vec<f64> = keys
                .iter()
                .map(|key| q.iter().zip(&key[at..]).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt())
                .map(f64::exp)
                .collect();
            let total: f64 = scores.iter().sum();
            out.extend((0..dim).map(|i| {
                scores.iter().zip(values).map(|(score, value)| score / total * value[at + i]).sum::<f64>()
            }));
        }
        out
    }

    pub fn logits(model: &Model, ids: &[u32]) -> Rows {
        let (config, weights) = (model.config(), model.weights());
        let (hidden, width) = (config.hidden_size, config.intermediate_size);
        let table = weights.embed_tokens.to_f32();
        let embed =
            |id: &u32| table[*id as usize * hidden..][..hidden].iter().map(|x| f64::from(*x)).collect();
        let mut x: Rows = ids.iter().map(embed).collect();
        for layer in &weights.layers {
            let (mut keys, mut values): (Rows, Rows) = (vec![], vec![]);
            for (position, x) in x.iter_mut().enumerate() {
                let normed = norm(x, &layer.input_layernorm, config.rms_norm_eps);
                let mut q = linear(&layer.q_proj, &normed, config.attention_width());
                let mut k = linear(&layer.k_proj, &normed, config.kv_width());
                let mut v = linear(&layer.v_proj, &normed, config.kv_width());
                if let Some(biases) = &layer.qkv_bias {
                    for (out, bias) in [&mut q, &mut k, &mut v].into_iter().zip(biases) {
                        out.iter_mut().zip(bias.iter()).for_each(|(x, b)| *x += f64::from(*b));
                    }
                }
                if let Some(norms) = &layer.qk_norm {
                    for (out, weight) in [&mut q, &mut k].into_iter().zip(norms) {
                        let heads = out.chunks(config.head_dim);
                        *out = heads.flat_map(|head| norm(head, weight, config.rms_norm_eps)).collect();
                    }
                }
                rotate(&mut q, position, config);
                rotate(&mut k, position, config);
                keys.push(k);
                values.push(v);
                let mut mixed = attend(&q, &keys, &values, config);
                if let Some(weight) = &layer.attn_sub_norm {
                    mixed = norm(&mixed, weight, config.rms_norm_eps);
                }
                let out = linear(&layer.o_proj, &mixed, hidden);
                x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
                let normed = norm(x, &layer.post_attention_layernorm, config.rms_norm_eps);
                let gate = linear(&layer.gate_proj, &normed, width);
                let up = linear(&layer.up_proj, &normed, width);
                let act = |g: f64| match config.hidden_act {
                    Activation::Silu => g / (1.0 + (-g).exp()),
                    Activation::Relu2 => g.max(0.0).powi(2),
                };
                let mut inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| act(*g) * u).collect();
                if let Some(weight) = &layer.ffn_sub_norm {
                    inner = norm(&inner, weight, config.rms_norm_eps);
                }
                let out = linear(&layer.down_proj, &inner, hidden);
                x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
            }
        }
        let head: Vec<f64> = model.head().to_f32().into_iter().map(f64::from).collect();
        let last = |x: &Vec<f64>| {
            product(head.clone(), &norm(x, &weights.norm, config.rms_norm_eps), config.vocab_size)
        };
        x.iter().map(last).collect()
    }

    /// Differences between model and oracle, relative to the spread of the oracle's logits, smallest first.
    pub fn differences(logits: &[f32], truth: &Rows) -> Vec<f64> {
        let truth: Vec<f64> = truth.concat();
        assert_eq!(logits.len(), truth.len());
        let spread = (truth.iter().map(|x| x * x).sum::<f64>() / truth.len() as f64).sqrt();
        let mut all: Vec<f64> =
            logits.iter().zip(&truth).map(|(a, b)| (f64::from(*a) - b).abs() / spread).collect();
        all.sort_by(f64::total_cmp);
        all
    }
}

fn forward(model: &Model, ids: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::new(model, ids.len()).unwrap();
    model.forward(ids, &mut cache, Logits::All).unwrap()
}

/// Dense models differ from the f64 truth by f32 rounding only.
const DENSE: f64 = 1e-4;
/// In ternary ones an activation that lies on a tie may get the other int8 code: a few logits then move by some 1e-2.
const TERNARY: f64 = 0.1;

#[test]
fn forward_equals_the_oracle() {
    for (seed, config) in variants().iter().enumerate() {
        let model = model(config, seed as u64);
        let ids = ids(config, 24, seed as u64);
        let all = oracle::differences(&forward(&model, &ids), &oracle::logits(&model, &ids));
        let (median, max) = (all[all.len() / 2], all[all.len() - 1]);
        assert!(max < if config.quantized { TERNARY } else { DENSE }, "{config:?}: {max}");
        assert!(median < DENSE, "{config:?}: {median}");
    }
}

#[test]
fn the_oracle_notices_what_is_wrong() {
    for quantized in [true, false] {
        let config = ModelConfig { quantized, ..config() };
        let right = model(&config, 3);
        let ids = ids(&config, 24, 3);
        let truth = oracle::logits(&right, &ids);
        let median = |config: &ModelConfig| {
            let other = Model::new(config.clone(), right.weights().clone()).unwrap();
            let all = oracle::differences(&forward(&other, &ids), &truth);
            all[all.len() / 2]
        };
        assert!(median(&config) < DENSE);
        for wrong in [
            ModelConfig { hidden_act: Activation::Relu2, ..config.clone() },
            ModelConfig { rope_theta: 500_000.0, ..config.clone() },
            ModelConfig { rms_norm_eps: 0.1, ..config.clone() },
        ] {
            assert!(median(&wrong) > 10.0 * DENSE, "{wrong:?}");
        }
    }
}

#[test]
fn a_prompt_in_pieces_gives_the_same_bits() {
    let dense = ModelConfig { quantized: false, ..config() };
    for config in qwens().into_iter().chain([config(), mixed(config()), dense]) {
        let config = ModelConfig { max_position_embeddings: 700, ..config };
        let model = model(&config, 5);
        // Longer than two of the pieces that the model itself cuts.
        let ids = ids(&config, 600, 5);
        let whole = forward(&model, &ids);
        let mut cache = KvCache::new(&model, 600).unwrap();
        let mut single = Vec::new();
        for id in &ids {
            single.extend(model.forward(&[*id], &mut cache, Logits::Last).unwrap());
        }
        assert_eq!(bits(&whole), bits(&single));
        let mut cache = KvCache::new(&model, 700).unwrap();
        assert!(model.forward(&ids[..300], &mut cache, Logits::None).unwrap().is_empty());
        assert!(model.forward(&[], &mut cache, Logits::Last).unwrap().is_empty());
        let last = model.forward(&ids[300..], &mut cache, Logits::Last).unwrap();
        assert_eq!(bits(&last), bits(&whole[599 * config.vocab_size..]));
        // Going back and on again.
        cache.truncate(10);
        assert_eq!((cache.len(), cache.capacity()), (10, 700));
        let again = model.forward(&ids[10..30], &mut cache, Logits::All).unwrap();
        assert_eq!(bits(&again), bits(&whole[10 * config.vocab_size..30 * config.vocab_size]));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    // Sizes at which every step is shared out.
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 32,
        max_position_embeddings: 300,
        ..config()
    };
    for quantized in [true, false] {
        let config = ModelConfig { quantized, ..config.clone() };
        let model = model(&config, 6);
        let ids = ids(&config, 270, 6);
        let with = |threads| {
            Arc::new(Pool::new(threads).unwrap()).install(|| {
                let mut cache = KvCache::new(&model, 300).unwrap();
                let mut logits = model.forward(&ids, &mut cache, Logits::All).unwrap();
                logits.extend(model.forward(&ids[..1], &mut cache, Logits::Last).unwrap());
                (bits(&logits), bits(&eval::score(&model, &ids).unwrap()))
            })
        };
        let one = with(1);
        assert!(one == with(2) && one == with(3));
    }
}

#[test]
fn bad_calls_are_errors_and_leave_the_cache_as_it_was() {
    let config = config();
    let model = model(&config, 7);
    let ids = ids(&config, 20, 7);
    let whole = forward(&model, &ids);
    let mut cache = KvCache::new(&model, 20).unwrap();
    model.forward(&ids[..10], &mut cache, Logits::None).unwrap();
    let error = model.forward(&[5, 300], &mut cache, Logits::All).unwrap_err();
    assert!(matches!(error, ModelError::Token { id: 300, position: 1, vocab_size: 300 }), "{error}");
    let error = model.forward(&[5; 11], &mut cache, Logits::All).unwrap_err();
    assert!(matches!(error, ModelError::CacheFull { tokens: 11, used: 10, capacity: 20 }), "{error}");
    let error = KvCache::new(&model, 97).unwrap_err();
    assert!(matches!(error, ModelError::Context { capacity: 97, limit: 96 }), "{error}");
    let other = common::model(&ModelConfig { num_key_value_heads: 4, ..config.clone() }, 7);
    assert!(matches!(other.forward(&[1], &mut cache, Logits::All), Err(ModelError::ForeignCache)));
    let rest = model.forward(&ids[10..], &mut cache, Logits::All).unwrap();
    assert_eq!(bits(&rest), bits(&whole[10 * config.vocab_size..]));
}

#[test]
fn weights_that_do_not_fit_are_named() {
    type Change = fn(&mut ModelConfig, &mut Weights);
    let changes: [(&str, Change); 10] = [
        ("model.embed_tokens.weight", |_, w| w.embed_tokens = vec![0.0; 5].into()),
        ("model.norm.weight", |_, w| w.norm = vec![0.0; 31].into()),
        ("lm_head.weight", |_, w| w.lm_head = Some(w.embed_tokens.clone())),
        ("lm_head.weight", |c, _| c.tie_word_embeddings = false),
        ("model.layers", |_, w| w.layers.truncate(1)),
        ("model.layers.1.input_layernorm.weight", |_, w| w.layers[1].input_layernorm = F32Data::from(vec![])),
        ("model.layers.0.self_attn.attn_sub_norm.weight", |_, w| w.layers[0].attn_sub_norm = None),
        ("model.layers.0.self_attn.attn_sub_norm.weight", |c, _| c.sub_norm = false),
        ("model.layers.1.mlp.up_proj.weight", |_, w| w.layers[1].up_proj = w.layers[1].down_proj.clone()),
        ("model.layers.1.mlp.up_proj.weight", |_, w| {
            w.layers[1].up_proj = Projection::Dense(vec![0.0; 32 * 44].into());
        }),
    ];
    let right = model(&config(), 1);
    for (name, change) in changes {
        let (mut config, mut weights) = (config(), right.weights().clone());
        change(&mut config, &mut weights);
        let error = Model::new(config, weights).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let [qwen2, qwen3] = qwens();
    let changes: [(ModelConfig, &str, Change); 6] = [
        (qwen2.clone(), "model.layers.0.self_attn.q_proj.bias", |_, w| w.layers[0].qkv_bias = None),
        (qwen2.clone(), "model.layers.0.self_attn.q_proj.bias", |c, _| c.qkv_bias = false),
        (qwen2, "model.layers.1.self_attn.v_proj.bias", |_, w| {
            w.layers[1].qkv_bias.as_mut().unwrap()[2] = vec![0.0; 17].into();
        }),
        (qwen3.clone(), "model.layers.0.self_attn.q_norm.weight", |c, _| c.qk_norm = false),
        (qwen3.clone(), "model.layers.1.self_attn.k_norm.weight", |_, w| {
            w.layers[1].qk_norm.as_mut().unwrap()[1] = vec![1.0; 32].into();
        }),
        (qwen3, "model.layers.1.mlp.gate_proj.weight", |c, _| {
            c.modules_to_not_convert = vec!["model.layers.1.mlp.gate_proj".into()];
        }),
    ];
    for (mut config, name, change) in changes {
        let mut weights = model(&config, 1).weights().clone();
        change(&mut config, &mut weights);
        let error = Model::new(config, weights).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    let wrong = ModelConfig { num_attention_heads: 3, ..config() };
    assert!(matches!(Model::new(wrong, right.weights().clone()), Err(ModelError::Config(_))));
}

fn greedy(max_new_tokens: Option<usize>, stop_ids: Vec<u32>) -> GenerateOptions {
    GenerateOptions { max_new_tokens, sampling: SamplingOptions::GREEDY, kv: KvPrecision::F32, stop_ids }
}

#[test]
fn generation_follows_the_logits_and_stops_where_it_should() {
    let config = config();
    let model = model(&config, 11);
    let prompt = ids(&config, 6, 11);
    let mut seen = Vec::new();
    let all = generate(&model, &prompt, &greedy(None, vec![]), &mut |id| {
        seen.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!((all.stop, all.tokens.len()), (Stop::Length, 90));
    assert_eq!(all.tokens, seen);
    // Each token is the likeliest one after all before it, read afresh.
    let mut text = prompt.clone();
    for token in &all.tokens[..20] {
        let logits = forward(&model, &text);
        assert_eq!(argmax(&logits[logits.len() - config.vocab_size..]).unwrap().0, *token);
        text.push(*token);
    }
    let keep = &mut |_| ControlFlow::Continue(());
    let few = generate(&model, &prompt, &greedy(Some(7), vec![]), keep).unwrap();
    assert_eq!((few.stop, &few.tokens[..]), (Stop::Length, &all.tokens[..7]));
    let stop_id = all.tokens[5];
    let first = all.tokens.iter().position(|t| *t == stop_id).unwrap();
    let stopped = generate(&model, &prompt, &greedy(None, vec![stop_id]), keep).unwrap();
    assert_eq!((stopped.stop, &stopped.tokens[..]), (Stop::EndOfText, &all.tokens[..first]));
    let broken = generate(&model, &prompt, &greedy(None, vec![]), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((broken.stop, &broken.tokens[..]), (Stop::Caller, &all.tokens[..1]));
    assert!(generate(&model, &prompt, &greedy(Some(0), vec![]), keep).unwrap().tokens.is_empty());
    let error = generate(&model, &prompt, &greedy(Some(91), vec![]), keep).unwrap_err().to_string();
    assert!(error.contains("91") && error.contains("96") && error.contains("at most 90"), "{error}");
    let long = ids(&config, 97, 0);
    assert!(matches!(
        generate(&model, &long, &greedy(None, vec![]), keep),
        Err(GenerateError::Context { .. })
    ));
    assert!(matches!(generate(&model, &[], &greedy(None, vec![]), keep), Err(GenerateError::EmptyPrompt)));
    assert!(matches!(generate(&model, &[999], &greedy(None, vec![]), keep), Err(GenerateError::Model(_))));
}

#[test]
fn scores_are_log_probabilities_of_the_next_token() {
    let config = config();
    let model = model(&config, 13);
    let ids = ids(&config, 40, 13);
    let logits = forward(&model, &ids);
    let scores = eval::score(&model, &ids).unwrap();
    assert_eq!(scores.len(), 39);
    for (i, score) in scores.iter().enumerate() {
        let row = &logits[i * config.vocab_size..][..config.vocab_size];
        let total: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
        let truth = f64::from(row[ids[i + 1] as usize]) - total.ln();
        assert!((f64::from(*score) - truth).abs() < 1e-4, "{i}: {score} {truth}");
    }
    assert!(eval::score(&model, &[]).unwrap().is_empty());
    assert!(eval::score(&model, &[3]).unwrap().is_empty());
    assert!(matches!(eval::score(&model, &[3, 300]), Err(ModelError::Token { id: 300, position: 1, .. })));
    // A window of the whole context predicts one token more than the context holds.
    assert_eq!(eval::score(&model, &vec![2; 97]).unwrap().len(), 96);
    assert!(eval::score(&model, &vec![2; 98]).is_err());
}

#[test]
fn perplexity_is_over_whole_windows() {
    let config = config();
    let model = model(&config, 14);
    let ids = ids(&config, 100, 14);
    let loss_of = |windows: &[&[u32]]| {
        let scores: Vec<f32> = windows.iter().flat_map(|w| eval::score(&model, w).unwrap()).collect();
        -scores.iter().map(|s| f64::from(*s)).sum::<f64>() / scores.len() as f64
    };
    let result = eval::perplexity(&model, &ids, 40, KvPrecision::F32).unwrap();
    assert_eq!((result.tokens, result.context), (80, 40));
    assert!((result.loss - loss_of(&[&ids[0..41], &ids[40..81]])).abs() < 1e-12);
    let short = eval::perplexity(&model, &ids[..30], 40, KvPrecision::F32).unwrap();
    assert_eq!((short.tokens, short.context), (29, 29));
    assert!((short.loss - loss_of(&[&ids[..30]])).abs() < 1e-12);
    // Beyond the model's own context it is cut to that.
    assert_eq!(eval::perplexity(&model, &ids, 1000, KvPrecision::F32).unwrap().context, 96);
    assert!(eval::perplexity(&model, &ids[..1], 40, KvPrecision::F32).is_err());
    assert!(eval::perplexity(&model, &ids, 0, KvPrecision::F32).is_err());
}

#[test]
fn the_layout_changes_no_bit() {
    for (seed, config) in variants().into_iter().filter(|config| config.quantized).enumerate() {
        let model = model(&config, seed as u64);
        let ids = ids(&config, 24, seed as u64);
        let expected = forward(&model, &ids);
        assert_eq!(model.layout(), Some(Layout::TwoBit));
        let small = model.with_layout(Layout::FiveTrit);
        assert_eq!(small.layout(), Some(Layout::FiveTrit));
        assert_eq!(bits(&forward(&small, &ids)), bits(&expected));
    }
}

/// Logits of a model with something rounded differ, and not by much: relative to their spread, root mean square.
fn distance(rounded: &[f32], exact: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = rounded.iter().zip(exact).map(|(a, b)| square(a - b)).sum();
    (error / exact.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

#[test]
fn a_rounded_head_is_close_to_the_exact_one() {
    for tie_word_embeddings in [true, false] {
        let config = ModelConfig { tie_word_embeddings, ..config() };
        let right = model(&config, 21);
        let ids = ids(&config, 24, 21);
        let exact = forward(&right, &ids);
        assert_eq!(right.head_precision(), "f32");
        for (bits, name, line_columns, bound) in
            [(Bits::Eight, "int8", 4, 0.01), (Bits::Four, "int4", 8, 0.1)]
        {
            let model = right.clone().with_int_head(bits).unwrap();
            assert_eq!(model.head_precision(), name);
            // 300 rows of 32 columns: 19 panels of 16 rows, and a scale a row.
            let head = 19 * 64 * 32 / line_columns + 300 * 4;
            assert_eq!(model.bytes_per_token(), right.bytes_per_token() - 300 * 32 * 4 + head);
            let rounded = forward(&model, &ids);
            let distance = distance(&rounded, &exact);
            assert!(distance > 0.0 && distance < bound, "{name}: {distance}");
            // Together or alone, a token has the same logits.
            let mut cache = KvCache::new(&model, 24).unwrap();
            let single: Vec<f32> =
                ids.iter().flat_map(|id| model.forward(&[*id], &mut cache, Logits::Last).unwrap()).collect();
            assert_eq!(common::bits(&single), common::bits(&rounded));
            if bits == Bits::Four {
                let rows = rounded.chunks_exact(300).zip(exact.chunks_exact(300));
                for (rounded, exact) in rows {
                    let max = exact.iter().fold(f32::MIN, |max, x| max.max(*x));
                    let pairs = || rounded.iter().zip(exact);
                    // What counts is exact, what does not is rounded.
                    assert!(pairs().all(|(a, b)| *b < max - 6.0 || a.to_bits() == b.to_bits()));
                    assert!(pairs().any(|(a, b)| a != b));
                }
            }
        }
    }
}

#[test]
fn a_cache_of_f16_is_close_to_the_exact_one() {
    let config = ModelConfig { quantized: false, ..config() };
    let model = model(&config, 22);
    let ids = ids(&config, 60, 22);
    let exact = forward(&model, &ids);
    let mut cache = KvCache::with_precision(&model, 60, KvPrecision::F16).unwrap();
    let rounded = model.forward(&ids, &mut cache, Logits::All).unwrap();
    let distance = distance(&rounded, &exact);
    assert!(distance > 0.0 && distance < 2e-3, "{distance}");
    cache.truncate(10);
    let again = model.forward(&ids[10..], &mut cache, Logits::All).unwrap();
    assert_eq!(bits(&again), bits(&rounded[10 * config.vocab_size..]));
}

#[test]
fn tables_of_halves_are_the_f32_tables_with_their_values() {
    let config = ModelConfig { tie_word_embeddings: false, ..config() };
    let right = model(&config, 23);
    let ids = ids(&config, 20, 23);
    /// Some values rounded, as f32 and as halves.
    type Split = fn(&[f32]) -> (Table, Table);
    let halves: [Split; 2] = [
        |values| {
            let halves: Vec<half::bf16> = values.iter().map(|x| half::bf16::from_f32(*x)).collect();
            (Table::from(halves.iter().map(|x| x.to_f32()).collect::<Vec<f32>>()), Table::Bf16(halves.into()))
        },
        |values| {
            let halves: Vec<half::f16> = values.iter().map(|x| half::f16::from_f32(*x)).collect();
            (Table::from(halves.iter().map(|x| x.to_f32()).collect::<Vec<f32>>()), Table::F16(halves.into()))
        },
    ];
    for split in halves {
        let (embed, embed_half) = split(&right.weights().embed_tokens.to_f32());
        let (head, head_half) = split(&right.head().to_f32());
        let with = |embed_tokens, head| {
            let weights = Weights { embed_tokens, lm_head: Some(head), ..right.weights().clone() };
            forward(&Model::new(config.clone(), weights).unwrap(), &ids)
        };
        assert_eq!(bits(&with(embed, head)), bits(&with(embed_half, head_half)));
    }
}

#[test]
fn a_random_model_of_a_shape_can_be_measured() {
    let config = ModelConfig { quantized: false, tie_word_embeddings: false, ..config() };
    let options =
        bench::BenchOptions { prompt_tokens: 8, gen_tokens: 4, repetitions: 2, kv: KvPrecision::F16 };
    for layout in Layout::ALL {
        let model = bench::random_model(&config, 1, layout).unwrap();
        assert_eq!(model.layout(), Some(layout));
        let report = bench::bench(&model, &options).unwrap();
        assert!(report.prompt.min > 0.0 && report.prompt.min <= report.prompt.median);
        assert!(report.read_bandwidth > 0.0 && report.bandwidth_share() > 0.0);
        // Rows in panels of 16, columns in lines of 16 or 20; norms 32, 32, 32, 44; the last norm; the head in bf16.
        let panels = [32, 16, 16, 32, 48, 48].iter().sum::<usize>() / 16;
        let line_bytes = 64 * (panels * layout.lines(32) + 2 * layout.lines(44));
        assert_eq!(report.bytes_per_token, 2 * (line_bytes + 4 * (32 * 3 + 44)) + 4 * 32 + 2 * 300 * 32);
        assert_eq!(report.operations_per_token, 2 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32));
        let named = |parts: &[(Part, f64)]| parts.iter().map(|(part, _)| *part).collect::<Vec<_>>();
        assert_eq!(named(&report.prompt_parts), Part::ALL);
        assert!(report.generation_parts.iter().all(|(_, seconds)| *seconds > 0.0));
    }
    for (config, vectors) in qwens().into_iter().zip([32 + 2 * 16, 2 * 16]) {
        let model = bench::random_model(&mixed(config.clone()), 1, Layout::TwoBit).unwrap();
        assert_eq!(model.config(), &config);
        let report = bench::bench(&model, &options).unwrap();
        // Beside a Llama of the same shape: biases of q, k and v, or norms of queries and keys.
        let plain = ModelConfig { qkv_bias: false, qk_norm: false, ..config };
        let plain = bench::random_model(&plain, 1, Layout::TwoBit).unwrap();
        assert_eq!(report.bytes_per_token, plain.bytes_per_token() + 2 * 4 * vectors);
        let more = model.config().parameters().unwrap() - plain.config().parameters().unwrap();
        assert_eq!(more, 2 * vectors as u64);
    }
    let model = bench::random_model(&config, 1, Layout::TwoBit).unwrap();
    let codes = |model: &Model| match &model.weights().layers[1].up_proj {
        Projection::Ternary(weight) => weight.unpack(),
        Projection::Dense(_) => panic!("a dense projection"),
    };
    // All three codes about equally often, the same for the same seed.
    for code in [-1, 0, 1] {
        let share = codes(&model).iter().filter(|c| **c == code).count() as f64 / (44.0 * 32.0);
        assert!((0.28..0.39).contains(&share), "{code}: {share}");
    }
    assert_eq!(codes(&model), codes(&bench::random_model(&config, 1, Layout::FiveTrit).unwrap()));
    assert_ne!(codes(&model), codes(&bench::random_model(&config, 2, Layout::TwoBit).unwrap()));
    for zero in [
        bench::BenchOptions { prompt_tokens: 0, ..options },
        bench::BenchOptions { gen_tokens: 0, ..options },
        bench::BenchOptions { repetitions: 0, ..options },
    ] {
        assert!(matches!(bench::bench(&model, &zero), Err(bench::BenchError::Zero(_))));
    }
    let long = bench::BenchOptions { prompt_tokens: usize::MAX, ..options };
    assert!(matches!(bench::bench(&model, &long), Err(bench::BenchError::Model(_))));
    let huge = ModelConfig { num_hidden_layers: 60_000, intermediate_size: 10_000_000, ..config };
    assert!(bench::random_model(&huge, 1, Layout::FiveTrit).is_err());
}
