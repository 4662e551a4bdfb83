//! A model's chat template: from messages to the text that the model is trained on.
//!
//! Templates are Jinja, written for the `transformers` library; they are rendered here as that library does, and bounded,
//! since they come with models from elsewhere: in work and memory by fuel, in output by length, and they can read
//! nothing but what they are given. `guard` keeps them from the end of the stack.

use super::super::DataError;
use super::conversation::Message;
use super::error::ChatError;
use super::functions;
use super::guard::{self, guarded};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::{ErrorKind as IoKind, Read};
use std::path::{Path, PathBuf};

/// The file that holds nothing but the template; it goes before the configuration's.
const TEMPLATE: &str = "chat_template.jinja";
/// The file that names special tokens and may hold the template.
pub const CONFIGURATION: &str = "tokenizer_config.json";
/// Longest of these files, bytes; the longest in use have about one million.
const MAX_FILE: u64 = 16 << 20;
/// Instructions, and blocks of 64 bytes, that one rendering may take: some ten thousand messages, 128 MiB.
const FUEL: u64 = 2_000_000;
/// Longest text that a conversation may become, bytes.
const MAX_TEXT: usize = 16 << 20;
/// Nesting of macros and loops, far below what overflows a thread's stack.
const MAX_NESTING: usize = 100;

/// The special tokens that a tokenizer's configuration names, as text.
#[derive(Debug, Clone, Default)]
pub(super) struct SpecialTokens(BTreeMap<&'static str, String>);

impl SpecialTokens {
    /// The token of a name such as `eos_token`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// What is read of `tokenizer_config.json`.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Configuration {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

impl Configuration {
    /// The one of a folder; nothing is named where there is none.
    fn read(folder: &Path) -> Result<Self, ChatError> {
        let path = folder.join(CONFIGURATION);
        let Some(text) = read_bounded(&path)? else { return Ok(Self::default()) };
        serde_json::from_str(&text)
            .map_err(|error| ChatError::Configuration { path, reason: error.to_string() })
    }

    fn tokens(&mut self) -> SpecialTokens {
        let named = [
            ("bos_token", self.bos_token.take()),
            ("eos_token", self.eos_token.take()),
            ("unk_token", self.unk_token.take()),
            ("pad_token", self.pad_token.take()),
        ];
        let text = |token| match token {
            Token::Text(content) | Token::Added { content } => content,
        };
        SpecialTokens(named.into_iter().filter_map(|(name, token)| Some((name, text(token?)))).collect())
    }
}

/// The special tokens that a folder's `tokenizer_config.json` names; none if there is no such file.
pub(super) fn special_tokens(folder: &Path) -> Result<SpecialTokens, ChatError> {
    Ok(Configuration::read(folder)?.tokens())
}

/// The configuration's file in a folder.
pub(super) fn configuration_path(folder: &Path) -> PathBuf {
    folder.join(CONFIGURATION)
}

/// Name and text of the files in a folder that say how its tokenizer is used and how conversations are written, of those that
/// there are.
///
/// # Errors
/// `Configuration` and `Data` where one cannot be used: not a file, not UTF-8, longer than 16 MiB.
pub fn configuration_files(folder: &Path) -> Result<Vec<(&'static str, String)>, ChatError> {
    let read = |name| Ok(read_bounded(&folder.join(name))?.map(|text| (name, text)));
    [CONFIGURATION, TEMPLATE].into_iter().filter_map(|name| read(name).transpose()).collect()
}

/// A text file of at most [`MAX_FILE`] bytes, or none.
fn read_bounded(path: &Path) -> Result<Option<String>, ChatError> {
    let refused = |reason: String| ChatError::Configuration { path: path.to_path_buf(), reason };
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == IoKind::NotFound => return Ok(None),
        metadata => metadata.map_err(DataError::io("read", path))?,
    };
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(refused("not a file of at most 16 MiB".into()));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(DataError::io("open", path))?;
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(DataError::io("read", path))?;
    String::from_utf8(bytes).map(Some).map_err(|error| refused(error.to_string()))
}

/// A chat template with the special tokens that it may write.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: SpecialTokens,
    path: PathBuf,
}

impl ChatTemplate {
    /// The template of a model's folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`, a
    /// template or a list of named ones of which `default` is taken. `bos_token`, `eos_token`, `unk_token` and
    /// `pad_token` of the latter are known to the template; each is a text or an object with the text in `content`.
    ///
    /// # Errors
    /// `NoTemplate`; `Template` where it is no Jinja; `Configuration` and `Data` where a file cannot be used.
    pub fn load(folder: &Path) -> Result<Self, ChatError> {
        let mut configuration = Configuration::read(folder)?;
        let path = folder.join(TEMPLATE);
        let (source, path) = match (read_bounded(&path)?, configuration.chat_template.take()) {
            (Some(source), _) => (Some(source), path),
            (None, Some(Templates::One(source))) => (Some(source), configuration_path(folder)),
            (None, Some(Templates::Named(all))) => {
                let default = all.into_iter().find(|named| named.name == "default");
                (default.map(|named| named.template), configuration_path(folder))
            }
            (None, None) => (None, path),
        };
        let source = source.ok_or_else(|| ChatError::NoTemplate { folder: folder.to_path_buf() })?;
        Self::new(&source, path, configuration.tokens())
    }

    fn new(source: &str, path: PathBuf, tokens: SpecialTokens) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_NESTING);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        functions::add(&mut environment);
        guard::add(&mut environment);
        let bad = |source| ChatError::Template { path: path.clone(), source: Box::new(source) };
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(bad)?;
        let source = guarded(source, &syntax).map_err(bad)?;
        environment.set_syntax(syntax);
        environment.add_template_owned(TEMPLATE, source).map_err(bad)?;
        Ok(Self { environment, tokens, path })
    }

    /// Fixes the time that the template is told (`strftime_now`), in seconds since 1970; without this it is the time
    /// of rendering. In either case it is UTC's: a template that writes the date gives other tokens on another day.
    #[must_use]
    pub fn at(mut self, seconds: i64) -> Self {
        functions::set_clock(&mut self.environment, Some(seconds));
        self
    }

    /// The file that the template is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text of a conversation; `add_generation_prompt` appends what comes before an answer.
    ///
    /// # Errors
    /// The template fails, by its own decision or for a fault, takes too long, or writes more than 16 MiB.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, Error> {
        let value = |message: &Message| {
            let parts = [("role", message.role.as_str()), ("content", message.content.as_str())];
            Value::from_pairs(parts)
        };
        let named = [
            ("messages", Value::from(messages.iter().map(value).collect::<Vec<_>>())),
            ("add_generation_prompt", add_generation_prompt.into()),
        ];
        let tokens = self.tokens.0.iter().map(|(name, token)| (*name, Value::from(token.as_str())));
        let context = Value::from_pairs(named.into_iter().chain(tokens));
        let text = self.environment.get_template(TEMPLATE)?.render(context)?;
        if text.len() > MAX_TEXT {
            return Err(Error::new(ErrorKind::OutOfFuel, "the text is longer than 16 MiB"));
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
