//! The parser: one test per error, each with its line, and any text at all.

use proptest::prelude::*;

use super::super::{Grammar, GrammarError};
use super::SMALL;

fn error(text: &str) -> GrammarError {
    Grammar::parse(text).expect_err(text)
}

/// A plot `story` that tells `sentence s`.
fn with_story(text: &str) -> String {
    format!("{text}plot story\n <s>\n")
}

#[test]
fn the_embedded_grammar_parses() {
    assert!(Grammar::parse(include_str!("../../../../data/stories.grammar")).is_ok());
}

#[test]
fn errors_name_the_line() {
    let cases = [
        ("\n# c\nfoo bar\n x\n", "opens no block; line 3"),
        ("phrase\n x\n", "opens no block; line 1"),
        ("phrase a: b\n x\n", "opens no block; line 1"),
        ("variable v\n x\n", "opens no block; line 1"),
        ("\n  x\n", "an option outside of a block; line 2"),
        ("phrase a\n x\nphrase a\n y\n", "the name `a` is taken or malformed; line 3"),
        ("phrase A b\n x\n", "the name `A b` is taken or malformed; line 1"),
        ("variable v: a | a\n x | y\n", "the name `a` is taken or malformed; line 1"),
        ("phrase a\n <b>\nphrase b\n x\n", "no `b` is defined above; line 2"),
        ("phrase a\n x <a>\n", "no `a` is defined above; line 2"),
        ("phrase a\n {v}\n", "no `v` is defined above; line 2"),
        ("variable v: a\n x\nphrase p\n {v.b}\n", "no `v.b` is defined above; line 4"),
        ("phrase p\n x\nplot story\n <p>\n", "`p` cannot stand here; line 4"),
        ("sentence s\n x.\nphrase p\n <s>\n", "`s` cannot stand here; line 4"),
        ("sentence s\n x.\nsentence t\n <s>\n", "`s` cannot stand here; line 4"),
        ("variable v: a\n x\nphrase p\n <v>\n", "`v` cannot stand here; line 4"),
        ("variable v: a | b\n x | y\n x\n", "the row has 1 cells instead of 2; line 3"),
        ("phrase p\n x\n 0 y\n", "the weight `0` is out of range; line 3"),
        (
            "phrase p\n x (99999999999999999999 y|z)\n",
            "the weight `99999999999999999999` is out of range; line 2",
        ),
        ("phrase p\n x\n y (a|b\n", "unexpected end of line; line 3"),
        ("phrase p\n a|b\n", "unexpected `|`; line 2"),
        ("phrase p\n a)\n", "unexpected `)`; line 2"),
        ("phrase p\n a > b\n", "unexpected `>`; line 2"),
        ("phrase p\n <a b>\n", "unexpected ` `; line 2"),
        ("sentence s\n x.\nplot story\n <s> and\n", "unexpected `a`; line 4"),
        ("phrase p\nphrase q\n x\n", "`p` has no options; line 1"),
        ("sentence s\n (a|).\n (|a)\n", "`s` may come out empty; line 1"),
        ("sentence s\n a.\nplot story\n (<s>|)\n", "`story` may come out empty; line 3"),
        ("sentence s\n a.\n", "there is no plot `story`; line 2"),
        ("phrase story\n a\n", "there is no plot `story`; line 2"),
        ("phrase p\n a\nsentence s\n a.\nplot story\n <s>\n", "`p` is never used; line 1"),
        (
            "variable v: a\n x\nsentence s\n {v}.\nplot story\n <s>\n",
            "the variable `v` may be mentioned before it is drawn; line 5",
        ),
        (
            "variable v: a\n x\nsentence s\n {v}.\nplot story\n (+v|) <s>\n",
            "the variable `v` may be mentioned before it is drawn; line 5",
        ),
        (
            "variable v: a\n x\nsentence s\n {v}.\nplot story\n +v <s>\n +v (+v|) <s>\n",
            "the variable `v` may be drawn twice; line 7",
        ),
        (
            "variable v: a\n x\n x\nsentence s\n {v}.\nplot story\n +v <s>\n",
            "the first sentence with the variable `v` may not name it, or none follows; line 6",
        ),
        (
            "variable v: a\n x\n y\nsentence s\n {v}.\nsentence t\n c.\nplot story\n +v (<s>|<t>)\n",
            "the first sentence with the variable `v` may not name it, or none follows; line 8",
        ),
        (
            "variable v: a | b\n x | z\n y | z\nsentence s\n {v}.\nsentence t\n {v.b}.\nplot story\n +v <t> <s>\n",
            "the first sentence with the variable `v` may not name it, or none follows; line 8",
        ),
    ];
    for (text, expected) in cases {
        let message = error(text).to_string();
        assert!(message.contains(expected), "{text:?}\n{message}\n{expected}");
    }
}

#[test]
fn costs_are_bounded() {
    // Each rule says the one before twice: 2^40 words in a few lines.
    let mut doubling = String::from("phrase p0\n x\n");
    let mut choosing = doubling.clone();
    let mut nothing = String::from("phrase p0\n (|)\n");
    for i in 1..40 {
        let before = i - 1;
        doubling += &format!("phrase p{i}\n <p{before}><p{before}>\n");
        choosing += &format!("phrase p{i}\n <p{before}>\n <p{before}>\n");
        nothing += &format!("phrase p{i}\n <p{before}><p{before}>\n");
    }
    for text in [doubling, choosing, nothing] {
        let text = with_story(&(text + "sentence s\n <p39>.\n"));
        assert!(matches!(error(&text), GrammarError::TooLarge { .. }));
    }
    let mut deep = String::from("phrase p0\n x\n");
    for i in 1..2000 {
        deep += &format!("phrase p{i}\n <p{}>\n", i - 1);
    }
    let deep = with_story(&(deep + "sentence s\n <p1999>.\n"));
    assert!(matches!(error(&deep), GrammarError::TooLarge { what: "the nesting of rules", .. }));
    let brackets = format!("phrase p\n {}\n", "(".repeat(1 << 19));
    assert!(matches!(error(&brackets), GrammarError::TooLarge { line: 2, .. }));
    let wide = format!("phrase p\n {}\n", "x".repeat(1 << 17));
    assert!(matches!(error(&wide), GrammarError::TooLarge { line: 2, .. }));
    let file = "#".repeat(1 << 21);
    assert!(matches!(error(&file), GrammarError::TooLarge { line: 1, .. }));
    let most: String = (0..255).map(|i| format!(" x{i}\n")).collect();
    let most = format!("variable v: a\n{most}sentence s\n {{v}}.\nplot story\n +v <s>\n");
    let most = Grammar::parse(&most).unwrap();
    assert!(most.recognize("X254.").story_in_language);
    let rows = format!("variable v: a\n{}", " x\n".repeat(256));
    assert!(matches!(error(&rows), GrammarError::TooLarge { line: 257, .. }));
    let variables: String = (0..17).map(|i| format!("variable v{i}: a\n x\n")).collect();
    assert!(matches!(error(&variables), GrammarError::TooLarge { line: 33, .. }));
    let rows: String = (0..200).map(|i| format!(" x{i}\n")).collect();
    let entangled: String = ["u", "v", "w"].map(|v| format!("variable {v}: a\n{rows}")).concat();
    let entangled = with_story(&(entangled + "sentence s\n {u}{v}{w}.\n"));
    assert!(matches!(error(&entangled), GrammarError::TooLarge { line: 604, .. }));
}

proptest! {
    #![proptest_config(super::quiet())]

    #[test]
    fn parsing_never_panics(text in "(variable|phrase|sentence|plot|story|a|b|[ \n:|(){}<>+.#0-9é]){0,60}") {
        if let Ok(grammar) = Grammar::parse(&text) {
            grammar.recognize(&grammar.story(1, 1));
        }
    }

    #[test]
    fn a_damaged_grammar_is_an_error_or_a_grammar(at in 0..SMALL.len(), with in "[ \n|(){}<>+.#0-9a-z]{0,3}", cut in 0..4_usize) {
        let end = (at + cut).min(SMALL.len());
        let text = format!("{}{with}{}", &SMALL[..at], &SMALL[end..]);
        if let Ok(grammar) = Grammar::parse(&text) {
            let story = grammar.story(1, 1);
            prop_assert!(grammar.log2_probability(&story).is_some() || story.trim() != story);
        }
    }
}
