//! The quantizers and whole training steps against PyTorch: golden/gen.py wrote the files, golden/README.md says with what.
use std::collections::HashMap;
use std::path::Path;

use bitlinear::math::Activation;
use bitlinear::quant;
use infer::config::ModelConfig;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use trainer::data::Batch;
use trainer::decoder::{Decoder, Lesson, StepWeights};
use trainer::model::Model;
use trainer::optimizer::{AdamW, AdamWConfig, Gradients};
use trainer::parameters::Parameters;
use trainer::schedule::Shares;

/// Largest difference of a loss, in nats.
const LOSS: f64 = 1e-5;

/// Largest difference of a value of a gradient, in units of the tensor's largest.
///
/// Both sides round every operation to f32 (2^-24) and add in different orders; through two layers and back that comes
/// to some 1e-6. gen.py chose a model in which no int8 code is near a tie, so both compute the same function.
const GRADIENT: f64 = 2e-5;

/// Largest difference of what three updates change, where one update changes a value by up to 1e-3.
///
/// Adam divides a gradient by its own size, so where a gradient is within rounding errors of zero its update is not
/// certain to more than that; the file holds changes as f16, to 1e-6.
const CHANGE: f64 = 5e-6;

/// A golden file in memory.
struct Golden {
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name);
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        println!("{name}: torch {}", metadata["torch"]);
        Self { bytes, metadata }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    /// The values of a tensor, all of which f64 holds exactly.
    fn values(&self, name: &str) -> Vec<f64> {
        let tensors = self.tensors();
        let tensor = tensors.tensor(name).unwrap();
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
            Dtype::F16 => data.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).into()).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            Dtype::I8 => data.iter().map(|b| f64::from(*b as i8)).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    fn f32s(&self, name: &str) -> Vec<f32> {
        self.values(name).into_iter().map(|v| v as f32).collect()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.values(name).into_iter().map(|v| v as u32).collect()
    }

    fn setting<T: std::str::FromStr<Err: std::fmt::Debug>>(&self, key: &str) -> T {
        // Python writes True and False.
        self.metadata[key].to_lowercase().parse().unwrap()
    }

    fn config(&self) -> ModelConfig {
        let config = ModelConfig {
            hidden_size: self.setting("hidden_size"),
            intermediate_size: self.setting("intermediate_size"),
            num_hidden_layers: self.setting("num_hidden_layers"),
            num_attention_heads: self.setting("num_attention_heads"),
            num_key_value_heads: self.setting("num_key_value_heads"),
            head_dim: self.setting("head_dim"),
            vocab_size: self.setting("vocab_size"),
            rms_norm_eps: self.setting("rms_norm_eps"),
            rope_theta: self.setting("rope_theta"),
            max_position_embeddings: self.setting("max_position_embeddings"),
            tie_word_embeddings: self.setting("tie_word_embeddings"),
            hidden_act: Activation::from_name(&self.metadata["hidden_act"]).unwrap(),
            sub_norm: self.setting("sub_norm"),
            quantized: true,
            qkv_bias: false,
            qk_norm: false,
            modules_to_not_convert: Vec::new(),
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        config.validate().unwrap();
        config
    }

    /// The initial parameters, which gen.py makes by the same integer arithmetic.
    fn initial(&self) -> Parameters {
        let config = self.config();
        let seed: u64 = self.setting("seed");
        let shapes = Parameters::init(&config, 1.0, 0).unwrap();
        let tensors: Vec<(&str, Vec<usize>, Vec<u8>)> = shapes
            .iter()
            .enumerate()
            .map(|(stream, (name, parameter))| {
                let scale = |u: f32| match parameter.value.dims().len() {
                    1 => 1.0 + u * 0.5,
                    _ if parameter.role.is_projection() => u * 0.5,
                    _ => u,
                };
                let count = parameter.value.elem_count() as u64;
                let values = (0..count).flat_map(|at| scale(uniform(seed, stream as u64, at)).to_le_bytes());
                (name, parameter.value.dims().to_vec(), values.collect())
            })
            .collect();
        let views = tensors
            .iter()
            .map(|(name, shape, data)| (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
        let bytes = safetensors::serialize(views, None).unwrap();
        Parameters::from_safetensors(&config, &bytes).unwrap()
    }
}

/// SplitMix64 in counter mode, between -1/2 and 1/2.
fn uniform(seed: u64, stream: u64, at: u64) -> f32 {
    let z = (seed << 40 | stream << 32).wrapping_add(at).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ z >> 31) >> 40) as f32 / 16_777_216.0 - 0.5
}

/// The largest difference; infinite for NaN and for another length.
fn largest_difference(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|v| v.is_nan()) {
        return f64::INFINITY;
    }
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max)
}

/// [`largest_difference`] in units of the largest magnitude expected, or of 1e-30 where all is zero.
fn relative_difference(found: &[f64], expected: &[f64]) -> f64 {
    let largest = expected.iter().fold(1e-30f64, |max, e| max.max(e.abs()));
    largest_difference(found, expected) / largest
}

#[test]
fn the_differences_see_what_they_should() {
    assert_eq!(largest_difference(&[1.0, 2.0], &[1.0, -1.0]), 3.0);
    assert_eq!(relative_difference(&[1.0, 2.0], &[1.0, -4.0]), 1.5);
    assert_eq!(relative_difference(&[0.0], &[0.0]), 0.0);
    assert!(relative_difference(&[1e-20], &[0.0]) > 1.0);
    for (found, expected) in [(vec![f64::NAN], vec![1.0]), (vec![1.0], vec![f64::NAN]), (vec![1.0], vec![])] {
        assert_eq!(relative_difference(&found, &expected), f64::INFINITY);
    }
}

#[test]
fn activations_quantize_as_in_pytorch() {
    let golden = Golden::open("quantizers.safetensors");
    let (values, codes) = (golden.f32s("activations"), golden.values("activation_codes"));
    let factors = golden.values("activation_factors");
    let width = values.len() / factors.len();
    for (row, (x, factor)) in values.chunks_exact(width).zip(&factors).enumerate() {
        let mut found = vec![0i8; width];
        let scale = quant::quantize_row(x, &mut found);
        let found: Vec<f64> = found.into_iter().map(f64::from).collect();
        assert_eq!(found, codes[row * width..][..width], "row {row}");
        // Ours multiplies and theirs divides: one rounding each.
        assert!((f64::from(scale) * factor - 1.0).abs() < 2e-7, "row {row}: {scale} times {factor}");
    }
}

#[test]
fn weights_quantize_as_in_pytorch() {
    let golden = Golden::open("quantizers.safetensors");
    for name in ["ties", "zeros", "tiny", "random", "outlier", "equal"] {
        let weights = golden.f32s(&format!("weights.{name}"));
        let scale = quant::absmean(&weights);
        let expected = golden.values(&format!("weight_scale.{name}"));
        // Theirs adds in f32.
        assert!(relative_difference(&[scale.into()], &expected) < 1e-6, "{name}: {scale} {expected:?}");
        let mut codes = vec![0i8; weights.len()];
        quant::ternarize(&weights, scale, &mut codes);
        let codes: Vec<f64> = codes.into_iter().map(f64::from).collect();
        assert_eq!(codes, golden.values(&format!("weight_codes.{name}")), "{name}");
    }
}

impl Golden {
    /// The file's batch.
    fn batch(&self) -> Batch {
        let ids = self.ids("ids");
        let length = self.setting("max_position_embeddings");
        let sequences = vec![length; ids.len() / length];
        Batch { targets: self.ids("targets"), weights: None, sequences, ids }
    }
}

/// Loss and gradients of the file's batch.
fn loss_and_gradients(
    golden: &Golden,
    model: &Model,
    parameters: &Parameters,
    lambda: f32,
) -> (f64, Gradients) {
    let shares = Shares { quantization: lambda, sub_norm: 1.0 };
    let loss = model.loss(parameters, &golden.batch(), shares).unwrap();
    let mut gradients = Gradients::new(parameters);
    gradients.add(parameters, loss.backward().unwrap()).unwrap();
    (loss.to_scalar::<f32>().unwrap().into(), gradients)
}

/// The worst [`relative_difference`] of all gradients.
fn gradient_difference(golden: &Golden, parameters: &Parameters, gradients: &Gradients) -> f64 {
    let mut worst = 0f64;
    for (name, _) in parameters.iter() {
        let found: Vec<f64> = gradients.get(name).unwrap().iter().map(|g| f64::from(*g)).collect();
        let difference = relative_difference(&found, &golden.values(&format!("gradient.{name}")));
        println!("gradient of {name}: {difference:.1e}");
        worst = worst.max(difference);
    }
    worst
}

fn trains_as_in_pytorch(file: &str) {
    let golden = Golden::open(file);
    let parameters = golden.initial();
    let start = parameters.to_vecs().unwrap();
    let named = golden.tensors().names().into_iter().filter(|n| n.starts_with("gradient.")).count();
    assert_eq!(named, start.len(), "a gradient for every parameter");
    let model = Model::new(golden.config(), golden.setting("max_position_embeddings"));
    let mut optimizer = AdamW::new(AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8 }, &parameters);
    let (losses, norms) = (golden.values("losses"), golden.values("gradient_norms"));
    for (step, (expected, expected_norm)) in losses.iter().zip(&norms).enumerate() {
        let (loss, gradients) = loss_and_gradients(&golden, &model, &parameters, 1.0);
        println!("step {step}: loss {loss}, PyTorch {expected}");
        assert!((loss - expected).abs() < LOSS, "step {step}: loss {loss}, PyTorch {expected}");
        if step == 0 {
            let difference = gradient_difference(&golden, &parameters, &gradients);
            assert!(difference < GRADIENT, "gradients differ by {difference:.1e}");
        }
        let norm = gradients.norms().iter().map(|(_, norm)| norm * norm).sum::<f64>().sqrt();
        assert!(
            relative_difference(&[norm], &[*expected_norm]) < GRADIENT,
            "step {step}: norm {norm}, {expected_norm}"
        );
        let clip: f64 = golden.setting("gradient_clip");
        assert!(norm > clip, "the file is to test clipping");
        let (rate, decay) = (golden.setting("learning_rate"), golden.setting("weight_decay"));
        optimizer.update(&parameters, &gradients, clip / norm, rate, decay).unwrap();
    }
    let mut worst = 0f64;
    for ((name, _, _, before), (_, _, _, after)) in start.iter().zip(parameters.to_vecs().unwrap()) {
        let change: Vec<f64> = after.iter().zip(before).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
        let difference = largest_difference(&change, &golden.values(&format!("change.{name}")));
        println!("change of {name}: {difference:.1e}");
        worst = worst.max(difference);
    }
    assert!(worst < CHANGE, "changes differ by {worst:.1e}");
}

#[test]
fn a_bitnet_with_sub_norms_silu_and_a_tied_head_trains_as_in_pytorch() {
    trains_as_in_pytorch("bitnet.safetensors");
}

#[test]
fn a_llama_with_relu2_and_its_own_head_trains_as_in_pytorch() {
    trains_as_in_pytorch("llama.safetensors");
}

/// The fast step rounds gradients to int8 and dense operands to bf16: directions agree, not digits.
#[test]
fn the_fast_step_has_the_loss_and_the_directions_of_pytorch() {
    for file in ["bitnet.safetensors", "llama.safetensors"] {
        let golden = Golden::open(file);
        let (parameters, config) = (golden.initial(), golden.config());
        let values = parameters.values().unwrap();
        let weights = StepWeights::new(&config, &values, Shares::FULL).unwrap();
        let mut decoder = Decoder::new(config, golden.setting("max_position_embeddings"), false);
        let mut gradients = Gradients::new(&parameters);
        let loss = decoder.step(&weights, &golden.batch(), &Lesson::TEXT, 1.0, &mut gradients).unwrap().total;
        let expected = golden.values("losses")[0];
        assert!((loss - expected).abs() < 2e-3, "{file}: loss {loss}, PyTorch {expected}");
        for (name, _) in parameters.iter() {
            let found: Vec<f64> = gradients.get(name).unwrap().iter().map(|g| f64::from(*g)).collect();
            let expected = golden.values(&format!("gradient.{name}"));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let cosine = dot(&found, &expected) / (dot(&found, &found) * dot(&expected, &expected)).sqrt();
            println!("gradient of {name}: cosine {cosine:.6}");
            assert!(cosine > 0.999, "{file}: gradient of {name}: cosine {cosine}");
        }
    }
}

#[test]
fn a_slightly_different_model_is_told_apart() {
    for file in ["bitnet.safetensors", "llama.safetensors"] {
        let golden = Golden::open(file);
        let (parameters, length) = (golden.initial(), golden.setting("max_position_embeddings"));
        let expected = golden.values("losses")[0];
        let differences = |config: ModelConfig, lambda| {
            let (loss, gradients) =
                loss_and_gradients(&golden, &Model::new(config, length), &parameters, lambda);
            ((loss - expected).abs(), gradient_difference(&golden, &parameters, &gradients))
        };
        let config = golden.config();
        let theta = ModelConfig { rope_theta: 9_000.0, ..config.clone() };
        let eps = ModelConfig { rms_norm_eps: 1e-4, ..config.clone() };
        for (what, config, lambda) in [("theta", theta, 1.0), ("eps", eps, 1.0), ("lambda", config, 0.99)] {
            let (loss, gradients) = differences(config, lambda);
            assert!(loss > LOSS && gradients > GRADIENT, "{file}, {what}: {loss:.1e}, {gradients:.1e}");
        }
    }
}
