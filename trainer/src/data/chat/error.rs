//! Every way in which conversations can be unusable.

use super::super::DataError;
use std::path::PathBuf;

/// Why conversations could not be prepared. Messages read `what; where; what to do`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The files or the tokenizer.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A file of another kind.
    #[error("conversations are read from .jsonl only; {}; convert it", path.display())]
    NotJsonLines {
        /// The file.
        path: PathBuf,
    },
    /// A line is not JSON.
    #[error("not JSON ({source}); {place}; write one object a line")]
    NotJson {
        /// File and line.
        place: Place,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// A line is JSON of another shape.
    #[error(
        "not a conversation ({source}); {place}; write `messages` as a list of `role` and `content`, both strings, or `prompt` and `completion`, both strings"
    )]
    Shape {
        /// File and line.
        place: Place,
        /// What the parser found.
        source: serde_json::Error,
    },
    /// A line has no form that is known.
    #[error("neither `messages` nor `prompt` and `completion`; {place}; write one of the two forms")]
    NeitherForm {
        /// File and line.
        place: Place,
    },
    /// There is nothing to learn in a line.
    #[error("{what} is empty; {place}; fill it in or remove the line")]
    Empty {
        /// What it is that is empty.
        what: &'static str,
        /// File and line.
        place: Place,
    },
    /// A conversation that nobody answers.
    #[error(
        "no message of the role `assistant` (roles: {roles}); {place}; rename the role or remove the line"
    )]
    NoAssistant {
        /// The roles that there are.
        roles: String,
        /// File and line.
        place: Place,
    },
    /// A conversation longer than any.
    #[error("{found} messages, more than {limit}; {place}; split the conversation")]
    TooManyMessages {
        /// Messages in the line.
        found: usize,
        /// The most accepted.
        limit: usize,
        /// File and line.
        place: Place,
    },
    /// There is no template.
    #[error(
        "no chat template; {}; put a chat_template.jinja there, or `chat_template` into its tokenizer_config.json", folder.display()
    )]
    NoTemplate {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A file beside the tokenizer is damaged.
    #[error("not a usable tokenizer configuration ({reason}); {}; copy it again from where the model was made", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A template that is no template.
    #[error("the chat template cannot be read ({source}); {}; correct it", path.display())]
    Template {
        /// The template's file.
        path: PathBuf,
        /// What the reader found.
        source: Box<minijinja::Error>,
    },
    /// A template that refuses a conversation.
    #[error("the chat template {} fails ({source}); {place} message {message}; change the conversation or the template", template.display())]
    Render {
        /// The template's file.
        template: PathBuf,
        /// File and line.
        place: Place,
        /// The last of the messages that it was given, from 1.
        message: usize,
        /// What it said.
        source: Box<minijinja::Error>,
    },
    /// A template that passes over a message.
    #[error(
        "the chat template {} leaves the message out, its role is `{role}`; {place} message {message}; use a role that the template knows", template.display()
    )]
    UnknownRole {
        /// The template's file.
        template: PathBuf,
        /// The message's role.
        role: String,
        /// File and line.
        place: Place,
        /// Its number, from 1.
        message: usize,
    },
    /// A template that writes a turn in another way once something follows, so that no tokens are the assistant's.
    #[error(
        "the chat template {} does not only append: {what}; {place} message {message}; use a template that writes each message once and for all", template.display()
    )]
    NotAppending {
        /// The template's file.
        template: PathBuf,
        /// Which text does not begin with which.
        what: &'static str,
        /// File and line.
        place: Place,
        /// The assistant's message, from 1.
        message: usize,
    },
    /// A token that the tokenizer lacks.
    #[error("{which} `{token}` is not in the tokenizer; {}; use files of one model", path.display())]
    UnknownToken {
        /// `eos_token`, `pad_token`.
        which: &'static str,
        /// The token as written.
        token: String,
        /// The configuration.
        path: PathBuf,
    },
    /// Nothing to end a completion with.
    #[error("no token that ends a completion; {}; name `eos_token` in its tokenizer_config.json", folder.display())]
    NoEnd {
        /// The model's folder.
        folder: PathBuf,
    },
    /// A split without any example.
    #[error(
        "no example is left of {lines}; {split} data; give more, raise the sequence length or change the validation fraction"
    )]
    NoExamples {
        /// "training" or "validation".
        split: &'static str,
        /// Lines that the split had.
        lines: usize,
    },
}

/// A line of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// Line number, from 1.
    pub line: u64,
}

impl std::fmt::Display for Place {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{} line {}", self.path.display(), self.line)
    }
}
