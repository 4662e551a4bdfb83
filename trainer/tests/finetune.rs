//! Fine-tuning as a user meets it: a model's folder goes in, with text, conversations or a teacher; a proven export and a
//! report come out.

mod common;

use std::fs;
use std::path::Path;

use common::source::{
    TEMPLATE, TURN_END, completions, conversations, edit_tensors, folder, llama, source, tensors, tune,
};
use common::{assert_same_run, checkpoint, copy, done, files, metrics, names, text, trainer};
use infer::checkpoint::hf;
use infer::config::ModelConfig;
use infer::{KvCache, Logits};
use safetensors::Dtype;
use serde_json::{Value, json};
use trainer::data::chat::{ChatSettings, prepare_chat};
use trainer::model::{Model, Weights};
use trainer::parameters::Parameters;
use trainer::runtime::runnable;
use trainer::schedule::Shares;

const FROM: &str = "init.from=source";

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The architecture of a run's export.
fn architecture(run: &Path) -> String {
    read_json(&run.join("export/hf/config.json"))["architectures"][0].as_str().unwrap().into()
}

/// Names of a report's rows, and its losses.
fn rows(run: &Path) -> (Vec<String>, Vec<f64>) {
    let report = read_json(&run.join("report.json"));
    let rows = report["rows"].as_array().unwrap().iter();
    rows.map(|row| (row["model"].as_str().unwrap().to_owned(), row["loss"].as_f64().unwrap())).unzip()
}

/// configs/finetune-distill.toml as it stands, made small.
#[test]
fn a_model_becomes_ternary_without_any_data() {
    let folder = folder();
    let path = folder.path();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/finetune-distill.toml");
    let small = [
        FROM,
        "run.threads=1",
        "data.sequence_length=32",
        "data.teacher_tokens=3000",
        "data.cache_dir=cache",
        "train.steps=10",
        "train.batch_size=2",
        "train.log_every=1",
        "schedule.warmup_steps=1",
        "eval.windows=8",
        "sample.tokens=8",
    ];
    let sets = small.iter().flat_map(|set| ["--set", set]);
    let args: Vec<_> = ["train", config.to_str().unwrap(), "--out", "run"].into_iter().chain(sets).collect();
    let (stdout, stderr) = done(path, &args);
    for part in [
        "exported to run/export/hf (",
        "step 10\nproven: weights equal, max logit difference ",
        "\nimported ",
        "\nternarized, untrained ",
        "\ntrained ",
        " % of what ternarization cost is won back\ncodes, % ",
        "\n0.mlp.down_proj ",
        "\nnext: ",
    ] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    assert!(stderr.contains("writing text") && stderr.contains(" | divergence "), "{stderr}");
    assert_eq!(architecture(&path.join("run")), "BitNetForCausalLM");
    let (models, losses) = rows(&path.join("run"));
    assert_eq!(models, ["imported", "ternarized, untrained", "trained"]);
    let report = read_json(&path.join("run/report.json"));
    assert_eq!(report["projections"].as_object().unwrap().len(), 21);
    let share = (losses[1] - losses[2]) / (losses[1] - losses[0]);
    assert!((report["gap_closed"].as_f64().unwrap() - share).abs() < 1e-12);
    // At the first step nothing is quantized and nothing normed: the student computes what the teacher does.
    let metrics = metrics(&path.join("run"));
    let divergence = |line: &Value| line["divergence"].as_f64().unwrap();
    assert_eq!(metrics[0]["lambda"], 0.0);
    assert!(divergence(&metrics[0]).abs() < 1e-4 && divergence(&metrics[9]) > 1e-3, "{metrics:?}");
    // The export runs where it stands.
    let (stdout, _) = done(path, &["eval", "run/export/hf", "--data", "text.txt"]);
    assert!(stdout.starts_with("loss "), "{stdout}");
}

#[test]
fn a_taught_run_that_stops_goes_on_bit_for_bit() {
    let folder = folder();
    let path = folder.path();
    let lessons = [
        "distill.teacher=init",
        "distill.relations=0.5",
        "distill.temperature=2",
        "quantization.warmup=linear",
        "train.steps=8",
        "train.gradient_accumulation=2",
        "eval.every=3",
    ];
    for data in [&["data.source=teacher", "data.train=[]"][..], &["data.source=files"]] {
        let (whole, from) = (format!("whole-{}", data.len()), |step| format!("from-{step}-{}", data.len()));
        let settings = [&lessons[..], data].concat();
        let kept = [&settings[..], &["checkpoint.every=1", "checkpoint.keep=99"]].concat();
        done(path, &tune(&whole, FROM, &kept));
        for step in [1, 3, 7] {
            let copied = from(step);
            copy(&path.join(&whole), &path.join(&copied));
            for later in step + 1..=8 {
                fs::remove_dir_all(path.join(&copied).join(checkpoint(later))).unwrap();
            }
            let (_, stderr) = done(path, &tune(&copied, FROM, &kept));
            assert!(stderr.contains(&format!("resuming from {copied}/{}", checkpoint(step))), "{stderr}");
            assert_same_run(&path.join(&whole), &path.join(&copied), 8);
            let export = |run: &str| files(&path.join(run).join("export/hf"));
            // The card names the run's folder nowhere, so that files are equal.
            assert!(export(&whole) == export(&copied), "the exports of {whole} and {copied} differ");
        }
    }
}

#[test]
fn skipped_projections_stay_as_they_are_in_the_export() {
    let folder = folder();
    let path = folder.path();
    let sets = ["quantization.skip=[\"*.down_proj\", \"model.layers.0.*\"]", "distill.teacher=init"];
    let (stdout, _) = done(path, &tune("run", FROM, &sets));
    assert!(stdout.contains("proven: weights equal"), "{stdout}");
    let export = path.join("run/export/hf");
    let kept = &read_json(&export.join("config.json"))["quantization_config"]["modules_to_not_convert"];
    let kept: Vec<&str> = kept.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!((kept.len(), kept[0]), (1 + 7 + 2, "lm_head"));
    for (name, (dtype, ..)) in tensors(&export) {
        let Some(module) = name.strip_suffix(".weight").filter(|module| module.ends_with("_proj")) else {
            continue;
        };
        assert_eq!(dtype == Dtype::F32, kept.contains(&module), "{name} is {dtype:?}");
    }
    let report = read_json(&path.join("run/report.json"));
    let ternary = report["projections"].as_object().unwrap();
    assert!(ternary.len() == 12 && ternary.keys().all(|name| !name.contains("down_proj")), "{ternary:?}");
}

/// What the proof rests on: a difference in the last place could become one of an int8 code.
#[test]
fn hidden_states_of_a_mixed_model_are_the_runtimes_bit_for_bit() {
    for (sub_norm, qkv_bias, qk_norm) in
        [(true, false, false), (false, true, false), (false, false, true), (false, false, false)]
    {
        let mut config = ModelConfig { quantized: true, sub_norm, qkv_bias, qk_norm, ..llama() };
        for name in ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"] {
            config.modules_to_not_convert.push(name.into());
        }
        let parameters = Parameters::init(&config, 0.1, 3).unwrap();
        let ids: Vec<u32> = (0..60).map(|at| at * 37 % 300).collect();
        let found = Model::new(config.clone(), 64)
            .hidden(&Weights::fixed(&parameters), &ids, &[ids.len()], Shares::FULL)
            .unwrap();
        let runtime = runnable(&config, &parameters).unwrap();
        let expected = runtime.hidden(&ids, &mut KvCache::new(&runtime, ids.len()).unwrap()).unwrap();
        assert!(found.flatten_all().unwrap().to_vec1::<f32>().unwrap() == expected, "{config:?}");
    }
}

#[test]
fn relations_alone_teach_too_at_any_layer_of_the_model() {
    let folder = folder();
    let path = folder.path();
    // More layers than a config has by default.
    source(path, "deep", |config| config.num_hidden_layers = 8);
    for (out, more) in [
        ("alone", &["distill.cross_entropy=0", "distill.logits=0", "distill.relation_layer=7"][..]),
        ("all", &["distill.relation_layer=6", "distill.relation_heads=4"]),
    ] {
        let sets = [&["distill.teacher=init", "distill.relations=1"][..], more].concat();
        let (stdout, _) = done(path, &tune(out, "init.from=deep", &sets));
        assert!(stdout.contains("proven: weights equal"), "{stdout}");
        let metrics = metrics(&path.join(out));
        let relations: Vec<f64> =
            metrics[..3].iter().map(|line| line["relations"].as_f64().unwrap()).collect();
        assert!(relations.iter().all(|relations| *relations > 0.0 && relations.is_finite()), "{relations:?}");
    }
}

#[test]
fn each_architecture_trains_and_keeps_its_name() {
    let folder = folder();
    let path = folder.path();
    source(path, "qwen2", |config| {
        (config.qkv_bias, config.tie_word_embeddings) = (true, true);
        (config.bos_token_id, config.eos_token_ids) = (None, vec![0, 299]);
    });
    source(path, "qwen3", |config| (config.qk_norm, config.head_dim) = (true, 16));
    for (from, class) in
        [("source", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")]
    {
        let from_set = format!("init.from={from}");
        for (kind, more) in [
            ("bitnet", &["distill.teacher=init", "quantization.warmup=cubic"][..]),
            ("none", &["train.steps=20", "optimizer.learning_rate=2e-3"]),
        ] {
            let (out, quantization) = (format!("{from}-{kind}"), format!("model.quantization={kind}"));
            let sets = [&["model.sub_norm=false", &quantization][..], more].concat();
            let (stdout, _) = done(path, &tune(&out, &from_set, &sets));
            assert!(stdout.contains("proven: weights equal"), "{stdout}");
            let run = path.join(&out);
            assert_eq!(architecture(&run), class);
            assert!(fs::read_to_string(run.join("export/hf/README.md")).unwrap().contains(class));
            let (models, losses) = rows(&run);
            if kind == "none" {
                assert_eq!(models, ["imported", "trained"]);
                assert!(losses[1] < losses[0], "{losses:?}");
                assert!(!stdout.contains("ternarization"), "{stdout}");
            } else {
                assert_eq!(models.len(), 3);
            }
            let config = read_json(&run.join("export/hf/config.json"));
            let generation = read_json(&run.join("export/hf/generation_config.json"));
            assert_eq!(generation["eos_token_id"], config["eos_token_id"]);
            assert_eq!(config["eos_token_id"], if from == "qwen2" { json!([0, 299]) } else { json!(0) });
        }
    }
}

#[test]
fn a_long_context_does_not_make_the_proof_long() {
    let folder = folder();
    let path = folder.path();
    source(path, "long", |config| config.max_position_embeddings = 1 << 17);
    let (stdout, _) = done(path, &tune("run", "init.from=long", &["train.steps=1"]));
    // Four windows, 512 tokens each.
    assert!(stdout.contains("; 2048 of 2048 greedy tokens equal"), "{stdout}");
    assert_eq!(read_json(&path.join("run/export/hf/config.json"))["max_position_embeddings"], 1 << 17);
}

/// Mean loss of the assistant's tokens of a model's folder, each example on its own, by the inference runtime.
fn chat_loss(model: &Path, settings: &ChatSettings) -> f64 {
    let model = hf::read(model).unwrap();
    let rows = prepare_chat(settings, &|_, _| {}).unwrap().validation;
    let batch = rows.batch(&rows.evaluation(0));
    let (weights, mut start, mut sum, mut count) = (batch.weights.unwrap(), 0, 0.0, 0);
    for length in batch.sequences {
        let ids = &batch.ids[start..start + length];
        let logits = model.forward(ids, &mut KvCache::new(&model, length).unwrap(), Logits::All).unwrap();
        for (at, logits) in logits.chunks_exact(model.config().vocab_size).enumerate() {
            if weights[start + at] == 1.0 {
                let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
                // The next token of the same example.
                sum += total.ln() - f64::from(logits[ids[at + 1] as usize]);
                count += 1;
            }
        }
        start += length;
    }
    assert!(count > 5);
    sum / f64::from(count)
}

#[test]
fn conversations_are_learnt_and_the_export_can_be_talked_to() {
    let folder = folder();
    let path = folder.path();
    fs::write(path.join("messages.jsonl"), conversations()).unwrap();
    fs::write(path.join("prompts.jsonl"), completions()).unwrap();
    let tokenizer_config =
        json!({"eos_token": TURN_END, "chat_template": TEMPLATE, "padding_side": "left"}).to_string();
    fs::write(path.join("source/tokenizer_config.json"), &tokenizer_config).unwrap();
    for (out, data, reduction) in [
        ("messages", "messages.jsonl", "train.reduction=mean"),
        ("prompts", "prompts.jsonl", "train.reduction=sum"),
    ] {
        if out == "prompts" {
            fs::write(path.join("source/chat_template.jinja"), TEMPLATE).unwrap();
        }
        let train = format!("data.train={data}");
        let more = ["data.source=chat", "data.validation_fraction=0.3", "data.sequence_length=64"];
        let sets =
            [&more[..], &["eval.windows=0", "train.gradient_accumulation=2", &train, reduction]].concat();
        let (stdout, _) = done(path, &tune(out, FROM, &sets));
        assert!(stdout.contains("proven: weights equal"), "{stdout}");
        let export = path.join(out).join("export/hf");
        assert_eq!(fs::read_to_string(export.join("tokenizer_config.json")).unwrap(), tokenizer_config);
        let template = fs::read_to_string(export.join("chat_template.jinja")).ok();
        assert_eq!(template.as_deref(), (out == "prompts").then_some(TEMPLATE));
        // What ends an answer ends a text.
        for name in ["config.json", "generation_config.json"] {
            let config = read_json(&export.join(name));
            assert_eq!(
                (&config["bos_token_id"], &config["eos_token_id"]),
                (&json!(0), &json!([0, 289])),
                "{name}"
            );
        }
        let settings = ChatSettings {
            train: vec![path.join(data)],
            validation: Vec::new(),
            validation_fraction: 0.3,
            folder: path.join("source"),
            vocab_size: Some(300),
            sequence_length: 64,
            seed: 1234,
            now: None,
        };
        let found = metrics(&path.join(out)).last().unwrap()["loss"].as_f64().unwrap();
        let expected = chat_loss(&export, &settings);
        // Sums of f32 in other orders.
        assert!((found - expected).abs() < 1e-5, "{found} and {expected}");
        assert!(stdout.contains(&format!("validation loss {found:.4} nats per token")), "{stdout}");
        // The export is a model to go on from, its conversations written alike.
        let from = format!("init.from={out}/export/hf");
        let again = format!("{out}-again");
        done(path, &tune(&again, &from, &sets));
    }
    // A tokenizer of another model does not get this one's configuration.
    let tokenizer = fs::read_to_string(path.join("source/tokenizer.json")).unwrap();
    fs::write(path.join("other.json"), tokenizer + "\n").unwrap();
    done(path, &tune("other", FROM, &["tokenizer.file=other.json"]));
    let config = read_json(&path.join("other/export/hf/tokenizer_config.json"));
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert!(!names(&path.join("other/export/hf")).contains(&"chat_template.jinja".to_owned()));
}

/// Runs what must be refused with one line, before anything is trained.
fn refused(folder: &Path, args: &[&str], parts: &[&str]) {
    let output = trainer(folder, args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(text(&output.stdout), "", "{args:?}");
    let last = stderr.lines().last().unwrap();
    let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(last.starts_with("error: ") && errors == 1, "{args:?}: {stderr}");
    assert!(parts.iter().all(|part| last.contains(part)), "{args:?}: {parts:?} {stderr}");
    assert!(last.contains("; "), "what and what to do: {last}");
    let (_, cause) = last.rsplit_once(": ").unwrap();
    assert_eq!(last.matches(cause).count(), 1, "a cause is told twice: {last}");
    assert!(!folder.join("run/config.toml").exists(), "{args:?}: a refused run was started");
    println!("{last}");
}

/// A copy of `source` with other tensors.
fn damaged(folder: &Path, name: &str, change: impl FnOnce(&mut common::source::Tensors)) {
    copy(&folder.join("source"), &folder.join(name));
    edit_tensors(&folder.join(name), change);
}

#[test]
fn models_that_cannot_be_started_from_are_refused() {
    let folder = folder();
    let path = folder.path();
    let config = fs::read_to_string(path.join("source/config.json")).unwrap();
    for (name, from, to) in [
        ("mistral", "LlamaForCausalLM", "MistralForCausalLM"),
        ("wide", "\"vocab_size\": 300", "\"vocab_size\": 301"),
        ("gelu", "\"silu\"", "\"gelu\""),
    ] {
        copy(&path.join("source"), &path.join(name));
        assert!(config.contains(from));
        fs::write(path.join(name).join("config.json"), config.replace(from, to)).unwrap();
    }
    damaged(path, "missing", |tensors| drop(tensors.remove("model.layers.1.mlp.up_proj.weight")));
    damaged(path, "extra", |tensors| {
        tensors.insert("model.layers.9.x".into(), (Dtype::F32, vec![1], vec![0; 4]));
    });
    damaged(path, "nan", |tensors| {
        let (_, (_, _, data)) = tensors.iter_mut().next().unwrap();
        data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    source(path, "narrow", |config| config.vocab_size = 280);
    source(path, "biased", |config| config.qkv_bias = true);
    for (from, parts) in [
        ("mistral", &["MistralForCausalLM", "mistral/config.json"][..]),
        ("gelu", &["gelu", "hidden_act"]),
        ("missing", &["model.layers.1.mlp.up_proj.weight", "missing"]),
        ("extra", &["model.layers.9.x", "extra/model.safetensors"]),
        ("nan", &["lm_head.weight", "nan/model.safetensors"]),
        ("wide", &["[300, 32]", "[301, 32]"]),
        ("narrow", &["290", "280", "narrow/tokenizer.json"]),
        ("biased", &["set model.sub_norm = false"]),
        ("nowhere", &["nowhere/config.json"]),
    ] {
        refused(path, &tune("run", &format!("init.from={from}"), &[]), parts);
    }
    for (set, parts) in [
        ("model.hidden_size=64", &["model.hidden_size is 64 in the config and 32 in the model"][..]),
        ("data.sequence_length=65", &["model.max_position_embeddings", "64", "65"]),
        ("quantization.skip=[\"*.lm_head\"]", &["quantization.skip", "*.lm_head"]),
        ("distill.relation_layer=3", &["distill.relation_layer", "less than 3"]),
        ("train.reduction=median", &["train.reduction", "median"]),
    ] {
        refused(path, &tune("run", FROM, &[set]), parts);
    }
    // None of them left anything in the way of a run that is right.
    done(path, &tune("run", FROM, &["train.steps=1"]));
}

#[test]
fn teachers_that_do_not_fit_are_refused_before_they_write() {
    let folder = folder();
    let path = folder.path();
    source(path, "other", |config| config.vocab_size = 310);
    source(path, "short", |config| config.max_position_embeddings = 16);
    source(path, "heads", |config| (config.num_attention_heads, config.num_key_value_heads) = (5, 5));
    done(path, &tune("ternary", FROM, &["train.steps=1"]));
    for (teacher, parts) in [
        ("other", &["the teacher's vocabulary is 310", "300"][..]),
        ("short", &["context (data.sequence_length) is 16", "32"]),
        // Queries, keys and values of 40 features; the student's keys and values have 16.
        ("heads", &["width that distill.relation_heads must divide is 40", "16"]),
        ("ternary/export/hf", &["the teacher's weights are ternary"]),
        ("nowhere", &["nowhere/config.json"]),
    ] {
        for source in [&["data.source=files"][..], &["data.source=teacher", "data.train=[]"]] {
            let set = format!("distill.teacher={teacher}");
            let relations = ["distill.relations=1", "distill.relation_heads=16"];
            let sets = [&[set.as_str()][..], &relations, source].concat();
            refused(path, &tune("run", FROM, &sets), parts);
        }
    }
    let written = names(&path.join("cache")).into_iter().filter(|name| name.ends_with(".u16"));
    assert_eq!(written.count(), 0, "a teacher that was refused has written");
    let right = ["distill.teacher=init", "train.steps=1"];
    done(path, &tune("run", FROM, &right));
}

#[test]
fn conversations_that_cannot_be_learnt_are_refused() {
    let folder = folder();
    let path = folder.path();
    let write = |name: &str, text: &str| fs::write(path.join(name), text).unwrap();
    write("chat.jsonl", &conversations());
    write(
        "alone.jsonl",
        &(conversations() + "\n{\"messages\": [{\"role\": \"user\", \"content\": \"Who?\"}]}"),
    );
    let chat = ["data.source=chat", "data.train=chat.jsonl"];
    refused(path, &tune("run", FROM, &chat), &["no chat template", "source"]);
    for (template, parts) in [
        ("{{ raise_exception('not for you') }}", &["not for you", "chat_template.jinja"][..]),
        ("{% if %}", &["the chat template cannot be read", "chat_template.jinja"]),
        ("{{ messages[0].content }}", &["chat_template.jinja"]),
        ("{% for i in range(99999999) %}{{ i }}{% endfor %}", &["chat_template.jinja"]),
    ] {
        write("source/chat_template.jinja", template);
        refused(path, &tune("run", FROM, &chat), parts);
    }
    write("source/chat_template.jinja", TEMPLATE);
    let alone = ["data.source=chat", "data.train=alone.jsonl"];
    refused(path, &tune("run", FROM, &alone), &["no message of the role `assistant`", "alone.jsonl line 21"]);
    let args = tune("run", "data.source=chat", &["data.train=chat.jsonl"]);
    refused(path, &args, &["init.from", "name the model to fine-tune"]);
    let args = [&chat[..], &["train.precision=f32"]].concat();
    refused(path, &tune("run", FROM, &args), &["train.precision"]);
    write("source/tokenizer_config.json", "{\"eos_token\": \"<nowhere>\"}");
    refused(path, &tune("run", FROM, &chat), &["eos_token `<nowhere>`", "tokenizer_config.json"]);
    write("source/tokenizer_config.json", &json!({ "eos_token": TURN_END }).to_string());
    done(path, &tune("run", FROM, &[&chat[..], &["train.steps=1"]].concat()));
}
