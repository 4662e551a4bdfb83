//! Which tokens a conversation becomes, and which of them are the assistant's.

use super::super::super::train_tokenizer;
use super::*;
use std::fs;
use tempfile::TempDir;
use tokenizers::AddedToken;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
/// Ends its prompt with plain text and a space.
const PLAIN: &str = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content | trim }}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}Assistant: {% endif %}";

fn template(source: &str) -> ChatTemplate {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("chat_template.jinja"), source).unwrap();
    ChatTemplate::load(folder.path()).unwrap()
}

/// Byte-level, with merges of a few words and the marks of ChatML; `<|endoftext|>` is 0 and stands before a text.
fn tokenizer() -> Tokenizer {
    let text = " Yes. No user Yes assistant Assistant: Yes hello hello User: system".repeat(20);
    let mut tokenizer = train_tokenizer(&[text], 280).unwrap().0;
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"].map(|t| AddedToken::from(t, true))).unwrap();
    tokenizer
}

fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
    let message = |&(role, content): &(&str, &str)| Message { role: role.into(), content: content.into() };
    turns.iter().map(message).collect()
}

fn place() -> Place {
    Place { path: "chat.jsonl".into(), line: 7 }
}

fn example(
    tokenizer: &Tokenizer,
    source: &str,
    text: Text,
    sequence_length: usize,
) -> Result<Option<Example>, ChatError> {
    let template = template(source);
    let encoder = Encoder::new(tokenizer, Some(&template), Some(0), sequence_length)?;
    encoder.example(&Conversation { text, place: place() })
}

fn chat(source: &str, turns: &[(&str, &str)]) -> Result<Example, ChatError> {
    Ok(example(&tokenizer(), source, Text::Messages(messages(turns)), 1 << 20)?.unwrap())
}

/// Runs of tokens as text, each with whether the assistant says it.
fn runs(tokenizer: &Tokenizer, example: &Example) -> Vec<(bool, String)> {
    let tokens: Vec<_> = example.ids.iter().zip(&example.assistant).collect();
    let runs = tokens.chunk_by(|a, b| a.1 == b.1);
    runs.map(|run| {
        let ids: Vec<u32> = run.iter().map(|token| *token.0).collect();
        (*run[0].1, tokenizer.decode(&ids, false).unwrap())
    })
    .collect()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn what_the_assistant_says_is_marked_with_its_end() {
    let tokenizer = tokenizer();
    let turns =
        [("system", "hi"), ("user", "é"), ("assistant", "😀 Yes"), ("user", ""), ("assistant", " No")];
    let example = chat(CHATML, &turns).unwrap();
    let text = "<|im_start|>system\nhi<|im_end|>\n<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n😀 Yes<|im_end|>\n\
        <|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n No<|im_end|>\n";
    // The tokens of the text as they are: nothing is cut where special tokens stand at the seams, none is added.
    assert_eq!(example.ids, ids(&tokenizer, text));
    let runs = runs(&tokenizer, &example);
    let said: Vec<_> = runs.iter().filter(|run| run.0).map(|run| run.1.as_str()).collect();
    assert_eq!(said, ["😀 Yes<|im_end|>\n", " No<|im_end|>\n"]);
    assert_eq!(runs.iter().map(|run| run.1.as_str()).collect::<String>(), text);
    let marks = ["<|im_start|>", "<|im_end|>"].map(|mark| tokenizer.token_to_id(mark).unwrap());
    assert_eq!(marks.map(|mark| example.ids.iter().filter(|&&id| id == mark).count()), [5, 5]);
}

#[test]
fn an_answer_begins_after_the_tokens_of_its_prompt() {
    let tokenizer = tokenizer();
    let example =
        chat(PLAIN, &[("user", "hello"), ("assistant", "Yes"), ("user", "a"), ("assistant", "5")]).unwrap();
    // As one text " Yes" is one token, and generation could not begin with it.
    assert_eq!(ids(&tokenizer, "Assistant: Yes").last(), tokenizer.token_to_id("ĠYes").as_ref());
    let first = ids(&tokenizer, "User: hello<|im_end|>Assistant: ");
    assert_eq!(example.ids[..first.len()], first);
    assert!(example.assistant[..first.len()].iter().all(|assistant| !assistant));
    let rest = ids(&tokenizer, "Yes<|im_end|>User: a<|im_end|>Assistant: 5<|im_end|>");
    assert_eq!(example.ids[first.len()..], rest);
    let said: Vec<_> = runs(&tokenizer, &example).into_iter().filter(|run| run.0).map(|run| run.1).collect();
    assert_eq!(said, ["Yes<|im_end|>", "5<|im_end|>"]);
}

/// Such a tokenizer begins every text it is given with a space: encoded in parts, each answer would have one.
#[test]
fn tokenizers_that_begin_a_text_with_a_space_do_so_once() {
    let mut tokenizer = tokenizer();
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('_', PrependScheme::First, false)));
    assert_eq!(tokenizer.id_to_token(ids(&tokenizer, "Yes")[0]).unwrap().chars().next(), Some('_'));
    let text = "<|im_start|>user|a<|im_end|>|<|im_start|>assistant|Yes<|im_end|>|";
    let turns = Text::Messages(messages(&[("user", "a"), ("assistant", "Yes")]));
    let example = example(&tokenizer, &CHATML.replace('\n', "|"), turns, 999).unwrap().unwrap();
    assert_eq!(example.ids, ids(&tokenizer, text));
    let at = example.assistant.iter().position(|&assistant| assistant).unwrap();
    assert_eq!(tokenizer.id_to_token(example.ids[at]).unwrap().chars().next(), Some('Y'));
}

#[test]
fn completions_stand_between_start_and_end() {
    let tokenizer = tokenizer();
    let completion = |prompt: &str, completion: &str| {
        let text = Text::Completion { prompt: prompt.into(), completion: completion.into() };
        example(&tokenizer, CHATML, text, 999).unwrap().unwrap()
    };
    let found = completion("hello", " Yes");
    let (prompt, answer) = (ids(&tokenizer, "hello"), ids(&tokenizer, " Yes"));
    assert_eq!(found.ids, [&[0], &prompt[..], &answer[..], &[0]].concat());
    assert_eq!(found.assistant.iter().filter(|&&assistant| assistant).count(), answer.len() + 1);
    assert!(found.assistant.ends_with(&vec![true; answer.len() + 1]));
    // The seam again: the prompt's tokens are those that generation starts from.
    let found = completion("hello ", "Yes");
    assert_eq!(found.ids, [&[0], &ids(&tokenizer, "hello ")[..], &ids(&tokenizer, "Yes")[..], &[0]].concat());
    assert_eq!(completion("", "a").assistant, [false, true, true]);
}

#[test]
fn long_examples_are_cut_and_those_with_nothing_to_learn_dropped() {
    let tokenizer = tokenizer();
    let turns = messages(&[("user", "hello"), ("assistant", "Yes. No")]);
    let of = |length| example(&tokenizer, CHATML, Text::Messages(turns.clone()), length).unwrap();
    let whole = of(999).unwrap();
    let before = whole.assistant.iter().position(|&assistant| assistant).unwrap();
    for length in 1..whole.ids.len() + 3 {
        let kept = length.min(whole.ids.len());
        match of(length) {
            None => assert!(length <= before, "{length}"),
            Some(example) => {
                assert!(length > before, "{length}");
                assert_eq!(example.ids, whole.ids[..kept]);
                assert_eq!(example.assistant, whole.assistant[..kept]);
            }
        }
    }
}

#[test]
fn what_a_template_does_wrong_is_named() {
    let ask = [("user", "Why?"), ("assistant", "So."), ("user", "And?"), ("assistant", "Thus.")];
    let error = chat(
        "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}x{{ messages[-1].content }}",
        &ask,
    )
    .unwrap_err()
    .to_string();
    assert!(error.contains("enough") && error.contains("chat.jsonl line 7 message 4"), "{error}");
    // The prompt is not what the turn begins with.
    let error =
        chat("{{ messages | map(attribute='content') | join }}{{ '>' if add_generation_prompt }}", &ask);
    assert!(matches!(error, Err(ChatError::NotAppending { message: 2, .. })), "{error:?}");
    // Only the last answer is written whole, as templates that drop earlier thoughts do.
    let dropping =
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}";
    match chat(dropping, &ask) {
        Err(ChatError::NotAppending { message: 2, what, .. }) => assert!(what.contains("once others follow")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn messages_that_a_template_passes_over_are_named() {
    let known = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.role }}: {{ m.content }};{% endif %}{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    assert!(chat(known, &[("user", "a"), ("assistant", "b")]).is_ok());
    match chat(known, &[("human", "What?"), ("assistant", "b")]) {
        Err(ChatError::UnknownRole { role, message: 1, place: found, .. }) => {
            assert_eq!((role.as_str(), found), ("human", place()));
        }
        other => panic!("{other:?}"),
    }
    // Words that are changed on the way are no words left out.
    let upper = known.replace("m.content", "m.content | upper");
    assert!(chat(&upper, &[("user", "What?"), ("assistant", "b")]).is_ok());
}
