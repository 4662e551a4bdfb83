//! Reading and writing `config.json`, with the defaults of each architecture.

use bitlinear::math::Activation;
use serde_json::{Value, json};

use super::architecture::{Architecture, ONE_BIT};
use super::keys::{Keys, object};
use super::modules::{Kept, full_name, is_projection};
use super::{ConfigError, ModelConfig, Storage};

impl ModelConfig {
    /// Reads a `config.json` of `LlamaForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`, `BitNetForCausalLM` or 1bitLLM's
    /// `BitnetForCausalLM`, and how its checkpoint stores the weights.
    ///
    /// Optional keys that are missing take transformers' defaults of that architecture.
    ///
    /// # Errors
    /// The text is not a JSON object, a needed key is missing, or a value is ill-typed, out of range or not supported.
    pub fn from_json(text: &[u8]) -> Result<(Self, Storage), ConfigError> {
        let value: Value = serde_json::from_slice(text)?;
        let keys = Keys { prefix: "", map: object("config", &value)? };
        let architecture = architecture(&keys)?;
        refuse_unsupported(&keys, architecture)?;
        let storage = storage(&keys, architecture)?;
        let heads = keys.needed_size("num_attention_heads")?;
        let hidden_size = keys.needed_size("hidden_size")?;
        let vocab_size = keys.needed_size("vocab_size")?;
        // transformers writes its own models' ids into the configs of others: an id beyond the vocabulary means none.
        let known = |id: &u32| (*id as usize) < vocab_size;
        let default_kv_heads = match keys.map.get("num_key_value_heads") {
            Some(Value::Null) => heads,
            _ => architecture.num_key_value_heads.unwrap_or(heads),
        };
        let default_head_dim = match architecture.head_dim {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        let mut config = Self {
            hidden_size,
            intermediate_size: keys.needed_size("intermediate_size")?,
            num_hidden_layers: keys.needed_size("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: keys.size("num_key_value_heads")?.unwrap_or(default_kv_heads),
            head_dim: keys.size("head_dim")?.unwrap_or(default_head_dim),
            vocab_size,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(architecture.rms_norm_eps) as f32,
            rope_theta: rope_theta(&keys)?.unwrap_or(architecture.rope_theta) as f32,
            max_position_embeddings: keys
                .size("max_position_embeddings")?
                .unwrap_or(architecture.max_position_embeddings),
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            hidden_act: activation(&keys)?.unwrap_or(architecture.hidden_act),
            sub_norm: architecture.sub_norm,
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            quantized: storage != Storage::Dense,
            modules_to_not_convert: Vec::new(),
            bos_token_id: keys
                .ids_or("bos_token_id", architecture.bos_token_id)?
                .first()
                .copied()
                .filter(known),
            eos_token_ids: keys
                .ids_or("eos_token_id", architecture.eos_token_id)?
                .into_iter()
                .filter(known)
                .collect(),
        };
        // Before the list of dense projections, which is as long as the model is deep.
        config.validate()?;
        config.modules_to_not_convert = modules_to_not_convert(&keys, &config)?;
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
        let architecture = Architecture::of(self);
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let mut config = json!({
            "architectures": [architecture.name],
            "model_type": architecture.model_type,
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
        if !self.qkv_bias {
            // Qwen2 has no such key: its biases are always there.
            config["attention_bias"] = json!(false);
        }
        if self.quantized {
            // Without a list transformers keeps the head dense by itself, with one only if the list says so.
            let kept = match self.modules_to_not_convert.as_slice() {
                [] => Value::Null,
                names => ["lm_head"].into_iter().chain(names.iter().map(String::as_str)).collect(),
            };
            // Without `linear_class` every reader would divide by the scale instead.
            config["quantization_config"] = json!({
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
                "modules_to_not_convert": kept,
            });
        }
        config
    }
}

/// The f64 that prints as short as this f32 does: 1e-5 and not 9.999999747378752e-6.
pub fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// The architecture by its name. transformers goes by `model_type`, so the two must agree.
fn architecture(keys: &Keys<'_>) -> Result<&'static Architecture, ConfigError> {
    let name = keys.get("architectures", "a list of one name", |v| match v.as_array()?.as_slice() {
        [name] => name.as_str(),
        _ => None,
    })?;
    let name = name.ok_or(ConfigError::Missing { key: "architectures" })?;
    let Some(architecture) = Architecture::named(name) else {
        let supported =
            "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, BitNetForCausalLM, BitnetForCausalLM";
        return Err(keys.unsupported("architectures", name, supported));
    };
    match keys.text("model_type")? {
        // 1bitLLM's configs name their code in `auto_map`, and any type.
        Some(found) if *architecture != ONE_BIT && found != architecture.model_type => {
            Err(keys.unsupported("model_type", found, architecture.model_type))
        }
        _ => Ok(architecture),
    }
}

/// Refuses options that would change the arithmetic.
fn refuse_unsupported(keys: &Keys<'_>, architecture: &Architecture) -> Result<(), ConfigError> {
    for key in ["attention_bias", "mlp_bias", "use_qk_norm", "use_sliding_window"] {
        // Qwen2 has biases of its own, whatever this key says.
        let ignored = key == "attention_bias" && architecture.qkv_bias;
        if keys.flag(key)? == Some(true) && !ignored {
            return Err(keys.unsupported(key, true, "false"));
        }
    }
    let layers = keys.get("layer_types", "a list", Value::as_array)?;
    if let Some(kind) = layers.into_iter().flatten().find(|kind| *kind != "full_attention") {
        return Err(keys.unsupported("layer_types", kind, "full_attention"));
    }
    if *architecture == ONE_BIT {
        for (key, bits) in [("weight_bits", 1), ("input_bits", 8)] {
            if let Some(found) = keys.size(key)?.filter(|found| *found != bits) {
                return Err(keys.unsupported(key, found, if bits == 1 { "1" } else { "8" }));
            }
        }
    }
    for rope in rope_objects(keys)? {
        rope_type(&rope)?;
    }
    whole_rotary(keys)
}

/// `rope_scaling` and `rope_parameters`, where they are given: the first comes before the second.
fn rope_objects<'a>(keys: &Keys<'a>) -> Result<Vec<Keys<'a>>, ConfigError> {
    let scaling = keys.child("rope_scaling", "rope_scaling.")?;
    Ok(scaling.into_iter().chain(keys.child("rope_parameters", "rope_parameters.")?).collect())
}

/// Accepts plain rotary embeddings only.
fn rope_type(rope: &Keys<'_>) -> Result<(), ConfigError> {
    for key in ["rope_type", "type"] {
        if let Some(name) = rope.text(key)?.filter(|name| *name != "default") {
            return Err(rope.unsupported(key, name, "default"));
        }
    }
    // Parameters of each kind of layer.
    if let Some((key, _)) = rope.map.iter().find(|(_, value)| value.is_object()) {
        return Err(rope.unsupported(key, "an object", "parameters of all layers together"));
    }
    whole_rotary(rope)
}

fn whole_rotary(keys: &Keys<'_>) -> Result<(), ConfigError> {
    match keys.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(keys.unsupported("partial_rotary_factor", factor, "1")),
        _ => Ok(()),
    }
}

/// `rope_theta` of `rope_parameters` (transformers 5), or on its own (before).
fn rope_theta(keys: &Keys<'_>) -> Result<Option<f64>, ConfigError> {
    // An empty object counts as missing.
    match rope_objects(keys)?.into_iter().find(|rope| !rope.map.is_empty()) {
        Some(rope) => Ok(rope.number("rope_theta")?.or(keys.number("rope_theta")?)),
        None => keys.number("rope_theta"),
    }
}

fn activation(keys: &Keys<'_>) -> Result<Option<Activation>, ConfigError> {
    let Some(name) = keys.text("hidden_act")? else { return Ok(None) };
    Activation::from_name(name).map(Some).ok_or_else(|| keys.unsupported("hidden_act", name, "silu, relu2"))
}

fn quantization<'a>(keys: &Keys<'a>) -> Result<Option<Keys<'a>>, ConfigError> {
    keys.child("quantization_config", "quantization_config.")
}

/// Reads `quantization_config`, whose dialects differ in what their scale means.
fn storage(keys: &Keys<'_>, architecture: &Architecture) -> Result<Storage, ConfigError> {
    let quantization = quantization(keys)?;
    if *architecture == ONE_BIT {
        return match quantization {
            Some(_) => {
                Err(keys.unsupported("quantization_config", "an object", "null with BitnetForCausalLM"))
            }
            None => Ok(Storage::LatentOneBit),
        };
    }
    let Some(keys) = quantization else { return Ok(Storage::Dense) };
    match keys.text("quant_method")? {
        Some("bitnet") => {}
        other => return Err(keys.unsupported("quant_method", other.unwrap_or("null"), "bitnet")),
    }
    if keys.flag("use_rms_norm")? == Some(true) {
        return Err(keys.unsupported("use_rms_norm", true, "false"));
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

/// Full names of the projections that `modules_to_not_convert` keeps dense, sorted.
fn modules_to_not_convert(keys: &Keys<'_>, config: &ModelConfig) -> Result<Vec<String>, ConfigError> {
    let key = "modules_to_not_convert";
    let Some(keys) = quantization(keys)? else { return Ok(Vec::new()) };
    let names = |v: &'_ Value| v.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect();
    let Some(entries) = keys.get(key, "a list of names", names)? else { return Ok(Vec::new()) };
    let entries: Vec<String> = entries;
    // A full name keeps that module and no other; for a long list of them no pattern is needed.
    let (mut dense, rest): (Vec<String>, Vec<String>) =
        entries.into_iter().partition(|entry| is_projection(config, entry));
    let Some(kept) = Kept::new(rest.iter().map(String::as_str).collect()) else {
        return Err(keys.unsupported(key, "a list", "few regular expressions, without look-around"));
    };
    if !kept.has("lm_head") {
        let supported = "null, or a list with lm_head: else the head would be ternary";
        return Err(keys.unsupported(key, "a list without lm_head", supported));
    }
    let names = (0..config.num_hidden_layers)
        .flat_map(|index| config.projections().map(|(projection, _, _)| full_name(index, projection)));
    dense.extend(names.filter(|name| kept.has(name)));
    dense.sort_unstable();
    dense.dedup();
    Ok(dense)
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

    /// The config of an architecture with nothing but its sizes.
    fn bare(name: &str) -> Value {
        let mut config =
            with(json!({"architectures": [name], "vocab_size": 200_000, "num_attention_heads": 8}));
        for key in ["num_key_value_heads", "max_position_embeddings"] {
            config.as_object_mut().unwrap().remove(key);
        }
        config["hidden_size"] = 80.into();
        config
    }

    #[test]
    fn defaults_are_those_of_the_architecture() {
        // As `LlamaConfig(hidden_size=80, num_attention_heads=8)` and its like print them; 1bitLLM's are Llama's.
        let (llama, storage) = parse(&bare("LlamaForCausalLM")).unwrap();
        assert_eq!(storage, Storage::Dense);
        assert_eq!((llama.rope_theta, llama.rms_norm_eps, llama.hidden_act), (1e4, 1e-6, Activation::Silu));
        assert_eq!((llama.num_key_value_heads, llama.head_dim), (8, 10));
        assert_eq!((llama.max_position_embeddings, llama.tie_word_embeddings), (2048, false));
        assert_eq!((llama.bos_token_id, llama.eos_token_ids.as_slice()), (Some(1), [2].as_slice()));
        assert_eq!(
            (llama.sub_norm, llama.qkv_bias, llama.qk_norm, llama.quantized),
            (false, false, false, false)
        );

        let (one_bit, storage) = parse(&bare("BitnetForCausalLM")).unwrap();
        assert_eq!(storage, Storage::LatentOneBit);
        assert_eq!(one_bit, ModelConfig { sub_norm: true, quantized: true, ..llama.clone() });

        // A Qwen has 32 key/value heads unless told otherwise, too many for 8; told null, as many as queries.
        for (name, head_dim) in [("Qwen2ForCausalLM", 10), ("Qwen3ForCausalLM", 128)] {
            assert!(parse(&bare(name)).unwrap_err().to_string().contains("= 32"));
            let mut text = bare(name);
            text["num_key_value_heads"] = Value::Null;
            let (qwen, _) = parse(&text).unwrap();
            let expected = ModelConfig {
                qkv_bias: head_dim == 10,
                qk_norm: head_dim == 128,
                head_dim,
                max_position_embeddings: 32_768,
                bos_token_id: None,
                eos_token_ids: vec![],
                ..llama.clone()
            };
            assert_eq!(qwen, expected);
        }

        // And a BitNet 5.
        let mut text = bare("BitNetForCausalLM");
        assert!(parse(&text).unwrap_err().to_string().contains("= 5"));
        text["num_attention_heads"] = 10.into();
        let (bitnet, _) = parse(&text).unwrap();
        let expected = ModelConfig {
            num_attention_heads: 10,
            num_key_value_heads: 5,
            head_dim: 8,
            rope_theta: 500_000.0,
            rms_norm_eps: 1e-5,
            hidden_act: Activation::Relu2,
            sub_norm: true,
            bos_token_id: Some(128_000),
            eos_token_ids: vec![128_001],
            ..llama
        };
        assert_eq!(bitnet, expected);
    }

    #[test]
    fn options_that_no_architecture_has_together_are_refused() {
        let (config, _) = parse(&bare("LlamaForCausalLM")).unwrap();
        for (sub_norm, qkv_bias, qk_norm) in
            [(true, true, false), (true, false, true), (false, true, true), (true, true, true)]
        {
            let both = ModelConfig { sub_norm, qkv_bias, qk_norm, ..config.clone() };
            assert!(matches!(both.validate(), Err(ConfigError::Together { .. })));
        }
    }

    #[test]
    fn dense_modules_are_full_names_in_order() {
        let (config, _) = parse(&small()).unwrap();
        let check = |names: &[&str]| {
            let modules_to_not_convert = names.iter().map(|name| (*name).to_owned()).collect();
            ModelConfig { modules_to_not_convert, ..config.clone() }.validate()
        };
        check(&["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]).unwrap();
        for names in [
            ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"].as_slice(),
            &["model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"],
            &["model.layers.2.mlp.up_proj"],
            &["model.layers.01.mlp.up_proj"],
            &["model.layers.+1.mlp.up_proj"],
            &["model.layers.1.mlp"],
            &["mlp.up_proj"],
            &["lm_head"],
            &[""],
        ] {
            let error = check(names).unwrap_err();
            assert!(
                matches!(&error, ConfigError::Module { name } if *name == names[names.len() - 1]),
                "{error}"
            );
        }
    }

    #[test]
    fn both_forms_of_the_rotary_base_are_read() {
        for rope in [
            json!({"rope_theta": 1234.0}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}),
            json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}, "rope_theta": 5.0}),
            json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1234.0}),
            json!({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "default", "rope_theta": 1234.0}}),
            json!({"rope_parameters": {"rope_theta": 1234.0}, "rope_scaling": {}}),
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
        for on in 0..4 {
            for quantized in [true, false] {
                let (mut config, _) = parse(&small()).unwrap();
                (config.sub_norm, config.qkv_bias, config.qk_norm) = (on == 1, on == 2, on == 3);
                config.quantized = quantized;
                if quantized {
                    config.modules_to_not_convert = vec!["model.layers.1.mlp.up_proj".into()];
                }
                (config.bos_token_id, config.eos_token_ids) = (Some(3), vec![5, 6]);
                let (read, storage) = parse(&config.to_json()).unwrap();
                assert_eq!(read, config);
                assert_eq!(storage, if quantized { Storage::PackedMultiply } else { Storage::Dense });
                (config.bos_token_id, config.eos_token_ids) = (None, vec![]);
                config.modules_to_not_convert.clear();
                assert_eq!(parse(&config.to_json()).unwrap().0, config);
            }
        }
        assert_eq!(parse(&small()).unwrap().0.to_json()["rms_norm_eps"].as_f64(), Some(1e-5));
    }

    #[test]
    fn refused_by_name() {
        for (change, name) in [
            (json!({"architectures": ["MistralForCausalLM"]}), "MistralForCausalLM"),
            (json!({"architectures": null}), "architectures"),
            (json!({"model_type": "llama"}), "model_type"),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"use_sliding_window": true}), "use_sliding_window"),
            (json!({"layer_types": ["full_attention", "chunked_attention"]}), "layer_types"),
            (
                json!({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}),
                "rope_parameters.full_attention",
            ),
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
