//! Every way in which data can be unusable, each with the place where it was found and what to do about it.

use std::path::PathBuf;

/// Why a data set could not be prepared. Messages read `what; where; what to do`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused an operation.
    #[error("cannot {action}; {}; check that it exists, its permissions and the free space", path.display())]
    Io {
        /// What was attempted: "read", "write", ...
        action: &'static str,
        /// The file or folder concerned.
        path: PathBuf,
        /// The system's own reason.
        source: std::io::Error,
    },
    /// No path and no document was given.
    #[error("no {split} data was given; {split} sources; name at least one file or folder")]
    NoSources {
        /// "training" or "validation".
        split: &'static str,
    },
    /// A path leads nowhere.
    #[error("no such file or folder; {}; check the path", path.display())]
    Missing {
        /// The path as given.
        path: PathBuf,
    },
    /// A path is neither a known kind of file nor a folder.
    #[error("not usable as data; {}; give a .txt, .jsonl, .u16 or .u32 file or a folder", path.display())]
    UnknownKind {
        /// The path as given.
        path: PathBuf,
    },
    /// A folder holds no text.
    #[error(
        "no .txt or .jsonl file; folder {} (it holds: {}); give another folder, or name .u16 and .u32 files directly",
        path.display(), if found.is_empty() { "nothing".to_owned() } else { found.join(", ") }
    )]
    NothingUsable {
        /// The folder.
        path: PathBuf,
        /// A few of the other files found.
        found: Vec<String>,
    },
    /// Text and token files cannot be one data set.
    #[error("text and token files are mixed; {} and {}; give one kind only", text.display(), tokens.display())]
    Mixed {
        /// A text source.
        text: PathBuf,
        /// A token source.
        tokens: PathBuf,
    },
    /// A file, or everything that was given, holds nothing.
    #[error("no text or tokens in it; {place}; give data that is not empty")]
    Empty {
        /// The file, or which sources.
        place: String,
    },
    /// Text is not valid UTF-8.
    #[error("not UTF-8; {} at byte {offset}; convert the file to UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first bad byte, from the start of the file.
        offset: u64,
    },
    /// A line of a `.jsonl` file is not the JSON object that it should be.
    #[error("bad JSON ({source}); {} line {line}; write one object a line, its text field a string", path.display())]
    BadJson {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// An object of a `.jsonl` file lacks the text field.
    #[error("no field `{field}`; {} line {line}; add it, or set the text field to the one that holds the text", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// The field looked for.
        field: String,
    },
    /// A line of a `.jsonl` file is too long to be one document.
    #[error("line longer than {limit} bytes; {} line {line}; split the document", path.display())]
    LineTooLong {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// The longest line accepted, bytes.
        limit: u64,
    },
    /// A token file's length is not a whole number of tokens.
    #[error("length {length} is not a multiple of {width}; {}; the file is cut short or has another width", path.display())]
    TokenFileLength {
        /// The file.
        path: PathBuf,
        /// Its length, bytes.
        length: u64,
        /// Bytes a token.
        width: usize,
    },
    /// A token does not fit the vocabulary.
    #[error(
        "token {id} is outside the vocabulary of {vocab_size}; {split} token {position}; use the tokenizer that made the file, or its vocabulary size"
    )]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// Its index within the split.
        position: u64,
        /// Entries of the vocabulary.
        vocab_size: usize,
        /// "training" or "validation".
        split: &'static str,
    },
    /// A split is shorter than one window.
    #[error(
        "{tokens} tokens, but one window needs {needed}; {split} data; give more text, shorten the sequence length or change the validation fraction"
    )]
    TooFewTokens {
        /// "training" or "validation".
        split: &'static str,
        /// Tokens in the split.
        tokens: usize,
        /// Sequence length + 1.
        needed: usize,
    },
    /// The sequence length is unusable.
    #[error("sequence length {0} is not usable; sequence length; give a number from 1 to 2^24")]
    SequenceLength(usize),
    /// The validation fraction is unusable.
    #[error("{0} is not a fraction between 0 and 1; validation fraction; give, say, 0.05")]
    ValidationFraction(f64),
    /// `tokenizer.json` is truncated, foreign or far too large.
    #[error("not a readable tokenizer ({source}); {}; give a whole tokenizer.json of the `tokenizers` library", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// What the reader found.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The tokenizer failed on a text.
    #[error("the tokenizer failed ({source}); {doing}; check the tokenizer")]
    Tokenizer {
        /// "training it" or "encoding text".
        doing: &'static str,
        /// What it said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The tokenizer has more entries than the model.
    #[error("the tokenizer has {found} entries, the model {vocab_size}; {}; set the vocabulary size to {found}", path.display())]
    TokenizerTooLarge {
        /// The tokenizer's file.
        path: PathBuf,
        /// Entries of the tokenizer.
        found: usize,
        /// Entries of the model.
        vocab_size: usize,
    },
    /// A vocabulary of this size cannot be trained.
    #[error(
        "vocabulary of {asked} entries; tokenizer training; ask for {min} (256 bytes and the end of text) to {max}"
    )]
    VocabularySize {
        /// Entries asked for.
        asked: usize,
        /// Fewest possible.
        min: usize,
        /// Most accepted.
        max: usize,
    },
    /// The text has too few different words for the vocabulary.
    #[error(
        "the text yields only {found} vocabulary entries of {asked}; tokenizer training; ask for {found} or give more text"
    )]
    VocabularyNotFilled {
        /// Entries asked for.
        asked: usize,
        /// Entries that training found.
        found: usize,
    },
    /// The document separator named in the settings is no token.
    #[error("no token `{name}` in the tokenizer; document separator; name one of its tokens")]
    UnknownSeparator {
        /// The name as given.
        name: String,
    },
    /// Text needs a tokenizer, token files cannot train one.
    #[error("{what}; tokenizer choice; {fix}")]
    TokenizerChoice {
        /// What does not fit.
        what: &'static str,
        /// What to choose.
        fix: &'static str,
    },
}

impl DataError {
    /// An adapter for `map_err` on I/O results.
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
