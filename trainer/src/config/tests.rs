use super::load::KNOWN_KEYS;
use super::*;
use proptest::prelude::*;
use std::{collections::BTreeMap, path::Path};

const FILE: &str = "recipes/tiny.toml";

fn parse(text: &str, sets: &[&str]) -> Result<Config, ConfigError> {
    let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
    Config::parse(text, Path::new(FILE), &sets)
}

fn set(sets: &[&str]) -> Result<Config, ConfigError> {
    parse("", sets)
}

/// The key an error is about.
fn key_of(error: &ConfigError) -> &str {
    match error {
        ConfigError::UnknownKey { key, .. } | ConfigError::IllTyped { key, .. } => key,
        ConfigError::OutOfRange { key, .. }
        | ConfigError::NotDivisible { key, .. }
        | ConfigError::Conflict { key, .. } => key,
        _ => "",
    }
}

/// The default of every key as a TOML value; absent optional ones are missing.
fn defaults() -> BTreeMap<String, toml::Value> {
    let sections = toml::Table::try_from(Config::default()).unwrap();
    let keys = |(section, keys): (String, toml::Value)| {
        let toml::Value::Table(keys) = keys else { panic!("{section} is not a table") };
        keys.into_iter().map(move |(key, value)| (format!("{section}.{key}"), value))
    };
    sections.into_iter().flat_map(keys).collect()
}

#[test]
fn defaults_are_resolved_and_valid() {
    let config = set(&[]).unwrap();
    assert_eq!(config.run.name, "tiny");
    assert_eq!(config.run.out, Path::new("runs/tiny"));
    assert_eq!(config.model.num_key_value_heads, Some(4));
    assert_eq!(config.model.max_position_embeddings, Some(256));
    assert_eq!(config.model.vocab_size, None);
    assert_eq!(config.tokens_per_step(), 4096);
    assert_eq!(config.tokenizer.trained_size(), 4096);
    assert_eq!(config.model.head_dim(), 64);
}

#[test]
fn a_model_to_start_from_brings_what_is_not_asked_for() {
    let config = set(&["init.from=m"]).unwrap();
    assert_eq!(config.model.num_key_value_heads, None);
    assert_eq!(config.model.max_position_embeddings, None);
    assert_eq!(config.max_positions(), 256);
    let config = set(&["init.from=m", "model.num_key_value_heads=2"]).unwrap();
    assert_eq!(config.model.num_key_value_heads, Some(2));
}

#[test]
fn each_layer_covers_the_one_before() {
    let text = "[train]\nsteps = 90\nbatch_size = 2\n[model]\nquantization = \"none\"\nhidden_act = 'relu2'";
    let config = parse(text, &["train.steps=77", " train.steps = 80 ", "optimizer.learning_rate=1"]).unwrap();
    assert_eq!((config.train.steps, config.train.batch_size, config.train.log_every), (80, 2, 10));
    assert_eq!(config.optimizer.learning_rate, 1.0);
    assert_eq!(config.model.quantization, Quantization::None);
    assert_eq!(config.model.hidden_act, HiddenAct::Relu2);
}

#[test]
fn overrides_need_no_quotes_and_no_brackets() {
    let config = set(&[
        "run.name=2026-01-01",
        "data.source=files",
        "data.train=../a b.txt",
        "data.validation=[\"x\", \"y\"]",
        "data.separator=7",
        "sample.prompts=Once upon a = b",
        "run.threads=3",
    ])
    .unwrap();
    assert_eq!(config.run.name, "2026-01-01");
    assert_eq!(config.data.train, [Path::new("../a b.txt")]);
    assert_eq!(config.data.validation, [Path::new("x"), Path::new("y")]);
    assert_eq!(config.data.separator.as_deref(), Some("7"));
    assert_eq!(config.sample.prompts, ["Once upon a = b"]);
    assert_eq!(config.run.threads, Some(3));
}

#[test]
fn malformed_overrides_are_refused() {
    for bad in ["train.steps", "=3", "data.train=[a, b]", "run={name = \"x\"}", "model=3"] {
        let error = set(&[bad]).unwrap_err();
        assert!(matches!(error, ConfigError::MalformedSet { .. }), "{bad}: {error}");
        assert!(error.to_string().contains(bad), "{error}");
    }
    // A line break must not bring in a second key; the text is then no number.
    let error = set(&["train.steps=5\nvalue2 = 1"]).unwrap_err();
    assert_eq!(key_of(&error), "train.steps");
}

#[test]
fn unknown_keys_name_the_nearest_known_one() {
    let cases = [
        ("model.hiden_size", "model.hidden_size"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("hidden_size", "model.hidden_size"),
        ("checkpoint.evry", "checkpoint.every"),
        ("model.num_key_heads", "model.num_key_value_heads"),
        ("schedule.stage_two_start.x", "schedule.stage_two_start"),
        ("eval.batchsize", "eval.batch_size"),
    ];
    for (given, expected) in cases {
        let error = set(&[&format!("{given}=3")]).unwrap_err();
        let ConfigError::UnknownKey { key, nearest, origin } = &error else { panic!("{given}: {error}") };
        assert_eq!((key.as_str(), nearest.as_str()), (given, expected));
        assert_eq!(*origin, Origin::Set(format!("{given}=3")));
    }
    let error = set(&["modle.hidden_size=8"]).unwrap_err();
    let expected = "unknown key `modle`; --set modle.hidden_size=8; did you mean `model`?";
    assert_eq!(error.to_string(), expected);
    let error = parse("[modle]\nhidden_size = 8", &[]).unwrap_err();
    assert_eq!(error.to_string(), format!("unknown key `modle`; {FILE}; did you mean `model`?"));
    let error = parse("[model]\nhiden_size = 8", &[]).unwrap_err();
    let expected = format!("unknown key `model.hiden_size`; {FILE}; did you mean `model.hidden_size`?");
    assert_eq!(error.to_string(), expected);
}

#[test]
fn ill_typed_values_name_key_origin_and_both_types() {
    let cases = [
        ("[model]\nhidden_size = \"big\"", "model.hidden_size", &["\"big\"", "whole number"][..]),
        ("[model]\nhidden_size = -4", "model.hidden_size", &["-4", "whole number"]),
        ("[model]\nhidden_size = 4.0", "model.hidden_size", &["4.0", "whole number"]),
        ("[model.hidden_size]\nx = 1", "model.hidden_size", &["map", "whole number"]),
        ("[model]\nsub_norm = 1", "model.sub_norm", &["1", "boolean"]),
        ("[model]\nhidden_act = \"gelu\"", "model.hidden_act", &["gelu", "silu", "relu2"]),
        ("[optimizer]\nbeta1 = true", "optimizer.beta1", &["true", "a number"]),
        ("[data]\ntrain = \"a.txt\"", "data.train", &["a.txt", "a list"]),
        ("[data]\ntrain = [1]", "data.train", &["1", "a path"]),
        ("[sample]\nprompts = [1]", "sample.prompts", &["1", "a string"]),
        ("model = 3", "model", &["integer", "[model]"]),
        ("[[model]]\nhidden_size = 4", "model", &["array", "[model]"]),
    ];
    for (text, key, words) in cases {
        let error = parse(text, &[]).unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, ConfigError::IllTyped { .. }), "{text}: {message}");
        assert_eq!(key_of(&error), key);
        assert!(message.contains(FILE), "{message}");
        assert!(!message.contains("usize") && !message.contains('\n'), "{message}");
        words.iter().for_each(|word| assert!(message.contains(word), "{word} not in {message}"));
    }
    let message = set(&["train.steps=many"]).unwrap_err().to_string();
    assert!(message.contains("--set train.steps=many") && message.contains("train.steps"), "{message}");
}

#[test]
fn syntax_errors_name_file_and_line() {
    let error = parse("[model]\n\nhidden_size = = 4", &[]).unwrap_err();
    assert!(matches!(error, ConfigError::Syntax { line: 3, .. }), "{error}");
    assert!(error.to_string().contains(FILE));
    let error = parse("[train]\nsteps = 1\nsteps = 2", &[]).unwrap_err();
    assert!(matches!(error, ConfigError::Syntax { line: 3, .. }), "{error}");
}

#[test]
fn every_number_has_bounds() {
    for (key, value) in defaults() {
        let bad: &[&str] = match value {
            toml::Value::Float(_) => &["nan", "inf", "-inf", "-0.5", "1e300"],
            // Seeds may take any value that TOML can hold.
            toml::Value::Integer(_) if key.ends_with("seed") => &["-1"],
            toml::Value::Integer(_) => &["-1", "9223372036854775807"],
            _ => continue,
        };
        for bad in bad {
            let error = set(&[&format!("{key}={bad}")]).expect_err(&format!("{key}={bad}"));
            assert_eq!(key_of(&error), key, "{error}");
        }
    }
}

#[test]
fn cross_checks_name_the_key_at_fault() {
    let cases: &[(&str, &[&str])] = &[
        ("run.threads", &["run.threads=0"]),
        ("run.name", &["run.name=../up"]),
        ("run.name", &["run.name=.."]),
        ("run.name", &["run.name=a/"]),
        ("model.hidden_size", &["model.hidden_size=250"]),
        ("model.hidden_size", &["model.hidden_size=0"]),
        ("model.hidden_size", &["model.hidden_size=12"]),
        ("model.hidden_size", &["model.hidden_size=10", "model.num_attention_heads=1"]),
        ("model.intermediate_size", &["model.intermediate_size=690"]),
        ("model.num_attention_heads", &["model.num_attention_heads=0"]),
        ("model.num_attention_heads", &["model.num_key_value_heads=3"]),
        ("model.num_attention_heads", &["model.num_key_value_heads=8"]),
        ("model.num_key_value_heads", &["model.num_key_value_heads=0"]),
        ("model.num_key_value_heads", &["model.hidden_size=24", "model.num_key_value_heads=1"]),
        ("model.max_position_embeddings", &["model.max_position_embeddings=255"]),
        ("model.vocab_size", &["model.vocab_size=0"]),
        ("model.vocab_size", &["model.vocab_size=300", "tokenizer.vocab_size=400"]),
        ("model.rms_norm_eps", &["model.rms_norm_eps=0.0"]),
        ("tokenizer.vocab_size", &["tokenizer.vocab_size=256"]),
        ("tokenizer.file", &["tokenizer.file="]),
        ("data.train", &["data.source=files"]),
        ("data.train", &["data.train=a.txt"]),
        ("data.validation", &["data.validation=a.txt"]),
        ("data.separator", &["data.separator="]),
        ("data.validation_fraction", &["data.validation_fraction=0.0"]),
        ("data.sequence_length", &["data.sequence_length=1"]),
        ("train.steps", &["train.steps=0"]),
        ("train.batch_size", &["train.batch_size=0"]),
        ("train.gradient_accumulation", &["train.gradient_accumulation=0"]),
        ("optimizer.learning_rate", &["optimizer.learning_rate=0"]),
        ("optimizer.beta2", &["optimizer.beta2=1"]),
        ("schedule.warmup_steps", &["train.steps=49"]),
        ("schedule.stage_two_start", &["schedule.stage_two_start=1.0"]),
        ("quantization.warmup_fraction", &["quantization.warmup_fraction=0"]),
        ("eval.batch_size", &["eval.batch_size=0"]),
        ("checkpoint.keep", &["checkpoint.keep=0"]),
        ("sample.tokens", &["sample.tokens=257"]),
        ("sample.top_p", &["sample.top_p=0"]),
        ("init.from", &["init.from="]),
        ("distill.teacher", &["distill.teacher=init"]),
        ("distill.teacher", &["data.source=teacher"]),
        ("distill.logits", &["distill.teacher=t", "distill.cross_entropy=0", "distill.logits=0"]),
        ("distill.cross_entropy", &["distill.cross_entropy=-1"]),
        ("distill.logits", &["distill.logits=1e7"]),
        ("distill.temperature", &["distill.temperature=0.05"]),
        ("distill.relations", &["distill.relations=-0.5"]),
        ("distill.relation_layer", &["distill.relation_layer=6"]),
        ("distill.relation_heads", &["distill.relation_heads=0"]),
        ("distill.relation_temperature", &["distill.relation_temperature=0"]),
        ("train.precision", &["distill.teacher=t", "train.precision=f32"]),
        ("data.train", &["distill.teacher=t", "data.source=teacher", "data.train=a.txt"]),
        ("data.teacher_tokens", &["data.teacher_tokens=999"]),
        ("data.teacher_temperature", &["data.teacher_temperature=0"]),
        ("data.train", &["init.from=m", "data.source=chat"]),
        ("init.from", &["data.source=chat", "data.train=a.jsonl"]),
        (
            "train.precision",
            &["init.from=m", "data.source=chat", "data.train=a.jsonl", "train.precision=f32"],
        ),
    ];
    for (key, sets) in cases {
        let error = set(sets).expect_err(&sets.join(" "));
        assert_eq!(key_of(&error), *key, "{error}");
        assert!(KNOWN_KEYS.contains(&key.to_string()), "{key}");
        assert_eq!(error.to_string().matches("; ").count(), 2, "what; where; what to do: {error}");
    }
}

#[test]
fn what_lies_on_a_bound_is_allowed() {
    let allowed: &[&[&str]] = &[
        &["train.steps=50"],
        &["schedule.warmup_steps=0", "train.steps=1"],
        &["run.seed=9223372036854775807"],
        &["model.hidden_size=250", "model.num_attention_heads=5", "model.quantization=none"],
        &["model.num_key_value_heads=1"],
        &["train.gradient_clip=0", "eval.every=0", "eval.windows=0", "sample.temperature=0"],
        &["sample.tokens=256", "model.max_position_embeddings=256"],
        &["model.vocab_size=300", "tokenizer.vocab_size=300"],
        &["tokenizer.file=t.json", "tokenizer.vocab_size=100"],
        &["init.from=m", "distill.teacher=init", "distill.temperature=0.1"],
        &["distill.teacher=t", "distill.cross_entropy=0", "distill.logits=0", "distill.relations=1"],
        &["distill.relation_layer=5"],
        &[
            "distill.teacher=t",
            "data.source=teacher",
            "data.validation=a.txt",
            "data.teacher_temperature=100",
        ],
        &["init.from=m", "data.source=chat", "data.train=a.jsonl"],
        // What the model to start from says is not known yet.
        &["init.from=m", "distill.relation_layer=20", "sample.tokens=400"],
    ];
    for sets in allowed {
        set(sets).unwrap_or_else(|error| panic!("{sets:?}: {error}"));
    }
}

#[test]
fn messages_carry_the_values() {
    let message = set(&["model.hidden_size=250"]).unwrap_err().to_string();
    let expected = "`model.hidden_size` = 250 is not divisible by `model.num_attention_heads` = 4; \
                    [model]; change one of the two";
    assert_eq!(message, expected);
    let message = set(&["run.threads=0"]).unwrap_err().to_string();
    assert_eq!(message, "`run.threads` = 0 is out of range; [run]; give at least 1 and at most 4096");
    let message = set(&["train.steps=9"]).unwrap_err().to_string();
    assert!(message.contains("= 50 contradicts `train.steps` = 9"), "{message}");
}

#[test]
fn the_resolved_config_loads_as_itself() {
    let sets = [
        "data.source=files",
        "data.train=[\"a \\\"quoted\\\".txt\", \"b\\n.txt\"]",
        "data.separator=<|end|>",
        "tokenizer.file=tok.json",
        "optimizer.learning_rate=0.1234567890123456789",
        "optimizer.eps=1e-12",
        "schedule.kind=two_stage",
        "quantization.warmup=linear",
        "data.document_split=blank_lines",
        "run.threads=2",
        "model.vocab_size=512",
        "sample.prompts=[\"\", \"Once\\tupon\"]",
    ];
    for config in [set(&[]).unwrap(), set(&sets).unwrap()] {
        let text = config.to_toml().unwrap();
        let again = Config::parse(&text, Path::new("elsewhere/config.toml"), &[]).unwrap();
        assert_eq!(again, config);
        assert_eq!(again.to_toml().unwrap(), text);
    }
}

#[test]
fn a_config_toml_cannot_hold_is_an_error() {
    let mut config = Config::default();
    config.run.seed = u64::MAX;
    let written = config.to_toml().is_ok_and(|text| text.contains(&u64::MAX.to_string()));
    assert!(written || matches!(config.to_toml(), Err(ConfigError::Write(_))));
    config.run.name = "x".into();
    assert_eq!(key_of(&config.validate().unwrap_err()), "run.seed");
}

#[test]
fn documented_defaults_are_the_code_s() {
    let mut documented = BTreeMap::new();
    let (mut section, mut default) = (String::new(), String::new());
    for line in include_str!("mod.rs").lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("/// `[") {
            section = rest.split(']').next().unwrap().into();
        }
        if let Some((_, rest)) = line.rsplit_once("Default: ") {
            default = rest.trim_end_matches('.').trim_matches('`').into();
        }
        let field = line.strip_prefix("pub ").and_then(|line| line.split_once(": "));
        if let Some((name, _)) = field.filter(|(name, _)| !name.contains(' ')) {
            documented.insert(format!("{section}.{name}"), std::mem::take(&mut default));
        }
    }
    // The fields of `Config` itself are the sections.
    documented.retain(|key, _| key.split('.').next() != key.split('.').nth(1));
    let defaults = defaults();
    assert_eq!(documented.keys().collect::<Vec<_>>(), KNOWN_KEYS.iter().collect::<Vec<_>>());
    for (key, text) in documented {
        match defaults.get(&key) {
            None => assert_eq!(text, "absent", "{key}"),
            Some(value) => {
                let table: toml::Table = toml::from_str(&format!("x = {text}")).unwrap();
                assert_eq!(table["x"], *value, "{key}");
            }
        }
    }
}

#[test]
fn files_that_are_no_config_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Config::load(&path, &[])
    };
    assert_eq!(load(b"[train]\nsteps = 60").unwrap().run.name, "a");
    assert!(matches!(load(b"# \xff").unwrap_err(), ConfigError::NotUtf8 { offset: 2, .. }));
    assert!(matches!(load(&vec![b'#'; 2 << 20]).unwrap_err(), ConfigError::TooLong { .. }));
    assert!(matches!(load(&[b'['; 100_000]).unwrap_err(), ConfigError::Syntax { .. }));
    let nested = [b"x = ".as_slice(), &[b'['; 100_000]].concat();
    assert!(matches!(load(&nested).unwrap_err(), ConfigError::Syntax { .. }));
    assert!(matches!(Config::load(dir.path(), &[]).unwrap_err(), ConfigError::Read { .. }));
    let missing = Config::load(&dir.path().join("none.toml"), &[]).unwrap_err();
    assert!(missing.to_string().contains("none.toml"), "{missing}");
}

/// Texts that get past the parser often enough: known keys with odd values.
fn odd_config() -> impl Strategy<Value = (String, String)> {
    let values = prop::sample::select(vec![
        "0",
        "-1",
        "1",
        "3",
        "9223372036854775807",
        "1e400",
        "nan",
        "inf",
        "\"\"",
        "\"none\"",
        "[]",
        "[1]",
        "{}",
        "true",
        "1979-05-27",
        "\"a/b\"",
        "0.5",
        "65536",
    ]);
    (prop::sample::select(KNOWN_KEYS.clone()), values).prop_map(|(key, value)| (key, value.into()))
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "(?s).{0,200}", set in "(?s).{0,60}") {
        let _ = parse(&text, &[]);
        let _ = parse("", &[&set]);
    }

    #[test]
    fn toml_like_text_never_panics(text in "[\\[\\]{}a-c.=\"'\n 0-9_#,-]{0,120}") {
        let _ = parse(&text, &[]);
    }

    #[test]
    fn odd_values_are_refused_or_round_trip(pairs in prop::collection::vec(odd_config(), 1..6)) {
        let sets: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
        if let Ok(config) = Config::parse("", Path::new(FILE), &sets) {
            let text = config.to_toml().unwrap();
            prop_assert_eq!(Config::parse(&text, Path::new(FILE), &[]).unwrap(), config);
        }
    }
}
