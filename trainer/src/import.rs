//! From somebody else's model to the start of a run: its shape into the config, its weights into parameters.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bitlinear::math::Activation;
use infer::checkpoint::{CheckpointError, hf};
use infer::config::{ModelConfig, Storage, shortest};
use infer::model::Projection;

use crate::config::{self, Config, DataSource, HiddenAct, SubNormStart};
use crate::data::is_token_file;
use crate::parameters::{ParameterError, Parameters};

/// Why a model cannot be started from.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The folder's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The run's config does not go with the model.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// Tensors that do not become parameters.
    #[error(transparent)]
    Parameters(#[from] ParameterError),
    /// The config asks for another shape.
    #[error("{key} is {asked} in the config and {found} in the model; {}; leave the key out: an imported model brings its shape", path.display())]
    Shape {
        /// The key.
        key: String,
        /// What the config says.
        asked: String,
        /// What the model has.
        found: String,
        /// The model's folder.
        path: PathBuf,
    },
    /// Sub-norms and something that no architecture has beside them.
    #[error("sub-norms cannot be put into a model with {with}: no architecture of transformers has both; {}; set model.sub_norm = false", path.display())]
    SubNorm {
        /// What the model has.
        with: &'static str,
        /// The model's folder.
        path: PathBuf,
    },
    /// Sub-norms that are to be taken away.
    #[error("the model has sub-norms; {}; leave model.sub_norm = false out", path.display())]
    HasSubNorm {
        /// The model's folder.
        path: PathBuf,
    },
    /// A teacher that does not fit the student.
    #[error("the teacher's {what} is {found}, which does not go with {expected}; {}; take a teacher with the same tokenizer, or change the setting", path.display())]
    Teacher {
        /// What does not fit.
        what: &'static str,
        /// The teacher's.
        found: String,
        /// What is asked for.
        expected: String,
        /// The teacher's folder.
        path: PathBuf,
    },
    /// Text, and nothing to make tokens of it with.
    #[error("there is no tokenizer.json, by which the model reads text; {}; put it there, or name it as tokenizer.file", .0.display())]
    NoTokenizer(PathBuf),
    /// A teacher that is itself quantized.
    #[error("the teacher's weights are ternary; {}; take the full-precision model", .0.display())]
    QuantizedTeacher(PathBuf),
}

/// A model in full precision, as a starting point or a teacher.
pub struct Imported {
    /// Its shape, not quantized.
    pub shape: ModelConfig,
    /// How its files hold the projections.
    pub storage: Storage,
    /// Its weights.
    pub parameters: Parameters,
}

/// Reads a model's folder; ternary weights become `code * scale`.
///
/// # Errors
/// The files are refused.
pub fn read(folder: &Path) -> Result<Imported, ImportError> {
    let (_, storage) = hf::read_config(folder)?;
    let model = hf::read_latent(folder)?;
    let shape = model.config().clone();
    let weights = model.weights();
    let mut values = BTreeMap::new();
    let mut add = |name: String, tensor: Vec<f32>| {
        values.insert(name, tensor);
    };
    add("model.embed_tokens.weight".into(), weights.embed_tokens.to_f32());
    add("model.norm.weight".into(), weights.norm.to_vec());
    if let Some(head) = &weights.lm_head {
        add("lm_head.weight".into(), head.to_f32());
    }
    for (index, layer) in weights.layers.iter().enumerate() {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        for (name, norm, _) in layer.norms(&shape) {
            if let Some(norm) = norm {
                add(at(&format!("{name}.weight")), norm.to_vec());
            }
        }
        for ((name, ..), projection) in shape.projections().into_iter().zip(layer.projections()) {
            if let Projection::Dense(weight) = projection {
                add(at(&format!("{name}.weight")), weight.to_vec());
            }
        }
        for (name, bias, _) in layer.biases() {
            add(at(name), bias.to_vec());
        }
    }
    let parameters = Parameters::from_values(&shape, values)?;
    Ok(Imported { shape, storage, parameters })
}

/// Fills in what the model to start from, or else the teacher, brings: shape and tokenizer.
///
/// # Errors
/// The model's config is refused, the run's asks for another shape, or the two do not go together otherwise.
pub fn complete(config: &mut Config) -> Result<(), ImportError> {
    if let Some(folder) = config.init.from.clone() {
        adopt(config, Path::new(&folder))?;
    }
    if let (None, None, Some(teacher)) =
        (config.model.vocab_size, config.tokenizer.vocab_size, teacher_folder(config))
    {
        // An embedding may have more rows than the tokenizer entries; distributions are compared entry by entry.
        config.model.vocab_size = Some(hf::read_config(teacher)?.0.vocab_size);
    }
    if config.tokenizer.file.is_none() {
        let folders = [config.init.from.as_deref().map(Path::new), teacher_folder(config)];
        let files: Vec<_> =
            folders.into_iter().flatten().map(|folder| folder.join("tokenizer.json")).collect();
        config.tokenizer.file = files.iter().find(|file| file.exists()).cloned();
        // A tokenizer trained on the text would have other tokens under the same ids.
        if let (None, Some(file), true) = (&config.tokenizer.file, files.first(), reads_text(config)) {
            return Err(ImportError::NoTokenizer(file.clone()));
        }
    }
    Ok(config.validate()?)
}

/// Whether the run's training data is text, not tokens.
fn reads_text(config: &Config) -> bool {
    match config.data.source {
        DataSource::Files => !config.data.train.iter().all(|path| is_token_file(path)),
        DataSource::Stories | DataSource::Chat => true,
        DataSource::Teacher => false,
    }
}

/// Where the teacher is, if there is one.
pub fn teacher_folder(config: &Config) -> Option<&Path> {
    match config.distill.teacher.as_deref()? {
        "init" => config.init.from.as_deref().map(Path::new),
        folder => Some(Path::new(folder)),
    }
}

/// Puts the shape of the model to start from into the config.
fn adopt(config: &mut Config, folder: &Path) -> Result<(), ImportError> {
    let (shape, _) = hf::read_config(folder)?;
    let path = || folder.to_path_buf();
    let asked = config.model.clone();
    if shape.sub_norm && !asked.sub_norm {
        return Err(ImportError::HasSubNorm { path: path() });
    }
    let with = match (shape.qkv_bias, shape.qk_norm) {
        (true, _) => Some("biases"),
        (_, true) => Some("norms of queries and keys"),
        _ => None,
    };
    if let (Some(with), true) = (with, asked.sub_norm) {
        return Err(ImportError::SubNorm { with, path: path() });
    }
    let even = shape.hidden_size.checked_div(shape.num_attention_heads);
    let found = config::ModelConfig {
        hidden_size: shape.hidden_size,
        intermediate_size: shape.intermediate_size,
        num_hidden_layers: shape.num_hidden_layers,
        num_attention_heads: shape.num_attention_heads,
        num_key_value_heads: Some(shape.num_key_value_heads),
        vocab_size: Some(shape.vocab_size),
        rms_norm_eps: shortest(shape.rms_norm_eps),
        rope_theta: shortest(shape.rope_theta),
        max_position_embeddings: Some(shape.max_position_embeddings),
        tie_word_embeddings: shape.tie_word_embeddings,
        hidden_act: match shape.hidden_act {
            Activation::Silu => HiddenAct::Silu,
            Activation::Relu2 => HiddenAct::Relu2,
        },
        head_dim: (even != Some(shape.head_dim)).then_some(shape.head_dim),
        qkv_bias: shape.qkv_bias,
        qk_norm: shape.qk_norm,
        bos_token_id: shape.bos_token_id,
        eos_token_ids: shape.eos_token_ids.clone(),
        sub_norm: asked.sub_norm,
        quantization: asked.quantization,
        initializer_range: asked.initializer_range,
    };
    refuse_other_shape(&asked, &found, folder)?;
    config.model = found;
    if config.quantization.skip.is_empty() {
        config.quantization.skip = shape.modules_to_not_convert;
    }
    if shape.sub_norm {
        // They are part of the model already.
        config.init.sub_norm = SubNormStart::One;
    }
    Ok(())
}

/// Refuses what somebody set to something else than the model has. What is as by default was not set.
fn refuse_other_shape(
    asked: &config::ModelConfig,
    found: &config::ModelConfig,
    folder: &Path,
) -> Result<(), ImportError> {
    let table = |model| toml::Table::try_from(model).map_err(config::ConfigError::Write);
    let (asked, found, default) = (table(asked)?, table(found)?, table(&config::ModelConfig::default())?);
    for (key, value) in &asked {
        if found.get(key) != Some(value) && default.get(key) != Some(value) {
            let found = found.get(key).map_or_else(|| "absent".into(), ToString::to_string);
            let (key, asked) = (format!("model.{key}"), value.to_string());
            return Err(ImportError::Shape { key, asked, found, path: folder.into() });
        }
    }
    Ok(())
}

/// The parameters that a run of this shape starts with: sub-norms that are put in have gains of 1. Ternary weights that go on
/// as latent ones are spread by `1 / share of non-zero codes`, so that absmean finds the same codes and the same scale.
///
/// # Errors
/// The shape has no place for a tensor.
pub fn start(shape: &ModelConfig, imported: &Imported) -> Result<Parameters, ImportError> {
    let packed = matches!(imported.storage, Storage::PackedMultiply | Storage::PackedDivide);
    let copied = imported.parameters.to_vecs().map_err(ParameterError::from)?;
    let values = copied.into_iter().map(|(name, role, _, mut values)| {
        let module = name.strip_suffix(".weight").filter(|_| role.is_projection());
        if packed && module.is_some_and(|module| shape.is_ternary(module)) {
            let dense = values.iter().filter(|w| **w != 0.0).count().max(1) as f32 / values.len() as f32;
            values.iter_mut().for_each(|w| *w /= dense);
        }
        (name.to_owned(), values)
    });
    Ok(Parameters::from_values(shape, values.collect())?)
}
