//! A folder with a small text and a small config, and the trainer run in it: as a command and as a library.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod source;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use trainer::config::Config;
use trainer::corpus::Grammar;

/// Trains ten thousand parameters for 20 steps on `text.txt`, in milliseconds.
pub const CONFIG: &str = r#"
[run]
threads = 1

[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 2
num_attention_heads = 2

[data]
source = "files"
train = ["text.txt"]
validation_fraction = 0.1
sequence_length = 16
cache_dir = "cache"

[tokenizer]
vocab_size = 300

[train]
steps = 20
batch_size = 2
log_every = 1

[schedule]
warmup_steps = 4

[eval]
every = 0
windows = 8

[checkpoint]
every = 0

[sample]
tokens = 8
"#;

/// A folder with `tiny.toml` and `text.txt`.
pub fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("tiny.toml"), CONFIG).unwrap();
    fs::write(folder.path().join("text.txt"), Grammar::embedded().stories(1, 6_000).join("\n\n")).unwrap();
    folder
}

/// The command `trainer`, to be run in a folder.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.args(args).current_dir(folder);
    command
}

/// Runs a command.
pub fn trainer(folder: &Path, args: &[&str]) -> Output {
    command(folder, args).output().unwrap()
}

/// The arguments that train `tiny.toml` into the folder `out` with some settings changed.
pub fn train<'a>(out: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    ["train", "tiny.toml", "--out", out].into_iter().chain(sets).collect()
}

pub fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs a command that must succeed; returns what it wrote to standard output and standard error.
pub fn done(folder: &Path, args: &[&str]) -> (String, String) {
    let output = trainer(folder, args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    (text(&output.stdout).into(), text(&output.stderr).into())
}

/// Runs a command that must fail by the user's mistake, with nothing on standard output; returns the error's line.
pub fn refused(folder: &Path, args: &[&str]) -> String {
    let output = trainer(folder, args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(text(&output.stdout), "", "{args:?}");
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    let errors: Vec<_> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{args:?}: {stderr}");
    errors[0].into()
}

/// `tiny.toml` with some settings changed, for the library: every path absolute.
pub fn config(folder: &Path, out: &str, sets: &[&str]) -> Config {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let mut config = Config::load(&folder.join("tiny.toml"), &sets).unwrap();
    let absolute = |path: &mut std::path::PathBuf| *path = folder.join(&*path);
    config.run.out = folder.join(out);
    config.data.train.iter_mut().chain(&mut config.data.validation).for_each(absolute);
    absolute(&mut config.data.cache_dir);
    config
}

/// The lines of a run's metrics, without the two figures that differ from run to run.
pub fn metrics(run: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let parse = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let object = line.as_object_mut().unwrap();
        let timed = object.remove("tokens_per_second").is_some();
        assert_eq!(timed, object.remove("peak_memory_bytes").is_some());
        assert_eq!(timed, object["kind"] == "train", "{object:?}");
        line
    };
    lines.lines().map(parse).collect()
}

/// The files of a folder by name.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

/// The names in a folder, in order; none if there is no folder.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The name of a checkpoint's folder.
pub fn checkpoint(step: u64) -> String {
    format!("checkpoints/step-{step:08}")
}

/// Two runs came to the same: weights, moments, codes, state, metrics and samples, bit for bit.
pub fn assert_same_run(a: &Path, b: &Path, step: u64) {
    let (whole, other) = (files(&a.join(checkpoint(step))), files(&b.join(checkpoint(step))));
    for name in ["model.safetensors", "optimizer.safetensors", "codes.safetensors", "state.json"] {
        assert!(whole[name] == other[name], "{name} differs: {} and {}", a.display(), b.display());
    }
    assert_eq!(metrics(a), metrics(b), "{} and {}", a.display(), b.display());
    assert!(files(&a.join("samples")) == files(&b.join("samples")), "samples of {}", b.display());
}

/// Copies a folder.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() { copy(&from, &to) } else { fs::copy(from, to).map(drop).unwrap() }
    }
}
