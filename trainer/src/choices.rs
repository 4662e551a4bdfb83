//! Multiple choice: how often a model finds the right continuation of a text likelier than the wrong ones.
//!
//! Scored as the language model evaluation harness (EleutherAI's `lm-evaluation-harness`) does it. A line of a `.jsonl`
//! file is a question, `{"query": "...", "choices": ["...", "..."], "gold": 0}`; the text before the choices may also be
//! called `context` or `question`, the index of the right one (from 0) `answer` or `label`. Other keys are passed over.

use std::path::{Path, PathBuf};

use infer::Model;
use infer::model::ModelError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::data::DataError;
use crate::data::source::for_each_line;

/// Why choices cannot be scored. Messages read `what; where; what to do`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChoicesError {
    /// The file or its lines cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A line is not a question.
    #[error(
        "not a question ({reason}); {} line {line}; write `query` as a string, `choices` as a list of strings and `gold` as the index of the right one", path.display()
    )]
    Question {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// There are no questions.
    #[error("no question in it; {}; give at least one line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A question longer than the model's context.
    #[error("{tokens} tokens in a context of {limit}; line {line} choice {choice}; remove the question")]
    TooLong {
        /// Line number, from 1.
        line: u64,
        /// Which choice, from 0.
        choice: usize,
        /// Query and choice in tokens, without the last, which is only predicted.
        tokens: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// A choice that is nothing to the tokenizer, or that nothing comes before.
    #[error(
        "the tokenizer gives {what} no token; line {line} choice {choice}; write more text or use another tokenizer"
    )]
    NoToken {
        /// `the query` or `the choice`.
        what: &'static str,
        /// Line number, from 1.
        line: u64,
        /// Which choice, from 0.
        choice: usize,
    },
    /// The tokenizer failed.
    #[error("the tokenizer failed ({source}); line {line}; check the tokenizer")]
    Tokenizer {
        /// Line number, from 1.
        line: u64,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The model's logits are no numbers.
    #[error(
        "the likelihood of a choice is not a number; line {line} choice {choice}; check the model's weights"
    )]
    NotANumber {
        /// Line number, from 1.
        line: u64,
        /// Which choice, from 0.
        choice: usize,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What comes before each choice; may be empty where the tokenizer puts a token before a text.
    pub query: String,
    /// At least two, none of them empty.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub gold: usize,
    /// Line of the file, from 1.
    pub line: u64,
}

/// The keys of a line, in any of their names.
#[derive(Deserialize)]
struct Line {
    query: Option<Value>,
    context: Option<Value>,
    question: Option<Value>,
    choices: Option<Vec<String>>,
    gold: Option<Value>,
    answer: Option<Value>,
    label: Option<Value>,
}

impl Line {
    /// The question, or what is wrong.
    fn question(self, line: u64) -> Result<Question, String> {
        let query = self.query.or(self.context).or(self.question).ok_or("no `query`")?;
        let Value::String(query) = query else { return Err("`query` is no string".into()) };
        let choices = self.choices.ok_or("no `choices`")?;
        if choices.len() < 2 {
            return Err(format!("{} choices, at least 2 are needed", choices.len()));
        }
        if let Some(empty) = choices.iter().position(|choice| choice.trim().is_empty()) {
            return Err(format!("choice {empty} is empty"));
        }
        let gold = self.gold.or(self.answer).or(self.label).ok_or("no `gold`")?;
        let index = gold.as_u64().and_then(|gold| usize::try_from(gold).ok());
        match index.filter(|&index| index < choices.len()) {
            Some(gold) => Ok(Question { query, choices, gold, line }),
            None => Err(format!("`gold` is no index below {}", choices.len())),
        }
    }
}

/// Reads the questions of a `.jsonl` file.
///
/// # Errors
/// `Question` with the line, `Empty`, or `Data`.
pub fn read(path: &Path) -> Result<Vec<Question>, ChoicesError> {
    // A pipe or device would block or never end.
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::Missing { path: path.into() }.into());
        }
        _ => return Err(DataError::UnknownKind { path: path.into() }.into()),
    }
    let mut questions = Vec::new();
    for_each_line(path, |line, text| {
        let parsed = serde_json::from_str::<Line>(text).map_err(|error| error.to_string());
        match parsed.and_then(|parsed| parsed.question(line)) {
            Ok(question) => questions.push(question),
            Err(reason) => return Err(ChoicesError::Question { path: path.into(), line, reason }),
        }
        Ok(())
    })?;
    if questions.is_empty() {
        return Err(ChoicesError::Empty { path: path.into() });
    }
    Ok(questions)
}

/// How often the right choice was the likeliest.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ChoicesReport {
    /// Questions asked.
    pub questions: usize,
    /// Share of them where the right choice has the highest log-likelihood.
    pub acc: f64,
    /// Standard error of `acc`: `sqrt(acc (1 - acc) / (questions - 1))`; none of a single question.
    pub acc_stderr: Option<f64>,
    /// Share of them where it has the highest log-likelihood a byte of the choice.
    pub acc_norm: f64,
    /// Standard error of `acc_norm`.
    pub acc_norm_stderr: Option<f64>,
}

impl std::fmt::Display for ChoicesReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let error = |error: Option<f64>| error.map(|error| format!(" +- {error:.4}")).unwrap_or_default();
        writeln!(f, "acc {:.4}{}", self.acc, error(self.acc_stderr))?;
        writeln!(f, "acc_norm {:.4}{}", self.acc_norm, error(self.acc_norm_stderr))?;
        write!(f, "questions {}", self.questions)
    }
}

/// Asks all questions; `progress` is told how many are done.
///
/// Of choices that are equally likely the first counts as chosen.
///
/// # Errors
/// A question does not fit the model's context, or a line's text cannot be scored. No question is an error too.
pub fn evaluate(
    model: &Model,
    tokenizer: &Tokenizer,
    questions: &[Question],
    mut progress: impl FnMut(usize),
) -> Result<ChoicesReport, ChoicesError> {
    // What does not fit is found before the first, long pass.
    let asked: Vec<_> = questions.iter().map(|q| encode(model, tokenizer, q)).collect::<Result<_, _>>()?;
    let (mut right, mut right_norm) = (0, 0);
    for (number, (question, choices)) in questions.iter().zip(asked).enumerate() {
        let sums = log_likelihoods(model, question, &choices)?;
        let bytes = question.choices.iter().map(|choice| choice.len() as f64);
        let means: Vec<f64> = sums.iter().zip(bytes).map(|(sum, bytes)| sum / bytes).collect();
        right += usize::from(largest(&sums) == question.gold);
        right_norm += usize::from(largest(&means) == question.gold);
        progress(number + 1);
    }
    let count = questions.len();
    let share = |right: usize| right as f64 / count.max(1) as f64;
    let stderr = |p: f64| (count > 1).then(|| (p * (1.0 - p) / (count - 1) as f64).sqrt());
    let (acc, acc_norm) = (share(right), share(right_norm));
    Ok(ChoicesReport {
        questions: count,
        acc,
        acc_stderr: stderr(acc),
        acc_norm,
        acc_norm_stderr: stderr(acc_norm),
    })
}

/// Tokens of the query with a choice, and how many of them come before the choice.
struct Encoded {
    ids: Vec<u32>,
    before: usize,
}

/// Encodes a question with each choice.
///
/// Query and choice are one text with a space between them, unless either brings white space along; it is encoded whole,
/// with what the tokenizer puts before a text, so that the space binds as it does anywhere. The choice's tokens are those
/// from the first one on that the query alone (without white space at its end) does not have.
fn encode(model: &Model, tokenizer: &Tokenizer, question: &Question) -> Result<Vec<Encoded>, ChoicesError> {
    let (line, limit) = (question.line, model.config().max_position_embeddings);
    let ids = |text: &str| match tokenizer.encode_fast(text, true) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(source) => Err(ChoicesError::Tokenizer { line, source }),
    };
    let query = ids(question.query.trim_end())?;
    let encode = |(choice, text): (usize, &String)| {
        let apart = question.query.is_empty()
            || question.query.ends_with(char::is_whitespace)
            || text.starts_with(char::is_whitespace);
        let ids = ids(&format!("{}{}{text}", question.query, if apart { "" } else { " " }))?;
        let before = ids.iter().zip(&query).take_while(|(id, other)| id == other).count();
        let tokens = ids.len().saturating_sub(1);
        match before {
            _ if before == ids.len() => Err(ChoicesError::NoToken { what: "the choice", line, choice }),
            0 => Err(ChoicesError::NoToken { what: "the query", line, choice }),
            _ if tokens > limit => Err(ChoicesError::TooLong { line, choice, tokens, limit }),
            _ => Ok(Encoded { ids, before }),
        }
    };
    question.choices.iter().enumerate().map(encode).collect()
}

/// `ln P(choice | query)` of each choice: the sum over its tokens.
fn log_likelihoods(
    model: &Model,
    question: &Question,
    choices: &[Encoded],
) -> Result<Vec<f64>, ChoicesError> {
    let sum = |(choice, encoded): (usize, &Encoded)| {
        let scores = infer::eval::score(model, &encoded.ids)?;
        let sum: f64 = scores[encoded.before - 1..].iter().map(|&score| f64::from(score)).sum();
        if sum.is_nan() {
            return Err(ChoicesError::NotANumber { line: question.line, choice });
        }
        Ok(sum)
    };
    choices.iter().enumerate().map(sum).collect()
}

/// Index of the first largest value.
fn largest(values: &[f64]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::train_tokenizer;
    use infer::ModelConfig;
    use infer::bench::random_model;
    use infer::model::{KvCache, Logits};

    const VOCABULARY: usize = 280;

    fn tokenizer() -> Tokenizer {
        train_tokenizer(&["the cat sat on a mat and the dog ran off ".repeat(30)], VOCABULARY).unwrap().0
    }

    fn model() -> Model {
        let config: ModelConfig = ModelConfig {
            hidden_size: 16,
            intermediate_size: 32,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 8,
            vocab_size: VOCABULARY,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            max_position_embeddings: 24,
            tie_word_embeddings: true,
            hidden_act: bitlinear::math::Activation::Silu,
            sub_norm: true,
            quantized: true,
            qkv_bias: false,
            qk_norm: false,
            modules_to_not_convert: Vec::new(),
            bos_token_id: Some(0),
            eos_token_ids: vec![0],
        };
        random_model(&config, 3, bitlinear::packed::Layout::TwoBit).unwrap()
    }

    fn question(query: &str, choices: &[&str], gold: usize) -> Question {
        Question {
            query: query.into(),
            choices: choices.iter().map(|choice| (*choice).into()).collect(),
            gold,
            line: 1,
        }
    }

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.jsonl");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    /// Log-probabilities by a pass a token, softmax in f64 from its definition.
    fn recomputed(model: &Model, ids: &[u32], before: usize) -> f64 {
        let mut sum = 0.0;
        for at in before..ids.len() {
            let mut cache = KvCache::new(model, at).unwrap();
            let logits = model.forward(&ids[..at], &mut cache, Logits::Last).unwrap();
            let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            sum += f64::from(logits[ids[at] as usize]) - total.ln();
        }
        sum
    }

    #[test]
    fn likelihoods_are_those_of_the_tokens_one_by_one() {
        let (model, tokenizer) = (model(), tokenizer());
        let all = [
            question("the cat", &["sat on a mat", "ran", " off and off"], 0),
            question("the dog \n", &["ran off", "mat"], 1),
            question("", &["the cat sat", "a dog"], 1),
        ];
        let (mut acc, mut norm) = (0.0, 0.0);
        for question in &all {
            let encoded = encode(&model, &tokenizer, question).unwrap();
            let found = log_likelihoods(&model, question, &encoded).unwrap();
            let mut expected = Vec::new();
            for (choice, encoded) in question.choices.iter().zip(&encoded) {
                // What is scored is the choice, with the space before it.
                let said = tokenizer.decode(&encoded.ids[encoded.before..], false).unwrap();
                assert_eq!(said.trim(), choice.trim());
                assert_eq!(encoded.ids[0], 0);
                expected.push(recomputed(&model, &encoded.ids, encoded.before));
            }
            for (found, expected) in found.iter().zip(&expected) {
                // A score is an f32 of a few nats: half a unit in its last place is 5e-7, and there are at most ten.
                assert!((found - expected).abs() < 1e-5 && *found < -1.0, "{found} {expected}");
            }
            let best = |values: Vec<f64>| {
                (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b])).unwrap()
            };
            let a_byte =
                expected.iter().zip(&question.choices).map(|(sum, choice)| sum / choice.len() as f64);
            norm += f64::from(u8::from(best(a_byte.collect()) == question.gold)) / 3.0;
            acc += f64::from(u8::from(best(expected) == question.gold)) / 3.0;
        }
        let mut done = Vec::new();
        let report = evaluate(&model, &tokenizer, &all, |count| done.push(count)).unwrap();
        assert_eq!(done, [1, 2, 3]);
        assert!((report.acc - acc).abs() < 1e-12 && (report.acc_norm - norm).abs() < 1e-12, "{report:?}");
        assert_eq!(report.acc_stderr, Some((report.acc * (1.0 - report.acc) / 2.0).sqrt()));
    }

    #[test]
    fn every_right_choice_and_none() {
        let (model, tokenizer) = (model(), tokenizer());
        let mut all: Vec<Question> =
            (0..5).map(|i| question("the cat", &["sat", &"off ".repeat(i + 2)], 0)).collect();
        let of = |all: &[Question]| evaluate(&model, &tokenizer, all, |_| {}).unwrap();
        // Longer choices are less likely, whatever the model, and likelier a byte here.
        assert_eq!((of(&all).acc, of(&all).acc_stderr), (1.0, Some(0.0)));
        all.iter_mut().for_each(|question| question.gold = 1);
        assert_eq!((of(&all).acc, of(&all[..1]).acc_stderr), (0.0, None));
        // A tie goes to the first.
        assert_eq!(of(&[question("the", &["cat", "cat"], 0)]).acc, 1.0);
        assert_eq!(largest(&[-3.0, -1.0, -1.0, f64::NEG_INFINITY]), 1);
    }

    #[test]
    fn a_space_binds_to_its_word() {
        let (model, tokenizer) = (model(), tokenizer());
        let text = "the cat sat";
        let expected = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        for (query, choice) in [("the cat", "sat"), ("the cat ", "sat"), ("the cat", " sat")] {
            let encoded = encode(&model, &tokenizer, &question(query, &[choice, "mat"], 0)).unwrap();
            assert_eq!(
                (&encoded[0].ids, encoded[0].before),
                (&expected, expected.len() - 1),
                "{query}|{choice}"
            );
        }
    }

    #[test]
    fn questions_that_cannot_be_scored_are_named() {
        let (model, mut tokenizer) = (model(), tokenizer());
        let of =
            |tokenizer: &Tokenizer, question| evaluate(&model, tokenizer, &[question], |_| {}).unwrap_err();
        // 24 tokens are read and one more is predicted.
        let fits = |words: usize| question("the cat", &["sat", &" off".repeat(words)], 0);
        let most = (1..40).rev().find(|&words| evaluate(&model, &tokenizer, &[fits(words)], |_| {}).is_ok());
        let (_, longest) = (most, encode(&model, &tokenizer, &fits(most.unwrap())).unwrap().remove(1));
        assert!((24..=25).contains(&longest.ids.len()), "{}", longest.ids.len());
        match of(&tokenizer, fits(60)) {
            ChoicesError::TooLong { line: 1, choice: 1, tokens, limit: 24 } => assert!(tokens > 24),
            other => panic!("{other:?}"),
        }
        tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        let error = of(&tokenizer, question("", &["a", "b"], 0));
        assert!(matches!(error, ChoicesError::NoToken { what: "the query", choice: 0, .. }), "{error:?}");
    }

    #[test]
    fn questions_are_read_under_all_their_names() {
        let text = r#"{"query": "a", "choices": ["b", "c"], "gold": 1, "id": {}}

            {"context": "a", "choices": ["b", "c"], "answer": 0}
            {"question": "", "choices": ["b", "c", "d"], "label": 2}"#;
        let (_folder, path) = file(text);
        let questions = read(&path).unwrap();
        assert_eq!(questions[0], question("a", &["b", "c"], 1));
        assert_eq!((questions[1].gold, questions[1].line), (0, 3));
        assert_eq!((questions[2].query.as_str(), questions[2].gold, questions[2].line), ("", 2, 4));
    }

    #[test]
    fn lines_that_are_no_questions_are_named() {
        let good = r#"{"query": "a", "choices": ["b", "c"], "gold": 1}"#;
        for (bad, expected) in [
            ("{", "EOF"),
            ("[]", "invalid length"),
            ("{}", "no `query`"),
            (r#"{"query": 3}"#, "`query` is no string"),
            (r#"{"query": "a"}"#, "no `choices`"),
            (r#"{"query": "a", "choices": "bc", "gold": 0}"#, "invalid type"),
            (r#"{"query": "a", "choices": ["b", 3], "gold": 0}"#, "invalid type"),
            (r#"{"query": "a", "choices": ["b"], "gold": 0}"#, "1 choices, at least 2"),
            (r#"{"query": "a", "choices": ["b", " "], "gold": 0}"#, "choice 1 is empty"),
            (r#"{"query": "a", "choices": ["b", "c"]}"#, "no `gold`"),
            (r#"{"query": "a", "choices": ["b", "c"], "gold": 2}"#, "`gold` is no index below 2"),
            (r#"{"query": "a", "choices": ["b", "c"], "gold": -1}"#, "`gold` is no index below 2"),
            (r#"{"query": "a", "choices": ["b", "c"], "gold": 0.5}"#, "`gold` is no index below 2"),
            (r#"{"query": "a", "choices": ["b", "c"], "gold": "B"}"#, "`gold` is no index below 2"),
        ] {
            let (_folder, path) = file(&format!("{good}\n{bad}\n{good}"));
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains("q.jsonl line 2; "), "{bad}: {error}");
        }
        let (folder, path) = file("\n \n");
        assert!(matches!(read(&path), Err(ChoicesError::Empty { .. })));
        assert!(matches!(read(folder.path()), Err(ChoicesError::Data(DataError::UnknownKind { .. }))));
        let missing = read(&folder.path().join("none.jsonl"));
        assert!(matches!(missing, Err(ChoicesError::Data(DataError::Missing { .. }))));
    }
}
