//! Which projections `modules_to_not_convert` names, by transformers' rule (`should_convert_module`).

use regex::RegexSetBuilder;

use super::ModelConfig;

/// Longest text of patterns that are no full names, in bytes: a thousand times what anyone writes.
const MAX_PATTERN_BYTES: usize = 1 << 16;

/// Full module name of a projection of layer `index`.
pub(super) fn full_name(index: usize, projection: &str) -> String {
    format!("model.layers.{index}.{projection}")
}

/// Whether a full module name is one of a projection of this model.
pub(super) fn is_projection(config: &ModelConfig, name: &str) -> bool {
    let Some((index, projection)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
    else {
        return false;
    };
    let known = config.projections().iter().any(|(known, _, _)| *known == projection);
    // Written back: "01" and "+1" are no layer's index.
    let index = index.parse().ok().filter(|index| *index < config.num_hidden_layers);
    known && index.is_some_and(|index| full_name(index, projection) == name)
}

/// Which modules a list keeps dense: a module whose name ends with an entry, or begins with a match of the entry as a
/// regular expression that ends where a part of the name does (`model.layers.1` keeps all of layer 1, none of layer 11).
pub(super) struct Kept<'a> {
    entries: Vec<&'a str>,
    patterns: regex::RegexSet,
}

impl<'a> Kept<'a> {
    /// Takes the entries that are not a full name of a projection; `None` if they are too many or not regular expressions.
    pub(super) fn new(entries: Vec<&'a str>) -> Option<Self> {
        if entries.iter().map(|entry| entry.len()).sum::<usize>() > MAX_PATTERN_BYTES {
            return None;
        }
        let patterns = entries.iter().map(|entry| format!("^(?:{entry})$"));
        let patterns = RegexSetBuilder::new(patterns).build().ok()?;
        Some(Self { entries, patterns })
    }

    /// Whether the list keeps this module.
    pub(super) fn has(&self, module: &str) -> bool {
        if self.entries.iter().any(|entry| module.ends_with(entry)) {
            return true;
        }
        // Where a match may end: after a dot, before one, and at the end.
        let dots = module.match_indices('.').flat_map(|(at, _)| [at, at + 1]);
        dots.chain([module.len()]).any(|end| self.patterns.is_match(&module[..end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python's `re` answers to transformers' expression, for each pair.
    #[test]
    fn modules_are_kept_as_in_transformers() {
        let name = "model.layers.11.mlp.down_proj";
        for (entry, kept) in [
            (name, true),
            ("down_proj", true),
            ("proj", true),
            ("", true),
            ("model.layers.1", false),
            ("model.layers.11", true),
            ("model.layers.11.", true),
            ("model.layers.1.", true), // the last dot is any character
            ("model.layers.1.mlp", false),
            ("layers.11", false),
            ("model.layers.11.mlp.down", false),
            ("model.layers.11.ml", false),
            (".*", true),
            ("model.*mlp", true),
            (r"model\.layers\.\d+\.mlp", true),
            (r"model\.layers\.(0|11)", true),
            ("lm_head|model", true),
            ("lm_head|mod", false),
            ("lm_head", false),
            ("model.layers.[0-9].mlp", false),
        ] {
            assert_eq!(Kept::new(vec!["lm_head", entry]).unwrap().has(name), kept, "{entry}");
        }
        assert!(Kept::new(vec!["("]).is_none());
        assert!(Kept::new(vec!["x{1000}{1000}{1000}"]).is_none());
        assert!(Kept::new(vec!["a"; MAX_PATTERN_BYTES + 1]).is_none());
    }
}
