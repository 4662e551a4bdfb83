//! The command as a user meets it: stdout, stderr, exit codes.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{bits, config, model, write_tokenizer};
use infer::checkpoint::hf;
use infer::generate::{GenerateOptions, generate};
use infer::model::KvPrecision;
use infer::sampler::SamplingOptions;
use infer::tokenizer::Tokenizer;
use infer::{KvCache, Logits, ModelConfig, eval};
use serde_json::Value;
use tempfile::TempDir;

/// A folder with a small model and its tokenizer, as `folder/model`.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model");
    hf::write(&path, &model(&config(), 1), &BTreeMap::new()).unwrap();
    write_tokenizer(&path);
    folder
}

fn infer(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_infer")).args(args).current_dir(folder).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs a command that must succeed; returns stdout.
fn done(folder: &Path, args: &[&str]) -> String {
    let output = infer(folder, args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout).to_owned()
}

fn report(folder: &Path, args: &[&str]) -> Value {
    let report: Value = serde_json::from_str(&done(folder, args)).unwrap();
    assert!(
        ["scalar", "avx2", "avx512vnni", "amx", "neon", "neondot"]
            .contains(&report["kernel"].as_str().unwrap())
    );
    report
}

/// Runs a command that must fail by the user's mistake, with nothing on stdout; returns stderr.
fn refused(folder: &Path, args: &[&str]) -> String {
    let output = infer(folder, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "", "{args:?}");
    let error = text(&output.stderr).to_owned();
    assert!(error.starts_with("error: ") && !error.contains("panicked"), "{error}");
    error
}

const PROMPT: [&str; 4] = ["generate", "model", "--prompt", "the cat"];

#[test]
fn generate_streams_what_the_library_generates() {
    let folder = folder();
    let path = folder.path().join("model");
    let (model, tokenizer) = (hf::read(&path).unwrap(), Tokenizer::read(&path, 300).unwrap());
    let options = GenerateOptions {
        max_new_tokens: Some(12),
        sampling: SamplingOptions { temperature: 0.8, top_k: 20, top_p: 0.9, seed: 5 },
        kv: KvPrecision::F32,
        stop_ids: vec![1],
    };
    let prompt = tokenizer.encode("the cat", true).unwrap();
    let expected = generate(&model, &prompt, &options, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
    let options = ["-n", "12", "--top-k", "20", "--top-p", "0.9", "--seed", "5"];
    let report = report(folder.path(), &[&PROMPT[..], &options, &["--json"]].concat());
    assert_eq!(report["ids"], serde_json::json!(expected.tokens));
    let text = tokenizer.decode(&expected.tokens).unwrap();
    assert_eq!(
        (report["text"].as_str(), report["stop"].as_str()),
        (Some(text.as_str()), Some(expected.stop.name()))
    );
    assert_eq!(report["prompt_ids"], serde_json::json!(prompt));
    assert!(report["prefill_seconds"].as_f64().unwrap() > 0.0);
    let output = infer(folder.path(), &[&PROMPT[..], &options].concat());
    assert_eq!(std::str::from_utf8(&output.stdout).unwrap(), format!("the cat{text}\n"));
    assert!(std::str::from_utf8(&output.stderr).unwrap().contains("kernel "));
}

#[test]
fn greedy_text_does_not_depend_on_seed_or_threads() {
    let folder = folder();
    let with = |seed, threads| {
        let options = ["--temperature", "0", "-n", "20", "--seed", seed, "--threads", threads];
        done(folder.path(), &[&PROMPT[..], &options].concat())
    };
    let one = with("1", "1");
    assert_eq!(one, with("2", "2"));
    assert_eq!(one, with("3", "3"));
}

#[test]
fn an_empty_prompt_starts_a_text() {
    let folder = folder();
    let report = report(folder.path(), &["generate", "model", "--prompt", "", "-n", "3", "--json"]);
    assert_eq!(report["prompt_ids"], serde_json::json!([0]));
}

#[test]
fn logits_are_those_of_the_library() {
    let folder = folder();
    let model = hf::read(&folder.path().join("model")).unwrap();
    let report =
        report(folder.path(), &["logits", "model", "--ids", "1,2,3", "--out", "out.safetensors", "--json"]);
    assert_eq!((report["tokens"].as_u64(), report["vocab_size"].as_u64()), (Some(3), Some(300)));
    let bytes = fs::read(folder.path().join("out.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("logits").unwrap();
    assert_eq!((view.shape(), view.dtype()), ([3, 300].as_slice(), safetensors::Dtype::F32));
    let values: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut cache = KvCache::new(&model, 3).unwrap();
    assert_eq!(bits(&values), bits(&model.forward(&[1, 2, 3], &mut cache, Logits::All).unwrap()));
}

/// What a model gives does not depend on how it is computed: every kernel, layout and number of threads, to the last bit.
#[test]
fn kernel_layout_and_threads_change_no_bit() {
    let folder = folder();
    let ids = (0..40).map(|i| (i * 37 % 300).to_string()).collect::<Vec<_>>().join(",");
    let with = |kernel: &str, layout: &str, threads: &str| {
        let run = |args: &[&str]| {
            let output = Command::new(env!("CARGO_BIN_EXE_infer"))
                .args([args, &["--layout", layout, "--threads", threads, "--json"]].concat())
                .env("BITLINEAR_KERNEL", kernel)
                .current_dir(folder.path())
                .output()
                .unwrap();
            assert!(output.status.success(), "{kernel}: {}", text(&output.stderr));
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(report["kernel"].as_str(), Some(kernel));
            report
        };
        run(&["logits", "model", "--ids", &ids, "--out", "out.safetensors"]);
        let greedy = run(&["generate", "model", "--prompt", "the cat", "--temperature", "0", "-n", "30"]);
        fs::write(folder.path().join("a.txt"), "the dog ran until the cat sat. ".repeat(9)).unwrap();
        let loss = run(&["perplexity", "model", "--data", "a.txt"]);
        let logits = fs::read(folder.path().join("out.safetensors")).unwrap();
        (logits, greedy["ids"].clone(), loss["loss"].clone())
    };
    let expected = with("scalar", "2bit", "1");
    for kernel in bitlinear::kernels::Kernel::available() {
        for layout in ["2bit", "1.6bit"] {
            for threads in ["1", "3"] {
                let same = with(kernel.name(), layout, threads) == expected;
                assert!(same, "{} {layout} {threads}", kernel.name());
            }
        }
        println!("the same bits as scalar: {}", kernel.name());
    }
}

#[test]
fn a_rounded_head_or_cache_is_asked_for_by_name() {
    let folder = folder();
    fs::write(folder.path().join("a.txt"), "the dog ran until the cat sat. ".repeat(9)).unwrap();
    let loss = |options: &[&str]| {
        report(folder.path(), &[&["perplexity", "model", "--data", "a.txt", "--json"], options].concat())["loss"]
            .as_f64()
            .unwrap()
    };
    let exact = loss(&[]);
    for options in [["--head", "int8"], ["--head", "int4"], ["--kv", "f16"]] {
        let rounded = loss(&options);
        let named = report(
            folder.path(),
            &[&["perplexity", "model", "--data", "a.txt", "--json"], &options[..]].concat(),
        );
        assert_eq!(named[options[0].trim_start_matches('-')].as_str(), Some(options[1]));
        assert!(
            rounded != exact && (rounded - exact).abs() < 0.003 * exact,
            "{options:?}: {rounded} {exact}"
        );
    }
    for wrong in [["--head", "int2"], ["--kv", "f8"], ["--layout", "3bit"]] {
        let error =
            refused(folder.path(), &[&["perplexity", "model", "--data", "a.txt"][..], &wrong].concat());
        assert!(error.contains(wrong[1]) && error.contains("possible values"), "{error}");
    }
}

#[test]
fn perplexity_of_text_and_of_ids_agree() {
    let folder = folder();
    let path = folder.path().join("model");
    let text = "the dog ran until the cat sat and the night fell on the mat. ".repeat(9);
    fs::write(folder.path().join("a.txt"), &text).unwrap();
    let ids = Tokenizer::read(&path, 300).unwrap().encode(&text, false).unwrap();
    fs::write(
        folder.path().join("a.u16"),
        ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect::<Vec<u8>>(),
    )
    .unwrap();
    fs::write(folder.path().join("a.u32"), ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<u8>>())
        .unwrap();
    let expected = eval::perplexity(&hf::read(&path).unwrap(), &ids, 32, KvPrecision::F32).unwrap();
    for name in ["a.txt", "a.u16", "a.u32"] {
        let report =
            report(folder.path(), &["perplexity", "model", "--data", name, "--context", "32", "--json"]);
        assert_eq!(report["loss"].as_f64(), Some(expected.loss), "{name}");
        assert_eq!(report["tokens"].as_u64(), Some(expected.tokens as u64));
        let bits = (name == "a.txt").then(|| expected.bits_per_byte(ids.len(), text.len()));
        assert_eq!(report["bits_per_byte"].as_f64(), bits);
    }
    let lines = done(folder.path(), &["perplexity", "model", "--data", "a.txt"]);
    assert!(
        lines.contains("perplexity: ") && lines.contains("kernel: ") && lines.contains("context: 96"),
        "{lines}"
    );
}

#[test]
fn bench_measures_a_model_or_a_shape() {
    let folder = folder();
    let options =
        ["--prompt-tokens", "8", "--gen-tokens", "4", "--repetitions", "3", "--threads", "2", "--json"];
    for which in [&["bench", "model"][..], &["bench", "--shape", "model/config.json"]] {
        let report = report(folder.path(), &[which, &options].concat());
        let speed = &report["gen_tokens_per_second"];
        let [min, median, max] = ["min", "median", "max"].map(|key| speed[key].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= max, "{speed}");
        assert_eq!(report["threads"].as_u64(), Some(2));
        assert!(report["bytes_per_token"].as_u64().unwrap() > 300 * 32 * 2);
        for key in ["read_bandwidth", "bandwidth_share", "gigabytes_per_second", "gigaoperations_per_second"]
        {
            assert!(report[key].as_f64().unwrap() > 0.0, "{key}");
        }
        let parts = report["gen_seconds_per_token"].as_object().unwrap();
        assert!(parts.len() == 8 && parts["head"].as_f64().unwrap() > 0.0, "{parts:?}");
        assert_eq!(report["by_bandwidth"][1]["gigabytes_per_second"].as_f64(), Some(800.0));
        // Without a layout both are tried, and the report is the faster one's.
        let layouts = report["layouts"].as_array().unwrap();
        let best = layouts.iter().find(|row| row["layout"] == report["layout"]).unwrap();
        assert!(
            layouts.len() == 2
                && layouts.iter().all(|row| row["gen_tokens_per_second"].as_f64().unwrap() <= median)
        );
        assert_eq!(best["gen_tokens_per_second"].as_f64(), Some(median));
    }
    let one = report(
        folder.path(),
        &[&["bench", "model", "--layout", "1.6bit", "--head", "int8"][..], &options].concat(),
    );
    assert_eq!((one["layout"].as_str(), one["head"].as_str()), (Some("1.6bit"), Some("int8")));
    assert!(one["layouts"].is_null());
    // The defaults fit a context of 96.
    assert!(done(folder.path(), &["bench", "model", "--repetitions", "1"]).contains("GB/s"));
}

#[test]
fn inspect_shows_the_share_of_each_code() {
    let folder = folder();
    let report = report(folder.path(), &["inspect", "model", "--json"]);
    let tensors = report["projections"].as_array().unwrap();
    assert_eq!(tensors.len(), 14);
    for tensor in tensors {
        let shares = ["minus", "zero", "plus"].map(|code| tensor["ternary"][code].as_f64().unwrap());
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9 && shares[1] > 0.1, "{tensor}");
    }
    assert_eq!(report["parameters"].as_u64(), config().parameters());
    let lines = done(folder.path(), &["inspect", "model"]);
    assert!(lines.contains("model.layers.1.mlp.down_proj") && lines.contains("kernel: "), "{lines}");
    let dense = ModelConfig { quantized: false, ..config() };
    hf::write(&folder.path().join("dense"), &model(&dense, 1), &BTreeMap::new()).unwrap();
    assert!(done(folder.path(), &["inspect", "dense"]).contains("dense f32"));
}

#[test]
fn mistakes_are_told_with_exit_code_1() {
    let folder = folder();
    let path = folder.path();
    fs::write(path.join("empty.txt"), "").unwrap();
    fs::write(path.join("latin.txt"), b"caf\xe9").unwrap();
    fs::write(path.join("odd.u16"), [1, 0, 2]).unwrap();
    fs::write(path.join("big.u16"), [1, 0, 255, 255]).unwrap();
    fs::write(path.join("text.csv"), "a").unwrap();
    let data = |name| ["perplexity", "model", "--data", name];
    for (args, what) in [
        (&["generate", "nowhere", "--prompt", "x"][..], "nowhere/config.json"),
        (&[&PROMPT[..], &["-n", "1000"]].concat(), "1000 new tokens"),
        (&[&PROMPT[..], &["--threads", "0"]].concat(), "0 threads; --threads"),
        (&[&PROMPT[..], &["--threads", "100000"]].concat(), "100000 threads"),
        (&[&PROMPT[..], &["--temperature", "-1"]].concat(), "-1"),
        (&[&PROMPT[..], &["--temperature", "NaN"]].concat(), "NaN"),
        (&[&PROMPT[..], &["--top-p", "1.5"]].concat(), "top-p 1.5"),
        (&["generate", "model", "--prompt", &"cat ".repeat(200)], "do not fit the context"),
        (&["generate", "model"], "--prompt"),
        (&["frobnicate"], "frobnicate"),
        (&["logits", "model", "--ids", "1,300", "--out", "x"], "token id 300"),
        (&["logits", "model", "--ids", "1,x", "--out", "x"], "--ids"),
        (&["logits", "model", "--ids", "1", "--out", "no/such/x"], "no/such/x"),
        (&data("missing.txt"), "missing.txt"),
        (&data("empty.txt"), "empty.txt"),
        (&data("latin.txt"), "byte 3"),
        (&data("odd.u16"), "3 bytes"),
        (&data("big.u16"), "65535"),
        (&data("text.csv"), ".u16"),
        (&["bench"], "--shape"),
        (&["bench", "--shape", "model/tokenizer.json"], "tokenizer.json"),
        (&["bench", "model", "--prompt-tokens", "0"], "prompt-tokens is 0"),
        (&["bench", "model", "--gen-tokens", "1000"], "96"),
    ] {
        let error = refused(path, args);
        assert!(error.contains(what), "{args:?}: {error}");
    }
}

#[test]
fn a_foreign_or_damaged_tokenizer_is_told() {
    let folder = folder();
    let path = folder.path().join("model/tokenizer.json");
    let whole = fs::read(&path).unwrap();
    for len in [0, 1, whole.len() / 2, whole.len() - 3] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(refused(folder.path(), &PROMPT).contains("tokenizer.json"));
    }
    fs::remove_file(&path).unwrap();
    assert!(refused(folder.path(), &PROMPT).contains("tokenizer.json"));
    fs::write(&path, &whole).unwrap();
    let small = ModelConfig { vocab_size: 100, ..config() };
    hf::write(&folder.path().join("model"), &model(&small, 1), &BTreeMap::new()).unwrap();
    assert!(refused(folder.path(), &PROMPT).contains("vocab_size 100"));
}

#[test]
fn an_unknown_kernel_is_told_and_a_known_one_is_named() {
    let folder = folder();
    let run = |kernel| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_infer"));
        command
            .args(["inspect", "model", "--json"])
            .current_dir(folder.path())
            .env("BITLINEAR_KERNEL", kernel);
        command.output().unwrap()
    };
    let output = run("abacus");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("abacus") && text(&output.stderr).contains("scalar"));
    let report: Value = serde_json::from_slice(&run("scalar").stdout).unwrap();
    assert_eq!(report["kernel"], "scalar");
}

#[test]
fn help_and_version_are_no_mistakes() {
    let folder = TempDir::new().unwrap();
    assert!(done(folder.path(), &["--help"]).contains("perplexity"));
    assert!(done(folder.path(), &["generate", "--help"]).contains("--top-p"));
    assert!(done(folder.path(), &["--version"]).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let folder = folder();
    for args in
        [&[&PROMPT[..], &["-n", "80"]].concat()[..], &["inspect", "model"], &["inspect", "model", "--json"]]
    {
        let mut child = Command::new(env!("CARGO_BIN_EXE_infer"))
            .args(args)
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut error = String::new();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert_eq!((child.wait().unwrap().code(), error.as_str()), (Some(0), ""));
    }
}
