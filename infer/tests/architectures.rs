//! Folders of other architectures, dialects and names: read as transformers reads them, refused by name.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::files::{Raw, edit, edit_config, folder, logits, scales};
use common::{bits, config, latents, mixed, model, qwens, values};
use infer::checkpoint::hf;
use infer::model::{Layer, Projection};
use infer::{Model, ModelConfig};
use rand::SeedableRng;
use serde_json::{Value, json};
use tempfile::TempDir;

const Q_BIAS: &str = "model.layers.1.self_attn.q_proj.bias";
const V_BIAS: &str = "model.layers.0.self_attn.v_proj.bias";
const O_BIAS: &str = "model.layers.0.self_attn.o_proj.bias";
const Q_NORM: &str = "model.layers.1.self_attn.q_norm.weight";
const DENSE_SCALE: &str = "model.layers.0.mlp.gate_proj.weight_scale";

fn message(folder: &Path) -> String {
    format!("{:#}", anyhow::Error::from(hf::read(folder).unwrap_err()))
}

#[test]
fn tensors_of_another_architecture_are_refused_by_name() {
    type Change = fn(&mut Raw);
    let [qwen2, qwen3] = qwens();
    let dense = ModelConfig { quantized: false, ..qwen2.clone() };
    let changes: [(ModelConfig, &str, &str, Change); 10] = [
        (qwen2.clone(), Q_BIAS, "missing", |raw| drop(raw.0.remove(Q_BIAS))),
        (dense.clone(), V_BIAS, "missing", |raw| drop(raw.0.remove(V_BIAS))),
        (dense, O_BIAS, "no place", |raw| raw.set_f32(O_BIAS, &[32], &[0.0; 32])),
        (qwen3.clone(), Q_BIAS, "no place", |raw| raw.set_f32(Q_BIAS, &[64], &[0.0; 64])),
        (qwen2.clone(), V_BIAS, "shape [32], expected [16]", |raw| raw.set_f32(V_BIAS, &[32], &[0.0; 32])),
        (qwen2.clone(), V_BIAS, "value 0", |raw| raw.set_f32(V_BIAS, &[16], &[f32::NAN; 16])),
        (qwen2, Q_NORM, "no place", |raw| raw.set_f32(Q_NORM, &[8], &[1.0; 8])),
        (qwen3.clone(), Q_NORM, "shape [64], expected [16]", |raw| raw.set_f32(Q_NORM, &[64], &[1.0; 64])),
        (qwen3.clone(), Q_NORM, "missing", |raw| drop(raw.0.remove(Q_NORM))),
        (mixed(qwen3), DENSE_SCALE, "no place", |raw| raw.set_f32(DENSE_SCALE, &[1], &[1.0])),
    ];
    for (config, tensor, what, change) in changes {
        let (folder, _) = folder(&config, 31);
        edit(folder.path(), change);
        let error = message(folder.path());
        assert!(error.contains(tensor) && error.contains(what), "{tensor} {what}: {error}");
    }
}

#[test]
fn what_transformers_computes_and_this_does_not_is_refused_by_name() {
    let llama = ModelConfig { sub_norm: false, ..config() };
    let [qwen2, qwen3] = qwens();
    for (config, key, value) in [
        (llama.clone(), "attention_bias", json!(true)),
        (llama.clone(), "mlp_bias", json!(true)),
        (llama.clone(), "model_type", json!("mistral")),
        (llama, "architectures", json!(["MistralForCausalLM"])),
        (qwen2.clone(), "use_sliding_window", json!(true)),
        (qwen2, "layer_types", json!(["full_attention", "sliding_attention"])),
        (qwen3.clone(), "attention_bias", json!(true)),
        (qwen3, "rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
    ] {
        let (folder, _) = folder(&config, 32);
        edit_config(folder.path(), |config| config[key] = value);
        let error = message(folder.path());
        assert!(error.contains(&format!("key '{key}")), "{key}: {error}");
    }
}

/// Replaces packed codes by the latent weights that they come from.
fn make_latent(folder: &Path, config: &ModelConfig, seed: u64) {
    edit(folder, |raw| {
        for name in scales(raw) {
            raw.0.remove(&name);
        }
        for (layer, latents) in latents(config, seed).iter().enumerate() {
            for (latent, (name, out, columns)) in latents.iter().zip(config.projections()) {
                raw.set_f32(&format!("model.layers.{layer}.{name}.weight"), &[out, columns], latent);
            }
        }
    });
}

/// Makes a folder one of 1bitLLM's: its names, its config, latent weights.
fn make_one_bit(folder: &Path, config: &ModelConfig, seed: u64) {
    make_latent(folder, config, seed);
    edit(folder, |raw| {
        let renamed = |name: &str| {
            name.replace("self_attn.attn_sub_norm", "self_attn.inner_attn_ln")
                .replace("mlp.ffn_sub_norm", "mlp.ffn_layernorm")
        };
        raw.0 = std::mem::take(&mut raw.0).into_iter().map(|(name, t)| (renamed(&name), t)).collect();
    });
    edit_config(folder, |config| {
        config["architectures"] = json!(["BitnetForCausalLM"]);
        config["model_type"] = "llama".into();
        config["weight_bits"] = 1.into();
        config["input_bits"] = 8.into();
        config.as_object_mut().unwrap().remove("quantization_config");
    });
}

#[test]
fn the_names_of_1bitllm_are_those_of_a_bitnet() {
    let (folder, model) = folder(&config(), 33);
    make_one_bit(folder.path(), &config(), 33);
    let read = hf::read(folder.path()).unwrap();
    assert_eq!(read.config(), model.config());
    assert_eq!(logits(&read), logits(&model));
    // It is written under transformers' names, packed.
    let packed = TempDir::new().unwrap();
    hf::write(packed.path(), &read, &BTreeMap::new()).unwrap();
    assert!(Raw::read(packed.path()).0.contains_key("model.layers.0.mlp.ffn_sub_norm.weight"));
    assert_eq!(logits(&hf::read(packed.path()).unwrap()), logits(&model));
    // Neither name stands for the other.
    edit_config(folder.path(), |config| config["architectures"] = json!(["BitNetForCausalLM"]));
    edit_config(folder.path(), |config| config["model_type"] = "bitnet".into());
    assert!(message(folder.path()).contains("self_attn.attn_sub_norm.weight"));
    for (key, value) in [("weight_bits", json!(2)), ("input_bits", json!(4))] {
        edit_config(folder.path(), |config| config["architectures"] = json!(["BitnetForCausalLM"]));
        edit_config(folder.path(), |config| config[key] = value);
        assert!(message(folder.path()).contains(key));
        edit_config(folder.path(), |config| config[key] = Value::Null);
    }
}

#[test]
fn a_bias_beside_packed_codes_is_stored_as_transformers_multiplies_it() {
    let [qwen2, _] = qwens();
    let (folder, model) = folder(&mixed(qwen2.clone()), 34);
    let raw = Raw::read(folder.path());
    let biases = model.weights().layers[1].qkv_bias.as_ref().unwrap();
    // The output times the scale: so the bias, too.
    let scale = raw.f32("model.layers.1.self_attn.k_proj.weight_scale")[0];
    let stored = raw.f32("model.layers.1.self_attn.k_proj.bias");
    let back: Vec<f32> = stored.iter().map(|value| value * scale).collect();
    assert_eq!(bits(&back), bits(&biases[1]));
    assert_ne!(bits(&stored), bits(&biases[1]));
    // q is dense in this layer: as it is.
    assert_eq!(bits(&raw.f32(Q_BIAS)), bits(&biases[0]));
}

#[test]
fn a_bias_beside_a_dividing_scale_is_as_it_is() {
    let [qwen2, _] = qwens();
    let (folder, _) = folder(&qwen2, 35);
    // Powers of two: the reciprocals are exact.
    edit(folder.path(), |raw| {
        for (i, name) in scales(raw).iter().enumerate() {
            raw.set_f32(name, &[1], &[0.5f32.powi(i as i32 % 5)]);
        }
    });
    let multiply = logits(&hf::read(folder.path()).unwrap());
    edit(folder.path(), |raw| {
        for name in scales(raw) {
            let scale = raw.f32(&name)[0];
            raw.set_f32(&name, &[1], &[1.0 / scale]);
            let bias = name.replace("weight_scale", "bias");
            if raw.0.contains_key(&bias) {
                let values: Vec<f32> = raw.f32(&bias).into_iter().map(|value| value * scale).collect();
                raw.set_f32(&bias, &[values.len()], &values);
            }
        }
    });
    edit_config(folder.path(), |config| config["quantization_config"] = json!({"quant_method": "bitnet"}));
    assert_eq!(logits(&hf::read(folder.path()).unwrap()), multiply);
}

#[test]
fn any_bias_is_written_to_the_last_place_and_from_then_on_exactly() {
    let [qwen2, _] = qwens();
    let right = model(&qwen2, 36);
    let mut weights = right.weights().clone();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(36);
    for layer in &mut weights.layers {
        layer.qkv_bias = layer
            .qkv_bias
            .as_ref()
            .map(|biases| biases.each_ref().map(|bias| values(&mut rng, bias.len(), 0.0, 1.0).into()));
    }
    let right = Model::new(qwen2, weights).unwrap();
    let written = |model: &Model| {
        let folder = TempDir::new().unwrap();
        hf::write(folder.path(), model, &BTreeMap::new()).unwrap();
        (hf::read(folder.path()).unwrap(), std::fs::read(folder.path().join("model.safetensors")).unwrap())
    };
    let (read, bytes) = written(&right);
    let biases = |model: &Model| -> Vec<f32> {
        let layers = model.weights().layers.iter().flat_map(Layer::biases);
        layers.flat_map(|(_, bias, _)| bias.to_vec()).collect()
    };
    assert_eq!(biases(&right).len(), 2 * 64);
    for (a, b) in biases(&read).into_iter().zip(biases(&right)) {
        assert!(a == b || a == b.next_up() || a == b.next_down(), "{a} {b}");
    }
    let (again, same) = written(&read);
    assert_eq!(logits(&again), logits(&read));
    assert!(bytes == same);
}

#[test]
fn a_bias_too_large_for_its_scale_is_not_written() {
    let [qwen2, _] = qwens();
    let right = model(&qwen2, 37);
    let mut weights = right.weights().clone();
    weights.layers[0].qkv_bias.as_mut().unwrap()[2] = vec![f32::MAX; 16].into();
    let folder = TempDir::new().unwrap();
    let right = Model::new(qwen2, weights).unwrap();
    let error = hf::write(folder.path(), &right, &BTreeMap::new()).unwrap_err().to_string();
    assert!(error.contains(V_BIAS), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_list_of_dense_modules_is_read_as_transformers_reads_it() {
    let llama = mixed(ModelConfig { sub_norm: false, ..config() });
    let (folder, model) = folder(&llama, 38);
    let list = "modules_to_not_convert";
    let written: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("config.json")).unwrap()).unwrap();
    let names = written["quantization_config"][list].as_array().unwrap();
    // With a list, transformers keeps the head dense only if the list says so.
    assert_eq!(names[0], "lm_head");
    assert_eq!(names.len(), 1 + llama.modules_to_not_convert.len());
    edit_config(folder.path(), |config| {
        config["quantization_config"][list] = json!([
            "lm_head",
            r"model\.layers\.1\.self_attn\.[qo]_proj",
            "0.mlp.down_proj",
            "mlp.gate_proj",
            "model.layers.0.self_attn.k_proj",
            "model.layers.1.mlp.up_proj",
            "model.embed_tokens",
            "up",
        ]);
    });
    let read = hf::read(folder.path()).unwrap();
    assert_eq!(read.config(), model.config());
    assert_eq!(logits(&read), logits(&model));
    for (entries, what) in [
        (json!(["model.layers.0.mlp"]), "lm_head"),
        (json!([]), "lm_head"),
        (json!(["lm_head", "("]), "regular expressions"),
        (json!(["lm_head", 3]), "names"),
        (json!("lm_head"), "names"),
        // Fewer than are dense: the next one has no scale.
        (json!(["lm_head", "down_proj"]), "self_attn.k_proj.weight_scale"),
        // More: a tensor of packed codes is no dense weight.
        (json!(["lm_head", "proj"]), "self_attn.q_proj.weight"),
    ] {
        edit_config(folder.path(), |config| config["quantization_config"][list] = entries.clone());
        let error = message(folder.path());
        assert!(error.contains(what), "{entries}: {error}");
    }
}

/// The projections of a model that must be dense, by module name.
fn dense_weights(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    for (index, layer) in model.weights().layers.iter().enumerate() {
        for ((name, _, _), projection) in model.config().projections().iter().zip(layer.projections()) {
            let Projection::Dense(weight) = projection else { panic!("{name} is ternary") };
            all.insert(format!("model.layers.{index}.{name}"), weight.to_vec());
        }
    }
    all
}

#[test]
fn a_model_is_read_in_full_precision_from_every_dialect() {
    for config in qwens().into_iter().chain([config()]).map(mixed) {
        let (folder, model) = folder(&config, 39);
        let full = ModelConfig { quantized: false, modules_to_not_convert: vec![], ..config.clone() };
        let modules =
            |index: usize| config.projections().map(|(name, ..)| format!("model.layers.{index}.{name}"));
        // Packed: codes times scale, dense ones as they are.
        let read = hf::read_latent(folder.path()).unwrap();
        assert_eq!(read.config(), &full);
        let packed = dense_weights(&read);
        for (index, layer) in model.weights().layers.iter().enumerate() {
            for (module, projection) in modules(index).into_iter().zip(layer.projections()) {
                let expected: Vec<f32> = match projection {
                    Projection::Dense(weight) => weight.to_vec(),
                    Projection::Ternary(weight) => {
                        weight.unpack().iter().map(|code| f32::from(*code) * weight.weight_scale()).collect()
                    }
                };
                assert_eq!(packed[&module], expected, "{module}");
            }
        }
        // The rest is that of the model, biases too.
        for (a, b) in read.weights().layers.iter().zip(&model.weights().layers) {
            let vectors = |layer: &Layer| -> Vec<f32> {
                let norms = layer.norms(&config).into_iter().filter_map(|(_, norm, _)| norm);
                norms.chain(layer.biases().map(|(_, bias, _)| bias)).flat_map(|v| v.to_vec()).collect()
            };
            assert_eq!(bits(&vectors(a)), bits(&vectors(b)));
        }
        assert_eq!(read.head().to_f32(), model.head().to_f32());
        // A scale that divides is the reciprocal.
        edit(folder.path(), |raw| {
            for name in scales(raw) {
                raw.set_f32(&name, &[1], &[4.0]);
            }
        });
        edit_config(folder.path(), |config| {
            let quantization = config["quantization_config"].as_object_mut().unwrap();
            quantization.remove("linear_class");
        });
        for (module, weight) in dense_weights(&hf::read_latent(folder.path()).unwrap()) {
            if config.is_ternary(&module) {
                assert!(weight.iter().all(|w| w.abs() == 0.25 || *w == 0.0), "{module}");
            }
        }
        // Master weights: as stored, not ternarized.
        make_latent(folder.path(), &config, 39);
        edit_config(folder.path(), |config| {
            config["quantization_config"]["linear_class"] = "autobitlinear".into();
            config["quantization_config"]["quantization_mode"] = "online".into();
        });
        let masters = dense_weights(&hf::read_latent(folder.path()).unwrap());
        for (index, latents) in latents(&config, 39).iter().enumerate() {
            for (module, latent) in modules(index).into_iter().zip(latents) {
                assert_eq!(&masters[&module], latent);
            }
        }
    }
}

#[test]
fn one_bit_and_dense_folders_are_read_in_full_precision() {
    let (folder, _) = folder(&config(), 40);
    make_one_bit(folder.path(), &config(), 40);
    let read = hf::read_latent(folder.path()).unwrap();
    assert_eq!(read.config(), &ModelConfig { quantized: false, ..config() });
    assert_eq!(dense_weights(&read)["model.layers.0.self_attn.q_proj"], latents(&config(), 40)[0][0]);
    edit(folder.path(), |raw| raw.set_f32("model.layers.0.extra", &[1], &[0.0]));
    assert!(hf::read_latent(folder.path()).is_err());
    let dense = ModelConfig { quantized: false, ..qwens()[0].clone() };
    let (folder, model) = common::files::folder(&dense, 41);
    assert_eq!(logits(&hf::read_latent(folder.path()).unwrap()), logits(&model));
}
