//! Starting from somebody else's model: it computes what it did, its codes stay, and what does not fit is refused by name.
#[path = "../../infer/tests/common/mod.rs"]
mod models;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bitlinear::kernels::KERNEL_VARIABLE;
use bitlinear::math::Activation;
use infer::checkpoint::hf;
use infer::config::{ModelConfig, Storage};
use infer::generate::{GenerateOptions, generate};
use infer::model::{KvCache, KvPrecision, Logits, Projection};
use infer::sampler::SamplingOptions;
use models::files::{edit, edit_config, folder};
use models::{config as base, ids, mixed, qwens, write_tokenizer};
use serde_json::json;
use tempfile::TempDir;
use trainer::config::{Config, ConfigError, HiddenAct, Quantization, SubNormStart};
use trainer::data::Batch;
use trainer::decoder::{Decoder, StepWeights, head_name};
use trainer::export::{self, Trained, Which};
use trainer::import::{self, ImportError};
use trainer::interrupt::Interrupt;
use trainer::model::{Model, Weights};
use trainer::parameters::Parameters;
use trainer::runtime::{model_config, runnable};
use trainer::schedule::Shares;
use trainer::train::{Resume, Session, prepare_data};

/// Tokens that models are compared on.
const LENGTH: usize = 40;
/// Nothing of a BitNet yet.
const NOTHING: Shares = Shares { quantization: 0.0, sub_norm: 0.0 };

fn llama() -> ModelConfig {
    ModelConfig { sub_norm: false, quantized: false, ..base() }
}

/// Models in full precision: Llama, tied and not, Qwen2 and Qwen3.
fn dense() -> Vec<ModelConfig> {
    let untied = ModelConfig { tie_word_embeddings: false, rope_theta: 5e5, ..llama() };
    let qwens = qwens().map(|qwen| ModelConfig { quantized: false, rms_norm_eps: 1e-6, ..qwen });
    [llama(), untied].into_iter().chain(qwens).collect()
}

/// The logits of `infer` for the model in a folder.
fn runtime_logits(folder: &Path) -> Vec<f32> {
    let model = hf::read(folder).unwrap();
    let mut cache = KvCache::new(&model, LENGTH).unwrap();
    model.forward(&tokens(), &mut cache, Logits::All).unwrap()
}

fn tokens() -> Vec<u32> {
    ids(&base(), LENGTH, 7)
}

/// The logits of the model that evaluates.
fn graph_logits(shape: &ModelConfig, parameters: &Parameters, shares: Shares) -> Vec<f32> {
    let model = Model::new(shape.clone(), LENGTH);
    let hidden = model.hidden(&Weights::fixed(parameters), &tokens(), &[LENGTH], shares).unwrap();
    let head = parameters.tensor(head_name(shape)).t().unwrap();
    hidden.matmul(&head).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The logits of the model that trains.
fn decoder_logits(shape: &ModelConfig, parameters: &Parameters, shares: Shares) -> Vec<f32> {
    let values = parameters.values().unwrap();
    let weights = StepWeights::new(shape, &values, shares).unwrap();
    let mut decoder = Decoder::new(shape.clone(), LENGTH, false);
    let batch = Batch { ids: tokens(), targets: vec![0; LENGTH], weights: None, sequences: vec![LENGTH] };
    let hidden = decoder.read(&weights, &batch, |_, _| ()).unwrap();
    let head = values.get(head_name(shape));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let width = shape.hidden_size;
    hidden.chunks(width).flat_map(|row| head.chunks(width).map(move |head| dot(row, head))).collect()
}

/// The largest difference in units of the largest logit.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0f32, |max, d| if d > max || d.is_nan() { d } else { max }) / largest
}

/// The settings of a run that starts from a folder, with windows that its context has room for.
fn config(folder: &Path, sets: &[&str]) -> Config {
    let from = format!("init.from={}", folder.display());
    let first = [from.as_str(), "data.sequence_length=32", "sample.tokens=50"];
    let sets: Vec<String> = first.iter().chain(sets).map(|set| (*set).to_owned()).collect();
    Config::parse("", Path::new("run.toml"), &sets).unwrap()
}

/// [`config`] with what the model brings.
fn completed(folder: &Path, sets: &[&str]) -> Result<Config, ImportError> {
    let mut config = config(folder, sets);
    import::complete(&mut config).map(|()| config)
}

#[test]
fn an_imported_model_computes_what_it_did() {
    for expected in dense() {
        let (folder, _) = folder(&expected, 11);
        write_tokenizer(folder.path());
        let logits = runtime_logits(folder.path());
        let imported = import::read(folder.path()).unwrap();
        assert_eq!(imported.storage, Storage::Dense);
        for quantization in ["bitnet", "none"] {
            let sub_norms: &[bool] =
                if expected.qkv_bias || expected.qk_norm { &[false] } else { &[false, true] };
            for sub_norm in sub_norms {
                let sets =
                    [format!("model.quantization={quantization}"), format!("model.sub_norm={sub_norm}")];
                let config = completed(folder.path(), &sets.each_ref().map(String::as_str)).unwrap();
                let shape = model_config(&config, 300, Some(1)).unwrap();
                let quantized = quantization == "bitnet";
                let expected = ModelConfig { sub_norm: *sub_norm, quantized, ..expected.clone() };
                assert_eq!(shape, expected);
                let parameters = import::start(&shape, &imported).unwrap();
                let found = difference(&graph_logits(&shape, &parameters, NOTHING), &logits);
                assert!(found < 1e-5, "{shape:?}: {found}");
                // Whatever is blended in changes it.
                if quantized || *sub_norm {
                    let found = difference(&graph_logits(&shape, &parameters, Shares::FULL), &logits);
                    assert!(found > 1e-2, "{shape:?}: {found}");
                }
            }
        }
    }
}

#[test]
fn training_starts_from_what_the_model_computed() {
    // In a process of its own, whose dense products are in f32 wherever it runs.
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "the_decoder_in_f32", "--ignored"]).env(KERNEL_VARIABLE, "scalar");
    let output = command.output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "runs in a process of its own"]
fn the_decoder_in_f32() {
    for dense in dense() {
        let (folder, _) = folder(&dense, 11);
        let logits = runtime_logits(folder.path());
        let sub_norm = !dense.qkv_bias && !dense.qk_norm;
        let shape = ModelConfig { quantized: true, sub_norm, ..dense };
        let parameters = import::start(&shape, &import::read(folder.path()).unwrap()).unwrap();
        let found = difference(&decoder_logits(&shape, &parameters, NOTHING), &logits);
        assert!(found < 1e-5, "{shape:?}: {found}");
    }
}

/// Trains one step that changes no weight; returns what the checkpoint holds.
fn one_step(folder: &TempDir, start: &str) -> Trained {
    let ids = ids(&base(), 3000, 21);
    let bytes: Vec<u8> = ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect();
    fs::write(folder.path().join("text.u16"), bytes).unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let sets = [
        &format!("init.sub_norm={start}"),
        &format!("data.train={}", path("text.u16")),
        &format!("data.cache_dir={}", path("cache")),
        &format!("run.out={}", path(start)),
        "data.source=files",
        "quantization.warmup=linear",
        "train.steps=1",
        "train.batch_size=2",
        "schedule.warmup_steps=0",
        "optimizer.learning_rate=1e-12",
        "eval.windows=2",
        "sample.tokens=4",
    ];
    let config = completed(folder.path(), &sets).unwrap();
    let dataset = prepare_data(&config).unwrap();
    let mut session = Session::open(&config, dataset, &Resume::Never).unwrap();
    session.run(&Interrupt::default()).unwrap();
    let dataset = session.into_dataset();
    let checkpoint = export::checkpoint_of(&config.run.out, Which::Latest).unwrap();
    export::load(&checkpoint, dataset.vocab_size, dataset.separator).unwrap()
}

#[test]
fn calibrated_gains_change_a_model_least() {
    for shape in [llama(), ModelConfig { hidden_act: Activation::Relu2, ..llama() }] {
        let (folder, _) = folder(&shape, 11);
        write_tokenizer(folder.path());
        let logits = runtime_logits(folder.path());
        let [blend, calibrate, one] = ["blend", "calibrate", "one"].map(|start| one_step(&folder, start));
        let whole = Shares { quantization: 0.0, sub_norm: 1.0 };
        let off = |run: &Trained, shares| {
            difference(&graph_logits(run.model.config(), &run.parameters, shares), &logits)
        };
        // Not blended in yet, it is the model as imported.
        for run in [&blend, &calibrate, &one] {
            let found = off(run, NOTHING);
            assert!(found < 1e-5, "{found}");
        }
        let [blended, calibrated, ones] = [&blend, &calibrate, &one].map(|run| off(run, whole));
        assert!(calibrated < 0.8 * ones, "calibrated {calibrated}, gains of one {ones}");
        assert_eq!(blended, calibrated);
        let gains = |run: &Trained, name: &str| {
            let gains = run.parameters.tensor(&format!("model.layers.1.{name}.weight"));
            gains.to_vec1::<f32>().unwrap()
        };
        for name in ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"] {
            assert_eq!(gains(&blend, name), gains(&calibrate, name));
            assert!(gains(&blend, name).iter().all(|gain| *gain > 0.0 && *gain != 1.0));
            assert!(gains(&one, name).iter().all(|gain| (gain - 1.0).abs() < 1e-6));
        }
    }
}

#[test]
fn packed_models_keep_codes_and_scales() {
    for shape in [base(), mixed(base())] {
        let (folder, stored) = folder(&shape, 12);
        write_tokenizer(folder.path());
        let imported = import::read(folder.path()).unwrap();
        assert_eq!(imported.storage, Storage::PackedMultiply);
        assert!(!imported.shape.quantized);
        let config = completed(folder.path(), &[]).unwrap();
        let start = model_config(&config, 300, Some(1)).unwrap();
        // What is dense in the model stays so.
        assert_eq!(start, shape);
        let parameters = import::start(&start, &imported).unwrap();
        let again = runnable(&start, &parameters).unwrap();
        for (found, expected) in again.weights().layers.iter().zip(&stored.weights().layers) {
            for (found, expected) in found.projections().into_iter().zip(expected.projections()) {
                match (found, expected) {
                    (Projection::Ternary(found), Projection::Ternary(expected)) => {
                        assert_eq!(found.unpack(), expected.unpack());
                        let (found, expected) = (found.weight_scale(), expected.weight_scale());
                        assert!((found - expected).abs() <= 1e-6 * expected, "{found}, {expected}");
                    }
                    (Projection::Dense(found), Projection::Dense(expected)) => {
                        assert_eq!(found.to_vec(), expected.to_vec());
                    }
                    _ => panic!("ternary in one, dense in the other"),
                }
            }
        }
        // In full precision they are the codes times the scale.
        let plain = import::start(&imported.shape, &imported).unwrap();
        let name = "model.layers.1.mlp.down_proj";
        let Projection::Ternary(weight) = &stored.weights().layers[1].down_proj else { panic!("{name}") };
        let expected = weight.unpack().into_iter().map(|code| f32::from(code) * weight.weight_scale());
        let found = plain.tensor(&format!("{name}.weight")).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(found, expected.collect::<Vec<_>>());
    }
}

#[test]
fn a_module_that_is_to_be_dense_is_not_spread() {
    let (folder, _) = folder(&base(), 12);
    write_tokenizer(folder.path());
    let config = completed(folder.path(), &["quantization.skip=[\"*.o_proj\"]"]).unwrap();
    let shape = model_config(&config, 300, None).unwrap();
    let imported = import::read(folder.path()).unwrap();
    let parameters = import::start(&shape, &imported).unwrap();
    let values = |parameters: &Parameters, name: &str| {
        parameters.tensor(name).flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let [dense, ternary] = ["o_proj", "q_proj"].map(|part| format!("model.layers.0.self_attn.{part}.weight"));
    assert_eq!(values(&parameters, &dense), values(&imported.parameters, &dense));
    assert_ne!(values(&parameters, &ternary), values(&imported.parameters, &ternary));
}

#[test]
fn latent_models_go_on_from_their_weights() {
    let plain = ModelConfig { quantized: false, ..base() };
    let (folder, stored) = folder(&plain, 13);
    write_tokenizer(folder.path());
    edit_config(folder.path(), |config| {
        config["quantization_config"] =
            json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"});
    });
    let imported = import::read(folder.path()).unwrap();
    assert_eq!(imported.storage, Storage::Latent);
    let config = completed(folder.path(), &["quantization.warmup=linear"]).unwrap();
    let shape = model_config(&config, 300, Some(1)).unwrap();
    assert_eq!(shape, base());
    let parameters = import::start(&shape, &imported).unwrap();
    let Projection::Dense(expected) = &stored.weights().layers[1].v_proj else { panic!("not dense") };
    let found = parameters.tensor("model.layers.1.self_attn.v_proj.weight").flatten_all().unwrap();
    assert_eq!(found.to_vec1::<f32>().unwrap(), expected.to_vec());
    let logits = runtime_logits(folder.path());
    let found = difference(&graph_logits(&shape, &parameters, Shares::FULL), &logits);
    assert!(found < 1e-5, "{found}");
    // It has its sub-norms already: they are not blended in.
    assert_eq!(config.init.sub_norm, SubNormStart::One);
    assert_eq!(trainer::schedule::shares(&config, 0), Shares { quantization: 0.0, sub_norm: 1.0 });
}

#[test]
fn the_shape_comes_with_the_model() {
    for expected in dense() {
        let (folder, _) = folder(&expected, 14);
        write_tokenizer(folder.path());
        let config = completed(folder.path(), &["model.sub_norm=false"]).unwrap();
        assert_eq!(config.model.head_dim, expected.qk_norm.then_some(16));
        assert_eq!(
            config.model.rms_norm_eps,
            if expected.qkv_bias || expected.qk_norm { 1e-6 } else { 1e-5 }
        );
        assert_eq!(config.model.max_position_embeddings, Some(96));
        assert_eq!(config.tokenizer.file, Some(folder.path().join("tokenizer.json")));
        // Once completed it stays as it is, stored and loaded again, too.
        let mut again = config.clone();
        import::complete(&mut again).unwrap();
        assert_eq!(again, config);
        let mut stored = Config::parse(&config.to_toml().unwrap(), Path::new("run.toml"), &[]).unwrap();
        assert_eq!(stored, config);
        import::complete(&mut stored).unwrap();
        assert_eq!(stored, config);
        // What is asked for as the model has it may be.
        let same = ["model.sub_norm=false", "model.hidden_size=32", "model.num_key_value_heads=2"];
        assert_eq!(completed(folder.path(), &same).unwrap().model, config.model);
    }
}

#[test]
fn other_shapes_are_refused_by_key() {
    let (folder, _) = folder(&ModelConfig { hidden_act: Activation::Relu2, ..llama() }, 15);
    write_tokenizer(folder.path());
    for (set, asked, found) in [
        ("model.hidden_size=64", "64", "32"),
        ("model.intermediate_size=48", "48", "44"),
        ("model.num_hidden_layers=3", "3", "2"),
        ("model.num_attention_heads=8", "8", "4"),
        ("model.num_key_value_heads=4", "4", "2"),
        ("model.head_dim=16", "16", "absent"),
        ("model.vocab_size=301", "301", "300"),
        ("model.max_position_embeddings=300", "300", "96"),
        ("model.rope_theta=5e5", "500000.0", "10000.0"),
        ("model.rms_norm_eps=1e-6", "0.000001", "0.00001"),
        ("model.tie_word_embeddings=false", "false", "true"),
        ("model.qkv_bias=true", "true", "false"),
        ("model.bos_token_id=7", "7", "0"),
        ("model.eos_token_ids=[7]", "[7]", "[1]"),
    ] {
        let error = completed(folder.path(), &[set]).unwrap_err();
        let ImportError::Shape { key, asked: a, found: f, path } = &error else { panic!("{set}: {error}") };
        assert_eq!((key.as_str(), a.as_str(), f.as_str()), (set.split('=').next().unwrap(), asked, found));
        assert_eq!(path, folder.path());
        assert_eq!(error.to_string().matches("; ").count(), 2, "what; where; what to do: {error}");
    }
    assert_eq!(completed(folder.path(), &[]).unwrap().model.hidden_act, HiddenAct::Relu2);
}

#[test]
fn what_does_not_go_with_the_model_is_refused() {
    for (shape, with) in qwens().into_iter().zip(["biases", "norms of queries and keys"]) {
        let (folder, _) = folder(&ModelConfig { quantized: false, ..shape }, 16);
        write_tokenizer(folder.path());
        let error = completed(folder.path(), &[]).unwrap_err();
        assert!(matches!(&error, ImportError::SubNorm { with: found, .. } if *found == with), "{error}");
    }
    let (bitnet, _) = folder(&base(), 16);
    write_tokenizer(bitnet.path());
    let error = completed(bitnet.path(), &["model.sub_norm=false"]).unwrap_err();
    assert!(matches!(&error, ImportError::HasSubNorm { path } if path == bitnet.path()), "{error}");

    // Windows that are longer than the context.
    let error = completed(bitnet.path(), &["data.sequence_length=97"]).unwrap_err();
    let ImportError::Config(ConfigError::Conflict { key, .. }) = &error else { panic!("{error}") };
    assert_eq!(*key, "model.max_position_embeddings");

    let mut config = Config::default();
    config.run.name = "run".into();
    config.distill.teacher = Some("init".into());
    let error = import::complete(&mut config).unwrap_err();
    let ImportError::Config(ConfigError::Conflict { key, other, .. }) = &error else { panic!("{error}") };
    assert_eq!((*key, *other), ("distill.teacher", "init.from"));

    let nowhere = completed(Path::new("nowhere"), &[]).unwrap_err().to_string();
    assert!(nowhere.contains("nowhere"), "{nowhere}");
}

#[test]
fn text_needs_the_model_s_tokenizer() {
    let (folder, _) = folder(&llama(), 17);
    let path = folder.path();
    for sets in [&[][..], &["data.source=files", "data.train=[\"a.u16\", \"b.txt\"]"]] {
        let error = completed(path, sets).unwrap_err();
        let ImportError::NoTokenizer(file) = &error else { panic!("{error}") };
        assert_eq!(file, &path.join("tokenizer.json"));
    }
    let tokens = ["data.source=files", "data.train=[\"a.u16\"]"];
    assert_eq!(completed(path, &tokens).unwrap().tokenizer.file, None);
    let given = completed(path, &["tokenizer.file=other.json"]).unwrap();
    assert_eq!(given.tokenizer.file, Some(PathBuf::from("other.json")));
    // A teacher's does as well.
    let teacher = TempDir::new().unwrap();
    write_tokenizer(teacher.path());
    let named = format!("distill.teacher={}", teacher.path().display());
    let config = completed(path, &[&named]).unwrap();
    assert_eq!(config.tokenizer.file, Some(teacher.path().join("tokenizer.json")));
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    const NAME: &str = "model.layers.1.self_attn.q_proj.weight";
    type Change = fn(&mut models::files::Raw);
    let changes: [(&str, &str, Change); 3] = [
        (NAME, "missing", |raw| drop(raw.0.remove(NAME))),
        (NAME, "expected [32, 32]", |raw| raw.set_f32(NAME, &[32, 31], &[0.0; 32 * 31])),
        ("model.layers.1.other", "no place", |raw| raw.set_f32("model.layers.1.other", &[1], &[0.0])),
    ];
    for (name, what, change) in changes {
        let (folder, _) = folder(&llama(), 18);
        edit(folder.path(), change);
        let error = import::read(folder.path()).err().unwrap().to_string();
        assert!(error.contains(name) && error.contains(what), "{error}");
    }
    // Into a shape that has no place for them, or another one.
    let (qwen2, _) = folder(&ModelConfig { quantized: false, ..qwens()[0].clone() }, 18);
    let imported = import::read(qwen2.path()).unwrap();
    let without = ModelConfig { qkv_bias: false, ..imported.shape.clone() };
    let error = import::start(&without, &imported).unwrap_err().to_string();
    assert!(error.contains("_proj.bias") && error.contains("not part"), "{error}");
    let wider = ModelConfig { vocab_size: 301, ..imported.shape.clone() };
    let error = import::start(&wider, &imported).unwrap_err().to_string();
    assert!(error.contains("[301, 32]") && error.contains("9600"), "{error}");
}

/// Runs the command in a folder; returns what it wrote to standard output.
fn trainer(folder: &TempDir, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    let output = command.args(args).current_dir(folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// A run of some steps that starts from the model in `.`, its own teacher if it has no codes yet.
const RUN: &str = r#"
[init]
from = "."
[data]
source = "files"
train = ["text.u16"]
sequence_length = 32
cache_dir = "cache"
[train]
steps = 6
batch_size = 2
[schedule]
warmup_steps = 0
[quantization]
warmup = "cubic"
[optimizer]
learning_rate = 1e-3
[eval]
windows = 4
[sample]
tokens = 4
"#;

/// The model of this shape in a folder, with tokens to train on and the settings of a run.
fn run_folder(shape: &ModelConfig, settings: &str) -> TempDir {
    let (folder, _) = folder(shape, 11);
    write_tokenizer(folder.path());
    let bytes: Vec<u8> = ids(&base(), 3000, 21).iter().flat_map(|id| (*id as u16).to_le_bytes()).collect();
    fs::write(folder.path().join("text.u16"), bytes).unwrap();
    fs::write(folder.path().join("run.toml"), format!("{RUN}{settings}")).unwrap();
    folder
}

#[test]
fn a_conversion_ends_with_a_report() {
    let distill = "[distill]\nteacher = \"init\"\nrelations = 1.0\n";
    let [qwen2, qwen3] = qwens().map(|qwen| ModelConfig { quantized: false, ..qwen });
    let plain = format!("{distill}[model]\nsub_norm = false\n");
    for (shape, settings) in [(llama(), distill), (qwen2, plain.as_str()), (qwen3, plain.as_str())] {
        let folder = run_folder(&shape, settings);
        let text = trainer(&folder, &["train", "run.toml", "--out", "run"]);
        assert!(text.contains("proven: weights equal") && text.contains("won back"), "{text}");
        let report = fs::read(folder.path().join("run/report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        let names: Vec<_> = report["rows"].as_array().unwrap().iter().map(|row| &row["model"]).collect();
        assert_eq!(names, ["imported", "ternarized, untrained", "trained"]);
        assert!(report["gap_closed"].is_f64(), "{report}");
        let loss = |row: usize| report["rows"][row]["loss"].as_f64().unwrap();
        let imported = runtime_loss(&folder);
        assert!((loss(0) - imported).abs() < 1e-4 * imported, "{report}, expected {imported}");
        assert_ne!(loss(1), loss(0));
    }
}

#[test]
fn a_bitnet_is_reported_as_it_is_run() {
    let folder = run_folder(&base(), "");
    let text = trainer(&folder, &["train", "run.toml", "--out", "run"]);
    assert!(text.contains("proven: weights equal") && !text.contains("won back"), "{text}");
    let report = fs::read(folder.path().join("run/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    assert!(report["gap_closed"].is_null());
    assert_eq!(report["rows"].as_array().unwrap().len(), 2);
    // The weights are those of the file to 1e-6, so an activation is rounded to another step here and there.
    let (found, expected) = (report["rows"][0]["loss"].as_f64().unwrap(), runtime_loss(&folder));
    assert!((found - expected).abs() < 1e-3 * expected, "{found}, expected {expected}");
}

/// The loss of the runtime, for the model in a folder as it is, on the validation windows of [`RUN`].
fn runtime_loss(folder: &TempDir) -> f64 {
    let mut config = Config::load(&folder.path().join("run.toml"), &[]).unwrap();
    config.init.from = Some(folder.path().display().to_string());
    config.data.train = vec![folder.path().join("text.u16")];
    config.data.cache_dir = folder.path().join("cache");
    import::complete(&mut config).unwrap();
    let dataset = prepare_data(&config).unwrap();
    let model = hf::read(folder.path()).unwrap();
    let (mut sum, mut count) = (0.0, 0);
    for window in dataset.validation.evaluation(config.eval.windows as u64) {
        let batch = dataset.validation.batch(&[window]);
        let mut cache = KvCache::new(&model, batch.ids.len()).unwrap();
        let logits = model.forward(&batch.ids, &mut cache, Logits::All).unwrap();
        for (row, target) in logits.chunks(300).zip(&batch.targets) {
            let powers = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>();
            sum += powers.ln() - f64::from(row[*target as usize]);
            count += 1;
        }
    }
    sum / f64::from(count)
}

#[test]
fn the_bench_measures_the_imported_shape() {
    let folder = run_folder(&llama(), "");
    let json = trainer(&folder, &["bench", "run.toml", "--repetitions", "1", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let shape = ModelConfig { sub_norm: true, ..llama() };
    assert_eq!(json["parameters"].as_u64(), shape.parameters());
}

/// The folder of models beside the repository, or none, saying so.
fn shared(name: &str) -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let model = std::env::var_os("BITNET_SHARED").map_or(beside, PathBuf::from).join("models").join(name);
    if model.join("model.safetensors").exists() {
        return Some(model);
    }
    eprintln!("skipped: no model at {}", model.display());
    None
}

#[test]
fn a_published_model_goes_on_with_its_story() {
    let Some(folder) = shared("stories260K") else { return };
    let imported = import::read(&folder).unwrap();
    let model = runnable(&imported.shape, &imported.parameters).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let prompt = tokenizer.encode("Once upon a time", false).unwrap();
    let ids: Vec<u32> = [1].into_iter().chain(prompt.get_ids().iter().copied()).collect();
    let options = GenerateOptions {
        max_new_tokens: Some(100),
        sampling: SamplingOptions { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 },
        kv: KvPrecision::F32,
        stop_ids: imported.shape.eos_token_ids.clone(),
    };
    let on = |_: u32| std::ops::ControlFlow::Continue(());
    let new = generate(&model, &ids, &options, &mut { on }).unwrap().tokens;
    let text = tokenizer.decode(&[prompt.get_ids(), &new].concat(), true).unwrap();
    let expected = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
                    One day, she saw a big, red ball. She wanted to play with it, but it was too high.";
    assert!(text.trim_start().starts_with(expected), "{text}");
}

#[test]
fn quantization_none_needs_no_skip() {
    let (folder, _) = folder(&mixed(base()), 19);
    write_tokenizer(folder.path());
    let config = completed(folder.path(), &["model.quantization=none"]).unwrap();
    assert_eq!(config.model.quantization, Quantization::None);
    let shape = model_config(&config, 300, Some(1)).unwrap();
    assert!(!shape.quantized && shape.modules_to_not_convert.is_empty());
    let values: BTreeMap<_, _> = import::start(&shape, &import::read(folder.path()).unwrap())
        .unwrap()
        .iter()
        .map(|(name, parameter)| (name.to_owned(), parameter.value.dims().to_vec()))
        .collect();
    assert_eq!(values["model.layers.0.mlp.ffn_sub_norm.weight"], [44]);
}
