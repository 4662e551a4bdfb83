//! From files to training windows: read, split, tokenize once, memory-map, shuffle by seed.
//!
//! [`prepare`] does it all. Text is held in memory while it is read and hashed; its tokens are kept in a cache folder
//! under the hash of everything that they depend on, so the second run with the same data starts at once.
//!
//! Text formats: `.txt`, `.jsonl`, folders of these. Token files (`.u16`, `.u32`, little-endian) are mapped as they are
//! and must not be changed during a run.
//!
//! Conversations for fine-tuning are a kind of their own: [`chat`].

mod batch;
mod cache;
pub mod chat;
mod encode;
mod error;
mod rows;
pub(crate) mod source;
mod tokenizer;
mod tokens;
mod windows;

pub use batch::{Batch, Reduction};
pub use chat::ChatWindows;
pub use error::DataError;
pub use rows::Rows;
pub use source::{DocumentSplit, Width, is_token_file};
pub use tokenizer::{END_OF_TEXT, end_of_text_id, token_byte_table, token_bytes, vocabulary_size};
pub use tokenizer::{load as load_tokenizer, train as train_tokenizer};
pub use tokens::Tokens;
pub use windows::{Sampler, Windows, epoch_order};

use serde::{Deserialize, Serialize};
use source::Files;
use std::path::PathBuf;
use tokenizers::Tokenizer;

/// Part of every cache name: to be raised when the same input would give other tokens or another layout.
const CACHE_FORMAT: &str = "data cache 1";

/// Where text or tokens come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Files and folders: text, or token files, not both.
    Paths(Vec<PathBuf>),
    /// Documents in memory, such as the embedded corpus.
    Documents(Vec<String>),
}

/// Which tokenizer to use.
#[derive(Debug, Clone)]
pub enum TokenizerChoice {
    /// A `tokenizer.json`. `vocab_size` is the model's, where that is fixed; it may exceed the tokenizer's.
    File {
        /// The file.
        path: PathBuf,
        /// Entries of the model's vocabulary, or none to take the tokenizer's.
        vocab_size: Option<usize>,
    },
    /// Train one on the training text.
    Train {
        /// Entries, at least 257.
        vocab_size: usize,
    },
    /// None: token files only.
    None {
        /// Entries of the vocabulary that the token files were made with.
        vocab_size: usize,
    },
}

/// What [`prepare`] needs to know.
#[derive(Debug, Clone)]
pub struct DataSettings {
    /// Training data, and validation data too unless given apart.
    pub train: Source,
    /// Validation data given apart.
    pub validation: Option<Source>,
    /// Without `validation`: the share of the training data at its end that is held out, `0 < f < 1`. Of text,
    /// `floor(bytes * f)` bytes; of token files, `floor(tokens * f)` tokens.
    pub validation_fraction: f64,
    /// The field of a `.jsonl` object that holds the text.
    pub text_field: String,
    /// How `.txt` files become documents.
    pub document_split: DocumentSplit,
    /// The tokenizer.
    pub tokenizer: TokenizerChoice,
    /// The token put after each document, by name; see [`end_of_text_id`].
    pub separator: Option<String>,
    /// T, tokens in a window.
    pub sequence_length: usize,
    /// Folder for tokenized text and trained tokenizers; made when missing.
    pub cache_dir: PathBuf,
}

/// Everything training needs of its data.
#[derive(Debug)]
pub struct Dataset {
    /// The tokenizer, unless there are only token files.
    pub tokenizer: Option<Tokenizer>,
    /// The bytes of its `tokenizer.json`, to be kept with the run.
    pub tokenizer_json: Option<Vec<u8>>,
    /// Entries of the model's vocabulary; every token is below it.
    pub vocab_size: usize,
    /// The token after each document.
    pub separator: Option<u32>,
    /// Training rows.
    pub train: Rows,
    /// Validation rows.
    pub validation: Rows,
    /// Bytes of text behind the training tokens, separators counting 0; unknown without a tokenizer.
    pub train_bytes: Option<u64>,
    /// Bytes of text behind the validation tokens.
    pub validation_bytes: Option<u64>,
    /// blake3 of the contents of both splits, hex.
    pub dataset_hash: String,
    /// blake3 of `tokenizer_json`, hex.
    pub tokenizer_hash: Option<String>,
    /// What the user should hear of, worded as errors are.
    pub warnings: Vec<String>,
}

/// A tokenizer with the bytes of its file and the model's vocabulary size.
type Chosen = (Tokenizer, Vec<u8>, usize);

/// Both splits as tokens.
struct Splits {
    train: Tokens,
    validation: Tokens,
    train_bytes: Option<u64>,
    validation_bytes: Option<u64>,
    hash: String,
}

/// Reads, splits, tokenizes (or takes from the cache) and checks the data.
///
/// `progress(done, total)` is called while text is tokenized, in bytes of text; a cache hit does not call it.
///
/// # Errors
/// Every [`DataError`]; each names the file or setting. Nothing is left in the cache by a failure.
pub fn prepare(settings: &DataSettings, progress: &dyn Fn(u64, u64)) -> Result<Dataset, DataError> {
    let fraction = settings.validation_fraction;
    if settings.validation.is_none() && !(fraction > 0.0 && fraction < 1.0) {
        return Err(DataError::ValidationFraction(fraction));
    }
    windows::check_length(settings.sequence_length)?;
    let mut warnings = Vec::new();
    let train = load_source(&settings.train, "training", settings, &mut warnings)?;
    let validation = settings
        .validation
        .as_ref()
        .map(|source| load_source(source, "validation", settings, &mut warnings))
        .transpose()?;
    let (chosen, vocab_size, splits) = match (train, validation) {
        (Loaded::Text(train), None) => {
            text(settings, source::split_documents(train, fraction), progress, &mut warnings)?
        }
        (Loaded::Text(train), Some(Loaded::Text(validation))) => {
            text(settings, (train, validation), progress, &mut warnings)?
        }
        (Loaded::Tokens(train), None) => {
            let held_out = (train.len() as f64 * fraction) as usize;
            token_files(settings, train.split_at(train.len() - held_out), &mut warnings)?
        }
        (Loaded::Tokens(train), Some(Loaded::Tokens(validation))) => {
            token_files(settings, (train, validation), &mut warnings)?
        }
        (Loaded::Tokens(train), Some(Loaded::Text(validation)))
            if matches!(settings.tokenizer, TokenizerChoice::File { .. }) =>
        {
            let validation = encoded(settings, &validation)?;
            token_files(settings, (train, validation), &mut warnings)?
        }
        _ => {
            let what = "one of training and validation data is text, the other token files";
            let fix = "give one kind only, or token files to train on and the tokenizer.json that made them";
            return Err(DataError::TokenizerChoice { what, fix });
        }
    };
    splits.train.check(vocab_size, "training")?;
    splits.validation.check(vocab_size, "validation")?;
    let separator = match &chosen {
        Some((tokenizer, ..)) => end_of_text_id(tokenizer, settings.separator.as_deref())?,
        None => None,
    };
    let (tokenizer, tokenizer_json) = chosen.map(|(tokenizer, json, _)| (tokenizer, json)).unzip();
    Ok(Dataset {
        vocab_size,
        separator,
        train: Rows::Text(Windows::new(splits.train, settings.sequence_length, "training")?),
        validation: Rows::Text(Windows::new(splits.validation, settings.sequence_length, "validation")?),
        train_bytes: splits.train_bytes,
        validation_bytes: splits.validation_bytes,
        dataset_hash: splits.hash,
        tokenizer_hash: tokenizer_json.as_ref().map(|json| blake3::hash(json).to_hex().to_string()),
        tokenizer,
        tokenizer_json,
        warnings,
    })
}

enum Loaded {
    Text(Vec<String>),
    Tokens(Tokens),
}

fn load_source(
    source: &Source,
    split: &'static str,
    settings: &DataSettings,
    warnings: &mut Vec<String>,
) -> Result<Loaded, DataError> {
    let documents = match source {
        Source::Documents(documents) => {
            documents.iter().filter(|document| !document.is_empty()).cloned().collect()
        }
        Source::Paths(paths) => match source::list(paths, split)? {
            Files::Text(files) => {
                source::read_documents(&files, &settings.text_field, settings.document_split, warnings)?
            }
            Files::Tokens(files) => {
                return Ok(Loaded::Tokens(join_token_files(&files, settings, warnings)?));
            }
        },
    };
    if documents.is_empty() {
        return Err(DataError::Empty { place: format!("all {split} sources together") });
    }
    Ok(Loaded::Text(documents))
}

/// The tokens of all files in order: one file is mapped as it is, several are joined in the cache.
fn join_token_files(
    files: &[(PathBuf, Width)],
    settings: &DataSettings,
    warnings: &mut Vec<String>,
) -> Result<Tokens, DataError> {
    let mut parts =
        files.iter().map(|(path, width)| Tokens::open(path, *width)).collect::<Result<Vec<_>, _>>()?;
    if parts.len() == 1 {
        return Ok(parts.remove(0));
    }
    let narrow = files.iter().all(|(_, width)| *width == Width::U16);
    let width = if narrow { Width::U16 } else { Width::U32 };
    let mut hasher = blake3::Hasher::new();
    hasher.update(CACHE_FORMAT.as_bytes()).update(b"joined");
    parts.iter().for_each(|part| part.hash_into(&mut hasher));
    let name = format!("{}.tokens", hasher.finalize().to_hex());
    let (map, ()) = cache::entry(&settings.cache_dir, &name, warnings, |writer| {
        const STEP: usize = 1 << 20;
        for part in &parts {
            for start in (0..part.len()).step_by(STEP) {
                let ids = part.get(start..part.len().min(start + STEP));
                writer.write(&tokens::to_bytes(&ids, width))?;
            }
        }
        Ok(())
    })?;
    Ok(Tokens::mapped(map, width))
}

/// Validation text beside training tokens, by the tokenizer that made those.
fn encoded(settings: &DataSettings, documents: &[String]) -> Result<Tokens, DataError> {
    let TokenizerChoice::File { path, .. } = &settings.tokenizer else { return Ok(Tokens::from_ids(&[])) };
    let (tokenizer, _) = tokenizer::load(path)?;
    let separator = end_of_text_id(&tokenizer, settings.separator.as_deref())?;
    let mut ids = Vec::new();
    encode::encode_documents(
        &tokenizer,
        documents,
        separator,
        |_| (),
        |part| {
            ids.extend_from_slice(part);
            Ok(())
        },
    )?;
    Ok(Tokens::from_ids(&ids))
}

/// Token files as they are; with a tokenizer their bytes are counted.
fn token_files(
    settings: &DataSettings,
    (train, validation): (Tokens, Tokens),
    warnings: &mut Vec<String>,
) -> Result<(Option<Chosen>, usize, Splits), DataError> {
    let chosen = match &settings.tokenizer {
        TokenizerChoice::File { path, vocab_size } => Some(load_chosen(path, *vocab_size, warnings)?),
        TokenizerChoice::None { .. } => None,
        TokenizerChoice::Train { .. } => {
            let fix = "name the tokenizer.json that made the files, or none and the vocabulary size";
            return Err(DataError::TokenizerChoice { what: "token files cannot train a tokenizer", fix });
        }
    };
    let vocab_size = match (&chosen, &settings.tokenizer) {
        (Some((_, _, vocab_size)), _)
        | (None, TokenizerChoice::None { vocab_size } | TokenizerChoice::Train { vocab_size }) => *vocab_size,
        (None, TokenizerChoice::File { .. }) => unreachable!("a file is loaded above"),
    };
    let table = chosen.as_ref().map(|(tokenizer, ..)| token_byte_table(tokenizer));
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"tokens");
    train.hash_into(&mut hasher);
    validation.hash_into(&mut hasher);
    let splits = Splits {
        train_bytes: table.as_ref().map(|table| train.text_bytes(table)),
        validation_bytes: table.as_ref().map(|table| validation.text_bytes(table)),
        hash: hasher.finalize().to_hex().to_string(),
        train,
        validation,
    };
    Ok((chosen, vocab_size, splits))
}

/// What a cached file of tokenized text says about itself.
#[derive(Serialize, Deserialize)]
struct TokenNotes {
    /// Tokens of the training part, which comes first.
    train_tokens: u64,
}

/// Text to tokens, through the cache.
fn text(
    settings: &DataSettings,
    (train, validation): (Vec<String>, Vec<String>),
    progress: &dyn Fn(u64, u64),
    warnings: &mut Vec<String>,
) -> Result<(Option<Chosen>, usize, Splits), DataError> {
    let (train_hash, validation_hash) = (hash_documents(&train), hash_documents(&validation));
    let mut hasher = blake3::Hasher::new();
    let hash =
        hasher.update(b"text").update(train_hash.as_bytes()).update(validation_hash.as_bytes()).finalize();
    let (tokenizer, json, vocab_size) = match &settings.tokenizer {
        TokenizerChoice::File { path, vocab_size } => load_chosen(path, *vocab_size, warnings)?,
        TokenizerChoice::Train { vocab_size } => {
            train_chosen(settings, &train, &train_hash, *vocab_size, warnings)?
        }
        TokenizerChoice::None { .. } => {
            let fix = "train one or name a tokenizer.json";
            return Err(DataError::TokenizerChoice { what: "text needs a tokenizer", fix });
        }
    };
    let separator = end_of_text_id(&tokenizer, settings.separator.as_deref())?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(CACHE_FORMAT.as_bytes()).update(b"tokens").update(hash.as_bytes());
    hasher
        .update(blake3::hash(&json).as_bytes())
        .update(&separator.map_or(u64::MAX, u64::from).to_le_bytes());
    let name = format!("{}.tokens", hasher.finalize().to_hex());
    let width = Width::for_vocabulary(vocabulary_size(&tokenizer));
    let size = |documents: &[String]| documents.iter().map(|document| document.len() as u64).sum::<u64>();
    let (train_bytes, validation_bytes) = (size(&train), size(&validation));
    let (map, notes) = cache::entry(&settings.cache_dir, &name, warnings, |writer| {
        let (mut done, mut count) = (0, 0);
        let mut part = |documents: &[String]| {
            let report = |bytes| {
                done += bytes as u64;
                progress(done, train_bytes + validation_bytes);
            };
            encode::encode_documents(&tokenizer, documents, separator, report, |ids| {
                count += ids.len() as u64;
                writer.write(&tokens::to_bytes(ids, width))
            })?;
            Ok(count)
        };
        let train_tokens = part(&train)?;
        part(&validation)?;
        Ok(TokenNotes { train_tokens })
    })?;
    let (train, validation) = Tokens::mapped(map, width).split_at(notes.train_tokens as usize);
    let splits = Splits {
        train,
        validation,
        train_bytes: Some(train_bytes),
        validation_bytes: Some(validation_bytes),
        hash: hash.to_hex().to_string(),
    };
    Ok((Some((tokenizer, json, vocab_size)), vocab_size, splits))
}

/// Loads a tokenizer and compares it with the model's vocabulary.
fn load_chosen(
    path: &std::path::Path,
    vocab_size: Option<usize>,
    warnings: &mut Vec<String>,
) -> Result<Chosen, DataError> {
    let (tokenizer, json) = tokenizer::load(path)?;
    let found = vocabulary_size(&tokenizer);
    let vocab_size = vocab_size.unwrap_or(found);
    if found > vocab_size {
        return Err(DataError::TokenizerTooLarge { path: path.to_path_buf(), found, vocab_size });
    }
    if found < vocab_size {
        let unused = vocab_size - found;
        warnings.push(format!(
            "the tokenizer has {found} entries, the model {vocab_size}; {}; {unused} rows of the embedding stay unused",
            path.display()
        ));
    }
    Ok((tokenizer, json, vocab_size))
}

/// Trains a tokenizer on the training text, or takes it from the cache.
fn train_chosen(
    settings: &DataSettings,
    train: &[String],
    train_hash: &blake3::Hash,
    vocab_size: usize,
    warnings: &mut Vec<String>,
) -> Result<Chosen, DataError> {
    if train.iter().map(String::len).sum::<usize>() > tokenizer::MAX_TRAINING_BYTES {
        let limit = tokenizer::MAX_TRAINING_BYTES >> 30;
        warnings.push(format!("more text than the tokenizer's training can count; training data; its first {limit} GiB were used"));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(CACHE_FORMAT.as_bytes()).update(b"tokenizer").update(train_hash.as_bytes());
    let name = format!("{}.tokenizer", hasher.update(&(vocab_size as u64).to_le_bytes()).finalize().to_hex());
    let (json, ()) = cache::entry(&settings.cache_dir, &name, warnings, |writer| {
        writer.write(&tokenizer::train(train, vocab_size)?.1)
    })?;
    let tokenizer = tokenizer::parse(&json).map_err(|source| {
        let path = settings.cache_dir.join(&name);
        DataError::BadTokenizer { path, source }
    })?;
    Ok((tokenizer, json.to_vec(), vocab_size))
}

/// blake3 of the documents and their boundaries.
fn hash_documents(documents: &[String]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for document in documents {
        hasher.update(&(document.len() as u64).to_le_bytes()).update(document.as_bytes());
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests;
