//! Hugging Face checkpoints: a folder with `config.json` and safetensors files.
//!
//! Reads dense models of four architectures, the three dialects of BitNet and 1bitLLM's names ([`Storage`]); writes packed
//! codes with a multiplying f32 scale, the one dialect in which a weight loses nothing, or dense f32. Embedding and head are
//! used where they lie in the memory-mapped file, in their own precision; norms, biases and dense projections are widened to
//! f32.
//!
//! That dialect has one catch: transformers multiplies the bias of a packed projection with its scale, too. So a bias is
//! stored divided by the scale, and comes back to within one unit in the last place (exactly, if it was read from such a
//! checkpoint).

mod tensors;
mod write;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use bitlinear::kernels::Kernel;
use bitlinear::packed::Layout;

use super::{CheckpointError, io_error};
use crate::config::{ModelConfig, Storage};
use crate::model::{F32Data, Layer, Model, ModelError, Projection, Weights};
use tensors::Tensors;
pub use write::write;

/// Sizes and options.
pub const CONFIG: &str = "config.json";
/// Special tokens for generation, which come before those of [`CONFIG`].
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The weights, if in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// Where the weights are, if in several files.
pub const INDEX: &str = "model.safetensors.index.json";

/// Longest JSON file that is read: a hundred times what any model has.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads the model in a folder.
///
/// # Errors
/// A file is missing or damaged, the config asks for what is not supported, or a tensor is missing, extra, ill-shaped,
/// ill-typed, not finite or not ternary; the error names it.
pub fn read(folder: &Path) -> Result<Model, CheckpointError> {
    read_with(folder, None)
}

/// [`read`] with the ternary weights in a layout of choice; without one, in the faster one here ([`Kernel::layout_for`]).
///
/// # Errors
/// As [`read`]; or without a layout, `BITLINEAR_KERNEL` names a kernel that cannot run.
pub fn read_with(folder: &Path, layout: Option<Layout>) -> Result<Model, CheckpointError> {
    let (config, storage) = read_config(folder)?;
    let layout = match layout {
        Some(layout) => layout,
        None => Kernel::active().map_err(ModelError::from)?.layout_for(config.ternary_parameters()),
    };
    let source = Source { tensors: Tensors::open(folder, layout)?, config: &config, storage, latent: false };
    let weights = source.weights()?;
    Ok(Model::new(config, weights)?)
}

/// Reads the model in a folder in full precision, as a starting point for training: every projection is dense f32 and the
/// config is that of a model that is not quantized.
///
/// Dense weights and master weights are as stored, packed ones `code * scale`. Embedding and head stay as [`read`] has them.
///
/// # Errors
/// As [`read`].
pub fn read_latent(folder: &Path) -> Result<Model, CheckpointError> {
    let (config, storage) = read_config(folder)?;
    let tensors = Tensors::open(folder, Layout::TwoBit)?;
    let weights = Source { tensors, config: &config, storage, latent: true }.weights()?;
    let config = ModelConfig { quantized: false, modules_to_not_convert: Vec::new(), ..config };
    Ok(Model::new(config, weights)?)
}

/// Reads the config in a folder, with the special tokens of its generation config.
///
/// # Errors
/// The file is missing, damaged, or asks for what is not supported.
pub fn read_config(folder: &Path) -> Result<(ModelConfig, Storage), CheckpointError> {
    let refused = |path: PathBuf| move |source| CheckpointError::Config { path, source };
    let path = folder.join(CONFIG);
    let (mut config, storage) = ModelConfig::from_json(&read_json(&path)?).map_err(refused(path))?;
    let path = folder.join(GENERATION_CONFIG);
    if path.exists() {
        config.apply_generation_config(&read_json(&path)?).map_err(refused(path))?;
    }
    Ok((config, storage))
}

fn read_json(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let file = File::open(path).map_err(io_error("read", path))?;
    let mut bytes = Vec::new();
    // One byte more than allowed: a longer file is cut and so no longer JSON.
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    Ok(bytes)
}

/// What a folder's tensors are to become.
struct Source<'a> {
    tensors: Tensors,
    config: &'a ModelConfig,
    storage: Storage,
    /// Whether projections become f32 weights, those of a quantized model, too.
    latent: bool,
}

impl Source<'_> {
    /// All weights, and no tensor left over.
    fn weights(&self) -> Result<Weights, CheckpointError> {
        let (tensors, config) = (&self.tensors, self.config);
        let table = [config.vocab_size, config.hidden_size];
        let layers: Result<Vec<Layer>, CheckpointError> =
            (0..config.num_hidden_layers).map(|index| self.layer(index)).collect();
        let weights = Weights {
            embed_tokens: tensors.table("model.embed_tokens.weight", &table)?,
            layers: layers?,
            norm: tensors.dense("model.norm.weight", &[config.hidden_size])?,
            lm_head: if config.tie_word_embeddings {
                None
            } else {
                Some(tensors.table("lm_head.weight", &table)?)
            },
        };
        tensors.no_others(&self.names())?;
        Ok(weights)
    }

    fn layer(&self, index: usize) -> Result<Layer, CheckpointError> {
        let config = self.config;
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let norm = |name: &str, width: usize| self.tensors.dense(&at(&format!("{name}.weight")), &[width]);
        let sub_norm = |name, width| if config.sub_norm { norm(name, width).map(Some) } else { Ok(None) };
        let projection =
            |(name, rows, columns): (&str, usize, usize)| self.projection(&at(name), rows, columns);
        let bias = |(name, rows, _): (&str, usize, usize)| self.bias(&at(name), rows);
        let [q, k, v, o, gate, up, down] = config.projections();
        let [attn_sub_norm, ffn_sub_norm] = self.sub_norms();
        Ok(Layer {
            input_layernorm: norm("input_layernorm", config.hidden_size)?,
            qkv_bias: if config.qkv_bias { Some([bias(q)?, bias(k)?, bias(v)?]) } else { None },
            qk_norm: if config.qk_norm {
                Some([norm("self_attn.q_norm", config.head_dim)?, norm("self_attn.k_norm", config.head_dim)?])
            } else {
                None
            },
            q_proj: projection(q)?,
            k_proj: projection(k)?,
            v_proj: projection(v)?,
            o_proj: projection(o)?,
            attn_sub_norm: sub_norm(attn_sub_norm, config.hidden_size)?,
            post_attention_layernorm: norm("post_attention_layernorm", config.hidden_size)?,
            gate_proj: projection(gate)?,
            up_proj: projection(up)?,
            down_proj: projection(down)?,
            ffn_sub_norm: sub_norm(ffn_sub_norm, config.intermediate_size)?,
        })
    }

    /// Names of the norms before `o_proj` and `down_proj`.
    fn sub_norms(&self) -> [&'static str; 2] {
        match self.storage {
            Storage::LatentOneBit => ["self_attn.inner_attn_ln", "mlp.ffn_layernorm"],
            _ => ["self_attn.attn_sub_norm", "mlp.ffn_sub_norm"],
        }
    }

    /// Whether the weight of a projection is stored as packed codes.
    fn is_packed(&self, module: &str) -> bool {
        let packed = matches!(self.storage, Storage::PackedMultiply | Storage::PackedDivide);
        packed && self.config.is_ternary(module)
    }

    fn projection(&self, module: &str, rows: usize, columns: usize) -> Result<Projection, CheckpointError> {
        let (tensors, weight) = (&self.tensors, format!("{module}.weight"));
        if self.is_packed(module) {
            let ternary = tensors.packed(&weight, rows, columns, self.scale(module)?)?;
            if !self.latent {
                return Ok(Projection::Ternary(ternary));
            }
            let scale = ternary.weight_scale();
            let values: Vec<f32> = ternary.unpack().into_iter().map(|code| f32::from(code) * scale).collect();
            return Ok(Projection::Dense(values.into()));
        }
        if self.latent || !self.config.is_ternary(module) {
            return Ok(Projection::Dense(tensors.dense(&weight, &[rows, columns])?));
        }
        Ok(Projection::Ternary(tensors.ternarized(&weight, rows, columns)?))
    }

    /// What the codes of a packed projection are multiplied by.
    fn scale(&self, module: &str) -> Result<f32, CheckpointError> {
        let stored = self.tensors.scalar(&format!("{module}.weight_scale"))?;
        Ok(if self.storage == Storage::PackedDivide { 1.0 / stored } else { stored })
    }

    /// What a projection's output is added to. Where the stored scale multiplies, transformers' `AutoBitLinear` multiplies the
    /// bias with it as well; its `BitLinear`, whose scale divides, does not.
    fn bias(&self, module: &str, rows: usize) -> Result<F32Data, CheckpointError> {
        let name = format!("{module}.bias");
        let stored = self.tensors.dense(&name, &[rows])?;
        if self.storage != Storage::PackedMultiply || !self.is_packed(module) {
            return Ok(stored);
        }
        let scale = self.scale(module)?;
        let bias: Vec<f32> = stored.iter().map(|value| value * scale).collect();
        Ok(self.tensors.check_finite(&name, bias.into())?.into_f32())
    }

    /// Names of all tensors of the checkpoint.
    fn names(&self) -> BTreeSet<String> {
        let config = self.config;
        let mut names =
            BTreeSet::from(["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()]);
        if !config.tie_word_embeddings {
            names.insert("lm_head.weight".to_owned());
        }
        let mut kinds = vec!["input_layernorm", "post_attention_layernorm"];
        if config.sub_norm {
            kinds.extend(self.sub_norms());
        }
        if config.qk_norm {
            kinds.extend(["self_attn.q_norm", "self_attn.k_norm"]);
        }
        for index in 0..config.num_hidden_layers {
            names.extend(kinds.iter().map(|name| format!("model.layers.{index}.{name}.weight")));
            for (place, (name, _, _)) in config.projections().into_iter().enumerate() {
                let module = format!("model.layers.{index}.{name}");
                names.insert(format!("{module}.weight"));
                if self.is_packed(&module) {
                    names.insert(format!("{module}.weight_scale"));
                }
                // q, k and v come first.
                if config.qkv_bias && place < 3 {
                    names.insert(format!("{module}.bias"));
                }
            }
        }
        names
    }
}
