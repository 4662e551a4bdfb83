//! The fast training step against candle's graph of the same model.
use bitlinear::math::Activation;
use bitlinear::pool::Pool;
use infer::config::ModelConfig;
use trainer::data::Batch;
use trainer::decoder::{Decoder, Lesson, StepWeights};
use trainer::model::Model;
use trainer::optimizer::Gradients;
use trainer::parameters::Parameters;
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

/// Ids and targets of some sequences, no pattern in them.
fn tokens(sequences: usize, vocab: u32) -> Batch {
    let id = |at: usize| (at as u32).wrapping_mul(2_654_435_761).rotate_left(11) % vocab;
    Batch {
        ids: (0..sequences * LENGTH).map(id).collect(),
        targets: (0..sequences * LENGTH).map(|at| id(at + 7919)).collect(),
        weights: None,
        sequences: vec![LENGTH; sequences],
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
    lambda: f32,
    recompute: bool,
    batches: &[Batch],
) -> (f64, Vec<(String, Vec<f32>)>) {
    let values = parameters.values().unwrap();
    let weights = StepWeights::new(config, &values, shares(lambda)).unwrap();
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
    lambda: f32,
    batch: &Batch,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let model = Model::new(config.clone(), LENGTH);
    let loss = model.loss(parameters, batch, shares(lambda)).unwrap();
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

#[test]
fn gradients_are_those_of_the_graph() {
    for (sub_norm, tied, act, quantized) in [
        (true, true, Activation::Silu, true),
        (true, false, Activation::Relu2, true),
        (false, true, Activation::Silu, true),
        (true, true, Activation::Silu, false),
    ] {
        let config = config(sub_norm, tied, act, quantized);
        let parameters = Parameters::init(&config, 0.1, 5).unwrap();
        let batch = tokens(3, 211);
        for lambda in [0.0, 0.3, 1.0] {
            let (expected_loss, expected) = graph(&config, &parameters, lambda, &batch);
            let (loss, found) = fast(&config, &parameters, lambda, false, std::slice::from_ref(&batch));
            assert!((loss - expected_loss).abs() < 2e-3, "loss {loss}, expected {expected_loss}");
            for ((name, found), (_, expected)) in found.iter().zip(&expected) {
                let (cosine, ratio) = compare(found, expected);
                assert!(
                    cosine > 0.999 && (ratio - 1.0).abs() < 0.02,
                    "{name} at lambda {lambda}, sub-norm {sub_norm}: cosine {cosine}, ratio {ratio}"
                );
            }
            println!(
                "worst cosine {:?}",
                found.iter().zip(&expected).map(|(f, e)| compare(&f.1, &e.1).0).fold(1.0, f64::min)
            );
        }
    }
}

#[test]
fn recomputing_changes_no_bit() {
    let config = config(true, true, Activation::Silu, true);
    let parameters = Parameters::init(&config, 0.1, 5).unwrap();
    for lambda in [0.3, 1.0] {
        let batches = [tokens(2, 211), tokens(3, 211)];
        let kept = fast(&config, &parameters, lambda, false, &batches);
        assert_eq!(kept, fast(&config, &parameters, lambda, true, &batches));
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let config = config(true, true, Activation::Silu, true);
    let parameters = Parameters::init(&config, 0.1, 5).unwrap();
    for lambda in [0.3, 1.0] {
        let with = |threads: usize| {
            let pool = std::sync::Arc::new(Pool::new(threads).unwrap());
            pool.install(|| fast(&config, &parameters, lambda, false, &[tokens(5, 211), tokens(5, 211)]))
        };
        let one = with(1);
        assert_eq!(one, with(2));
        assert_eq!(one, with(5));
    }
}
