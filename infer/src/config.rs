//! A model's sizes and options, under the names of Hugging Face's `config.json`.
//!
//! What would change the arithmetic and is not implemented is refused by name; a key that cannot change it is ignored.
//! So a model that loads computes what its authors meant.

use bitlinear::kernels::MAX_IN_FEATURES;
use bitlinear::math::Activation;
use serde_json::{Map, Value, json};

/// Most layers that a config may ask for; the sizes of layers have a bound in [`MAX_IN_FEATURES`].
const MAX_LAYERS: usize = 1 << 16;
/// Largest vocabulary that a config may ask for.
const MAX_VOCAB: usize = i32::MAX as usize;
/// Longest context that a config may ask for: positions up to here are exact in f32.
const MAX_POSITIONS: usize = 1 << 24;

/// What is wrong with a `config.json`.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON.
    #[error("not valid JSON: {0}; write the file again")]
    Json(#[from] serde_json::Error),
    /// A key that has no default is not there.
    #[error("no value; key '{key}'; a model cannot be built without it")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value has the wrong type.
    #[error("{found} is not {expected}; key '{key}'; correct the value")]
    Type {
        /// The key.
        key: String,
        /// What was expected.
        expected: &'static str,
        /// The value found.
        found: String,
    },
    /// A value asks for arithmetic that is not implemented.
    #[error("{found} is not supported; key '{key}'; supported: {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// The value found.
        found: String,
        /// What is implemented.
        supported: &'static str,
    },
    /// A number is out of range.
    #[error("{found} is out of range; key '{key}'; must be {range}")]
    Range {
        /// The key.
        key: &'static str,
        /// The value found.
        found: String,
        /// The range.
        range: String,
    },
    /// Two sizes do not go together.
    #[error("{left} = {left_value} does not go with {right} = {right_value}; config; {rule}")]
    Mismatch {
        /// Name of the first.
        left: &'static str,
        /// Value of the first.
        left_value: usize,
        /// Name of the second.
        right: &'static str,
        /// Value of the second.
        right_value: usize,
        /// What must hold.
        rule: &'static str,
    },
}

/// How a checkpoint stores the weights of its seven projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// f32, bf16 or f16 weights, used as they are.
    Dense,
    /// f32, bf16 or f16 latent weights, ternarized when loaded (`autobitlinear`, online).
    Latent,
    /// Packed ternary codes and a scale that multiplies (`autobitlinear`, offline).
    PackedMultiply,
    /// Packed ternary codes and a scale that divides (`bitlinear`, also where `linear_class` is missing).
    PackedDivide,
}

/// Sizes and options of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// The epsilon of every norm.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    /// Longest context, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the head's weight is that of the embedding.
    pub tie_word_embeddings: bool,
    /// Activation function of the MLP.
    pub hidden_act: Activation,
    /// Norms before `o_proj` and `down_proj`: with them the model is `BitNetForCausalLM`, without `LlamaForCausalLM`.
    pub sub_norm: bool,
    /// Whether `q_proj`, `k_proj` and `v_proj` add a bias (Qwen2).
    pub qkv_bias: bool,
    /// Whether each head's queries and keys pass an RMSNorm over `head_dim` before the rotary embedding (Qwen3).
    pub qk_norm: bool,
    /// Whether the seven projections of a layer are ternary (W1.58A8); else they are dense f32.
    pub quantized: bool,
    /// Projections of a quantized model that stay dense, by full module name (`model.layers.0.mlp.down_proj`), sorted.
    pub modules_to_not_convert: Vec<String>,
    /// The token that starts a text, if any.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads a `config.json` of `BitNetForCausalLM` or `LlamaForCausalLM`, and how its checkpoint stores the weights.
    ///
    /// Optional keys that are missing take transformers' defaults of that architecture.
    ///
    /// # Errors
    /// The text is not a JSON object, a needed key is missing, or a value is ill-typed, out of range or not supported.
    pub fn from_json(text: &[u8]) -> Result<(Self, Storage), ConfigError> {
        let value: Value = serde_json::from_slice(text)?;
        let keys = Keys { prefix: "", map: object("config", &value)? };
        let sub_norm = architecture(&keys)?;
        refuse_unsupported(&keys)?;
        let storage = storage(&keys)?;
        let (default_theta, default_eps) = if sub_norm { (500_000.0, 1e-5) } else { (10_000.0, 1e-6) };
        let default_act = if sub_norm { Activation::Relu2 } else { Activation::Silu };
        let heads = keys.needed_size("num_attention_heads")?;
        let hidden_size = keys.needed_size("hidden_size")?;
        let vocab_size = keys.needed_size("vocab_size")?;
        // transformers writes its own models' ids into the configs of others: an id beyond the vocabulary means none.
        let known = |id: &u32| (*id as usize) < vocab_size;
        let config = Self {
            hidden_size,
            intermediate_size: keys.needed_size("intermediate_size")?,
            num_hidden_layers: keys.needed_size("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: keys.size("num_key_value_heads")?.unwrap_or(if sub_norm {
                5
            } else {
                heads
            }),
            head_dim: match keys.size("head_dim")? {
                Some(head_dim) => head_dim,
                None => hidden_size.checked_div(heads).unwrap_or(0),
            },
            vocab_size,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(default_eps) as f32,
            rope_theta: rope_theta(&keys)?.unwrap_or(default_theta) as f32,
            max_position_embeddings: keys.size("max_position_embeddings")?.unwrap_or(2048),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            hidden_act: activation(&keys)?.unwrap_or(default_act),
            sub_norm,
            qkv_bias: false,
            qk_norm: false,
            quantized: storage != Storage::Dense,
            modules_to_not_convert: Vec::new(),
            bos_token_id: keys.ids("bos_token_id")?.unwrap_or_default().first().copied().filter(known),
            eos_token_ids: keys.ids("eos_token_id")?.unwrap_or_default().into_iter().filter(known).collect(),
        };
        config.validate()?;
        Ok((config, storage))
    }

    /// Takes over the special tokens that a `generation_config.json` names: they come before those of `config.json`.
    ///
    /// # Errors
    /// The text is not a JSON object or an id is not a whole number.
    pub fn apply_generation_config(&mut self, text: &[u8]) -> Result<(), ConfigError> {
        let value: Value = serde_json::from_slice(text)?;
        let keys = Keys { prefix: "", map: object("generation config", &value)? };
        let known = |id: &u32| (*id as usize) < self.vocab_size;
        if let Some(ids) = keys.ids("bos_token_id")? {
            self.bos_token_id = ids.first().copied().filter(known);
        }
        if let Some(ids) = keys.ids("eos_token_id")? {
            self.eos_token_ids = ids.into_iter().filter(known).collect();
        }
        Ok(())
    }

    /// The `config.json` that transformers 5 reads, for a checkpoint that stores packed codes with a multiplying scale
    /// (or, if not quantized, dense f32).
    pub fn to_json(&self) -> Value {
        let (architecture, model_type) =
            if self.sub_norm { ("BitNetForCausalLM", "bitnet") } else { ("LlamaForCausalLM", "llama") };
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let mut config = json!({
            "architectures": [architecture],
            "model_type": model_type,
            "attention_bias": false,
            "bos_token_id": self.bos_token_id,
            "dtype": "float32",
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": self.hidden_act.name(),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": shortest(self.rms_norm_eps),
            // Both forms: transformers 5 reads the second, every other tool the first.
            "rope_theta": shortest(self.rope_theta),
            "rope_parameters": {"rope_type": "default", "rope_theta": shortest(self.rope_theta)},
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        });
        if self.quantized {
            // Without `linear_class` every reader would divide by the scale instead.
            config["quantization_config"] = json!({
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
                "modules_to_not_convert": null,
            });
        }
        config
    }

    /// Checks every size against its bounds and against the others.
    ///
    /// # Errors
    /// Names the first value that is out of range or that does not go with another.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_IN_FEATURES),
            ("intermediate_size", self.intermediate_size, MAX_IN_FEATURES),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, MAX_IN_FEATURES),
            ("num_key_value_heads", self.num_key_value_heads, MAX_IN_FEATURES),
            ("head_dim", self.head_dim, MAX_IN_FEATURES),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ];
        for (key, size, max) in sizes {
            if !(1..=max).contains(&size) {
                return Err(ConfigError::Range {
                    key,
                    found: size.to_string(),
                    range: format!("1 to {max}"),
                });
            }
        }
        for (key, value) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                let range = "positive and finite".to_owned();
                return Err(ConfigError::Range { key, found: value.to_string(), range });
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            let range = "even, for the rotary embedding".to_owned();
            return Err(ConfigError::Range { key: "head_dim", found: self.head_dim.to_string(), range });
        }
        let mismatch = |left, left_value, right, right_value, rule| {
            Err(ConfigError::Mismatch { left, left_value, right, right_value, rule })
        };
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let rule = "every key/value head serves the same number of query heads";
            return mismatch("num_attention_heads", heads, "num_key_value_heads", kv_heads, rule);
        }
        let attention_width = heads.checked_mul(self.head_dim).filter(|width| *width <= MAX_IN_FEATURES);
        let Some(attention_width) = attention_width else {
            let rule = "their product is too large";
            return mismatch("num_attention_heads", heads, "head_dim", self.head_dim, rule);
        };
        if self.sub_norm && attention_width != self.hidden_size {
            let rule = "with sub-norms, num_attention_heads * head_dim must equal hidden_size";
            return mismatch(
                "num_attention_heads * head_dim",
                attention_width,
                "hidden_size",
                self.hidden_size,
                rule,
            );
        }
        if self.parameters().is_none_or(|count| count > isize::MAX as u64 / 4) {
            let rule = "the model has more parameters than memory has addresses";
            return mismatch(
                "num_hidden_layers",
                self.num_hidden_layers,
                "hidden_size",
                self.hidden_size,
                rule,
            );
        }
        Ok(())
    }

    /// Whether a projection, by its full module name, is ternary.
    pub fn is_ternary(&self, module: &str) -> bool {
        self.quantized && !self.modules_to_not_convert.iter().any(|dense| dense == module)
    }

    /// Width of all query heads together: the input of `o_proj`.
    pub fn attention_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Name and shape `(name, out_features, in_features)` of the seven projections of a layer.
    pub fn projections(&self) -> [(&'static str, usize, usize); 7] {
        let (hidden, width, attention) = (self.hidden_size, self.intermediate_size, self.attention_width());
        [
            ("self_attn.q_proj", attention, hidden),
            ("self_attn.k_proj", self.kv_width(), hidden),
            ("self_attn.v_proj", self.kv_width(), hidden),
            ("self_attn.o_proj", hidden, attention),
            ("mlp.gate_proj", width, hidden),
            ("mlp.up_proj", width, hidden),
            ("mlp.down_proj", hidden, width),
        ]
    }

    /// Number of weights of the seven projections of all layers, which a quantized model has as ternary ones.
    pub fn ternary_parameters(&self) -> u64 {
        let layer = self.projections().into_iter().map(|(_, out, columns)| out as u64 * columns as u64);
        // It cannot overflow: `validate` counts all parameters.
        layer.sum::<u64>() * self.num_hidden_layers as u64
    }

    /// Number of weights, a tied head counted once; `None` if it does not fit.
    pub fn parameters(&self) -> Option<u64> {
        let count = |a: usize, b: usize| (a as u64).checked_mul(b as u64);
        let norms = 2 * self.hidden_size as u64
            + if self.sub_norm { (self.hidden_size + self.intermediate_size) as u64 } else { 0 };
        let layer = self
            .projections()
            .iter()
            .try_fold(norms, |sum, (_, out, columns)| sum.checked_add(count(*out, *columns)?))?;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        layer
            .checked_mul(self.num_hidden_layers as u64)?
            .checked_add(count(self.vocab_size, self.hidden_size)?.checked_mul(tables)?)?
            .checked_add(self.hidden_size as u64)
    }
}

/// The f64 that prints as short as this f32 does: 1e-5 and not 9.999999747378752e-6.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// A JSON object with typed look-ups; `null` counts as missing.
struct Keys<'a> {
    /// Where the object lies in the file, ending in a dot if not at the top.
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

fn object<'a>(key: &str, value: &'a Value) -> Result<&'a Map<String, Value>, ConfigError> {
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
    fn get<T>(
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

    fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.get(key, "a whole number", |v| v.as_u64().and_then(|v| usize::try_from(v).ok()))
    }

    fn needed_size(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.size(key)?.ok_or(ConfigError::Missing { key })
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.get(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.get(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key, "a string", Value::as_str)
    }

    fn ids(&self, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        self.get(key, "a token id or a list of token ids", |v| match v {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })
    }

    fn child(&self, key: &str, prefix: &'static str) -> Result<Option<Keys<'a>>, ConfigError> {
        Ok(self.get(key, "an object", Value::as_object)?.map(|map| Keys { prefix, map }))
    }

    fn unsupported(&self, key: &str, found: impl ToString, supported: &'static str) -> ConfigError {
        ConfigError::Unsupported { key: format!("{}{key}", self.prefix), found: found.to_string(), supported }
    }
}

/// Whether the architecture has sub-norms.
fn architecture(keys: &Keys<'_>) -> Result<bool, ConfigError> {
    let names = keys.get("architectures", "a list of one name", |v| match v.as_array()?.as_slice() {
        [name] => name.as_str(),
        _ => None,
    })?;
    match names {
        Some("BitNetForCausalLM") => Ok(true),
        Some("LlamaForCausalLM") => Ok(false),
        Some(other) => Err(keys.unsupported("architectures", other, "BitNetForCausalLM, LlamaForCausalLM")),
        None => Err(ConfigError::Missing { key: "architectures" }),
    }
}

/// Refuses options that would change the arithmetic.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), ConfigError> {
    for key in ["attention_bias", "mlp_bias", "use_qk_norm", "use_sliding_window"] {
        if keys.flag(key)? == Some(true) {
            return Err(keys.unsupported(key, true, "false"));
        }
    }
    if let Some(scaling) = keys.child("rope_scaling", "rope_scaling.")? {
        rope_type(&scaling)?;
    }
    if let Some(rope) = keys.child("rope_parameters", "rope_parameters.")? {
        rope_type(&rope)?;
    }
    whole_rotary(keys)
}

/// Accepts plain rotary embeddings only.
fn rope_type(rope: &Keys<'_>) -> Result<(), ConfigError> {
    for key in ["rope_type", "type"] {
        if let Some(name) = rope.text(key)?.filter(|name| *name != "default") {
            return Err(rope.unsupported(key, name, "default"));
        }
    }
    whole_rotary(rope)
}

fn whole_rotary(keys: &Keys<'_>) -> Result<(), ConfigError> {
    match keys.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(keys.unsupported("partial_rotary_factor", factor, "1")),
        _ => Ok(()),
    }
}

/// `rope_parameters.rope_theta` (transformers 5) or `rope_theta` (before).
fn rope_theta(keys: &Keys<'_>) -> Result<Option<f64>, ConfigError> {
    let nested = match keys.child("rope_parameters", "rope_parameters.")? {
        Some(rope) => rope.number("rope_theta")?,
        None => None,
    };
    Ok(nested.or(keys.number("rope_theta")?))
}

fn activation(keys: &Keys<'_>) -> Result<Option<Activation>, ConfigError> {
    let Some(name) = keys.text("hidden_act")? else { return Ok(None) };
    Activation::from_name(name).map(Some).ok_or_else(|| keys.unsupported("hidden_act", name, "silu, relu2"))
}

/// Reads `quantization_config`, whose dialects differ in what their scale means.
fn storage(keys: &Keys<'_>) -> Result<Storage, ConfigError> {
    let Some(keys) = keys.child("quantization_config", "quantization_config.")? else {
        return Ok(Storage::Dense);
    };
    match keys.text("quant_method")? {
        Some("bitnet") => {}
        other => return Err(keys.unsupported("quant_method", other.unwrap_or("null"), "bitnet")),
    }
    if keys.flag("use_rms_norm")? == Some(true) {
        return Err(keys.unsupported("use_rms_norm", true, "false"));
    }
    let kept = keys.get("modules_to_not_convert", "a list", Value::as_array)?;
    // Head and embeddings are dense in any case.
    let dense = ["lm_head", "model.embed_tokens", "embed_tokens"];
    if let Some(name) = kept.into_iter().flatten().find(|v| !v.as_str().is_some_and(|v| dense.contains(&v))) {
        return Err(keys.unsupported("modules_to_not_convert", name, "null, or the head and the embedding"));
    }
    let mode = keys.text("quantization_mode")?.unwrap_or("offline");
    match (keys.text("linear_class")?.unwrap_or("bitlinear"), mode) {
        ("autobitlinear", "offline") => Ok(Storage::PackedMultiply),
        ("autobitlinear", "online") => Ok(Storage::Latent),
        ("bitlinear", "offline") => Ok(Storage::PackedDivide),
        ("autobitlinear" | "bitlinear", mode) => {
            Err(keys.unsupported("quantization_mode", mode, "offline, online"))
        }
        (class, _) => Err(keys.unsupported("linear_class", class, "autobitlinear, bitlinear")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Value {
        json!({
            "architectures": ["BitNetForCausalLM"], "hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
            "max_position_embeddings": 128,
        })
    }

    fn parse(value: &Value) -> Result<(ModelConfig, Storage), ConfigError> {
        ModelConfig::from_json(value.to_string().as_bytes())
    }

    fn with(changes: Value) -> Value {
        let mut config = small();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    #[test]
    fn defaults_are_those_of_the_architecture() {
        let (bitnet, storage) = parse(&small()).unwrap();
        assert_eq!(storage, Storage::Dense);
        assert_eq!((bitnet.rope_theta, bitnet.rms_norm_eps, bitnet.head_dim), (500_000.0, 1e-5, 4));
        assert_eq!((bitnet.hidden_act, bitnet.sub_norm, bitnet.quantized), (Activation::Relu2, true, false));
        let (llama, _) = parse(&with(json!({"architectures": ["LlamaForCausalLM"]}))).unwrap();
        assert_eq!((llama.rope_theta, llama.rms_norm_eps, llama.sub_norm), (10_000.0, 1e-6, false));
        assert_eq!(llama.hidden_act, Activation::Silu);
    }

    #[test]
    fn both_forms_of_the_rotary_base_are_read() {
        for rope in [
            json!({"rope_theta": 1234.0}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}),
        ] {
            assert_eq!(parse(&with(rope)).unwrap().0.rope_theta, 1234.0);
        }
    }

    #[test]
    fn dialects_of_quantization() {
        let dialect = |q: Value| parse(&with(json!({"quantization_config": q}))).map(|c| c.1);
        let auto = |mode| json!({"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode});
        assert_eq!(dialect(auto("offline")).unwrap(), Storage::PackedMultiply);
        assert_eq!(dialect(auto("online")).unwrap(), Storage::Latent);
        assert_eq!(dialect(json!({"quant_method": "bitnet"})).unwrap(), Storage::PackedDivide);
        assert_eq!(
            dialect(json!({"quant_method": "bitnet", "linear_class": "bitlinear"})).unwrap(),
            Storage::PackedDivide
        );
        for (bad, key) in [
            (json!({"quant_method": "gptq"}), "quant_method"),
            (json!({}), "quant_method"),
            (json!({"quant_method": "bitnet", "linear_class": "other"}), "linear_class"),
            (auto("sometimes"), "quantization_mode"),
            (json!({"quant_method": "bitnet", "use_rms_norm": true}), "use_rms_norm"),
            (
                json!({"quant_method": "bitnet", "modules_to_not_convert": ["model.layers.0"]}),
                "modules_to_not_convert",
            ),
        ] {
            let error = dialect(bad).unwrap_err().to_string();
            assert!(error.contains(&format!("quantization_config.{key}")), "{error}");
        }
    }

    #[test]
    fn what_it_writes_it_reads() {
        for sub_norm in [true, false] {
            for quantized in [true, false] {
                let (mut config, _) = parse(&small()).unwrap();
                (config.sub_norm, config.quantized) = (sub_norm, quantized);
                (config.bos_token_id, config.eos_token_ids) = (Some(3), vec![5, 6]);
                let (read, storage) = parse(&config.to_json()).unwrap();
                assert_eq!(read, config);
                assert_eq!(storage, if quantized { Storage::PackedMultiply } else { Storage::Dense });
            }
        }
        assert_eq!(parse(&small()).unwrap().0.to_json()["rms_norm_eps"].as_f64(), Some(1e-5));
    }

    #[test]
    fn refused_by_name() {
        for (change, name) in [
            (json!({"architectures": ["Qwen3ForCausalLM"]}), "architectures"),
            (json!({"architectures": null}), "architectures"),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"hidden_act": "gelu"}), "hidden_act"),
            (json!({"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling.type"),
            (json!({"rope_parameters": {"rope_type": "llama3"}}), "rope_parameters.rope_type"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"hidden_size": null}), "hidden_size"),
            (json!({"hidden_size": -16}), "hidden_size"),
            (json!({"hidden_size": 0}), "hidden_size"),
            (json!({"hidden_size": u64::MAX}), "hidden_size"),
            (json!({"hidden_size": 20}), "hidden_size"), // head_dim 5 is odd, too
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"head_dim": 3}), "head_dim"),
            (json!({"head_dim": 8}), "head_dim"),
            (json!({"num_hidden_layers": 1_000_000}), "num_hidden_layers"),
            (json!({"vocab_size": 1e99}), "vocab_size"),
            (json!({"rms_norm_eps": 0}), "rms_norm_eps"),
            (json!({"rope_theta": -1}), "rope_theta"),
            (json!({"eos_token_id": "x"}), "eos_token_id"),
        ] {
            let error = parse(&with(change)).unwrap_err().to_string();
            assert!(error.contains(name) || name == "hidden_size" && error.contains("head_dim"), "{error}");
        }
        assert!(matches!(ModelConfig::from_json(b"{"), Err(ConfigError::Json(_))));
        assert!(matches!(ModelConfig::from_json(b"[]"), Err(ConfigError::Type { .. })));
    }

    #[test]
    fn special_tokens_of_the_generation_config_win() {
        let (mut config, _) = parse(&with(json!({"bos_token_id": 1, "eos_token_id": 99_999}))).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids.len()), (Some(1), 0));
        config.apply_generation_config(br#"{"eos_token_id": [4, 5], "bos_token_id": null}"#).unwrap();
        assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![4, 5]));
    }
}
