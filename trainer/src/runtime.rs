//! From the trainer's parameters to the inference runtime: the model that samples and exports are made of.
use bitlinear::math::Activation;
use bitlinear::packed::{PackError, TernaryWeight};
use infer::checkpoint::CheckpointError;
use infer::config::ModelConfig;
use infer::generate::{GenerateError, GenerateOptions, generate};
use infer::model::{F32Data, KvPrecision, Layer, ModelError, Projection, Weights};
use infer::sampler::SamplingOptions;
use std::ops::ControlFlow;

use crate::config::{Config, DataSource, HiddenAct, Quantization};
use crate::parameters::Parameters;

/// Why parameters do not become a runnable model, or it does not run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Latent weights that cannot be ternarized.
    #[error("the latent weights of '{name}' cannot be packed; {source}")]
    Pack {
        /// The weight's name.
        name: String,
        /// What is wrong.
        source: PackError,
    },
    /// The model is inconsistent or its input is.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model's config is not one that the runtime takes.
    #[error(transparent)]
    Config(#[from] infer::config::ConfigError),
    /// Generation failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A model folder cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// candle.
    #[error("a tensor cannot be read; {0}")]
    Candle(#[from] candle_core::Error),
    /// The tokenizer failed.
    #[error("the tokenizer failed; {text:?}; {message}")]
    Tokenizer {
        /// The text, or what stands for it.
        text: String,
        /// What the tokenizer says.
        message: String,
    },
}

/// The model's shape as `config.json` has it. `separator` is the token between documents: it starts and ends a text. Of
/// conversations it is the one that ends an answer, whatever else ends a text, and starts nothing.
///
/// # Errors
/// The runtime refuses the shape.
pub fn model_config(
    config: &Config,
    vocab_size: usize,
    separator: Option<u32>,
) -> Result<ModelConfig, infer::config::ConfigError> {
    let model = &config.model;
    let chat = config.data.source == DataSource::Chat;
    let mut shape = ModelConfig {
        hidden_size: model.hidden_size,
        intermediate_size: model.intermediate_size,
        num_hidden_layers: model.num_hidden_layers,
        num_attention_heads: model.num_attention_heads,
        num_key_value_heads: model.kv_heads(),
        head_dim: model.head_dim(),
        vocab_size,
        rms_norm_eps: model.rms_norm_eps as f32,
        rope_theta: model.rope_theta as f32,
        max_position_embeddings: config.max_positions(),
        tie_word_embeddings: model.tie_word_embeddings,
        hidden_act: match model.hidden_act {
            HiddenAct::Silu => Activation::Silu,
            HiddenAct::Relu2 => Activation::Relu2,
        },
        sub_norm: model.sub_norm,
        qkv_bias: model.qkv_bias,
        qk_norm: model.qk_norm,
        modules_to_not_convert: Vec::new(),
        quantized: model.quantization == Quantization::Bitnet,
        bos_token_id: model.bos_token_id.or(separator.filter(|_| !chat)),
        eos_token_ids: match model.eos_token_ids.as_slice() {
            [] => separator.into_iter().collect(),
            ids => {
                let answer = separator.filter(|end| chat && !ids.contains(end));
                ids.iter().copied().chain(answer).collect()
            }
        },
    };
    if shape.quantized {
        shape.modules_to_not_convert = skipped(&shape, &config.quantization.skip)?;
    }
    shape.validate()?;
    Ok(shape)
}

/// The projections that one of the patterns names, in the order of names.
///
/// # Errors
/// A pattern names none.
fn skipped(shape: &ModelConfig, patterns: &[String]) -> Result<Vec<String>, infer::config::ConfigError> {
    let layers = 0..shape.num_hidden_layers;
    let modules: Vec<String> = layers
        .flat_map(|layer| shape.projections().map(|(name, ..)| format!("model.layers.{layer}.{name}")))
        .collect();
    if let Some(pattern) = patterns.iter().find(|p| !modules.iter().any(|module| matches(p, module))) {
        return Err(infer::config::ConfigError::Unsupported {
            key: "quantization.skip".into(),
            found: format!("{pattern:?}, which names no projection"),
            supported: "names such as \"model.layers.0.mlp.down_proj\", with * for any part",
        });
    }
    let mut skipped: Vec<_> =
        modules.into_iter().filter(|module| patterns.iter().any(|p| matches(p, module))).collect();
    skipped.sort_unstable();
    Ok(skipped)
}

/// Whether a name is `pattern`, in which each `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    let inner = name.strip_prefix(start).and_then(|name| name.strip_suffix(end));
    // Each part between two stars at its first place: a later one would leave less for those behind it.
    inner.is_some_and(|inner| {
        middle
            .split('*')
            .try_fold(inner, |rest, part| rest.find(part).map(|at| &rest[at + part.len()..]))
            .is_some()
    })
}

/// The runnable model of parameters: latent weights ternarized and packed, or copied for a full-precision model.
///
/// # Errors
/// A weight is not finite.
pub fn runnable(config: &ModelConfig, parameters: &Parameters) -> Result<infer::Model, RuntimeError> {
    let values = |name: &str| -> Result<F32Data, RuntimeError> {
        Ok(parameters.tensor(name).flatten_all()?.to_vec1::<f32>()?.into())
    };
    let vector = |name: &str| values(&format!("{name}.weight"));
    let mut layers = Vec::with_capacity(config.num_hidden_layers);
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let norm = |part: &str| vector(&name(part));
        let sub_norm = |part: &str| if config.sub_norm { norm(part).map(Some) } else { Ok(None) };
        let bias = |part: &str| values(&name(&format!("self_attn.{part}_proj.bias")));
        let linear = |part: &str| -> Result<Projection, RuntimeError> {
            let name = name(part);
            let values = vector(&name)?;
            if !config.is_ternary(&name) {
                return Ok(Projection::Dense(values));
            }
            let (out, columns) = parameters.tensor(&format!("{name}.weight")).dims2()?;
            let packed = TernaryWeight::from_latent(&values, out, columns);
            Ok(Projection::Ternary(packed.map_err(|source| RuntimeError::Pack { name, source })?))
        };
        layers.push(Layer {
            input_layernorm: norm("input_layernorm")?,
            qkv_bias: match config.qkv_bias {
                true => Some([bias("q")?, bias("k")?, bias("v")?]),
                false => None,
            },
            qk_norm: match config.qk_norm {
                true => Some([norm("self_attn.q_norm")?, norm("self_attn.k_norm")?]),
                false => None,
            },
            q_proj: linear("self_attn.q_proj")?,
            k_proj: linear("self_attn.k_proj")?,
            v_proj: linear("self_attn.v_proj")?,
            attn_sub_norm: sub_norm("self_attn.attn_sub_norm")?,
            o_proj: linear("self_attn.o_proj")?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: linear("mlp.gate_proj")?,
            up_proj: linear("mlp.up_proj")?,
            ffn_sub_norm: sub_norm("mlp.ffn_sub_norm")?,
            down_proj: linear("mlp.down_proj")?,
        });
    }
    let weights = Weights {
        embed_tokens: vector("model.embed_tokens")?.into(),
        layers,
        norm: vector("model.norm")?,
        lm_head: if config.tie_word_embeddings { None } else { Some(vector("lm_head")?.into()) },
    };
    Ok(infer::Model::new(config.clone(), weights)?)
}

/// Text that continues `prompt` (a new document if it is empty), without the prompt.
///
/// # Errors
/// The prompt does not fit the context or the tokenizer fails.
pub fn continue_text(
    model: &infer::Model,
    tokenizer: &tokenizers::Tokenizer,
    prompt: &str,
    tokens: Option<usize>,
    sampling: SamplingOptions,
) -> Result<String, RuntimeError> {
    let failed = |source: tokenizers::Error| RuntimeError::Tokenizer {
        text: prompt.chars().take(60).collect(),
        message: source.to_string(),
    };
    let encoding = tokenizer.encode(prompt, false).map_err(failed)?;
    // A document follows the separator of the one before.
    let ids: Vec<u32> =
        model.config().bos_token_id.into_iter().chain(encoding.get_ids().iter().copied()).collect();
    // Without a separator an empty prompt starts anywhere: at the first token of the vocabulary.
    let ids = if ids.is_empty() { vec![0] } else { ids };
    let room = model.config().max_position_embeddings.saturating_sub(ids.len());
    let options = GenerateOptions {
        max_new_tokens: tokens.map(|tokens| tokens.min(room)),
        sampling,
        kv: KvPrecision::F32,
        stop_ids: model.config().eos_token_ids.clone(),
    };
    let generation = generate(model, &ids, &options, &mut |_| ControlFlow::Continue(()))?;
    tokenizer.decode(&generation.tokens, true).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn a_star_stands_for_any_text() {
        let down = "model.layers.11.mlp.down_proj";
        for pattern in [
            down,
            "*",
            "**",
            "*down_proj",
            "model.*",
            "*.11.*",
            "model.layers.*.mlp.down_proj",
            "m*l*1*.*j",
            "*1*1*",
        ] {
            assert!(matches(pattern, down), "{pattern}");
        }
        for pattern in [
            "",
            "model.layers.1.mlp.down_proj",
            "model.layers.11.mlp.down_pro",
            "odel*",
            "*down",
            "*1*1*1*",
            "*.mlp.*.11.*",
            "model.layers.11.mlp.down_proj*down_proj",
            "model?layers*",
        ] {
            assert!(!matches(pattern, down), "{pattern}");
        }
        // What a star's two sides name must not be the same text.
        assert!(matches("ab*b", "abb") && !matches("ab*b", "ab") && !matches("*aa*aa*", "aaa"));
    }

    #[test]
    fn hostile_patterns_are_quick() {
        let start = Instant::now();
        let name = "a".repeat(100);
        assert!(matches(&"*".repeat(1000), &name));
        assert!(!matches(&format!("{}b", "*".repeat(1000)), &name));
        assert!(!matches(&"a*".repeat(1000), &name));
        assert!(!matches(&format!("{}b*", "*a".repeat(100)), &name));
        assert!(start.elapsed() < Duration::from_secs(1));
    }

    fn skip(patterns: &[&str]) -> Result<Vec<String>, infer::config::ConfigError> {
        let mut config = Config::default();
        (config.model.num_hidden_layers, config.model.num_key_value_heads) = (2, Some(2));
        config.quantization.skip = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
        model_config(&config, 300, None).map(|shape| shape.modules_to_not_convert)
    }

    #[test]
    fn skipped_projections_are_named_in_order_and_once() {
        assert_eq!(skip(&[]).unwrap(), [""; 0]);
        let names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"];
        assert_eq!(skip(&["*.down_proj"]).unwrap(), names);
        assert_eq!(skip(&[names[1], "*down*", names[0]]).unwrap(), names);
        assert_eq!(skip(&["*"]).unwrap().len(), 14);
        assert_eq!(skip(&["model.layers.1.*"]).unwrap().len(), 7);
        for nothing in ["", "*.lm_head", "model.layers.2.*", "*.weight", "*norm*"] {
            let error = skip(&["*.down_proj", nothing]).unwrap_err().to_string();
            assert!(
                error.contains("quantization.skip") && error.contains(&format!("{nothing:?}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_full_precision_model_skips_nothing() {
        let mut config = Config::default();
        config.model.quantization = Quantization::None;
        config.quantization.skip = vec!["*.down_proj".into()];
        assert_eq!(model_config(&config, 300, None).unwrap().modules_to_not_convert, [""; 0]);
    }
}
