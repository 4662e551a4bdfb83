//! Learning from a teacher: what its losses add up to, where their gradients go, and which teachers are refused.
#[path = "../../infer/tests/common/mod.rs"]
mod models;

use std::path::Path;
use std::process::Command;

use bitlinear::kernels::KERNEL_VARIABLE;
use candle_core::{Device, Tensor};
use infer::config::ModelConfig;
use models::files::{edit_config, folder};
use models::{config as base, ids, qwens, write_tokenizer};
use tempfile::TempDir;
use trainer::config::{Config, DistillConfig, Quantization};
use trainer::data::Batch;
use trainer::decoder::{Decoder, StepLoss, StepWeights};
use trainer::import::{self, ImportError};
use trainer::model::{Model, Weights};
use trainer::optimizer::{AdamW, AdamWConfig, Gradients};
use trainer::parameters::Parameters;
use trainer::schedule::Shares;
use trainer::teacher::{Teacher, TeacherError};
use trainer::train::Learner;

/// Tokens in the longest sequence.
const LENGTH: usize = 24;
/// The layer whose relations are compared: one lies below it and one above.
const LAYER: usize = 1;

/// Three layers in full precision, as Llama.
fn llama() -> ModelConfig {
    ModelConfig {
        num_hidden_layers: 3,
        sub_norm: false,
        quantized: false,
        tie_word_embeddings: false,
        ..base()
    }
}

/// Some sequences, no pattern in their tokens.
fn batch(sequences: &[usize], seed: u64) -> Batch {
    let tokens: usize = sequences.iter().sum();
    Batch {
        ids: ids(&base(), tokens, seed),
        targets: ids(&base(), tokens, seed + 100),
        weights: None,
        sequences: sequences.to_vec(),
    }
}

/// All terms, with coefficients that f32 holds exactly.
fn all_terms() -> DistillConfig {
    DistillConfig {
        cross_entropy: 0.75,
        logits: 0.5,
        temperature: 1.5,
        relations: 8.0,
        relation_layer: Some(LAYER),
        relation_temperature: 0.5,
        ..DistillConfig::default()
    }
}

/// Relations alone.
fn relations_alone() -> DistillConfig {
    DistillConfig { cross_entropy: 0.0, logits: 0.0, relations: 64.0, ..all_terms() }
}

/// The parameters of a model in a folder.
fn read(folder: &TempDir) -> Parameters {
    import::read(folder.path()).unwrap().parameters
}

/// The values of each parameter's gradient, by its name.
type Copies = Vec<(String, Vec<f32>)>;

/// Losses and gradients of one optimizer step of the student, taught by the model in a folder.
fn step(
    teacher: &Path,
    distill: &DistillConfig,
    (shape, parameters, shares): (&ModelConfig, &Parameters, Shares),
    batches: &[Batch],
) -> (StepLoss, Copies) {
    let mut teacher = Teacher::load(teacher, distill, LENGTH, shape).unwrap();
    let values = parameters.values().unwrap();
    let weights = StepWeights::new(shape, &values, shares).unwrap();
    let mut decoder = Decoder::new(shape.clone(), LENGTH, false);
    let mut gradients = Gradients::new(parameters);
    let (mut loss, share) = (StepLoss::default(), 1.0 / batches.len() as f64);
    for batch in batches {
        teacher.read(batch).unwrap();
        let teacher_values = teacher.values().unwrap();
        let lesson = teacher.lesson(distill, &teacher_values);
        loss += decoder.step(&weights, batch, &lesson, share, &mut gradients).unwrap();
    }
    let copy = |(name, _)| (String::from(name), gradients.get(name).unwrap().to_vec());
    (loss, parameters.iter().map(copy).collect())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_student_that_is_its_teacher_has_nothing_to_learn() {
    let [qwen2, qwen3] = qwens();
    for shape in [llama(), qwen2, qwen3] {
        let shape = ModelConfig { quantized: false, ..shape };
        let (teacher, _) = folder(&shape, 3);
        // As a conversion starts: to be quantized, and nothing is yet.
        let student = ModelConfig { quantized: true, ..shape };
        let parameters = import::start(&student, &import::read(teacher.path()).unwrap()).unwrap();
        let shares = Shares { quantization: 0.0, sub_norm: 0.0 };
        let distill = DistillConfig { cross_entropy: 0.0, ..all_terms() };
        let taught = |shares, distill: &DistillConfig| {
            step(teacher.path(), distill, (&student, &parameters, shares), &[batch(&[LENGTH, 11], 5)])
        };
        let (loss, gradients) = taught(shares, &distill);
        assert!(loss.divergence.abs() < 1e-6 && loss.relations.abs() < 1e-6, "{loss:?}");
        let (_, text) = taught(shares, &DistillConfig { cross_entropy: 1.0, ..distill.clone() });
        for ((name, gradient), (_, text)) in gradients.iter().zip(&text) {
            let (found, size) = (norm(gradient), norm(text));
            assert!(found < 1e-5 * size, "{name}: {found}, that of the text is {size}");
        }
        // Once quantized it has.
        let (loss, _) = taught(Shares::FULL, &distill);
        assert!(loss.divergence > 1e-3 && loss.relations > 1e-3, "{loss:?}");
    }
}

#[test]
fn the_total_is_the_sum_of_its_terms() {
    let shape = llama();
    let ((teacher, _), (student, _)) = (folder(&shape, 3), folder(&shape, 4));
    let parameters = read(&student);
    let student = (&shape, &parameters, Shares::FULL);
    let batch = [batch(&[LENGTH, 7], 5)];
    let (loss, _) = step(teacher.path(), &all_terms(), student, &batch);
    let StepLoss { total, cross_entropy, divergence, relations } = loss;
    let expected = 0.75 * cross_entropy + 0.5 * 1.5 * 1.5 * divergence + 8.0 * relations;
    assert!((total - expected).abs() < 1e-12 * expected, "{total}, expected {expected}");
    assert!(cross_entropy > 1.0 && divergence > 0.1 && relations > 0.01, "{loss:?}");
    // Terms are what they are alone.
    let alone = DistillConfig { logits: 0.0, relations: 0.0, cross_entropy: 1.0, ..all_terms() };
    let (text, _) = step(teacher.path(), &alone, student, &batch);
    assert_eq!(text, StepLoss { total: cross_entropy, cross_entropy, ..StepLoss::default() });
    let (alone, _) = step(teacher.path(), &relations_alone(), student, &batch);
    assert_eq!((alone.relations, alone.total), (relations, 64.0 * relations));
}

/// Runs one of the ignored tests in a process whose dense products are in f32 wherever it runs.
fn in_f32(test: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(KERNEL_VARIABLE, "scalar");
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn divergence_is_that_of_the_models_distributions() {
    in_f32("divergence_in_f32");
}

#[test]
#[ignore = "runs in a process of its own"]
fn divergence_in_f32() {
    let shape = llama();
    let ((teacher, _), (student, _)) = (folder(&shape, 3), folder(&shape, 4));
    let batch = batch(&[LENGTH, 7], 5);
    let parameters = read(&student);
    let student = (&shape, &parameters, Shares::FULL);
    let (loss, _) = step(teacher.path(), &all_terms(), student, std::slice::from_ref(&batch));
    let distributions = |parameters: &Parameters, temperature: f64| -> Vec<Vec<f64>> {
        let model = Model::new(shape.clone(), LENGTH);
        let weights = Weights::fixed(parameters);
        let hidden = model.hidden(&weights, &batch.ids, &batch.sequences, Shares::FULL).unwrap();
        let logits = hidden.matmul(&parameters.tensor("lm_head.weight").t().unwrap()).unwrap();
        let softmax = |row: &Vec<f32>| {
            let powers: Vec<f64> = row.iter().map(|x| (f64::from(*x) / temperature).exp()).collect();
            let sum: f64 = powers.iter().sum();
            powers.into_iter().map(|power| power / sum).collect()
        };
        logits.to_vec2().unwrap().iter().map(softmax).collect()
    };
    let (p, q) = (distributions(&parameters, 1.5), distributions(&read(&teacher), 1.5));
    let pairs = p.iter().flatten().zip(q.iter().flatten());
    let divergence = pairs.map(|(p, q)| q * (q / p).ln()).sum::<f64>() / batch.ids.len() as f64;
    assert!((loss.divergence - divergence).abs() < 1e-5 * divergence, "{loss:?}, expected {divergence}");
    let sharp = distributions(&parameters, 1.0);
    let text = sharp.iter().zip(&batch.targets).map(|(p, target)| -p[*target as usize].ln()).sum::<f64>();
    let text = text / batch.ids.len() as f64;
    assert!((loss.cross_entropy - text).abs() < 1e-5 * text, "{loss:?}, expected {text}");
}

#[test]
fn gradients_are_finite_differences_of_the_total() {
    in_f32("differences_in_f32");
}

#[test]
#[ignore = "runs in a process of its own"]
fn differences_in_f32() {
    assert!(!bitlinear::products::bf16_is_fast());
    let [qwen2, qwen3] = qwens();
    for shape in [llama(), qwen2, qwen3] {
        let shape = ModelConfig { num_hidden_layers: 3, quantized: false, ..shape };
        let ((teacher, _), (student, _)) = (folder(&shape, 3), folder(&shape, 4));
        let parameters = read(&student);
        let batches = [batch(&[LENGTH, 7], 5)];
        for distill in [all_terms(), relations_alone()] {
            let evaluate = || step(teacher.path(), &distill, (&shape, &parameters, Shares::FULL), &batches);
            let (_, gradients) = evaluate();
            for (name, gradient) in &gradients {
                differences(&parameters, name, gradient, || evaluate().0.total);
            }
        }
    }
}

/// Compares a gradient with central differences along itself and along another direction.
fn differences(parameters: &Parameters, name: &str, gradient: &[f32], total: impl Fn() -> f64) {
    /// Steps that are long enough for the rounding of an f32 loss, some 1e-6, and short enough for its curvature.
    const STEP: f32 = 4e-3;
    let tensor = parameters.tensor(name).copy().unwrap();
    let size = norm(gradient);
    let other: Vec<f32> = (0..gradient.len()).map(|at| (at as f32 * 12.9898 + 1.0).sin()).collect();
    for direction in [gradient.to_vec(), other] {
        let length = norm(&direction);
        if length == 0.0 {
            continue;
        }
        let unit: Vec<f32> = direction.iter().map(|x| (f64::from(*x) / length) as f32).collect();
        let step = Tensor::from_vec(unit.clone(), tensor.shape(), &Device::Cpu).unwrap();
        let at = |factor: f32| {
            parameters.set(name, &(&tensor + (&step * f64::from(factor)).unwrap()).unwrap()).unwrap();
            total()
        };
        let difference = (at(STEP) - at(-STEP)) / f64::from(2.0 * STEP);
        parameters.set(name, &tensor).unwrap();
        let slope: f64 = gradient.iter().zip(&unit).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
        assert!(
            (difference - slope).abs() < 2e-3 * size + 2e-4,
            "{name}: slope {slope}, difference {difference}, gradient of length {size}"
        );
    }
}

#[test]
fn relations_reach_only_what_they_are_made_of() {
    let [qwen2, qwen3] = qwens();
    let bitnet = ModelConfig { num_hidden_layers: 3, ..base() };
    for shape in [llama(), qwen2, qwen3, bitnet] {
        let shape = ModelConfig { num_hidden_layers: 3, tie_word_embeddings: false, ..shape };
        let full = ModelConfig { quantized: false, ..shape.clone() };
        let ((teacher, _), (student, _)) = (folder(&full, 3), folder(&full, 4));
        let parameters = read(&student);
        let batches = [batch(&[LENGTH, 7], 5)];
        let student = (&shape, &parameters, Shares::FULL);
        let (loss, gradients) = step(teacher.path(), &relations_alone(), student, &batches);
        assert!(loss.total > 0.0 && loss.cross_entropy > 0.0, "{loss:?}");
        for (name, gradient) in &gradients {
            let below = name.starts_with("model.embed") || name.starts_with("model.layers.0.");
            let part = name.strip_prefix(&format!("model.layers.{LAYER}."));
            let made_of = ["input_layernorm.", "self_attn.q_", "self_attn.k_", "self_attn.v_"];
            let reached = below || part.is_some_and(|part| made_of.iter().any(|made| part.starts_with(made)));
            assert_eq!(norm(gradient) > 0.0, reached, "{name}: {}", norm(gradient));
        }
    }
}

#[test]
fn micro_batches_are_one_batch() {
    let shape = llama();
    let ((teacher, _), (student, _)) = (folder(&shape, 3), folder(&shape, 4));
    let parameters = read(&student);
    let student = (&shape, &parameters, Shares::FULL);
    let whole = batch(&[LENGTH; 4], 5);
    let half = |tokens: std::ops::Range<usize>| Batch {
        ids: whole.ids[tokens.clone()].to_vec(),
        targets: whole.targets[tokens].to_vec(),
        weights: None,
        sequences: vec![LENGTH; 2],
    };
    let halves = [half(0..2 * LENGTH), half(2 * LENGTH..4 * LENGTH)];
    for distill in [all_terms(), relations_alone()] {
        let (expected_loss, expected) = step(teacher.path(), &distill, student, std::slice::from_ref(&whole));
        let (loss, found) = step(teacher.path(), &distill, student, &halves);
        assert!((loss.total - expected_loss.total).abs() < 1e-6 * loss.total, "{loss:?} {expected_loss:?}");
        assert!((loss.relations - expected_loss.relations).abs() < 1e-6 * loss.relations);
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let difference: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
            // Sums of f32 in another order; halves are halved exactly, so bf16 rounds them alike.
            assert!(norm(&difference) <= 1e-4 * norm(expected), "{name}: {}", norm(&difference));
        }
    }
}

/// A run's settings with a teacher and a learner of this shape.
fn learner(
    distill: &DistillConfig,
    shape: &ModelConfig,
    teacher: &Path,
    student: &TempDir,
) -> (Config, Learner) {
    let mut config = Config { distill: distill.clone(), ..Config::default() };
    (config.data.sequence_length, config.train.batch_size) = (LENGTH, 2);
    config.model.quantization = if shape.quantized { Quantization::Bitnet } else { Quantization::None };
    let parameters = read(student);
    let optimizer = AdamW::new(AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8 }, &parameters);
    let teacher = Teacher::load(teacher, distill, LENGTH, shape).unwrap();
    let learner = Learner::new(&config, shape.clone(), parameters, optimizer, Some(teacher));
    (config, learner)
}

#[test]
fn each_term_alone_teaches() {
    let full = llama();
    let shape = ModelConfig { quantized: true, ..full.clone() };
    let ((teacher, _), (student, _)) = (folder(&full, 3), folder(&full, 4));
    let batches = [batch(&[LENGTH; 2], 5)];
    let none = DistillConfig { cross_entropy: 0.0, logits: 0.0, ..DistillConfig::default() };
    type Term = fn(&StepLoss) -> f64;
    let terms: [(DistillConfig, Term); 3] = [
        (DistillConfig { cross_entropy: 1.0, ..none.clone() }, |loss| loss.cross_entropy),
        (DistillConfig { logits: 1.0, ..none }, |loss| loss.divergence),
        (relations_alone(), |loss| loss.relations),
    ];
    for (distill, term) in terms {
        let (config, mut learner) = learner(&distill, &shape, teacher.path(), &student);
        let losses: Vec<f64> = (0..30)
            .map(|at| {
                let step = learner.step(&config, at, &batches).unwrap();
                assert!(step.updated);
                term(&step.loss)
            })
            .collect();
        assert!(losses[29] < 0.8 * losses[0], "{distill:?}: {losses:?}");
    }
}

/// Why a teacher is refused.
fn refused(teacher: &Path, distill: &DistillConfig, student: &ModelConfig) -> TeacherError {
    Teacher::load(teacher, distill, LENGTH, student).err().unwrap()
}

#[test]
fn teachers_that_do_not_fit_are_refused() {
    let shape = llama();
    let (teacher, _) = folder(&shape, 3);
    let path = teacher.path();
    let message = |error: TeacherError| {
        let text = error.to_string();
        assert!(text.contains(&path.display().to_string()), "{text}");
        text
    };

    let other = ModelConfig { vocab_size: 301, ..shape.clone() };
    let text = message(refused(path, &all_terms(), &other));
    assert!(text.contains("vocabulary is 300") && text.contains("301"), "{text}");

    let longer = Teacher::load(path, &all_terms(), 97, &shape).err().unwrap();
    let text = message(longer);
    assert!(text.contains("context") && text.contains("is 96") && text.contains("97"), "{text}");

    // Queries are 32 wide, keys and values 16.
    let heads = |heads| DistillConfig { relation_heads: Some(heads), ..all_terms() };
    for count in [3, 32] {
        let text = message(refused(path, &heads(count), &shape));
        assert!(text.contains("distill.relation_heads") && text.contains(&count.to_string()), "{text}");
    }
    assert!(Teacher::load(path, &heads(16), LENGTH, &shape).is_ok());
    let unused = DistillConfig { relations: 0.0, ..heads(3) };
    assert!(Teacher::load(path, &unused, LENGTH, &shape).is_ok());

    // The config alone says nothing of tensors that disagree with it.
    edit_config(path, |config| config["intermediate_size"] = 40.into());
    let text = message(refused(path, &all_terms(), &shape));
    assert!(text.contains("gate_proj") || text.contains("down_proj") || text.contains("up_proj"), "{text}");
}

#[test]
fn ternary_teachers_are_refused() {
    let (packed, _) = folder(&base(), 3);
    let (latent, _) = folder(&ModelConfig { quantized: false, ..base() }, 3);
    edit_config(latent.path(), |config| {
        config["quantization_config"] = serde_json::json!({
            "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online",
        });
    });
    for teacher in [packed, latent] {
        let error = refused(teacher.path(), &all_terms(), &base());
        assert!(
            matches!(&error, TeacherError::Import(ImportError::QuantizedTeacher(path)) if path == teacher.path()),
            "{error}"
        );
    }
    let missing = TempDir::new().unwrap();
    write_tokenizer(missing.path());
    let text = refused(missing.path(), &all_terms(), &base()).to_string();
    assert!(text.contains("config.json"), "{text}");
}

#[test]
fn a_deeper_teacher_teaches_as_far_from_its_end() {
    // The teacher's relations come from its own last layer but one, whatever its depth and width.
    let shape = ModelConfig { num_hidden_layers: 2, ..llama() };
    let deep = ModelConfig { num_hidden_layers: 4, hidden_size: 48, num_attention_heads: 6, ..llama() };
    let ((teacher, _), (student, _)) = (folder(&deep, 3), folder(&shape, 4));
    let parameters = read(&student);
    let distill = DistillConfig { relation_layer: None, relation_heads: Some(4), ..relations_alone() };
    let batches = [batch(&[LENGTH, 7], 5)];
    let student = (&shape, &parameters, Shares::FULL);
    let (loss, gradients) = step(teacher.path(), &distill, student, &batches);
    assert!(loss.relations > 0.01, "{loss:?}");
    let gradient = |name: &str| norm(&gradients.iter().find(|(found, _)| found == name).unwrap().1);
    assert!(gradient("model.layers.0.self_attn.q_proj.weight") > 0.0);
    assert_eq!(gradient("model.layers.1.self_attn.q_proj.weight"), 0.0);
    // What the teacher does above that layer is of no matter.
    models::files::edit(teacher.path(), |raw| {
        let name = "model.layers.3.self_attn.q_proj.weight";
        let zeros = vec![0.0; raw.f32(name).len()];
        raw.set_f32(name, &[48, 48], &zeros);
    });
    assert_eq!(step(teacher.path(), &distill, student, &batches).0.relations, loss.relations);
    models::files::edit(teacher.path(), |raw| {
        let name = "model.layers.2.self_attn.q_proj.weight";
        let values: Vec<f32> = raw.f32(name).iter().rev().copied().collect();
        raw.set_f32(name, &[48, 48], &values);
    });
    assert_ne!(step(teacher.path(), &distill, student, &batches).0.relations, loss.relations);
}
