//! What the loop must do to a model: it learns, it moves every variable, it keeps NaN out, and what it exports is proven.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use common::{checkpoint, config, folder, metrics, names};
use infer::checkpoint::hf;
use safetensors::SafeTensors;
use trainer::config::{Config, HiddenAct, Quantization, QuantizationWarmup};
use trainer::data::Batch;
use trainer::data::Dataset;
use trainer::export::{self, ExportError, Trained, Which};
use trainer::interrupt::Interrupt;
use trainer::optimizer::{AdamW, AdamWConfig, Gradients};
use trainer::parameters::{Parameters, Role};
use trainer::runtime::{model_config, runnable};
use trainer::schedule::Shares;
use trainer::train::{Resume, Session, TrainError, prepare_data};

/// Trains to the end.
fn run(config: &Config) -> Result<Dataset, TrainError> {
    let mut session = Session::open(config, prepare_data(config)?, &Resume::Auto)?;
    session.run(&Interrupt::default())?;
    Ok(session.into_dataset())
}

/// Trains to the end and loads the last checkpoint.
fn trained(config: &Config) -> (Trained, Dataset) {
    let dataset = run(config).unwrap();
    let checkpoint = export::checkpoint_of(&config.run.out, Which::Latest).unwrap();
    (export::load(&checkpoint, dataset.vocab_size, dataset.separator).unwrap(), dataset)
}

/// The f32 tensors of a file of a checkpoint.
fn tensors(folder: &Path, name: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(folder.join(name)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    file.iter().map(|(name, view)| (name.to_owned(), values(view.data()))).collect()
}

/// A text learnt by heart: the loss, fully quantized, on the text itself.
#[test]
fn a_small_text_is_learnt_by_heart() {
    let text = "Peas porridge hot, peas porridge cold, peas porridge in the pot, nine days old. \
                Some like it hot, some like it cold, some like it in the pot, nine days old. ";
    let folder = folder();
    fs::write(folder.path().join("text.txt"), text.repeat(3)).unwrap();
    for (quantization, bound) in [("bitnet", 0.1), ("none", 0.05)] {
        let settings = [
            "data.validation=text.txt",
            "tokenizer.vocab_size=270",
            "model.hidden_size=32",
            "model.intermediate_size=64",
            "data.sequence_length=32",
            "train.steps=400",
            "train.batch_size=4",
            "optimizer.learning_rate=1e-2",
            "eval.every=200",
        ];
        let mut config = config(folder.path(), quantization, &settings);
        config.model.quantization =
            if quantization == "none" { Quantization::None } else { Quantization::Bitnet };
        run(&config).unwrap();
        let metrics = metrics(&config.run.out);
        let of = |kind: &str| -> Vec<f64> {
            metrics.iter().filter(|m| m["kind"] == kind).map(|m| m["loss"].as_f64().unwrap()).collect()
        };
        let (train, eval) = (of("train"), of("eval"));
        println!("{quantization}: {:.3} at first, {:.4} by heart", train[0], eval[1]);
        // The first guess is uniform: ln(270).
        assert!((train[0] - 270f64.ln()).abs() < 0.5, "{quantization}: {}", train[0]);
        assert!(eval[1] < bound, "{quantization}: {}", eval[1]);
        let codes =
            metrics.iter().find(|m| m["kind"] == "eval").unwrap()["layers"].as_object().unwrap().clone();
        assert_eq!(codes.len(), if quantization == "none" { 0 } else { 14 });
        for (name, shares) in codes {
            let share = |key: &str| shares[key].as_f64().unwrap();
            assert!((share("minus") + share("zero") + share("plus") - 1.0).abs() < 1e-12, "{name}");
            assert!(share("flipped") > 0.0, "no code of {name} has changed in 200 steps");
        }
    }
}

#[test]
fn every_variable_moves_in_the_first_two_steps() {
    let folder = folder();
    for lambda in [QuantizationWarmup::None, QuantizationWarmup::Step] {
        let mut config = config(
            folder.path(),
            &format!("{lambda:?}"),
            &["train.steps=2", "schedule.warmup_steps=0", "checkpoint.every=1"],
        );
        config.model.tie_word_embeddings = false;
        config.quantization.warmup = lambda;
        let dataset = run(&config).unwrap();
        let shape = model_config(&config, dataset.vocab_size, dataset.separator).unwrap();
        let initial = Parameters::init(&shape, config.model.initializer_range, config.run.seed).unwrap();
        let steps = [1, 2].map(|step| tensors(&config.run.out.join(checkpoint(step)), "model.safetensors"));
        assert_eq!(initial.iter().count(), 3 + 2 * 11);
        for (name, _, _, before) in initial.to_vecs().unwrap() {
            assert!(steps[0][name] != before, "{name} did not move in step 1");
            assert!(steps[1][name] != steps[0][name], "{name} did not move in step 2");
        }
    }
}

/// AdamW of arXiv 1711.05101 in f64, one value after the other.
#[test]
fn adamw_is_that_of_the_paper() {
    let (beta1, beta2, eps, decay) = (0.9, 0.95, 1e-8, 0.1);
    let folder = folder();
    // An embedding of more than one chunk of the optimizer.
    let config = config(folder.path(), "run", &["model.hidden_size=32", "model.num_hidden_layers=1"]);
    let shape = model_config(&config, 300, None).unwrap();
    let parameters = Parameters::init(&shape, 0.1, 3).unwrap();
    let mut optimizer = AdamW::new(AdamWConfig { beta1, beta2, eps }, &parameters);
    let start = parameters.to_vecs().unwrap();
    // Gradients of all sizes and signs, and exact zeros.
    let gradient = |at: usize, step: usize| match (at + step) % 7 {
        0 => 0.0,
        odd => ((at * 31 + step * 17) as f32 * 0.37).sin() * 10f32.powi(odd as i32 - 4),
    };
    let rates = [1e-2, 2e-2, 5e-3, 1e-3];
    let (factor, mut decayed) = (0.5f32, 0);
    for (step, rate) in rates.into_iter().enumerate() {
        // The gradient of sum(p * g) is g.
        let mut loss = Tensor::new(0f32, &Device::Cpu).unwrap();
        for (_, p) in parameters.iter() {
            let values = (0..p.value.elem_count()).map(|at| gradient(at, step)).collect();
            let g = Tensor::from_vec(values, p.value.dims(), &Device::Cpu).unwrap();
            loss = (loss + (p.value.as_tensor() * g).unwrap().sum_all().unwrap()).unwrap();
        }
        let mut gradients = Gradients::new(&parameters);
        gradients.add(&parameters, loss.backward().unwrap()).unwrap();
        optimizer.update(&parameters, &gradients, f64::from(factor), rate, decay).unwrap();
    }
    assert_eq!(optimizer.updates(), 4);
    let moments: BTreeMap<_, _> =
        optimizer.state(&parameters).into_iter().map(|(name, _, values)| (name, values.to_vec())).collect();
    let close = |found: f32, expected: f64, of: f64| (f64::from(found) - expected).abs() <= 1e-6 * of;
    for ((name, role, _, before), (_, _, _, after)) in start.iter().zip(parameters.to_vecs().unwrap()) {
        let decay = if matches!(role, Role::Projection | Role::ResidualProjection) { decay } else { 0.0 };
        decayed += usize::from(decay > 0.0);
        let (first, second) = (&moments[&format!("{name}.exp_avg")], &moments[&format!("{name}.exp_avg_sq")]);
        for (at, (before, after)) in before.iter().zip(after).enumerate() {
            let (mut p, mut m, mut v) = (f64::from(*before), 0.0, 0.0);
            for (step, rate) in rates.into_iter().enumerate() {
                let g = f64::from(gradient(at, step) * factor);
                m = beta1 * m + (1.0 - beta1) * g;
                v = beta2 * v + (1.0 - beta2) * g * g;
                let t = step as i32 + 1;
                let (m_hat, v_hat) = (m / (1.0 - beta1.powi(t)), v / (1.0 - beta2.powi(t)));
                p = p - rate * decay * p - rate * m_hat / (v_hat.sqrt() + eps);
            }
            assert!(close(after, p, p.abs() + 0.1), "{name}[{at}]: {after} is not {p}");
            let largest = (0..4).map(|step| f64::from(gradient(at, step).abs())).fold(0.0, f64::max);
            assert!(close(first[at], m, largest), "{name}[{at}]: first moment {} is not {m}", first[at]);
            assert!(close(second[at], v, largest * largest), "{name}[{at}]: second moment is not {v}");
        }
    }
    assert_eq!(decayed, 7);
}

#[test]
fn a_run_that_diverges_stops_and_leaves_finite_checkpoints() {
    let folder = folder();
    let settings = ["checkpoint.every=1", "checkpoint.keep=99", "eval.every=2", "train.max_skipped_steps=4"];
    let mut config = config(folder.path(), "run", &settings);
    // No config file may ask for this: after one step of it nothing that is computed is finite.
    config.optimizer.learning_rate = 1e30;
    let error = run(&config).unwrap_err();
    let TrainError::Diverged { step, in_a_row, .. } = error else { panic!("{error}") };
    assert_eq!(in_a_row, 4);
    let message = error.to_string();
    for part in ["4 steps in a row", &format!("step {step}"), "optimizer.learning_rate", "warmup_steps"] {
        assert!(message.contains(part), "{message}");
    }
    let skipped: Vec<_> = metrics(&config.run.out).into_iter().filter(|m| m["kind"] == "skipped").collect();
    assert_eq!(skipped.len(), 4);
    let finite = |value: &serde_json::Value| value.as_str().unwrap().parse::<f64>().unwrap().is_finite();
    assert!(skipped.iter().all(|m| !finite(&m["loss"]) || !finite(&m["grad_norm"])), "{skipped:?}");
    let checkpoints = config.run.out.join("checkpoints");
    assert_eq!(names(&checkpoints).len() as u64, step - 1);
    for name in names(&checkpoints) {
        for file in ["model.safetensors", "optimizer.safetensors"] {
            for (tensor, values) in tensors(&checkpoints.join(&name), file) {
                assert!(values.iter().all(|v| v.is_finite()), "{tensor} of {name}/{file}");
            }
        }
        trainer::checkpoint::load(&checkpoints.join(&name)).unwrap();
    }
    // Skipped steps changed nothing.
    let last = |step| tensors(&config.run.out.join(checkpoint(step)), "model.safetensors");
    assert!(last(step - 1) == last(step - 4));
}

/// The last step trained at a share of quantization below 1; what is evaluated and exported is at 1.
#[test]
fn evaluation_and_export_are_fully_quantized_before_training_is() {
    let folder = folder();
    let settings = ["quantization.warmup=linear", "quantization.warmup_fraction=1.0", "train.steps=10"];
    let config = config(folder.path(), "run", &settings);
    let (trained, dataset) = trained(&config);
    let metrics = metrics(&config.run.out);
    let last = metrics.iter().rfind(|m| m["kind"] == "train").unwrap();
    assert!((last["lambda"].as_f64().unwrap() - 0.9).abs() < 1e-6);
    let evaluated = metrics.last().unwrap()["loss"].as_f64().unwrap();

    let windows = dataset.validation.evaluation(8);
    let batch = dataset.validation.batch(&windows);
    let at = |lambda| {
        let shares = Shares { quantization: lambda, sub_norm: 1.0 };
        let loss = trained.model.loss(&trained.parameters, &batch, shares).unwrap();
        f64::from(loss.to_scalar::<f32>().unwrap())
    };
    assert!((evaluated - at(1.0)).abs() < 1e-6, "{evaluated} is not {}", at(1.0));
    assert!((evaluated - at(0.9)).abs() > 1e-5, "the test sees no difference: {evaluated}, {}", at(0.9));

    let out = config.run.out.join("export/hf");
    let report = export::export(&trained, &dataset, &out, false).unwrap();
    assert_eq!(report.loss, evaluated);
    assert!(report.parity.passes() && report.parity.positions > 0 && report.parity.greedy_tokens > 0);
    let model = hf::read(&out).unwrap();
    let mut sum = 0.0;
    for Batch { ids, targets, .. } in windows.iter().map(|window| dataset.validation.batch(&[*window])) {
        let text = [&ids[..1], &targets[..]].concat();
        sum -= infer::eval::score(&model, &text).unwrap().into_iter().map(f64::from).sum::<f64>();
    }
    let exported = sum / batch.targets.len() as f64;
    assert!((exported - evaluated).abs() < 1e-5, "exported {exported}, evaluated {evaluated}");
}

#[test]
fn every_variant_trains_and_exports_with_proof() {
    let folder = folder();
    type Change = fn(&mut Config);
    let changes: [(&str, Change); 6] = [
        ("relu2", |c| c.model.hidden_act = HiddenAct::Relu2),
        ("no sub-norms", |c| c.model.sub_norm = false),
        ("untied", |c| c.model.tie_word_embeddings = false),
        ("gqa", |c| (c.model.num_attention_heads, c.model.num_key_value_heads) = (4, Some(2))),
        ("full precision", |c| c.model.quantization = Quantization::None),
        ("a longer context", |c| c.model.max_position_embeddings = Some(40)),
    ];
    let all: Change = |c| {
        (c.model.hidden_act, c.model.sub_norm, c.model.tie_word_embeddings) =
            (HiddenAct::Relu2, false, false);
        (c.model.num_attention_heads, c.model.num_key_value_heads) = (4, Some(2));
    };
    for (name, change) in changes.into_iter().chain([("all at once", all)]) {
        let settings = ["train.steps=6", "model.num_key_value_heads=2"];
        let mut config = config(folder.path(), name, &settings);
        change(&mut config);
        let (trained, dataset) = trained(&config);
        let out = config.run.out.join("model");
        let report =
            export::export(&trained, &dataset, &out, false).unwrap_or_else(|e| panic!("{name}: {e}"));
        println!("{name}: {}", report.parity);
        let model = hf::read(&out).unwrap();
        assert_eq!(model.config(), trained.model.config(), "{name}");
        let parity = export::compare(&trained, &dataset, &model).unwrap();
        assert!(parity.passes() && parity.positions == 4 * 16, "{name}: {parity}");
        assert_eq!(parity.top1_agreement, 1.0, "{name}");
    }
}

/// The proof is no formality: the smallest damage to what is exported is seen.
#[test]
fn a_damaged_export_does_not_pass() {
    let folder = folder();
    let config = config(folder.path(), "run", &["optimizer.learning_rate=1e-2"]);
    let (trained, dataset) = trained(&config);
    let shape = trained.model.config();
    // Not one whose output goes straight into a norm, which takes its scale away again.
    let name = "model.layers.1.mlp.down_proj.weight";
    let damaged = |name: &str, damage: &dyn Fn(&mut [f32])| {
        let checkpoint = export::checkpoint_of(&config.run.out, Which::Latest).unwrap();
        let other = export::load(&checkpoint, dataset.vocab_size, dataset.separator).unwrap();
        let (_, p) = other.parameters.iter().find(|(found, _)| *found == name).unwrap();
        let mut values = p.value.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        damage(&mut values);
        p.value.set(&Tensor::from_vec(values, p.value.dims(), &Device::Cpu).unwrap()).unwrap();
        other
    };
    let parity = |other: &Trained| {
        export::compare(&trained, &dataset, &runnable(shape, &other.parameters).unwrap()).unwrap()
    };
    assert!(parity(&damaged(name, &|_| {})).passes(), "what is not damaged passes");
    // The largest weight turned round: one code changes from one end to the other, the scale stays.
    let code = damaged(name, &|values| {
        let largest = values.iter_mut().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
        *largest = -*largest;
    });
    // All codes stay, the scale grows by a tenth.
    let scale = damaged(name, &|values| values.iter_mut().for_each(|v| *v *= 1.1));
    let norm = damaged("model.norm.weight", &|values| values[0] *= 1.1);
    for (what, other) in [("code", code), ("scale", scale), ("norm", norm)] {
        let parity = parity(&other);
        println!("{what}: {parity}");
        assert!(!parity.passes(), "{what}: {parity}");
    }

    // A bad export is refused and nothing is left of it: NaN cannot be written, infinite logits are nothing to sample
    // from, and of logits of millions the last digits differ by more than is allowed.
    let before = names(&config.run.out);
    let refused = |value: f32| {
        let bad = damaged("model.norm.weight", &|values| values.fill(value));
        let error = export::export(&bad, &dataset, &config.run.out.join("bad"), false).unwrap_err();
        assert_eq!(names(&config.run.out), before);
        error
    };
    assert!(matches!(refused(f32::NAN), ExportError::Runtime(_)));
    assert!(matches!(refused(f32::MAX), ExportError::Runtime(_)));
    let error = refused(1e7);
    assert!(matches!(error, ExportError::Disagrees { .. }), "{error}");
    assert!(error.to_string().contains("nothing was exported"), "{error}");
}
