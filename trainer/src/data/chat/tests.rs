//! `prepare_chat` from files to rows.

use super::super::{Sampler, train_tokenizer};
use super::*;
use std::fs;
use tempfile::TempDir;

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// A model's folder with a tokenizer and a template.
fn folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    let (_, json) = train_tokenizer(&["user: assistant: hello yes no ".repeat(30)], 280).unwrap();
    fs::write(folder.path().join("tokenizer.json"), json).unwrap();
    let configuration =
        serde_json::json!({"chat_template": TEMPLATE, "eos_token": {"content": "<|endoftext|>"}});
    fs::write(folder.path().join("tokenizer_config.json"), configuration.to_string()).unwrap();
    folder
}

fn write(folder: &TempDir, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

fn settings(folder: &TempDir, train: &[PathBuf]) -> ChatSettings {
    ChatSettings {
        train: train.to_vec(),
        validation: Vec::new(),
        validation_fraction: 0.25,
        folder: folder.path().into(),
        vocab_size: None,
        sequence_length: 64,
        seed: 1,
        now: None,
    }
}

fn run(settings: &ChatSettings) -> Result<Dataset, ChatError> {
    prepare_chat(settings, &|_, _| {})
}

/// The rows of a split.
fn chat(rows: &Rows) -> &ChatWindows {
    let Rows::Chat(windows) = rows else { panic!("no conversations") };
    windows
}

/// Twenty conversations and twenty completions.
fn lines() -> String {
    let line = |i: usize| match i % 2 {
        0 => format!(
            r#"{{"id": {i}, "messages": [{{"role": "user", "content": "hello {i}", "x": []}}, {{"content": "yes {i}", "role": "assistant"}}]}}"#
        ),
        _ => format!(r#"{{"prompt": "no {i}", "completion": " yes {}"}}"#, "a".repeat(i)),
    };
    (0..40).map(line).collect::<Vec<_>>().join("\n")
}

/// Error text of one file with this content.
fn refused(content: impl AsRef<[u8]>) -> String {
    let folder = folder();
    let path = write(&folder, "chat.jsonl", content);
    let error = run(&settings(&folder, &[path])).map(|_| ()).unwrap_err().to_string();
    assert!(error.matches("; ").count() >= 2, "{error}");
    error
}

#[test]
fn conversations_become_rows() {
    let folder = folder();
    let settings = settings(&folder, &[write(&folder, "chat.jsonl", lines())]);
    let calls = std::cell::RefCell::new(Vec::new());
    let dataset = prepare_chat(&settings, &|done, total| calls.borrow_mut().push((done, total))).unwrap();
    assert_eq!(calls.into_inner(), [(30, 40), (40, 40)]);
    assert_eq!((chat(&dataset.train).examples(), chat(&dataset.validation).examples()), (30, 10));
    assert_eq!(
        (dataset.vocab_size, dataset.separator, dataset.warnings),
        (280, Some(0), Vec::<String>::new())
    );
    let (train, mut texts) = (chat(&dataset.train), Vec::new());
    let batch = train.batch(&Sampler::new(1, 0).next_batch(train.count(), train.count() as usize));
    assert!(batch.ids.iter().all(|&id| id < 280));
    let mut ids = batch.ids.as_slice();
    for &length in &batch.sequences {
        let (sequence, rest) = ids.split_at(length);
        texts.push(dataset.tokenizer.as_ref().unwrap().decode(sequence, false).unwrap());
        ids = rest;
    }
    let has = |text: &str| texts.iter().filter(|found| *found == text).count();
    assert_eq!(has("user: hello 0<|endoftext|>assistant: yes 0<|endoftext|>"), 1);
    assert_eq!(has("<|endoftext|>no 3 yes aaa<|endoftext|>"), 1);
    assert_eq!(has("user: hello 38<|endoftext|>assistant: yes 38<|endoftext|>"), 0);
    // The learnt tokens: " yes", a space, the digits and the end, or as many letters.
    assert_eq!(batch.weights.unwrap().iter().sum::<f32>() as u64, train.learnt());
    // The same again; another seed is another order of the same, other words are other data.
    let again = run(&settings).unwrap();
    let all = |windows: &ChatWindows| windows.batch(&windows.evaluation(0));
    assert_eq!(all(chat(&again.train)), all(train));
    assert_eq!(
        (&again.dataset_hash, &again.tokenizer_hash),
        (&dataset.dataset_hash, &dataset.tokenizer_hash)
    );
    let other = run(&ChatSettings { seed: 2, ..settings.clone() }).unwrap();
    assert_ne!(all(chat(&other.train)), all(train));
    assert_eq!(other.dataset_hash, dataset.dataset_hash);
    write(&folder, "chat.jsonl", lines().replace("yes 0", "yes 1"));
    assert_ne!(run(&settings).unwrap().dataset_hash, dataset.dataset_hash);
}

#[test]
fn validation_may_be_a_file_of_its_own() {
    let folder = folder();
    let (train, validation) = (write(&folder, "a.jsonl", lines()), folder.path().join("b"));
    fs::create_dir(&validation).unwrap();
    write(&folder, "b/x.jsonl", lines().lines().take(3).collect::<Vec<_>>().join("\n"));
    let settings = ChatSettings {
        validation: vec![validation],
        validation_fraction: 9.0,
        ..settings(&folder, &[train])
    };
    let dataset = run(&settings).unwrap();
    assert_eq!((chat(&dataset.train).examples(), chat(&dataset.validation).examples()), (40, 3));
}

#[test]
fn dropped_examples_are_counted_in_one_warning() {
    let folder = folder();
    let long = r#"{"prompt": "Q", "completion": "A"}
        {"prompt": "QQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQQ", "completion": "A"}
        {"prompt": "ZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZZ", "completion": "A"}
        {"prompt": "Q", "completion": "A"}"#;
    let path = write(&folder, "chat.jsonl", long);
    let settings = ChatSettings { sequence_length: 16, ..settings(&folder, &[path]) };
    let dataset = run(&settings).unwrap();
    assert_eq!(dataset.warnings.len(), 1);
    assert!(
        dataset.warnings[0].starts_with("2 of 4 examples have no token of the assistant within 16 tokens")
    );
    let error = run(&ChatSettings { sequence_length: 1, ..settings }).map(|_| ()).unwrap_err();
    assert!(matches!(error, ChatError::NoExamples { split: "training", lines: 3 }));
}

#[test]
fn a_template_is_needed_for_messages_only() {
    let folder = folder();
    write(&folder, "tokenizer_config.json", "{}");
    let path = write(&folder, "chat.jsonl", lines());
    let error = run(&settings(&folder, std::slice::from_ref(&path))).map(|_| ()).unwrap_err();
    assert!(matches!(error, ChatError::NoTemplate { .. }));
    let completions: Vec<_> =
        lines().lines().filter(|line| line.contains("prompt")).map(String::from).collect();
    write(&folder, "chat.jsonl", completions.join("\n"));
    let dataset = run(&settings(&folder, &[path])).unwrap();
    // The end is the tokenizer's own where the configuration names none.
    assert_eq!((chat(&dataset.train).examples(), dataset.separator), (15, Some(0)));
}

#[test]
fn special_tokens_must_be_the_tokenizers() {
    let folder = folder();
    let path =
        write(&folder, "chat.jsonl", r#"{"prompt": "a", "completion": "b"}"#.to_owned() + "\n" + &lines());
    for which in ["eos_token", "pad_token"] {
        write(&folder, "tokenizer_config.json", format!(r#"{{"{which}": "<nowhere>"}}"#));
        let error = run(&settings(&folder, std::slice::from_ref(&path))).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("{which} `<nowhere>` is not in the tokenizer; ")), "{error}");
    }
}

#[test]
fn lines_that_are_no_conversations_are_named() {
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    for (bad, expected) in [
        ("{", "not JSON"),
        ("hello", "not JSON"),
        ("[1]", "not a conversation"),
        ("3", "not a conversation"),
        ("{}", "neither `messages` nor `prompt`"),
        (r#"{"text": "a"}"#, "neither `messages` nor `prompt`"),
        (r#"{"prompt": "a"}"#, "neither `messages` nor `prompt`"),
        (r#"{"messages": null}"#, "neither `messages` nor `prompt`"),
        (r#"{"prompt": "a", "completion": ""}"#, "`completion` is empty"),
        (r#"{"prompt": ["a"], "completion": "b"}"#, "not a conversation"),
        (r#"{"messages": []}"#, "`messages` is empty"),
        (r#"{"messages": {}}"#, "not a conversation"),
        (r#"{"messages": [{"role": "user"}]}"#, "missing field `content`"),
        (r#"{"messages": [{"role": "user", "content": null}]}"#, "invalid type: null"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}"#,
            "invalid type: sequence",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "no message of the role `assistant` (roles: user)",
        ),
        (r#"{"messages": [{"role": "gpt", "content": "a"}]}"#, "(roles: gpt)"),
        (r#"{"messages": [{"role": "assistant", "content": ""}]}"#, "a message of the assistant is empty"),
    ] {
        let error = refused(format!("{good}\n\n{bad}\n"));
        assert!(error.contains(expected) && error.contains("chat.jsonl line 3; "), "{bad}: {error}");
    }
    let many = r#"{"role": "assistant", "content": "a"},"#.repeat(1025);
    let error = refused(format!(r#"{{"messages": [{}]}}"#, many.trim_end_matches(',')));
    assert!(error.contains("1025 messages, more than 1024"), "{error}");
    let deep = format!("{{\"x\":{}", "[".repeat(1 << 20));
    assert!(refused(deep).contains("not JSON"));
    assert!(refused(b"\xff\xfe").contains("not UTF-8"));
    assert!(refused("\n\n").contains("no text or tokens in it"));
}

#[test]
fn other_files_and_settings_are_refused() {
    let folder = folder();
    let chat = write(&folder, "chat.jsonl", lines());
    let fails = |settings: ChatSettings| run(&settings).map(|_| ()).unwrap_err();
    let base = settings(&folder, std::slice::from_ref(&chat));
    for name in ["a.txt", "a.u16"] {
        let path = write(&folder, name, "ab");
        let error = fails(ChatSettings { train: vec![chat.clone(), path.clone()], ..base.clone() });
        assert!(matches!(error, ChatError::NotJsonLines { .. } | ChatError::Data(DataError::Mixed { .. })));
        assert!(matches!(fails(settings(&folder, &[path])), ChatError::NotJsonLines { .. }));
    }
    let missing = fails(settings(&folder, &["nowhere.jsonl".into()]));
    assert!(matches!(missing, ChatError::Data(DataError::Missing { .. })));
    for fraction in [0.0, 1.0, -1.0, f64::NAN] {
        let error = fails(ChatSettings { validation_fraction: fraction, ..base.clone() });
        assert!(matches!(error, ChatError::Data(DataError::ValidationFraction(_))));
    }
    let error = fails(ChatSettings { validation_fraction: 0.01, ..base.clone() });
    assert!(matches!(error, ChatError::NoExamples { split: "validation", lines: 0 }));
    let error = fails(ChatSettings { sequence_length: 0, ..base.clone() });
    assert!(matches!(error, ChatError::Data(DataError::SequenceLength(0))));
    let error = fails(ChatSettings { vocab_size: Some(100), ..base });
    assert!(matches!(error, ChatError::Data(DataError::TokenizerTooLarge { .. })));
}
