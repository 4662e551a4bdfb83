//! `trainer eval --choices` as a user meets it.

mod common;

use std::fs;

use common::{done, folder, refused, train};
use serde_json::Value;

const QUESTIONS: &str = r#"{"query": "There once lived a", "choices": ["kind girl", "qqq zzz xxx"], "gold": 0}
{"context": "The", "choices": ["\u0001\u0002\u0003\u0004", "cow"], "answer": 1}
{"question": "Sam", "choices": ["found a ball", "found", "qqqqqqqqqqqq"], "label": 2}
"#;

#[test]
fn choices_are_counted_with_and_without_a_text() {
    let folder = folder();
    let path = folder.path();
    done(path, &train("run", &["train.steps=2", "schedule.warmup_steps=1", "data.sequence_length=32"]));
    fs::write(path.join("q.jsonl"), QUESTIONS).unwrap();
    let eval = |model: &str, more: &[&str]| {
        let (stdout, _) = done(path, &[&["eval", model, "--choices", "q.jsonl"][..], more].concat());
        stdout
    };
    let json = |model: &str, more: &[&str]| {
        let value: Value = serde_json::from_str(&eval(model, &[more, &["--json"]].concat())).unwrap();
        value
    };
    let alone = json("run", &[]);
    let choices = &alone["choices"];
    assert_eq!(choices["questions"], 3);
    // Two steps teach a model of random weights nothing but that longer is less likely: the first two are right by
    // their length, the third is wrong.
    assert_eq!(choices["acc"].as_f64().unwrap(), 2.0 / 3.0);
    let error = (2.0f64 / 3.0 / 3.0 / 2.0).sqrt();
    assert!((choices["acc_stderr"].as_f64().unwrap() - error).abs() < 1e-12);
    assert!(choices["acc_norm"].is_f64() && choices["acc_norm_stderr"].is_f64());
    assert!(alone["kernel"].is_string() && alone.get("loss").is_none());
    assert_eq!(json("run/export/hf", &[]), alone);
    let both = json("run", &["--data", "text.txt"]);
    assert!(both["loss"].is_f64() && both["choices"] == *choices);
    let text = eval("run", &[]);
    assert!(text.starts_with(&format!("acc 0.6667 +- {error:.4}\nacc_norm ")), "{text}");
    assert!(text.contains("\nquestions 3\nkernel "), "{text}");
    let text = eval("run", &["--data", "text.txt"]);
    assert!(text.starts_with("loss ") && text.contains("\nacc 0.6667"), "{text}");

    let long = format!(
        "{QUESTIONS}{{\"query\": \"a\", \"choices\": [\"b\", \"{}\"], \"gold\": 0}}",
        "qz".repeat(40)
    );
    fs::write(path.join("long.jsonl"), long).unwrap();
    fs::write(path.join("bad.jsonl"), QUESTIONS.replace("\"gold\": 0", "\"gold\": 2")).unwrap();
    for (file, expected) in [
        ("long.jsonl", "in a context of 32; line 4 choice 1; "),
        ("bad.jsonl", "`gold` is no index below 2); bad.jsonl line 1; "),
        ("none.jsonl", "no such file or folder; none.jsonl; "),
    ] {
        let error = refused(path, &["eval", "run", "--choices", file]);
        assert!(error.contains(expected), "{error}");
    }
    let error = refused(path, &["eval", "run"]);
    assert!(error.contains("required arguments"), "{error}");
}
