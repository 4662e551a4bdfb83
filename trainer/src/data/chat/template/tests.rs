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
    let long = |start: &str, part: &str, end: &str| [start, &part.repeat(20_000), end].concat();
    let nested = long("{{ ", "(", "1 }}");
    let loops = long("", "{% if true %}", "");
    let chains = [
        long("{{ 1", "+1", " }}"),
        long("{{ ", "not ", "1 }}"),
        long("{{ x", ".a", " }}"),
        long("{{ [1]", "|list", " }}"),
        long("{{ ", "1 if a else ", "2 }}"),
        long("{% if a %}", "{% elif a %}", "{% endif %}"),
    ];
    let sources =
        ["{% for %}", "{{", "{% generation %}", "{% include 'x' %}", "{% extends 'x' %}", &nested, &loops];
    for source in sources.into_iter().chain(chains.iter().map(String::as_str)) {
        match template(source) {
            Err(error @ ChatError::Template { .. }) => {
                assert!(error.to_string().contains("; correct it"), "{error}");
            }
            other => panic!("{:.40}: {:?}", source, other.map(|_| ())),
        }
    }
}

/// On a thread of 2 MiB, as those of the pool are.
#[test]
fn hostile_templates_end_with_an_error() {
    let set = |value: &str| {
        format!(
            "{{% set ns = namespace(x=[1]) %}}{{% for a in range(90000) %}}{{% set ns.x = {value} %}}{{% endfor %}}{{{{ ns.x }}}}"
        )
    };
    let mut sources = vec![
        // Endless.
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
        // Large.
        set("ns.x ~ ns.x"),
        "{% for a in range(20000) %}{{ 'x' * 1000 }}{% endfor %}".into(),
        "{{ 'x' * 100000000000 }}".into(),
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}".into(),
        "{{ range(10000000000) | list | length }}".into(),
        "{{ '%1000000000d' | format(1) }}".into(),
        // Deep.
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}".into(),
        "{% macro f(n) %}{% for a in [1] %}{% if true %}{% set x %}{{ f([n]) }}{% endset %}{% endif %}{% endfor %}{% endmacro %}{{ f(0) }}".into(),
        "{% for a in [1] recursive %}{{ loop([[a]]) }}{% endfor %}".into(),
        format!("{{{{ {}x.y.z }}}}", "not ".repeat(980)),
        "{% set x = [x] %}".repeat(20_000) + "{{ x }}",
        "{% set x = namespace(x=x) %}".repeat(20_000) + "{{ x }}",
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}".into(),
        "{% set ns = namespace() %}{% set ns.x = [{'a': ns}] %}{{ ns }}".into(),
        "{% set a, b = namespace(), 1 %}".into(),
    ];
    sources.extend(["[ns.x]", "{'a': ns.x}", "[ns.x, ns.x]", "[ns.x][0:]", "(ns.x,)"].map(set));
    for source in sources {
        let (name, started) = (source.chars().take(90).collect::<String>(), std::time::Instant::now());
        let thread = std::thread::Builder::new().stack_size(2 << 20);
        let rendered = thread.spawn(move || render(&source).map(|text| text.len())).unwrap().join().unwrap();
        assert!(rendered.is_err(), "{name}: {rendered:?}");
        assert!(started.elapsed().as_secs() < 20, "{name}");
    }
    // Views of views are lists, however many there are.
    for value in ["ns.x[0:]", "ns.x | reverse", "ns.x + []", "[ns.x[0:]][0][0:]"] {
        let source = set(value).replace("90000", "9000");
        let thread = std::thread::Builder::new().stack_size(2 << 20);
        assert_eq!(thread.spawn(move || render(&source)).unwrap().join().unwrap().unwrap(), "[1]", "{value}");
    }
}
