//! Layering: defaults < file < `--set`, with every key and type checked where it was given.
//!
//! The list of known keys is the default config itself, serialised to JSON (which, unlike TOML, keeps absent optional
//! keys as `null`). A value's type is checked by reading a config made of that value alone: slower than one pass,
//! but the error then names the exact key and its origin, whatever the type.

use super::{Config, ConfigError, Origin};
use std::{fs::File, io::Read, path::Path, sync::LazyLock};
use toml::{Table, Value};

/// Longest config file accepted, in bytes.
const MAX_BYTES: u64 = 1 << 20;

impl Config {
    /// Reads `path`, applies the `section.key=value` texts of `sets` in order, fills in what derives from other values
    /// and validates the result.
    ///
    /// # Errors
    /// Any [`ConfigError`] but `Write`.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.into(), source };
        let mut bytes = Vec::new();
        File::open(path).map_err(read)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(ConfigError::TooLong { path: path.into(), limit: MAX_BYTES });
        }
        let text = String::from_utf8(bytes).map_err(|error| ConfigError::NotUtf8 {
            path: path.into(),
            offset: error.utf8_error().valid_up_to(),
        })?;
        Self::parse(&text, path, sets)
    }

    /// As [`Config::load`], from text already in memory; `path` names the run and is named in errors.
    ///
    /// # Errors
    /// Any [`ConfigError`] but `Read`, `TooLong`, `NotUtf8` and `Write`.
    pub fn parse(text: &str, path: &Path, sets: &[String]) -> Result<Self, ConfigError> {
        let file: Table = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.into(),
            line: error.span().map_or(1, |span| line_of(text, span.start)),
            problem: error.message().replace('\n', ", "),
        })?;
        let origin = Origin::File(path.into());
        let mut merged = Table::new();
        merge(&mut merged, file, &origin)?;
        for set in sets {
            merge(&mut merged, parse_set(set)?, &Origin::Set(set.clone()))?;
        }
        let mut config: Self = merged.try_into().map_err(|error: toml::de::Error| ConfigError::IllTyped {
            key: "config".into(),
            origin,
            problem: error.message().into(),
        })?;
        config.resolve(path);
        match config.init.from {
            // Its shape is not known yet: `import::complete` checks what depends on it.
            Some(_) => config.validate_settings()?,
            None => config.validate()?,
        }
        Ok(config)
    }

    /// Fills in what is derived from other values, so that the stored config stands alone.
    fn resolve(&mut self, path: &Path) {
        if self.run.name.is_empty() {
            self.run.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        }
        if self.run.out.as_os_str().is_empty() {
            self.run.out = Path::new("runs").join(&self.run.name);
        }
        // A model to start from brings its own.
        if self.init.from.is_none() {
            self.model.num_key_value_heads = Some(self.model.kv_heads());
            self.model.max_position_embeddings = Some(self.max_positions());
        }
    }
}

/// Line of a byte offset, counted from 1.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

/// Every key a config has, as `section.key`, in the order of the alphabet.
pub(super) static KNOWN_KEYS: LazyLock<Vec<String>> = LazyLock::new(|| {
    let defaults = serde_json::to_value(Config::default()).expect("the default config has no odd values");
    let sections = defaults.as_object().expect("a struct is an object");
    let keys_of = |(section, keys): (&String, &serde_json::Value)| {
        let keys = keys.as_object().expect("a section is a struct");
        keys.keys().map(|key| format!("{section}.{key}")).collect::<Vec<_>>()
    };
    sections.iter().flat_map(keys_of).collect()
});

/// Puts every value of `layer` over `merged`, after checking its key and type.
fn merge(merged: &mut Table, layer: Table, origin: &Origin) -> Result<(), ConfigError> {
    for (section, content) in layer {
        let is_section = KNOWN_KEYS.iter().any(|key| key.starts_with(&format!("{section}.")));
        let keys = match content {
            Value::Table(keys) if is_section => keys,
            other if is_section => {
                let problem = format!("found {}, expected a table such as [{section}]", other.type_str());
                return Err(ConfigError::IllTyped { key: section, origin: origin.clone(), problem });
            }
            other => {
                let nearest = nearest(&section, other.is_table());
                return Err(ConfigError::UnknownKey { key: section, origin: origin.clone(), nearest });
            }
        };
        for (key, value) in keys {
            let full = format!("{section}.{key}");
            if !KNOWN_KEYS.contains(&full) {
                let nearest = nearest(&full, false);
                return Err(ConfigError::UnknownKey { key: full, origin: origin.clone(), nearest });
            }
            let value = well_typed(&section, &key, value, origin)?;
            let known = merged.entry(section.as_str()).or_insert_with(|| Table::new().into());
            if let Value::Table(known) = known {
                known.insert(key, value);
            }
        }
    }
    Ok(())
}

/// `value` if `section.key` can hold it. On the command line, where quotes and brackets are a burden, also its text
/// as a string or as a list of one string.
fn well_typed(section: &str, key: &str, value: Value, origin: &Origin) -> Result<Value, ConfigError> {
    let error = match type_error(section, key, &value) {
        None => return Ok(value),
        Some(error) => error,
    };
    if let Origin::Set(text) = origin {
        let text = text.split_once('=').map_or("", |(_, text)| text.trim());
        let text = value.as_str().unwrap_or(text);
        let candidates = [Value::from(text), Value::from(vec![text])];
        let fits = |candidate: &Value| !value.is_array() && type_error(section, key, candidate).is_none();
        if let Some(candidate) = candidates.into_iter().find(fits) {
            return Ok(candidate);
        }
    }
    Err(ConfigError::IllTyped { key: format!("{section}.{key}"), origin: origin.clone(), problem: error })
}

/// What is wrong with the type of a value, if anything is: found and expected, in words.
fn type_error(section: &str, key: &str, value: &Value) -> Option<String> {
    let section_only = Table::from_iter([(key.to_owned(), value.clone())]);
    let alone = Table::from_iter([(section.to_owned(), Value::Table(section_only))]);
    let error = alone.try_into::<Config>().err()?;
    // The names of Rust's types mean nothing to who writes a config.
    let words = [
        ("expected usize", "expected a whole number of 0 or more"),
        ("expected u64", "expected a whole number of 0 or more"),
        ("expected f64", "expected a number"),
        ("expected a sequence", "expected a list"),
        ("expected path string", "expected a path"),
    ];
    let message = error.message().trim_end().replace('\n', ", ");
    Some(words.iter().fold(message, |message, (rust, plain)| message.replace(rust, plain)))
}

/// One `section.key=value` as a table of one value: TOML where it parses as such, else a string.
fn parse_set(text: &str) -> Result<Table, ConfigError> {
    let malformed = |problem| ConfigError::MalformedSet { text: text.into(), problem };
    let (path, value) = text.split_once('=').ok_or_else(|| malformed("it has no `=`"))?;
    let (path, value) = (path.trim(), value.trim());
    if path.is_empty() {
        return Err(malformed("it names no key"));
    }
    let is_section = KNOWN_KEYS.iter().any(|key| key.starts_with(&format!("{path}.")));
    if is_section {
        return Err(malformed("it names a section, not a key"));
    }
    // Only a document of this one key: a value with line breaks must not smuggle in others.
    let parsed = toml::from_str::<Table>(&format!("value = {value}")).ok().filter(|table| table.len() == 1);
    let value = match parsed.and_then(|mut table| table.remove("value")) {
        Some(value) => value,
        None if value.starts_with('[') => {
            return Err(malformed("its list is not TOML, as in [\"a.txt\", \"b.txt\"]"));
        }
        None => Value::from(value),
    };
    // The key of `a.b.c` is `b.c`: no section has it, so that deeper paths are reported as unknown keys.
    let (section, key) = match path.split_once('.') {
        Some((section, key)) => (section.trim(), key.trim()),
        None => return Ok(Table::from_iter([(path.to_owned(), value)])),
    };
    let keys = Table::from_iter([(key.to_owned(), value)]);
    Ok(Table::from_iter([(section.to_owned(), Value::Table(keys))]))
}

/// The known key, or section, closest to `given`. A key that is right but for its section counts as an exact match.
fn nearest(given: &str, is_section: bool) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let score = |known: &str| {
        let whole = strsim::normalized_damerau_levenshtein(given, known);
        let key_only = strsim::normalized_damerau_levenshtein(&last(given), &last(known));
        // The sum breaks ties between equal keys (`every`) by the section.
        whole.max(key_only) + 0.01 * whole
    };
    let section = |key: &String| key.split('.').next().unwrap_or_default().to_owned();
    let candidates: Vec<String> = match is_section {
        true => KNOWN_KEYS.iter().map(section).collect(),
        false => KNOWN_KEYS.clone(),
    };
    let best = candidates.into_iter().max_by(|a, b| score(a).total_cmp(&score(b)));
    best.unwrap_or_default()
}
