//! What can be wrong with a config, each message naming the key, where it was given and what to do.

use std::{fmt, io, path::PathBuf};

/// Where a value was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The config file at this path.
    File(PathBuf),
    /// The command line: the text after `--set`.
    Set(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Set(text) => write!(f, "--set {text}"),
        }
    }
}

/// A config that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the config; {}; check the path and its permissions", path.display())]
    Read {
        /// The config file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is too long to be a config.
    #[error("the config is longer than {limit} bytes; {}; is this the right file?", path.display())]
    TooLong {
        /// The config file.
        path: PathBuf,
        /// Largest size accepted, in bytes.
        limit: u64,
    },
    /// The file is not UTF-8.
    #[error("the config is not UTF-8; {} at byte {offset}; save it as UTF-8 text", path.display())]
    NotUtf8 {
        /// The config file.
        path: PathBuf,
        /// Offset of the first bad byte.
        offset: usize,
    },
    /// The file is not TOML.
    #[error("not TOML: {problem}; {} line {line}; correct that line", path.display())]
    Syntax {
        /// The config file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// What the parser found.
        problem: String,
    },
    /// A `--set` that is not `section.key=value`.
    #[error("cannot use this override: {problem}; --set {text}; write section.key=value, a value in TOML")]
    MalformedSet {
        /// The text after `--set`.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A key no config has.
    #[error("unknown key `{key}`; {origin}; did you mean `{nearest}`?")]
    UnknownKey {
        /// The key as given, with its section.
        key: String,
        /// Where it was given.
        origin: Origin,
        /// The known key closest to it.
        nearest: String,
    },
    /// A value of the wrong type, or a word that is none of the choices.
    #[error("bad value for `{key}`: {problem}; {origin}; give a value of the expected kind")]
    IllTyped {
        /// The key, with its section.
        key: String,
        /// Where it was given.
        origin: Origin,
        /// What was found and what was expected.
        problem: String,
    },
    /// A number outside of its range.
    #[error("`{key}` = {value} is out of range; [{}]; give {allowed}", section(key))]
    OutOfRange {
        /// The key, with its section.
        key: &'static str,
        /// The value found.
        value: String,
        /// The range, in words.
        allowed: String,
    },
    /// A size that another one does not divide.
    #[error(
        "`{key}` = {value} is not divisible by {by} = {divisor}; [{}]; change one of the two",
        section(key)
    )]
    NotDivisible {
        /// The key of the dividend, with its section.
        key: &'static str,
        /// The dividend.
        value: usize,
        /// The key of the divisor, or what it is.
        by: &'static str,
        /// The divisor.
        divisor: usize,
    },
    /// Two values that contradict each other.
    #[error("`{key}` = {value} contradicts `{other}` = {other_value}; [{}]; {rule}", section(key))]
    Conflict {
        /// The key at fault, with its section.
        key: &'static str,
        /// Its value.
        value: String,
        /// The other key, with its section.
        other: &'static str,
        /// The other value.
        other_value: String,
        /// The rule the two break, as what to do.
        rule: &'static str,
    },
    /// The config cannot be written as TOML.
    #[error("the config cannot be written as TOML; resolved config; use UTF-8 paths and integers below 2^63")]
    Write(#[source] toml::ser::Error),
}

/// The section of a dotted key.
fn section(key: &str) -> &str {
    key.split('.').next().unwrap_or(key)
}
