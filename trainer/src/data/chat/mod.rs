//! Conversations for supervised fine-tuning: read, rendered by the model's chat template, tokenized, packed.
//!
//! [`prepare_chat`] does it all. A line of a `.jsonl` file is one of
//!
//! * `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`: what the assistant
//!   says is learnt, of every turn; what follows its last turn is left out, since nothing is learnt from it;
//! * `{"prompt": "...", "completion": "..."}`: the completion is learnt, without a template: the token that the
//!   tokenizer puts before a text (if it does), prompt, completion, `eos_token`.
//!
//! Other keys are passed over. Special tokens written in the text, by the template or by the data, are those tokens, as
//! in `transformers`; none is added to what a template writes.

mod conversation;
mod encode;
mod error;
mod functions;
mod guard;
mod pack;
mod template;
mod windows;

pub use conversation::{ASSISTANT, Message};
pub use error::{ChatError, Place};
pub use template::{CONFIGURATION, ChatTemplate, configuration_files};
pub use windows::ChatWindows;

use super::source::{self, Files};
use super::{DataError, Dataset, Rows, end_of_text_id, load_chosen};
use conversation::{Conversation, Text};
use encode::{Encoder, Example};
use rayon::prelude::*;
use std::path::PathBuf;
use template::{SpecialTokens, configuration_path, special_tokens};
use tokenizers::Tokenizer;

/// Conversations that are encoded between two reports of progress.
const BATCH: usize = 1024;

/// What [`prepare_chat`] needs to know.
#[derive(Debug, Clone)]
pub struct ChatSettings {
    /// `.jsonl` files, or folders of them.
    pub train: Vec<PathBuf>,
    /// Validation data given apart; empty if it is not.
    pub validation: Vec<PathBuf>,
    /// Without `validation`: the share of the lines at their end that is held out, `floor(lines * f)` with `0 < f < 1`.
    pub validation_fraction: f64,
    /// The folder with the model's `tokenizer.json`, `tokenizer_config.json` and, if it is apart,
    /// `chat_template.jinja`.
    pub folder: PathBuf,
    /// Entries of the model's vocabulary, or none to take the tokenizer's.
    pub vocab_size: Option<usize>,
    /// T, tokens in a row; longer examples are cut at their end.
    pub sequence_length: usize,
    /// Decides which examples share a row.
    pub seed: u64,
    /// What the template is told of the time, in seconds since 1970 (UTC); none for the time of the call. A template
    /// that writes the date gives other tokens, and another hash, on another day.
    pub now: Option<i64>,
}

/// Reads, renders, tokenizes and packs conversations.
///
/// The separator is the token that ends an answer or a text: `eos_token`, else the tokenizer's end of text. The hash is of the
/// tokens of both splits and of which are the assistant's.
///
/// Examples in which no token of the assistant is left within the sequence length are dropped, and a warning counts
/// them. `progress(done, total)` is called while conversations are tokenized, in lines.
///
/// # Errors
/// Every [`ChatError`]; each names the file, and the line where there is one.
pub fn prepare_chat(settings: &ChatSettings, progress: &dyn Fn(u64, u64)) -> Result<Dataset, ChatError> {
    super::windows::check_length(settings.sequence_length)?;
    let mut warnings = Vec::new();
    let (train, validation) = read_splits(settings)?;
    let file = settings.folder.join("tokenizer.json");
    let (tokenizer, tokenizer_json, vocab_size) = load_chosen(&file, settings.vocab_size, &mut warnings)?;
    let tokens = special_tokens(&settings.folder)?;
    let eos = match token_id(&tokenizer, &tokens, "eos_token", settings)? {
        Some(eos) => Some(eos),
        None => end_of_text_id(&tokenizer, None)?,
    };
    let padding = token_id(&tokenizer, &tokens, "pad_token", settings)?.or(eos).unwrap_or(0);
    let all = || train.iter().chain(&validation);
    let has_messages = all().any(|line| matches!(line.text, Text::Messages(_)));
    let template = has_messages.then(|| load_template(settings)).transpose()?;
    if eos.is_none() && all().any(|line| matches!(line.text, Text::Completion { .. })) {
        return Err(ChatError::NoEnd { folder: settings.folder.clone() });
    }
    let encoder = Encoder::new(&tokenizer, template.as_ref(), eos, settings.sequence_length)?;
    let total = all().count();
    let split = |lines: &[Conversation], split, done| {
        let examples = encode_all(&encoder, lines, |part| progress((done + part) as u64, total as u64))?;
        if examples.is_empty() {
            return Err(ChatError::NoExamples { split, lines: lines.len() });
        }
        Ok(ChatWindows::new(examples, settings.sequence_length, padding, settings.seed))
    };
    let train_rows = split(&train, "training", 0)?;
    let validation_rows = split(&validation, "validation", train.len())?;
    let kept = train_rows.examples() + validation_rows.examples();
    if kept < total as u64 {
        warnings.push(format!(
            "{} of {total} examples have no token of the assistant within {} tokens; conversations; they were left out: raise the sequence length to keep them",
            total as u64 - kept,
            settings.sequence_length
        ));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"chat");
    train_rows.hash_into(&mut hasher);
    validation_rows.hash_into(&mut hasher);
    Ok(Dataset {
        tokenizer_hash: Some(blake3::hash(&tokenizer_json).to_hex().to_string()),
        tokenizer: Some(tokenizer),
        tokenizer_json: Some(tokenizer_json),
        vocab_size,
        separator: eos,
        train: Rows::Chat(train_rows),
        validation: Rows::Chat(validation_rows),
        train_bytes: None,
        validation_bytes: None,
        dataset_hash: hasher.finalize().to_hex().to_string(),
        warnings,
    })
}

/// The lines of both splits.
fn read_splits(settings: &ChatSettings) -> Result<(Vec<Conversation>, Vec<Conversation>), ChatError> {
    let mut train = read_all(&settings.train, "training")?;
    if !settings.validation.is_empty() {
        return Ok((train, read_all(&settings.validation, "validation")?));
    }
    let fraction = settings.validation_fraction;
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(DataError::ValidationFraction(fraction).into());
    }
    let held_out = (train.len() as f64 * fraction) as usize;
    let validation = train.split_off(train.len() - held_out);
    Ok((train, validation))
}

/// The lines of all files, in order.
fn read_all(paths: &[PathBuf], split: &'static str) -> Result<Vec<Conversation>, ChatError> {
    let files = match source::list(paths, split)? {
        Files::Text(files) => files,
        Files::Tokens(files) => files.into_iter().map(|(path, _)| path).collect(),
    };
    let is_lines = |path: &PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("jsonl"));
    if let Some(path) = files.iter().find(|path| !is_lines(path)) {
        return Err(ChatError::NotJsonLines { path: path.clone() });
    }
    let mut lines = Vec::new();
    files.iter().try_for_each(|path| conversation::read(path, &mut lines))?;
    if lines.is_empty() {
        return Err(DataError::Empty { place: format!("all {split} sources together") }.into());
    }
    Ok(lines)
}

fn load_template(settings: &ChatSettings) -> Result<ChatTemplate, ChatError> {
    let template = ChatTemplate::load(&settings.folder)?;
    Ok(match settings.now {
        Some(seconds) => template.at(seconds),
        None => template,
    })
}

/// The id of a special token that the configuration names; none if it names none.
fn token_id(
    tokenizer: &Tokenizer,
    tokens: &SpecialTokens,
    which: &'static str,
    settings: &ChatSettings,
) -> Result<Option<u32>, ChatError> {
    let Some(token) = tokens.get(which) else { return Ok(None) };
    let unknown = || {
        let (token, path) = (token.chars().take(40).collect(), configuration_path(&settings.folder));
        ChatError::UnknownToken { which, token, path }
    };
    tokenizer.token_to_id(token).map(Some).ok_or_else(unknown)
}

/// The examples of all lines in their order, those without anything to learn left out. The first line that fails, fails.
fn encode_all(
    encoder: &Encoder,
    lines: &[Conversation],
    progress: impl Fn(usize),
) -> Result<Vec<Example>, ChatError> {
    let (mut examples, mut done) = (Vec::new(), 0);
    for batch in lines.chunks(BATCH) {
        let encoded: Vec<_> = batch.par_iter().map(|line| encoder.example(line)).collect();
        for example in encoded {
            examples.extend(example?);
        }
        done += batch.len();
        progress(done);
    }
    Ok(examples)
}

#[cfg(test)]
mod tests;
