//! The loss of packed conversations against PyTorch, one at a time: golden/chat_loss.py wrote the file, golden/README.md says
//! with what.
use std::fs;
use std::path::Path;

use bitlinear::products::bf16_is_fast;
use infer::config::ModelConfig;
use serde_json::{Value, json};
use tempfile::TempDir;
use trainer::data::chat::{ChatSettings, ChatWindows, prepare_chat};
use trainer::data::{Batch, Reduction, Rows};
use trainer::decoder::{Decoder, Lesson, StepWeights};
use trainer::model::Model;
use trainer::optimizer::Gradients;
use trainer::parameters::Parameters;
use trainer::schedule::Shares;
use trainer::train::validation_loss;

/// Tokens of a row: the four conversations take three, one of them full.
const LENGTH: usize = 128;

/// Largest difference of a mean loss, nats a token: in f32 sums in another order, worth some 1e-7; bf16 keeps 8 bits of each
/// factor. `BITLINEAR_KERNEL=avx2` computes in f32 everywhere.
fn loss_tolerance() -> f64 {
    if bf16_is_fast() { 2e-3 } else { 1e-5 }
}

/// Largest relative difference of a gradient's norm, likewise.
fn norm_tolerance() -> f64 {
    if bf16_is_fast() { 1e-2 } else { 1e-5 }
}

/// The golden file, and the folder of the model and conversations that it holds.
struct Golden {
    file: Value,
    folder: TempDir,
}

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/chat_loss.json");
        let file: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let folder = TempDir::new().unwrap();
        let tokens =
            json!({"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": file["template"]});
        let lines: Vec<String> = file["conversations"].as_array().unwrap().iter().map(line).collect();
        for (name, text) in [
            ("tokenizer.json", file["tokenizer"].to_string()),
            ("tokenizer_config.json", tokens.to_string()),
            ("chat.jsonl", lines.join("\n")),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self { file, folder }
    }

    fn number(&self, key: &str) -> f64 {
        self.file[key].as_f64().unwrap()
    }

    fn config(&self) -> ModelConfig {
        ModelConfig::from_json(self.file["config"].to_string().as_bytes()).unwrap().0
    }

    /// What chat_loss.py makes by the same integer arithmetic.
    fn parameters(&self) -> Parameters {
        let config = self.config();
        let seed = self.file["seed"].as_u64().unwrap();
        let shapes = Parameters::init(&config, 1.0, 0).unwrap();
        let values = shapes.iter().enumerate().map(|(stream, (name, parameter))| {
            let norm = parameter.value.dims().len() == 1;
            let value = |at| uniform(seed, stream as u64, at) * 0.5 + f32::from(u8::from(norm));
            (name.to_owned(), (0..parameter.value.elem_count() as u64).map(value).collect())
        });
        Parameters::from_values(&config, values.collect()).unwrap()
    }

    /// The conversations as rows.
    fn rows(&self) -> ChatWindows {
        let file = self.folder.path().join("chat.jsonl");
        let settings = ChatSettings {
            train: vec![file.clone()],
            validation: vec![file],
            validation_fraction: 0.1,
            folder: self.folder.path().into(),
            vocab_size: Some(self.config().vocab_size),
            sequence_length: LENGTH,
            seed: 1,
            now: None,
        };
        let Rows::Chat(rows) = prepare_chat(&settings, &|_, _| {}).unwrap().train else {
            panic!("no conversations")
        };
        rows
    }
}

/// A line of the conversations' file.
fn line(messages: &Value) -> String {
    json!({ "messages": messages }).to_string()
}

/// SplitMix64 in counter mode, between -1/2 and 1/2.
fn uniform(seed: u64, stream: u64, at: u64) -> f32 {
    let z = (seed << 40 | stream << 32).wrapping_add(at).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ z >> 31) >> 40) as f32 / 16_777_216.0 - 0.5
}

/// The micro-batches of one step over all rows: two rows, then one.
fn step_of(rows: &ChatWindows, reduction: Reduction) -> Vec<Batch> {
    let mut batches = vec![rows.batch(&[2, 0]), rows.batch(&[1])];
    reduction.scale(&mut batches);
    batches
}

/// Loss of a step and the gradient of each tensor.
fn learn(golden: &Golden, batches: &[Batch]) -> (f64, Vec<(String, Vec<f32>)>) {
    let (config, parameters) = (golden.config(), golden.parameters());
    let values = parameters.values().unwrap();
    let weights = StepWeights::new(&config, &values, Shares::FULL).unwrap();
    let mut decoder = Decoder::new(config, LENGTH, false);
    let mut gradients = Gradients::new(&parameters);
    let share = 1.0 / batches.len() as f64;
    let step = |batch| decoder.step(&weights, batch, &Lesson::TEXT, share, &mut gradients).unwrap().total;
    let loss = batches.iter().map(step).sum();
    let copied = |(name, _): (&str, _)| (name.to_owned(), gradients.get(name).unwrap().to_vec());
    (loss, parameters.iter().map(copied).collect())
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn tokens_and_who_says_them_are_those_of_transformers() {
    let golden = Golden::open();
    let rows = golden.rows();
    assert_eq!((rows.count(), rows.learnt() as f64), (3, golden.number("learnt")));
    let batch = rows.batch(&[0, 1, 2]);
    let (weights, mut start, mut found) = (batch.weights.unwrap(), 0, Vec::new());
    for length in batch.sequences {
        let ids = &batch.ids[start..start + length];
        // A weight is that of the next token.
        let assistant: Vec<u8> = weights[start..start + length - 1].iter().map(|w| *w as u8).collect();
        if assistant.contains(&1) {
            let assistant = [&[0], &assistant[..]].concat();
            found.push(json!({ "ids": ids, "assistant": assistant }));
        }
        start += length;
    }
    let expected = golden.file["examples"].as_array().unwrap();
    assert_eq!(found.len(), expected.len());
    assert!(expected.iter().all(|example| found.contains(example)), "{found:?}");
}

#[test]
fn loss_and_gradients_are_those_of_pytorch() {
    let golden = Golden::open();
    let (rows, learnt) = (golden.rows(), golden.number("learnt"));
    for (key, reduction, count) in [("mean", Reduction::Mean, 1.0), ("sum", Reduction::Sum, learnt)] {
        let (loss, gradients) = learn(&golden, &step_of(&rows, reduction));
        let gap = (loss - golden.number(key)).abs() / count;
        println!("{key}: loss differs by {gap:.1e} a token, bf16 {}", bf16_is_fast());
        assert!(gap < loss_tolerance(), "{key}: {loss}, differs by {gap:.1e}");
        let mut worst = 0f64;
        for (name, gradient) in &gradients {
            let expected = golden.file["norms"][key][name].as_f64().unwrap();
            let gap = (norm(gradient) / expected - 1.0).abs();
            worst = worst.max(gap);
            assert!(gap < norm_tolerance(), "{key} {name}: {} and {expected}", norm(gradient));
        }
        println!("{key}: norms differ by {worst:.1e}");
    }
    assert!((golden.number("sum") / golden.number("mean") - learnt).abs() < 1e-9 * learnt);
}

/// In f32 whatever the processor: evaluation never rounds to bf16.
#[test]
fn validation_is_the_same_mean() {
    let golden = Golden::open();
    let (model, rows) = (Model::new(golden.config(), LENGTH), Rows::Chat(golden.rows()));
    for batch_size in [1, 2] {
        let loss = validation_loss(&model, &golden.parameters(), &rows, &[0, 1, 2], batch_size).unwrap();
        let gap = (loss - golden.number("mean")).abs();
        println!("validation loss differs by {gap:.1e}");
        assert!(gap < 1e-5, "{loss}");
    }
}

#[test]
fn a_sum_is_the_mean_of_as_many_tokens() {
    let golden = Golden::open();
    let (rows, learnt) = (golden.rows(), golden.number("learnt"));
    let (mean, means) = learn(&golden, &step_of(&rows, Reduction::Mean));
    let (sum, sums) = learn(&golden, &step_of(&rows, Reduction::Sum));
    // A mean's weights are rounded to f32, each alike.
    assert!((sum / mean / learnt - 1.0).abs() < 1e-6, "{sum} and {mean}");
    for ((name, sum), (_, mean)) in sums.iter().zip(&means) {
        // Gradients are rounded to bf16 where that is fast, on different grids.
        let ratio = norm(sum) / norm(mean) / learnt;
        assert!((ratio - 1.0).abs() < norm_tolerance(), "{name}: {ratio}");
    }
}

#[test]
fn what_the_assistant_does_not_say_is_not_learnt() {
    let golden = Golden::open();
    let (rows, config) = (golden.rows(), golden.config());
    let step = step_of(&rows, Reduction::Mean);
    let (loss, gradients) = learn(&golden, &step);
    // Other targets where nothing is learnt: nothing changes, in no bit.
    let mut other = step.clone();
    for batch in &mut other {
        let weights = batch.weights.as_ref().unwrap();
        let unlearnt = batch.targets.iter_mut().zip(weights).filter(|(_, weight)| **weight == 0.0);
        unlearnt.for_each(|(target, _)| *target = (*target + 100) % config.vocab_size as u32);
    }
    assert_ne!(other, step);
    assert!(learn(&golden, &other) == (loss, gradients.clone()));
    // One token of a question more: another loss than the file's.
    let mut more = vec![rows.batch(&[2, 0]), rows.batch(&[1])];
    more[0].weights.as_mut().unwrap()[3] = 1.0;
    Reduction::Mean.scale(&mut more);
    assert!((learn(&golden, &more).0 - golden.number("mean")).abs() > loss_tolerance());
    // Another target where something is learnt: another loss, too.
    let weights = step[0].weights.as_ref().unwrap();
    let said = weights.iter().position(|weight| *weight > 0.0).unwrap();
    let mut changed = step.clone();
    changed[0].targets[said] = (step[0].targets[said] + 100) % config.vocab_size as u32;
    assert_ne!(learn(&golden, &changed).0, loss);

    let row = |tensor: &str, id: u32| {
        let (_, values) = gradients.iter().find(|(name, _)| name == tensor).unwrap();
        norm(&values[id as usize * config.hidden_size..][..config.hidden_size])
    };
    let padding = golden.file["tokenizer"]["model"]["vocab"]["<|pad|>"].as_u64().unwrap() as u32;
    assert!(step[1].ids.contains(&padding), "a row that is not full");
    // Padding is read, attends only to itself, and predicts nothing that counts: the head is its own here.
    assert_eq!(row("model.embed_tokens.weight", padding), 0.0);
    // A question is read with care though it is not learnt.
    assert!(row("model.embed_tokens.weight", step[0].ids[3]) > 0.0);
}
