//! Typed look-ups in a JSON object, whose errors name the key.

use serde_json::{Map, Value};

use super::ConfigError;

/// A JSON object with typed look-ups; `null` counts as missing.
pub(super) struct Keys<'a> {
    /// Where the object lies in the file, ending in a dot if not at the top.
    pub(super) prefix: &'static str,
    pub(super) map: &'a Map<String, Value>,
}

pub(super) fn object<'a>(key: &str, value: &'a Value) -> Result<&'a Map<String, Value>, ConfigError> {
    value.as_object().ok_or_else(|| type_error(key.to_owned(), "an object", value))
}

fn type_error(key: String, expected: &'static str, value: &Value) -> ConfigError {
    let mut found = value.to_string();
    if found.len() > 60 {
        found = found.chars().take(60).chain("...".chars()).collect();
    }
    ConfigError::Type { key, expected, found }
}

impl<'a> Keys<'a> {
    pub(super) fn get<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(type_error(format!("{}{key}", self.prefix), expected, value)),
            },
        }
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.get(key, "a whole number", |v| v.as_u64().and_then(|v| usize::try_from(v).ok()))
    }

    pub(super) fn needed_size(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.size(key)?.ok_or(ConfigError::Missing { key })
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.get(key, "a number", Value::as_f64)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.get(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key, "a string", Value::as_str)
    }

    pub(super) fn ids(&self, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        self.get(key, "a token id or a list of token ids", |v| match v {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })
    }

    /// Token ids; the default only where the key is missing: `null` means none.
    pub(super) fn ids_or(&self, key: &str, default: Option<u32>) -> Result<Vec<u32>, ConfigError> {
        match self.map.contains_key(key) {
            true => Ok(self.ids(key)?.unwrap_or_default()),
            false => Ok(default.into_iter().collect()),
        }
    }

    pub(super) fn child(&self, key: &str, prefix: &'static str) -> Result<Option<Keys<'a>>, ConfigError> {
        Ok(self.get(key, "an object", Value::as_object)?.map(|map| Keys { prefix, map }))
    }

    pub(super) fn unsupported(
        &self,
        key: &str,
        found: impl ToString,
        supported: &'static str,
    ) -> ConfigError {
        ConfigError::Unsupported { key: format!("{}{key}", self.prefix), found: found.to_string(), supported }
    }
}
