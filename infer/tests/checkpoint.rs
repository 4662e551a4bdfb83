//! Model folders: what is written is read, in every dialect, and what is damaged is refused by name.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::files::{Raw, edit, edit_config, folder, logits, scales};
use common::{bits, config, latents, model, qwens, variants};
use infer::ModelConfig;
use infer::checkpoint::{CheckpointError, hf};
use infer::generate::{GenerateOptions, generate};
use infer::model::{KvPrecision, Projection};
use infer::sampler::SamplingOptions;
use infer::tokenizer::Tokenizer;
use rand::{Rng, SeedableRng};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

#[test]
fn what_is_written_is_read_bit_for_bit() {
    for (seed, config) in variants().iter().enumerate() {
        let (folder, model) = folder(config, seed as u64);
        let read = hf::read(folder.path()).unwrap();
        assert_eq!(read.config(), model.config());
        for (a, b) in read.weights().layers.iter().zip(&model.weights().layers) {
            for (a, b) in a.projections().into_iter().zip(b.projections()) {
                match (a, b) {
                    (Projection::Ternary(a), Projection::Ternary(b)) => assert!(a == b),
                    (Projection::Dense(a), Projection::Dense(b)) => assert_eq!(bits(a), bits(b)),
                    _ => panic!("{a:?} is not {b:?}"),
                }
            }
        }
        assert_eq!(logits(&read), logits(&model));
        let mut names: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["config.json", "model.safetensors"]);
    }
}

#[test]
fn the_file_is_laid_out_as_transformers_wants_it() {
    let (folder, model) = folder(&config(), 4);
    let raw = Raw::read(folder.path());
    assert!(!raw.0.contains_key("lm_head.weight"));
    let Projection::Ternary(weight) = &model.weights().layers[1].k_proj else { panic!() };
    let (dtype, shape, bytes) = &raw.0["model.layers.1.self_attn.k_proj.weight"];
    assert_eq!((*dtype, shape.as_slice()), (Dtype::U8, [4, 32].as_slice()));
    // byte[j, c] = Σ_i (t[j + i r, c] + 1) << 2 i, with r = 16 / 4.
    let codes = weight.unpack();
    for j in 0..4 {
        for c in 0..32 {
            let byte: i32 = (0..4).map(|i| (i32::from(codes[(j + i * 4) * 32 + c]) + 1) << (2 * i)).sum();
            assert_eq!(i32::from(bytes[j * 32 + c]), byte);
        }
    }
    let (dtype, shape, _) = &raw.0["model.layers.1.self_attn.k_proj.weight_scale"];
    assert_eq!((*dtype, shape.as_slice()), (Dtype::F32, [1].as_slice()));
    assert_eq!(raw.f32("model.layers.1.self_attn.k_proj.weight_scale"), [weight.weight_scale()]);
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1;
    assert_eq!(metadata.metadata(), &Some(HashMap::from([("format".to_owned(), "pt".to_owned())])));
    let config: Value =
        serde_json::from_slice(&fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["linear_class"], "autobitlinear");
    assert_eq!(config["architectures"], json!(["BitNetForCausalLM"]));
}

#[test]
fn metadata_goes_into_the_header() {
    let folder = TempDir::new().unwrap();
    let metadata = BTreeMap::from([("run".to_owned(), "demo".to_owned())]);
    // A folder that is not there yet is made.
    let path = folder.path().join("a/b");
    hf::write(&path, &model(&config(), 1), &metadata).unwrap();
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let header = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap();
    assert_eq!((header["run"].as_str(), header["format"].as_str()), ("demo", "pt"));
    assert!(hf::read(&path).is_ok());
}

#[test]
fn a_dividing_scale_gives_the_same_model() {
    let (folder, model) = folder(&config(), 8);
    // Powers of two have exact reciprocals, so both dialects must agree to the last bit.
    edit(folder.path(), |raw| {
        for (i, name) in scales(raw).iter().enumerate() {
            raw.set_f32(name, &[1], &[0.5f32.powi(i as i32 % 5)]);
        }
    });
    let multiply = hf::read(folder.path()).unwrap();
    assert_ne!(logits(&multiply), logits(&model));
    edit(folder.path(), |raw| {
        for name in scales(raw) {
            let scale = raw.f32(&name)[0];
            raw.set_f32(&name, &[1], &[1.0 / scale]);
        }
    });
    for quantization in
        [json!({"quant_method": "bitnet"}), json!({"quant_method": "bitnet", "linear_class": "bitlinear"})]
    {
        edit_config(folder.path(), |config| config["quantization_config"] = quantization);
        assert_eq!(logits(&hf::read(folder.path()).unwrap()), logits(&multiply));
    }
}

#[test]
fn latent_weights_are_ternarized_when_read() {
    let config = config();
    let (folder, model) = folder(&config, 9);
    edit(folder.path(), |raw| {
        for name in scales(raw) {
            raw.0.remove(&name);
        }
        for (layer, latents) in latents(&config, 9).iter().enumerate() {
            for (latent, (name, out, columns)) in latents.iter().zip(config.projections()) {
                raw.set_f32(&format!("model.layers.{layer}.{name}.weight"), &[out, columns], latent);
            }
        }
    });
    edit_config(folder.path(), |config| config["quantization_config"]["quantization_mode"] = "online".into());
    assert_eq!(logits(&hf::read(folder.path()).unwrap()), logits(&model));
}

#[test]
fn half_precision_is_widened() {
    let configs = qwens().into_iter().chain([config()]);
    for (config, dtype) in configs.flat_map(|config| [(config.clone(), Dtype::BF16), (config, Dtype::F16)]) {
        let (folder, _) = folder(&config, 10);
        let narrow = |x: f32| match dtype {
            Dtype::BF16 => (half::bf16::from_f32(x).to_le_bytes(), half::bf16::from_f32(x).to_f32()),
            _ => (half::f16::from_f32(x).to_le_bytes(), half::f16::from_f32(x).to_f32()),
        };
        // The same values once rounded and stored as f32, once stored as they are.
        edit(folder.path(), |raw| {
            for name in raw.0.keys().cloned().collect::<Vec<_>>() {
                if raw.0[&name].0 == Dtype::F32 {
                    let (shape, values) = (raw.0[&name].1.clone(), raw.f32(&name));
                    raw.set_f32(&name, &shape, &values.iter().map(|x| narrow(*x).1).collect::<Vec<_>>());
                }
            }
        });
        let rounded = hf::read(folder.path()).unwrap();
        edit(folder.path(), |raw| {
            for name in raw.0.keys().cloned().collect::<Vec<_>>() {
                if raw.0[&name].0 == Dtype::F32 {
                    let values = raw.f32(&name);
                    let entry = raw.0.get_mut(&name).unwrap();
                    (entry.0, entry.2) = (dtype, values.iter().flat_map(|x| narrow(*x).0).collect());
                }
            }
        });
        assert_eq!(logits(&hf::read(folder.path()).unwrap()), logits(&rounded));
    }
}

/// Splits the model of a folder in two files with an index.
fn split(folder: &Path) {
    let mut first = Raw::read(folder);
    let name = "model.layers.1.input_layernorm.weight";
    let second = Raw(first.0.split_off(name));
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut map = serde_json::Map::new();
    for (raw, file) in [first, second].iter().zip(files) {
        raw.write(&folder.join(file));
        map.extend(raw.0.keys().map(|name| (name.clone(), file.into())));
    }
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
}

#[test]
fn several_files_with_an_index_are_one_model() {
    let (folder, model) = folder(&config(), 12);
    split(folder.path());
    assert_eq!(logits(&hf::read(folder.path()).unwrap()), logits(&model));
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(hf::read(folder.path()).unwrap_err().to_string().contains("model-00002-of-00002"));
}

#[test]
fn an_index_cannot_lead_out_of_its_folder() {
    for name in [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        "passwd",
        "c:x.safetensors",
    ] {
        let (folder, _) = folder(&config(), 12);
        split(folder.path());
        let path = folder.path().join("model.safetensors.index.json");
        fs::write(&path, json!({"weight_map": {"model.norm.weight": name}}).to_string()).unwrap();
        assert!(matches!(hf::read(folder.path()), Err(CheckpointError::Index { .. })), "{name}");
    }
    let (folder, _) = folder(&config(), 12);
    split(folder.path());
    for text in ["", "[]", "{}", r#"{"weight_map": {"a": 3}}"#] {
        fs::write(folder.path().join("model.safetensors.index.json"), text).unwrap();
        assert!(matches!(hf::read(folder.path()), Err(CheckpointError::Index { .. })), "{text}");
    }
}

#[test]
fn special_tokens_come_from_the_generation_config() {
    let (folder, _) = folder(&config(), 15);
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [7, 8]}"#).unwrap();
    assert_eq!(hf::read(folder.path()).unwrap().config().eos_token_ids, [7, 8]);
    fs::write(folder.path().join("generation_config.json"), "?").unwrap();
    assert!(matches!(hf::read(folder.path()), Err(CheckpointError::Config { .. })));
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";
const SCALE: &str = "model.layers.1.self_attn.q_proj.weight_scale";
const NORM: &str = "model.layers.0.post_attention_layernorm.weight";
const EMBED: &str = "model.embed_tokens.weight";

#[test]
fn damaged_tensors_are_refused_by_name() {
    type Change = fn(&mut Raw);
    let changes: [(&str, &str, Change); 18] = [
        (Q, "missing", |raw| drop(raw.0.remove(Q))),
        (SCALE, "missing", |raw| drop(raw.0.remove(SCALE))),
        (EMBED, "missing", |raw| drop(raw.0.remove(EMBED))),
        ("model.layers.2.extra", "no place", |raw| raw.set_f32("model.layers.2.extra", &[1], &[0.0])),
        ("lm_head.weight", "no place", |raw| raw.set_f32("lm_head.weight", &[300, 32], &[0.5; 9600])),
        (Q, "shape [32, 32], expected [8, 32]", |raw| {
            raw.0.get_mut(Q).unwrap().clone_from(&(Dtype::U8, vec![32, 32], vec![0; 1024]))
        }),
        (Q, "shape [32, 8]", |raw| raw.0.get_mut(Q).unwrap().1 = vec![32, 8]),
        (Q, "F32, expected U8", |raw| raw.set_f32(Q, &[32, 32], &[0.1; 1024])),
        (Q, "code 3 at row 16, column 5", |raw| raw.0.get_mut(Q).unwrap().2[5] |= 0b11_0000),
        (SCALE, "NaN", |raw| raw.set_f32(SCALE, &[1], &[f32::NAN])),
        (SCALE, "inf", |raw| raw.set_f32(SCALE, &[1], &[f32::INFINITY])),
        (Q, "scale 0", |raw| raw.set_f32(SCALE, &[1], &[0.0])),
        (Q, "scale -1", |raw| raw.set_f32(SCALE, &[1], &[-1.0])),
        (SCALE, "shape [2]", |raw| raw.set_f32(SCALE, &[2], &[1.0, 1.0])),
        (SCALE, "shape [0]", |raw| raw.set_f32(SCALE, &[0], &[])),
        (NORM, "value 3", |raw| {
            let mut values = raw.f32(NORM);
            values[3] = f32::NAN;
            raw.set_f32(NORM, &[32], &values);
        }),
        (EMBED, "value 77", |raw| {
            let mut values = raw.f32(EMBED);
            values[77] = f32::NEG_INFINITY;
            raw.set_f32(EMBED, &[300, 32], &values);
        }),
        (NORM, "I32", |raw| raw.0.get_mut(NORM).unwrap().0 = Dtype::I32),
    ];
    for (tensor, what, change) in changes {
        let (folder, _) = folder(&config(), 16);
        edit(folder.path(), change);
        let error = format!("{:#}", anyhow::Error::from(hf::read(folder.path()).unwrap_err()));
        assert!(error.contains(tensor) && error.contains(what), "{tensor} {what}: {error}");
        assert!(error.contains(&folder.path().display().to_string()), "{error}");
    }
}

#[test]
fn a_scalar_scale_is_read_too() {
    let (folder, model) = folder(&config(), 17);
    edit(folder.path(), |raw| {
        for name in scales(raw) {
            raw.0.get_mut(&name).unwrap().1 = vec![];
        }
    });
    assert_eq!(logits(&hf::read(folder.path()).unwrap()), logits(&model));
}

#[test]
fn another_models_config_is_refused() {
    for (key, value) in [
        ("hidden_size", json!(64)),
        ("num_hidden_layers", json!(3)),
        ("num_hidden_layers", json!(1)),
        ("num_hidden_layers", json!(60_000)),
        ("vocab_size", json!(2_000_000_000)),
        ("tie_word_embeddings", json!(false)),
        ("architectures", json!(["LlamaForCausalLM"])),
        ("quantization_config", Value::Null),
        ("intermediate_size", json!(46)),
        ("intermediate_size", json!(16_000_000)),
    ] {
        let (folder, _) = folder(&config(), 18);
        edit_config(folder.path(), |config| config[key] = value.clone());
        assert!(hf::read(folder.path()).is_err(), "{key} {value}");
    }
}

#[test]
fn what_cannot_be_written_is_said_and_nothing_is_left() {
    let folder = TempDir::new().unwrap();
    let odd = ModelConfig { intermediate_size: 46, ..config() };
    let error = hf::write(folder.path(), &model(&odd, 1), &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, CheckpointError::Rows { rows: 46, .. }), "{error}");
    // Dense models have no such rule.
    hf::write(folder.path(), &model(&ModelConfig { quantized: false, ..odd }, 1), &BTreeMap::new()).unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let error = hf::write(&file, &model(&config(), 1), &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, CheckpointError::Io { .. }), "{error}");
    // A folder where the file should be: the rename fails and the temporary file goes.
    let blocked = folder.path().join("blocked");
    fs::create_dir_all(blocked.join("model.safetensors")).unwrap();
    assert!(hf::write(&blocked, &model(&config(), 1), &BTreeMap::new()).is_err());
    assert_eq!(fs::read_dir(&blocked).unwrap().count(), 1);
}

#[test]
fn missing_files_are_named() {
    let (folder, _) = folder(&config(), 19);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(hf::read(folder.path()).unwrap_err().to_string().contains("model.safetensors"));
    assert!(hf::read(&folder.path().join("nowhere")).unwrap_err().to_string().contains("nowhere"));
}

/// Reads and, if that works, generates: an error is fine, a panic is not. Says whether it generated.
fn survives(folder: &Path) -> bool {
    let Ok(model) = hf::read(folder) else { return false };
    let sampling = SamplingOptions { temperature: 1.0, top_k: 5, top_p: 0.9, seed: 1 };
    let options =
        GenerateOptions { max_new_tokens: Some(3), sampling, kv: KvPrecision::F32, stop_ids: vec![] };
    generate(&model, &[2, 3], &options, &mut |_| ControlFlow::Continue(())).is_ok()
}

#[test]
fn truncated_files_are_errors() {
    let small = ModelConfig { num_hidden_layers: 1, vocab_size: 16, ..config() };
    let (folder, _) = folder(&small, 20);
    for name in ["model.safetensors", "config.json"] {
        let path = folder.path().join(name);
        let whole = fs::read(&path).unwrap();
        let step = (whole.len() / 150).max(1);
        for len in (0..whole.len() - 2).step_by(step).chain(whole.len() - 3..whole.len() - 2) {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(hf::read(folder.path()).is_err(), "{name} cut to {len}");
        }
        fs::write(&path, [whole.as_slice(), b"x"].concat()).unwrap();
        assert!(hf::read(folder.path()).is_err(), "{name} with a byte more");
        fs::write(&path, &whole).unwrap();
    }
    assert!(survives(folder.path()));
}

#[test]
fn flipped_bytes_never_panic() {
    let small = ModelConfig { num_hidden_layers: 1, vocab_size: 16, ..config() };
    let (folder, _) = folder(&small, 21);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(22);
    let (mut fine, mut refused) = (0, 0);
    for name in ["model.safetensors", "config.json"] {
        let path = folder.path().join(name);
        let whole = fs::read(&path).unwrap();
        let header =
            8 + u64::from_le_bytes(whole[..8].try_into().unwrap()).min(whole.len() as u64 - 8) as usize;
        for round in 0..300 {
            let mut bytes = whole.clone();
            // Half of the flips hit the header, where most of the rules are.
            let end = if round % 2 == 0 { header } else { bytes.len() };
            for _ in 0..=round % 3 {
                let at = rng.random_range(0..end);
                bytes[at] =
                    if round % 5 == 0 { rng.random() } else { bytes[at] ^ 1 << rng.random_range(0..8) };
            }
            fs::write(&path, &bytes).unwrap();
            if survives(folder.path()) { fine += 1 } else { refused += 1 }
        }
        fs::write(&path, &whole).unwrap();
    }
    assert!(fine > 50 && refused > 50, "{fine} generated, {refused} refused");
}

#[test]
fn flipped_bytes_of_a_tokenizer_never_panic() {
    let folder = TempDir::new().unwrap();
    common::write_tokenizer(folder.path());
    let path = folder.path().join("tokenizer.json");
    let whole = fs::read(&path).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(24);
    let (mut fine, mut refused) = (0, 0);
    for _ in 0..300 {
        let mut bytes = whole.clone();
        let at = rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << rng.random_range(0..7);
        fs::write(&path, &bytes).unwrap();
        let used =
            Tokenizer::read(folder.path(), 300).and_then(|t| t.decode(&t.encode("the cat é😀", true)?));
        if used.is_ok() { fine += 1 } else { refused += 1 }
    }
    assert!(fine > 10 && refused > 10, "{fine} used, {refused} refused");
}

#[test]
fn packed_rows_must_fill_their_bytes() {
    let odd = ModelConfig { intermediate_size: 46, quantized: false, ..config() };
    let (folder, _) = folder(&odd, 23);
    edit_config(folder.path(), |config| {
        config["quantization_config"] = json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"});
    });
    assert!(hf::read(folder.path()).is_err());
}
