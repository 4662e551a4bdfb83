//! The fast training step against candle's graph of the same model.
use bitlinear::math::Activation;
use bitlinear::pool::Pool;
use candle_core::{Device, Tensor};
use infer::config::ModelConfig;
use trainer::data::Batch;
use trainer::decoder::{Decoder, Lesson, StepWeights};
use trainer::model::Model;
use trainer::optimizer::Gradients;
use trainer::parameters::{Parameters, Role};
use trainer::schedule::Shares;

/// Tokens in a sequence: more than one block of queries, and no multiple of it.
const LENGTH: usize = 90;

fn config(sub_norm: bool, tied: bool, act: Activation, quantized: bool) -> ModelConfig {
    let config = ModelConfig {
        hidden_size: 72,
        intermediate_size: 140,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 12,
        vocab_size: 211,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        max_position_embeddings: LENGTH,
        tie_word_embeddings: tied,
        hidden_act: act,
        sub_norm,
        quantized,
        qkv_bias: false,
        qk_norm: false,
        modules_to_not_convert: Vec::new(),
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    };
    config.validate().unwrap();
    config
}

/// As many sequences of [`LENGTH`] tokens.
fn tokens(sequences: usize, vocab: u32) -> Batch {
    pieces(&vec![LENGTH; sequences], vocab)
}

/// Sequences of these lengths, no pattern in their tokens.
fn pieces(sequences: &[usize], vocab: u32) -> Batch {
    let tokens: usize = sequences.iter().sum();
    let id = |at: usize| (at as u32).wrapping_mul(2_654_435_761).rotate_left(11) % vocab;
    Batch {
        ids: (0..tokens).map(id).collect(),
        targets: (0..tokens).map(|at| id(at + 7919)).collect(),
        weights: None,
        sequences: sequences.to_vec(),
    }
}

/// The same share of quantization and of sub-norms.
fn shares(share: f32) -> Shares {
    Shares { quantization: share, sub_norm: share }
}

/// Loss and gradients of the fast step.
fn fast(
    config: &ModelConfig,
    parameters: &Parameters,
    shares: Shares,
    recompute: bool,
    batches: &[Batch],
) -> (f64, Vec<(String, Vec<f32>)>) {
    let values = parameters.values().unwrap();
    let weights = StepWeights::new(config, &values, shares).unwrap();
    let mut decoder = Decoder::new(config.clone(), LENGTH, recompute);
    let mut gradients = Gradients::new(parameters);
    let share = 1.0 / batches.len() as f64;
    let step =
        |batch: &Batch| decoder.step(&weights, batch, &Lesson::TEXT, share, &mut gradients).unwrap().total;
    let loss = batches.iter().map(step).sum();
    (loss, copies(parameters, &gradients))
}

/// Loss and gradients of candle's graph.
fn graph(
    config: &ModelConfig,
    parameters: &Parameters,
    shares: Shares,
    batch: &Batch,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let model = Model::new(config.clone(), LENGTH);
    let loss = model.loss(parameters, batch, shares).unwrap();
    let mut gradients = Gradients::new(parameters);
    gradients.add(parameters, loss.backward().unwrap()).unwrap();
    (f64::from(loss.to_scalar::<f32>().unwrap()), copies(parameters, &gradients))
}

fn copies(parameters: &Parameters, gradients: &Gradients) -> Vec<(String, Vec<f32>)> {
    parameters.iter().map(|(name, _)| (name.to_owned(), gradients.get(name).unwrap().to_vec())).collect()
}

/// Cosine of two gradients, and the ratio of their lengths.
fn compare(a: &[f32], b: &[f32]) -> (f64, f64) {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let (aa, bb) = (dot(a, a).sqrt(), dot(b, b).sqrt());
    (dot(a, b) / (aa * bb), aa / bb)
}

/// The fast step's loss and gradients are the graph's; with recomputation, bit for bit the same again.
fn assert_as_graph(what: &str, config: &ModelConfig, shares: Shares, batch: &Batch) {
    let parameters = parameters(config);
    let (expected_loss, expected) = graph(config, &parameters, shares, batch);
    let (loss, found) = fast(config, &parameters, shares, false, std::slice::from_ref(batch));
    // Rounded to bf16 or summed in another order, values go to another step of int8 here and there.
    let tolerance = if bitlinear::products::bf16_is_fast() { 3e-3 } else { 5e-4 };
    assert!(
        (loss - expected_loss).abs() < tolerance,
        "{what} at {shares:?}: loss {loss}, expected {expected_loss}"
    );
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        if shares.sub_norm == 0.0 && name.ends_with("_sub_norm.weight") {
            assert!(found.iter().chain(expected).all(|g| *g == 0.0), "{name} of {what} at {shares:?}");
            continue;
        }
        let (cosine, ratio) = compare(found, expected);
        assert!(
            cosine > 0.999 && (ratio - 1.0).abs() < 0.02,
            "{name} of {what} at {shares:?}: cosine {cosine}, ratio {ratio}"
        );
    }
    let again = fast(config, &parameters, shares, true, std::slice::from_ref(batch));
    assert_eq!((loss, found), again, "{what}: recomputed");
}

/// Parameters away from where they start: no norm's gain is 1, no bias 0.
fn parameters(config: &ModelConfig) -> Parameters {
    let parameters = Parameters::init(config, 0.1, 5).unwrap();
    for (name, parameter) in parameters.iter() {
        if matches!(parameter.role, Role::Norm | Role::Bias) {
            let values: Vec<f32> = parameter.value.to_vec1().unwrap();
            let moved = values.iter().enumerate().map(|(at, x)| x + 0.3 * (at as f32 * 1.7).sin());
            let moved: Vec<f32> = moved.collect();
            parameters.set(name, &Tensor::new(moved, &Device::Cpu).unwrap()).unwrap();
        }
    }
    parameters
}

/// Biases of q, k and v without sub-norms, as Qwen2.
fn qwen2() -> ModelConfig {
    let config = ModelConfig { qkv_bias: true, ..config(false, false, Activation::Silu, true) };
    config.validate().unwrap();
    config
}

/// Norms of queries and keys, with heads that are wider together than the residual stream, as Qwen3.
fn qwen3() -> ModelConfig {
    let plain = config(false, true, Activation::Silu, true);
    let config = ModelConfig { qk_norm: true, head_dim: 16, ..plain };
    config.validate().unwrap();
    config
}

/// One of q, k and v dense, one of gate and up, and one down projection.
fn mixed(config: ModelConfig) -> ModelConfig {
    let names = [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.2.self_attn.o_proj",
    ];
    let config = ModelConfig { modules_to_not_convert: names.map(str::to_owned).to_vec(), ..config };
    config.validate().unwrap();
    config
}

#[test]
fn gradients_are_those_of_the_graph() {
    for (sub_norm, tied, act, quantized) in [
        (true, true, Activation::Silu, true),
        (true, false, Activation::Relu2, true),
        (false, true, Activation::Silu, true),
        (true, true, Activation::Silu, false),
    ] {
        let config = config(sub_norm, tied, act, quantized);
        for lambda in [0.0, 0.3, 1.0] {
            let what = format!("sub-norm {sub_norm}, quantized {quantized}");
            assert_as_graph(&what, &config, shares(lambda), &tokens(3, 211));
        }
    }
}

#[test]
fn options_of_imported_models_are_those_of_the_graph() {
    let bitnet = || config(true, true, Activation::Relu2, true);
    for (what, config) in [
        ("biases", qwen2()),
        ("norms of heads", qwen3()),
        ("biases in full precision", ModelConfig { quantized: false, ..qwen2() }),
        ("norms of heads in full precision", ModelConfig { quantized: false, ..qwen3() }),
        ("some dense", mixed(bitnet())),
        ("biases, some dense", mixed(qwen2())),
        ("norms of heads, some dense", mixed(qwen3())),
    ] {
        for lambda in [0.3, 1.0] {
            assert_as_graph(what, &config, shares(lambda), &tokens(3, 211));
        }
    }
}

#[test]
fn blended_sub_norms_are_those_of_the_graph() {
    for (quantized, act) in [(true, Activation::Silu), (false, Activation::Relu2)] {
        let config = config(true, true, act, quantized);
        for (quantization, sub_norm) in [(0.0, 0.0), (0.3, 0.7), (1.0, 0.4), (0.4, 1.0), (1.0, 0.0)] {
            let shares = Shares { quantization, sub_norm };
            let what = format!("quantized {quantized}");
            assert_as_graph(&what, &config, shares, &tokens(3, 211));
        }
    }
}

#[test]
fn sequences_of_any_lengths_are_those_of_the_graph() {
    let lengths = [1, 17, LENGTH, 64, 2, 65];
    for (what, config) in [
        ("sub-norms", config(true, true, Activation::Silu, true)),
        ("biases", qwen2()),
        ("norms of heads", qwen3()),
    ] {
        for lambda in [0.3, 1.0] {
            assert_as_graph(what, &config, shares(lambda), &pieces(&lengths, 211));
        }
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    let config = qwen2();
    let parameters = parameters(&config);
    let values = parameters.values().unwrap();
    let weights = StepWeights::new(&config, &values, Shares::FULL).unwrap();
    let mut decoder = Decoder::new(config.clone(), LENGTH, false);
    let mut hidden = |batch: &Batch| decoder.read(&weights, batch, |_, _| ()).unwrap().to_vec();
    let both = pieces(&[40, 23], 211);
    let part = |tokens: std::ops::Range<usize>| Batch {
        ids: both.ids[tokens.clone()].to_vec(),
        targets: both.targets[tokens.clone()].to_vec(),
        weights: None,
        sequences: vec![tokens.len()],
    };
    let apart = [hidden(&part(0..40)), hidden(&part(40..63))].concat();
    assert_eq!(hidden(&both), apart);
    // One sequence of all the tokens is something else.
    assert_ne!(hidden(&part(0..63)), apart);
}

/// Gradients agree in direction and size, to the rounding of int8 gradients with other scales.
fn assert_alike(found: &[(String, Vec<f32>)], expected: &[(String, Vec<f32>)], cosine: f64, ratio: f64) {
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        let (c, r) = compare(found, expected);
        assert!(c > 1.0 - cosine && (r - 1.0).abs() < ratio, "{name}: cosine {c}, ratio {r}");
    }
}

#[test]
fn equal_weights_are_no_weights() {
    for config in [config(true, true, Activation::Silu, true), mixed(qwen2())] {
        let parameters = parameters(&config);
        for lambda in [0.3, 1.0] {
            let batches = [tokens(2, 211), tokens(2, 211)];
            let count = batches.iter().map(|batch| batch.ids.len()).sum::<usize>();
            let weighted = batches
                .clone()
                .map(|batch| Batch { weights: Some(vec![1.0 / count as f32; batch.ids.len()]), ..batch });
            let (loss, expected) = fast(&config, &parameters, shares(lambda), false, &batches);
            let (weighted_loss, found) = fast(&config, &parameters, shares(lambda), false, &weighted);
            assert!((loss - weighted_loss).abs() < 1e-6 * loss, "{loss}, {weighted_loss}");
            // Only the head's factor is rounded another way: an int8 step here and there.
            assert_alike(&found, &expected, 1e-5, 1e-3);
        }
    }
}

#[test]
fn tokens_without_weight_are_not_learnt() {
    // Every third token counts, and the whole second sequence does not.
    let masked = |targets: fn(u32) -> u32| {
        let batch = pieces(&[LENGTH, 31, 50], 211);
        let counts = |at: usize| at.is_multiple_of(3) && !(LENGTH..LENGTH + 31).contains(&at);
        let weights: Vec<f32> = (0..batch.ids.len()).map(|at| f32::from(counts(at)) * 0.01).collect();
        let targets =
            batch.targets.iter().zip(&weights).map(|(t, w)| if *w == 0.0 { targets(*t) } else { *t });
        Batch { targets: targets.collect(), weights: Some(weights), ..batch }
    };
    for config in [config(true, true, Activation::Silu, true), qwen2(), qwen3()] {
        let parameters = parameters(&config);
        for lambda in [0.3, 1.0] {
            let gradients = |batch: Batch| fast(&config, &parameters, shares(lambda), false, &[batch]);
            let expected = gradients(masked(|target| target));
            assert_eq!(gradients(masked(|target| 210 - target)), expected);
            // Even of no token of the vocabulary.
            assert_eq!(gradients(masked(|_| u32::MAX)), expected);

            // Without the sequence that has nothing to learn.
            let batch = masked(|target| target);
            let keep = |at: &usize| !(LENGTH..LENGTH + 31).contains(at);
            let kept: Vec<usize> = (0..batch.ids.len()).filter(keep).collect();
            let weights = batch.weights.as_ref().unwrap();
            let alone = gradients(Batch {
                ids: kept.iter().map(|at| batch.ids[*at]).collect(),
                targets: kept.iter().map(|at| batch.targets[*at]).collect(),
                weights: Some(kept.iter().map(|at| weights[*at]).collect()),
                sequences: vec![LENGTH, 50],
            });
            assert!((alone.0 - expected.0).abs() < 1e-6 * expected.0);
            // int8 gradients have their scales from blocks of tokens, which lie otherwise now.
            assert_alike(&alone.1, &expected.1, 1e-3, 0.01);
        }
    }
}

#[test]
fn recomputing_changes_no_bit() {
    for config in [config(true, true, Activation::Silu, true), mixed(qwen2()), qwen3()] {
        let parameters = parameters(&config);
        for shares in [shares(0.3), shares(1.0), Shares { quantization: 0.6, sub_norm: 0.2 }] {
            let batches = [tokens(2, 211), pieces(&[7, 80, 33], 211)];
            let kept = fast(&config, &parameters, shares, false, &batches);
            assert_eq!(kept, fast(&config, &parameters, shares, true, &batches));
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let config = config(true, true, Activation::Silu, true);
    let parameters = Parameters::init(&config, 0.1, 5).unwrap();
    for lambda in [0.3, 1.0] {
        let with = |threads: usize| {
            let pool = std::sync::Arc::new(Pool::new(threads).unwrap());
            pool.install(|| {
                fast(&config, &parameters, shares(lambda), false, &[tokens(5, 211), tokens(5, 211)])
            })
        };
        let one = with(1);
        assert_eq!(one, with(2));
        assert_eq!(one, with(5));
    }
}
