//! Templates rendered as `transformers` renders them, and templates that mean harm.

use super::*;
use std::fs;
use tempfile::TempDir;

/// Templates of ours with what `transformers` makes of them: `tests/golden/chat.py`.
#[derive(Deserialize)]
struct Golden {
    tokens: BTreeMap<String, String>,
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
}

fn golden() -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/chat.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().unwrap();
    files.iter().for_each(|(name, text)| fs::write(folder.path().join(name), text).unwrap());
    folder
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into() }
}

/// A template given as a file.
fn template(source: &str) -> Result<ChatTemplate, ChatError> {
    ChatTemplate::load(folder(&[(TEMPLATE, source)]).path())
}

fn render(source: &str) -> Result<String, Error> {
    template(source).unwrap().render(&[message("user", "hello")], false)
}

#[test]
fn conversations_are_rendered_as_transformers_renders_them() {
    let golden = golden();
    assert_eq!((golden.templates.len(), golden.cases.len()), (4, 24));
    for (name, source) in &golden.templates {
        let mut configuration = serde_json::json!({ "chat_template": source });
        for (name, token) in &golden.tokens {
            configuration[name] = token.as_str().into();
        }
        let folder = folder(&[(CONFIGURATION, &configuration.to_string())]);
        let template = ChatTemplate::load(folder.path()).unwrap();
        for case in golden.cases.iter().filter(|case| case.template == *name) {
            let text = template.render(&case.messages, case.add_generation_prompt).unwrap();
            assert_eq!(text, case.text, "{name}");
        }
    }
}

#[test]
fn a_template_is_found_wherever_it_is_kept() {
    let read = |files: &[(&str, &str)]| {
        let template = ChatTemplate::load(folder(files).path())?;
        Ok::<_, ChatError>(template.render(&[message("user", "hi")], false).unwrap())
    };
    let file = (TEMPLATE, "{{ bos_token }}{{ messages[0].content }} from the file");
    let one = (
        CONFIGURATION,
        r#"{"chat_template": "{{ bos_token }}one", "bos_token": {"content": "<s>", "id": 1}}"#,
    );
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}"#;
    assert_eq!(read(&[file]).unwrap(), "hi from the file");
    assert_eq!(read(&[file, one]).unwrap(), "<s>hi from the file");
    assert_eq!(read(&[one]).unwrap(), "<s>one");
    assert_eq!(read(&[(CONFIGURATION, named)]).unwrap(), "yes");
    let no_default = named.replace("default", "rag");
    for files in [&[][..], &[(CONFIGURATION, "{}")], &[(CONFIGURATION, &no_default)]] {
        assert!(matches!(read(files), Err(ChatError::NoTemplate { .. })));
    }
    for bad in ["", "3", r#"{"chat_template": 3}"#, r#"{"chat_template": "x", "bos_token": 1}"#] {
        let error = read(&[(CONFIGURATION, bad)]).unwrap_err();
        assert!(matches!(error, ChatError::Configuration { .. }), "{bad}: {error}");
    }
    let folder = folder(&[]);
    fs::create_dir(folder.path().join(TEMPLATE)).unwrap();
    assert!(matches!(ChatTemplate::load(folder.path()), Err(ChatError::Configuration { .. })));
    fs::remove_dir(folder.path().join(TEMPLATE)).unwrap();
    fs::write(folder.path().join(TEMPLATE), b"\xff").unwrap();
    assert!(matches!(ChatTemplate::load(folder.path()), Err(ChatError::Configuration { .. })));
    fs::File::create(folder.path().join(TEMPLATE)).unwrap().set_len(MAX_FILE + 1).unwrap();
    assert!(matches!(ChatTemplate::load(folder.path()), Err(ChatError::Configuration { .. })));
}

#[test]
fn the_time_can_be_fixed() {
    let template = template("{{ strftime_now('%d %b %Y') }}").unwrap();
    assert_eq!(template.at(1_721_952_000).render(&[], false).unwrap(), "26 Jul 2024");
    let year: i64 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2025, "{year}");
}

#[test]
fn nothing_is_escaped_or_run_in_what_is_said() {
    let template = template("{{ messages[0].content }}").unwrap();
    let text = "<b> & \"{{ messages }}\" {% for %} {# #} \u{0}";
    assert_eq!(template.render(&[message("user", text)], true).unwrap(), text);
}

#[test]
fn refusals_of_a_template_are_told() {
    let error = render("{{ raise_exception('no ' ~ messages[0].role) }}").unwrap_err();
    assert!(error.to_string().contains("no user"), "{error}");
}

#[test]
fn templates_that_are_none_are_refused_when_read() {
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    let loops = "{% if true %}".repeat(100_000);
    let sources =
        ["{% for %}", "{{", "{% generation %}", "{% include 'x' %}", "{% extends 'x' %}", &nested, &loops];
    for source in sources {
        match template(source) {
            Err(error @ ChatError::Template { .. }) => {
                assert!(error.to_string().contains("; correct it"), "{error}");
            }
            other => panic!("{:.40}: {:?}", source, other.map(|_| ())),
        }
    }
}

/// On a thread of the pool, whose stack is the smallest that a template meets.
#[test]
fn hostile_templates_end_with_an_error() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let growing =
        "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    let recursive = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    let nested = "{% macro f(n) %}{% for a in [1] %}{% if true %}{% set x %}{{ f([n]) }}{% endset %}{% endif %}{% endfor %}{% endmacro %}{{ f(0) }}";
    let long = "{% for a in range(20000) %}{{ 'x' * 1000 }}{% endfor %}";
    let huge = "{{ 'x' * 100000000000 }}";
    let wide = "{{ 'x'.ljust(100000000000) }}{{ ('a' * 100000).replace('a', 'b' * 100000) }}";
    let list = "{{ range(10000000000) | list | length }}";
    let format = "{{ '%1000000000d' | format(1) }}";
    for source in [endless, growing, recursive, nested, long, huge, wide, list, format] {
        let started = std::time::Instant::now();
        let failed = std::thread::Builder::new()
            .stack_size(2 << 20)
            .spawn(move || render(source).map(|text| text.len()))
            .unwrap()
            .join()
            .unwrap();
        assert!(failed.is_err(), "{source}: {failed:?}");
        assert!(started.elapsed().as_secs() < 20, "{source}");
    }
}
