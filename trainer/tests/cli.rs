//! The command as a user meets it: standard output, standard error, exit status, and what is left on the disk.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::{
    CONFIG, assert_same_run, checkpoint, command, copy, done, files, folder, names, refused, text, train,
    trainer,
};
use serde_json::Value;
use tempfile::TempDir;
use trainer::run_dir::RunDir;

/// Settings of a run of four steps that leaves the checkpoints of steps 1 to 4.
const SHORT: [&str; 4] =
    ["train.steps=4", "schedule.warmup_steps=1", "checkpoint.every=1", "checkpoint.keep=9"];

/// A folder with a finished run in `run`.
fn finished() -> TempDir {
    let folder = folder();
    done(folder.path(), &train("run", &SHORT));
    folder
}

/// Standard output as the one JSON object that it must be.
fn json(folder: &Path, args: &[&str]) -> Value {
    let (stdout, _) = done(folder, args);
    let value: Value = serde_json::from_str(&stdout).unwrap();
    assert!(value.is_object() && stdout.lines().count() == 1, "{stdout}");
    value
}

/// Changes one byte of a file in its middle.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn training_ends_with_a_proven_export() {
    let folder = folder();
    let path = folder.path();
    let (stdout, stderr) = done(path, &train("run", &SHORT));
    for part in [
        "exported to run/export/hf (",
        "step 4\nproven: weights equal, max logit difference ",
        "greedy tokens equal\nvalidation loss ",
        "bits per byte\nnext: ",
    ] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    for part in ["hidden_size = 16", "model: BitNet b1.58, 10096 parameters", "training 4/4 | loss "] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    let run = path.join("run");
    let all = ["checkpoints", "config.toml", "export", "metrics.jsonl", "samples", "tokenizer.json"];
    assert_eq!(names(&run), [&[".lock"][..], &all].concat());
    assert_eq!(names(&run.join("samples")), ["step-00000004.txt"]);
    assert_eq!(names(&run.join("checkpoints")).len(), 4);
    let exported = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"];
    let export = files(&run.join("export/hf"));
    assert!(exported.iter().all(|name| export.contains_key(*name)), "{:?}", export.keys());
    assert!(text(&export["README.md"]).contains("against the trainer's own logits"));

    // Once more: nothing is left to train, the same export is made and proven again.
    copy(&run, &path.join("before"));
    fs::write(run.join("export/hf/stale"), "").unwrap();
    let (again, _) = done(path, &train("run", &SHORT));
    assert_eq!(again, stdout);
    assert_same_run(&path.join("before"), &run, 4);
    assert!(files(&run.join("export/hf")) == export);
    assert_eq!(names(&run.join("export")), ["hf"]);
}

#[test]
fn a_run_and_its_export_are_the_same_model() {
    let folder = finished();
    let path = folder.path();
    let eval = |model| json(path, &["eval", model, "--data", "text.txt", "--json"]);
    let (run, export) = (eval("run"), eval("run/export/hf"));
    assert_eq!(run, export);
    let (loss, perplexity) = (run["loss"].as_f64().unwrap(), run["perplexity"].as_f64().unwrap());
    assert!((loss.exp() / perplexity - 1.0).abs() < 1e-12 && loss > 4.0 && loss < 6.5, "{loss}");
    assert!(run["tokens"].as_u64().unwrap() > 1000 && run["bits_per_byte"].as_f64().unwrap() > 0.0);
    let (stdout, _) = done(path, &["eval", "run", "--data", "text.txt"]);
    assert!(stdout.starts_with(&format!("loss {loss:.4} nats per token\nperplexity ")), "{stdout}");

    let inspect = |model| json(path, &["inspect", model, "--json"]);
    let report = inspect("run");
    assert_eq!(report, inspect("run/export/hf"));
    assert_eq!(report["parameters"], 10096);
    let projections = report["projections"].as_array().unwrap();
    assert_eq!(projections.len(), 14);
    for projection in projections {
        let of = |key: &str| projection["ternary"][key].as_f64().unwrap();
        assert!(of("weight_scale") > 0.0 && (of("minus") + of("zero") + of("plus") - 1.0).abs() < 1e-9);
    }
    let (stdout, _) = done(path, &["inspect", "run"]);
    assert!(stdout.contains("model.layers.1.mlp.down_proj"), "{stdout}");
}

#[test]
fn a_run_of_the_embedded_corpus_ends_with_a_report_on_it() {
    let folder = folder();
    let stories = [
        "data.source=stories",
        "data.train=[]",
        "data.stories_bytes=20000",
        "tokenizer.vocab_size=500",
        "model.num_hidden_layers=1",
        "train.steps=2",
        "schedule.warmup_steps=1",
    ];
    let long = [&stories[..], &["model.max_position_embeddings=600"]].concat();
    let (stdout, _) = done(folder.path(), &train("long", &long));
    for part in ["fresh stories: ", "the corpus's entropy is ", "100 sampled stories: ", "\nnext: "] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    let (stdout, _) = done(folder.path(), &train("short", &stories));
    assert!(stdout.contains("the context is too short to judge whole stories"), "{stdout}");
}

#[test]
fn export_takes_the_checkpoint_named_and_refuses_a_folder_in_use() {
    let folder = finished();
    let path = folder.path();
    let export = |out, step| json(path, &["export", "run", "--out", out, "--step", step, "--json"]);
    let (second, latest) = (export("second", "2"), export("latest", "latest"));
    assert_eq!((&second["step"], &latest["step"]), (&2.into(), &4.into()));
    assert!(second["parity"]["max_difference"].as_f64().unwrap() <= 1e-3);
    let weights = |folder: &str| fs::read(path.join(folder).join("model.safetensors")).unwrap();
    assert!(weights("latest") == weights("run/export/hf") && weights("latest") != weights("second"));

    let before = files(&path.join("second"));
    let error = refused(path, &["export", "run", "--out", "second"]);
    assert!(error.contains("not empty; second; choose another --out"), "{error}");
    assert!(files(&path.join("second")) == before);
    for (args, part) in [
        (&["run", "--out", "new", "--step", "3000"][..], "step 3000"),
        (&["run", "--out", "new", "--step", "last"], "give best, latest or a number"),
        (&["run", "--out", "text.txt"], "text.txt; choose another --out"),
        (&["run", "--out", "text.txt/new"], "text.txt"),
        (&["second", "--out", "new"], "second/config.toml"),
        (&["nothing", "--out", "new"], "nothing/config.toml"),
    ] {
        let error = refused(path, &[&["export"], args].concat());
        assert!(error.contains(part), "{error}");
        assert!(!path.join("new").exists());
    }
    fs::create_dir(path.join("empty")).unwrap();
    let (stdout, _) = done(path, &["export", "run", "--out", "empty"]);
    assert!(stdout.contains("exported to empty (") && stdout.contains("\nproven: "), "{stdout}");
}

#[test]
fn a_tokenizer_trained_apart_is_the_one_that_a_run_trains() {
    let folder = finished();
    let path = folder.path();
    let args = ["tokenizer", "--data", "text.txt", "--vocab-size", "280", "--out", "tokenizer.json"];
    let (stdout, _) = done(path, &args);
    assert!(stdout.starts_with("tokenizer.json: 280 entries; the text is "), "{stdout}");
    let used = ["tokenizer.vocab_size=280", "tokenizer.file=tokenizer.json", "train.steps=4"];
    let (_, stderr) = done(path, &train("used", &used));
    assert!(stderr.contains("vocabulary 280"), "{stderr}");
    assert_eq!(
        fs::read(path.join("used/tokenizer.json")).unwrap(),
        fs::read(path.join("tokenizer.json")).unwrap()
    );
    for (args, part) in [
        (["text.txt", "--vocab-size", "256", "--out", "new.json"], "ask for 257"),
        (["text.txt", "--vocab-size", "90000", "--out", "new.json"], "give more text"),
        (["absent", "--vocab-size", "280", "--out", "new.json"], "no such file or folder; absent"),
        (["text.txt", "--vocab-size", "280", "--out", "text.txt/new.json"], "text.txt/new.json"),
    ] {
        let error = refused(path, &[&["tokenizer", "--data"], &args[..]].concat());
        assert!(error.contains(part), "{error}");
        assert!(!path.join("new.json").exists());
    }
}

#[test]
fn a_dry_run_makes_no_run() {
    let folder = folder();
    let (stdout, stderr) = done(folder.path(), &[&train("run", &[])[..], &["--dry-run"]].concat());
    assert_eq!(stdout, "");
    assert!(stderr.contains("training: 20 steps of 32 tokens"), "{stderr}");
    // Tokenized text is kept for the run to come.
    assert_eq!(names(folder.path()), ["cache", "text.txt", "tiny.toml"]);
    refused(folder.path(), &[&train("run", &["data.train=absent.txt"])[..], &["--dry-run"]].concat());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = finished();
    let export = ["export", "run", "--out", "exported"];
    let tokenizer = ["tokenizer", "--data", "text.txt", "--vocab-size", "280", "--out", "t.json"];
    let eval = ["eval", "run", "--data", "text.txt", "--json"];
    let train = train("run", &SHORT);
    for args in [&["inspect", "run"][..], &eval, &export, &tokenizer, &train, &["--help"]] {
        let mut command = command(folder.path(), args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
        assert!(!stderr.contains("error") && !stderr.contains("panicked"), "{args:?}: {stderr}");
    }
}

#[test]
fn a_wrong_command_line_is_the_users_mistake() {
    let folder = folder();
    for args in [
        &["train"][..],
        &["trian", "tiny.toml"],
        &["train", "tiny.toml", "--steps", "3"],
        &["export", "run", "--out", "x", "--format", "onnx"],
        &[],
    ] {
        let output = trainer(folder.path(), args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    let (stdout, stderr) = done(folder.path(), &["--version"]);
    assert!(stdout.starts_with("trainer ") && stderr.is_empty());
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let folder = finished();
    let path = folder.path();
    let before = files(&path.join("run").join(checkpoint(4)));
    let held = RunDir::open(&path.join("run")).unwrap();
    let error = refused(path, &train("run", &SHORT));
    assert!(error.contains(&format!("process {}", std::process::id())) && error.contains("run;"), "{error}");
    // Reading needs no lock.
    done(path, &["inspect", "run"]);
    drop(held);
    done(path, &train("run", &SHORT));
    assert!(files(&path.join("run").join(checkpoint(4))) == before);
}

#[test]
fn resume_does_what_it_is_told() {
    let folder = folder();
    let path = folder.path();
    fn with<'a>(resume: &[&'a str]) -> Vec<&'a str> {
        [&["train", "tiny.toml"], resume].concat()
    }
    for (args, part) in [
        (with(&["--resume", "absent"]), "no run folder, it has no config.toml; absent;"),
        (with(&["--resume", "one", "--out", "two"]), "name two folders"),
    ] {
        let error = refused(path, &args);
        assert!(error.contains(part), "{error}");
        assert!(names(path).iter().all(|name| ["cache", "text.txt", "tiny.toml"].contains(&name.as_str())));
    }
    done(path, &with(&["--resume", "never", "--out", "run"]));
    let before = files(&path.join("run").join(checkpoint(20)));
    let error = refused(path, &with(&["--resume", "never", "--out", "run"]));
    assert!(error.contains("not empty; run; continue that run with --resume auto"), "{error}");
    fs::remove_dir_all(path.join("run").join(checkpoint(20))).unwrap();
    let (stdout, _) = done(path, &with(&["--resume", "run"]));
    assert!(stdout.contains("exported to run/export/hf"), "{stdout}");
    assert!(files(&path.join("run").join(checkpoint(20))) == before);
    assert!(!path.join("runs").exists());

    // A folder with someone's files in it is never trained into.
    fs::create_dir(path.join("thesis")).unwrap();
    fs::write(path.join("thesis/thesis.tex"), "x").unwrap();
    let error = refused(path, &with(&["--out", "thesis"]));
    assert!(error.contains("not empty; thesis;"), "{error}");
    assert_eq!(names(&path.join("thesis")), ["thesis.tex"]);
}

#[test]
fn a_run_goes_on_only_with_its_own_settings_and_data() {
    let folder = finished();
    let path = folder.path();
    let stopped = path.join("run").join(checkpoint(4));
    let whole = files(&stopped);
    fs::remove_dir_all(&stopped).unwrap();
    for (set, then) in [
        ("optimizer.learning_rate=1e-2", "0.004 then, 0.01 now"),
        ("model.hidden_size=32", "16 then, 32 now"),
        ("run.seed=5", "1234 then, 5 now"),
        ("train.steps=5", "4 then, 5 now"),
        ("model.sub_norm=false", "true then, false now"),
        ("data.sequence_length=8", "16 then, 8 now"),
    ] {
        let error = refused(path, &train("run", &[&SHORT[..], &[set]].concat()));
        let (key, _) = set.split_once('=').unwrap();
        assert!(
            error.contains(key) && error.contains(then) && error.contains("; run; use another --out"),
            "{error}"
        );
    }
    let original = fs::read_to_string(path.join("text.txt")).unwrap();
    fs::write(path.join("text.txt"), original.replacen("the ", "The ", 1)).unwrap();
    let error = refused(path, &train("run", &SHORT));
    // The tokenizer is trained on the text, and so changes with it.
    assert!(error.contains("changed since this run started; run; "), "{error}");
    fs::write(path.join("text.txt"), &original).unwrap();
    let args = ["tokenizer", "--data", "text.txt", "--vocab-size", "299", "--out", "other.json"];
    done(path, &args);
    let other = ["tokenizer.file=other.json", "model.vocab_size=300"];
    let error = refused(path, &train("run", &[&SHORT[..], &other].concat()));
    assert!(error.contains("model.vocab_size") || error.contains("the tokenizer changed"), "{error}");
    assert!(!stopped.exists(), "a refused run trained");

    // What changes neither weights nor their order is free, and the text may move.
    fs::rename(path.join("text.txt"), path.join("moved.txt")).unwrap();
    let free =
        ["data.train=moved.txt", "run.threads=2", "train.log_every=3", "sample.tokens=3", "run.export=false"];
    let (stdout, _) = done(path, &train("run", &[&SHORT[..], &free].concat()));
    assert_eq!(stdout, "");
    for name in ["model.safetensors", "optimizer.safetensors", "codes.safetensors", "state.json"] {
        assert!(files(&stopped)[name] == whole[name], "{name}");
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let folder = finished();
    let path = folder.path();
    let names = [
        "model.safetensors",
        "optimizer.safetensors",
        "codes.safetensors",
        "state.json",
        "config.toml",
        "manifest.json",
    ];
    for name in names {
        let run = path.join(name);
        copy(&path.join("run"), &run);
        flip(&run.join(checkpoint(4)).join(name));
        for args in [&["inspect", name][..], &["export", name, "--out", "e", "--step", "latest", "--json"]] {
            let output = trainer(path, args);
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "{said}");
            assert!(
                said.contains("warning: checkpoint passed over") && said.contains("step-00000004"),
                "{said}"
            );
        }
        assert!(fs::read_to_string(path.join("e/README.md")).unwrap().contains("for 3 steps"));
        fs::remove_dir_all(path.join("e")).unwrap();
        let error = refused(path, &["export", name, "--out", "e", "--step", "4"]);
        assert!(error.contains("step-00000004"), "{error}");
        let (_, said) = done(path, &train(name, &SHORT));
        assert!(
            said.contains("warning: checkpoint passed over: ") && said.contains("resuming from "),
            "{said}"
        );
        assert!(said.contains("step-00000003\n"), "{said}");
        assert_same_run(&path.join("run"), &run, 4);
    }
    // Without one whole checkpoint nothing is overwritten.
    for step in 1..=4 {
        flip(&path.join("run").join(checkpoint(step)).join("model.safetensors"));
    }
    let error = refused(path, &train("run", &SHORT));
    assert!(error.contains("no checkpoint can be used") && error.contains("use another --out"), "{error}");
    for args in
        [&["inspect", "run"][..], &["export", "run", "--out", "e"], &["eval", "run", "--data", "text.txt"]]
    {
        let error = refused(path, args);
        assert!(error.contains("no checkpoint of any step is whole; run"), "{error}");
    }
}

#[test]
fn an_output_that_cannot_be_written_is_a_clear_error() {
    let folder = folder();
    for out in ["text.txt", "text.txt/run"] {
        let error = refused(folder.path(), &train(out, &[]));
        assert!(error.contains("cannot make the run folder; text.txt"), "{error}");
    }
    let error = refused(folder.path(), &train("run", &["data.cache_dir=text.txt/cache"]));
    assert!(error.contains("text.txt/cache"), "{error}");
    assert!(!folder.path().join("run").exists());
}

#[test]
fn bad_data_is_refused_and_blocks_nothing() {
    let folder = folder();
    let path = folder.path();
    for (name, bytes) in [
        ("empty.txt", &b""[..]),
        ("one.txt", b"a"),
        ("latin1.txt", b"caf\xe9 au lait"),
        ("one.u16", b"\x01\x00"),
        ("odd.u16", b"\x01\x00\x02"),
        ("large.u16", &[0xff; 400]),
        ("broken.jsonl", b"{\"text\": \"a\"}\n{\"text\": "),
        ("foreign.jsonl", b"{\"body\": \"a\"}\n"),
        ("data.csv", b"a,b\n"),
    ] {
        fs::write(path.join(name), bytes).unwrap();
    }
    fs::create_dir(path.join("folder")).unwrap();
    let files = [
        ("absent.txt", "no such file or folder; absent.txt"),
        ("empty.txt", "empty.txt; give data that is not empty"),
        ("one.txt", "give more text"),
        ("latin1.txt", "not UTF-8; latin1.txt at byte 3"),
        ("one.u16", "1 tokens, but one window needs 17"),
        ("odd.u16", "odd.u16; the file is cut short"),
        ("large.u16", "token 65535 is outside the vocabulary of 300"),
        ("broken.jsonl", "bad JSON"),
        ("foreign.jsonl", "no field `text`; foreign.jsonl line 1"),
        ("data.csv", "data.csv; give a .txt"),
        ("folder", "folder"),
        ("[]", "name files or folders"),
    ];
    for (name, part) in files {
        for key in ["data.train", "data.validation"] {
            if (key, name) == ("data.validation", "[]") {
                continue; // the held-out end of the training text
            }
            let error = refused(path, &train("run", &[&format!("{key}={name}")]));
            let mixed = error.contains("one kind only") && name.ends_with(".u16");
            let short = error.contains("but one window needs 17") && name == "one.txt";
            assert!(
                error.contains(part) || key == "data.validation" && (mixed || short),
                "{key}={name}: {error}"
            );
            assert!(!path.join("run").exists(), "{name}");
        }
    }
    // Text shorter than one window, held out or not.
    fs::write(path.join("short.txt"), "a few words only, but enough of them to train a tokenizer").unwrap();
    let error = refused(path, &train("run", &["data.train=short.txt", "tokenizer.vocab_size=258"]));
    assert!(error.contains("but one window needs 17"), "{error}");
    done(path, &train("run", &SHORT));
}

#[test]
fn bad_settings_are_refused_and_block_nothing() {
    let folder = folder();
    let path = folder.path();
    for (set, part) in [
        ("run.threads=0", "`run.threads` = 0 is out of range"),
        ("train.stpes=3", "unknown key `train.stpes`; --set train.stpes=3; did you mean `train.steps`?"),
        ("modle.hidden_size=16", "unknown key `modle`; --set modle.hidden_size=16; did you mean `model`?"),
        ("train.steps=many", "bad value for `train.steps`"),
        ("train.steps=-1", "bad value for `train.steps`"),
        ("train.steps=0", "`train.steps` = 0 is out of range"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate"),
        ("model.hidden_act=gelu", "model.hidden_act"),
        ("train.steps", "it has no `=`"),
        ("model.num_attention_heads=3", "`model.hidden_size` = 16 is not divisible by"),
        ("model.num_attention_heads=16", "heads of even width"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads"),
        ("model.intermediate_size=30", "packing group of ternary rows = 4"),
        ("model.vocab_size=400", "contradicts `tokenizer.vocab_size` = 300"),
        ("model.max_position_embeddings=8", "data.sequence_length"),
        ("sample.tokens=17", "sample.tokens"),
        ("data.separator=<none>", "no token `<none>`"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size"),
        ("tokenizer.vocab_size=100000", "give more text"),
        ("checkpoint.keep=0", "checkpoint.keep"),
    ] {
        let error = refused(path, &train("run", &[set]));
        assert!(error.contains(part), "{set}: {error}");
        assert!(!path.join("run").exists(), "{set}");
    }
    for (bytes, part) in [
        (&b"[train]\nsteps = \n"[..], "not TOML"),
        (b"[train]\nsteps = 'x'\n", "bad value for `train.steps`"),
        (b"[trian]\nsteps = 1\n", "unknown key `trian`; bad.toml; did you mean `train`?"),
        (b"train = 3\n", "bad value for `train`"),
        (b"\xff\xfe", "not UTF-8; bad.toml at byte 0"),
        (&[b' '; 2 << 20], "longer than"),
    ] {
        fs::write(path.join("bad.toml"), bytes).unwrap();
        let error = refused(path, &["train", "bad.toml", "--out", "run"]);
        assert!(error.contains(part), "{error}");
    }
    let error = refused(path, &["train", "absent.toml"]);
    assert!(error.contains("cannot read the config; absent.toml"), "{error}");
    // Read as a config, a folder is a mistake too.
    fs::create_dir(path.join("folder")).unwrap();
    refused(path, &["train", "folder"]);
    fs::write(path.join("tiny.toml"), CONFIG).unwrap();
    done(path, &train("run", &SHORT));
}

#[test]
fn bad_tokenizers_are_refused_and_block_nothing() {
    let folder = finished();
    let path = folder.path();
    let whole = fs::read(path.join("run/tokenizer.json")).unwrap();
    for at in [0, 1, 100, 500, whole.len() / 2, whole.len() - 2] {
        fs::write(path.join("cut.json"), &whole[..at]).unwrap();
        let error = refused(path, &train("new", &["tokenizer.file=cut.json"]));
        assert!(
            error.contains("not a readable tokenizer") && error.contains("cut.json"),
            "cut at {at}: {error}"
        );
    }
    for foreign in
        ["{}", "{\"a\": 1}", "[]", "hello", "{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\"}}"]
    {
        fs::write(path.join("foreign.json"), foreign).unwrap();
        let error = refused(path, &train("new", &["tokenizer.file=foreign.json"]));
        assert!(error.contains("foreign.json"), "{foreign}: {error}");
    }
    let error = refused(path, &train("new", &["tokenizer.file=absent.json"]));
    assert!(error.contains("absent.json"), "{error}");
    let smaller = ["tokenizer.file=run/tokenizer.json", "tokenizer.vocab_size=290"];
    let error = refused(path, &train("new", &smaller));
    assert!(error.contains("the tokenizer has 300 entries, the model 290"), "{error}");
    assert!(!path.join("new").exists());
    done(path, &train("new", &[&SHORT[..], &["tokenizer.file=run/tokenizer.json"]].concat()));
    assert_same_run(&path.join("run"), &path.join("new"), 4);
}

#[test]
fn bad_models_are_refused() {
    let folder = finished();
    let path = folder.path();
    let model = path.join("run/export/hf");
    let damage = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let bad = path.join("bad");
        copy(&model, &bad);
        let mut bytes = fs::read(bad.join(name)).unwrap();
        change(&mut bytes);
        fs::write(bad.join(name), bytes).unwrap();
        let eval = ["eval", "bad", "--data", "text.txt", "--json"];
        let error = refused(path, &eval);
        assert!(error.contains(name), "{name}: {error}");
    };
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        damage(name, &|bytes| bytes.truncate(bytes.len() - 7));
        damage(name, &|bytes| bytes.truncate(100));
        damage(name, &|bytes| bytes.clear());
        damage(name, &|bytes| *bytes = b"hello, this is no model".to_vec());
        damage(name, &|bytes| *bytes = b"{}".to_vec());
    }
    for args in
        [&["eval", "nothing", "--data", "text.txt"][..], &["inspect", "nothing"], &["inspect", "text.txt"]]
    {
        let error = refused(path, args);
        assert!(error.contains("config.json"), "{error}");
    }
    let error = refused(path, &["eval", "run", "--data", "absent.txt"]);
    assert!(error.contains("no such file or folder; absent.txt"), "{error}");
}

#[test]
fn bench_measures_a_shape_without_data() {
    let folder = folder();
    let path = folder.path();
    fs::remove_file(path.join("text.txt")).unwrap();
    let (stdout, _) = done(path, &["bench", "tiny.toml", "--repetitions", "2"]);
    for part in ["tokens/s", "steps of 32 tokens", "forward", "backward", "optimizer", "dense products in "] {
        assert!(stdout.contains(part), "{part}: {stdout}");
    }
    for precision in ["fast", "f32"] {
        let set = format!("train.precision={precision}");
        let report = json(path, &["bench", "tiny.toml", "--json", "--repetitions", "1", "--set", &set]);
        assert!(report["tokens_per_second"]["median"].as_f64().unwrap() > 0.0);
        assert!(report["seconds"]["backward"].as_f64().unwrap() > 0.0, "{report}");
        assert_eq!(report["tokens_per_step"], 32);
    }
    assert!(refused(path, &["bench", "tiny.toml", "--repetitions", "0"]).contains("at least 1"));
    assert_eq!(names(path), ["tiny.toml"], "nothing is left behind");
}

/// A model of 4 M parameters: what it takes is not lost in what the process takes.
#[test]
#[cfg(target_os = "linux")]
fn the_estimate_of_memory_is_close_and_a_run_that_cannot_fit_is_refused() {
    let folder = folder();
    let path = folder.path();
    let shape = ["model.hidden_size=256", "model.intermediate_size=512", "data.sequence_length=128"];
    for extra in
        [["train.batch_size=16", "train.recompute=none"], ["train.batch_size=16", "train.recompute=block"]]
    {
        let sets: Vec<_> = shape.iter().chain(&extra).flat_map(|set| ["--set", *set]).collect();
        let report =
            json(path, &[&["bench", "tiny.toml", "--json", "--repetitions", "1"], &sets[..]].concat());
        let peak = report["peak_memory_bytes"].as_f64().unwrap();
        let (_, stderr) = done(path, &[&["train", "tiny.toml", "--dry-run"], &sets[..]].concat());
        let line = stderr.lines().find(|line| line.starts_with("memory: about ")).unwrap();
        let estimate = line.split(' ').nth(2).unwrap().parse::<f64>().unwrap() * f64::from(1 << 20);
        assert!((0.7..1.5).contains(&(estimate / peak)), "estimated {estimate}, measured {peak}");
    }
    for command in ["train", "bench"] {
        // Half a terabyte of parameters alone, with their optimizer.
        let sets = ["--set", "model.hidden_size=65536", "--set", "model.intermediate_size=65536"];
        let message = refused(path, &[&[command, "tiny.toml"], &sets[..]].concat());
        assert!(
            message.contains("training needs about ") && message.contains("train.recompute"),
            "{message}"
        );
    }
    assert!(!path.join("runs").exists(), "nothing was started");
}
