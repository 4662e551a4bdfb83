//! The one description of a run, so that every number that shapes a result is written down in one place.
//!
//! A config is layered: defaults < file < `--set section.key=value`. The structs below are the only list of keys:
//! defaults, documentation, the search for the nearest key and the resolved file are all derived from them. The price
//! is that every value has one fixed section; the gain is that a misspelt key can never be ignored.

mod error;
mod load;
mod validate;

pub use error::{ConfigError, Origin};

use crate::data::{DocumentSplit, Reduction};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Everything a run depends on besides the bytes of its data.
///
/// An empty file is a valid config: it trains a small model on the embedded corpus.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[run]`: name, folder, seed and threads.
    pub run: RunConfig,
    /// `[model]`: the decoder's shape, under Hugging Face's names.
    pub model: ModelConfig,
    /// `[init]`: the model to start from.
    pub init: InitConfig,
    /// `[distill]`: what a teacher adds to the loss.
    pub distill: DistillConfig,
    /// `[data]`: where text comes from and how it is cut.
    pub data: DataConfig,
    /// `[tokenizer]`: a given tokenizer, or the size of one to train.
    pub tokenizer: TokenizerConfig,
    /// `[train]`: steps, batches and guards.
    pub train: TrainConfig,
    /// `[optimizer]`: AdamW.
    pub optimizer: OptimizerConfig,
    /// `[schedule]`: learning rate and weight decay over time.
    pub schedule: ScheduleConfig,
    /// `[quantization]`: the share of quantization over time.
    pub quantization: QuantizationConfig,
    /// `[eval]`: loss on held-out text.
    pub eval: EvalConfig,
    /// `[checkpoint]`: when to save and what to keep.
    pub checkpoint: CheckpointConfig,
    /// `[sample]`: text generated while training.
    pub sample: SampleConfig,
}

/// `[run]`: name, folder, seed and threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run, one path component; when empty, loading puts the config file's stem here. Default: `""`.
    pub name: String,
    /// Folder of the run; when empty, loading puts `runs/NAME` here. Default: `""`.
    pub out: PathBuf,
    /// Seed of the streams for initial weights, data order and samples, at most 2^63 - 1. Default: `1234`.
    pub seed: u64,
    /// Worker threads, 1 to 4,096; results do not depend on it. When absent, one a core. Default: absent.
    pub threads: Option<usize>,
    /// Whether to export to `export/hf` in the run's folder, and prove the export, once all steps are done. Default: `true`.
    pub export: bool,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self { name: String::new(), out: PathBuf::new(), seed: 1234, threads: None, export: true }
    }
}

/// `[model]`: the decoder's shape, under Hugging Face's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Width of the residual stream; divisible by `num_attention_heads`, and by 4 under `"bitnet"`. Default: `256`.
    pub hidden_size: usize,
    /// Width inside the MLP; divisible by 4 under `"bitnet"`. Default: `688`.
    pub intermediate_size: usize,
    /// Decoder layers, 1 to 1,024. Default: `6`.
    pub num_hidden_layers: usize,
    /// Query heads; `head_dim = hidden_size / num_attention_heads` must be even. Default: `4`.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`, to which it is resolved when absent. Default: absent.
    pub num_key_value_heads: Option<usize>,
    /// Rows of the embedding; when absent, the tokenizer's size. A different size there is an error. Default: absent.
    pub vocab_size: Option<usize>,
    /// `eps` in `y = x / sqrt(mean(x^2) + eps) * gain`, 1e-12 to 0.1. Default: `1e-5`.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles `position * rope_theta^(-2i / head_dim)`, 1 to 1e12. Default: `10000.0`.
    pub rope_theta: f64,
    /// Longest context, in tokens; at least `data.sequence_length`, to which it is resolved when absent. Default: absent.
    pub max_position_embeddings: Option<usize>,
    /// Whether the head multiplies by the embedding's own matrix. Default: `true`.
    pub tie_word_embeddings: bool,
    /// Activation of the gated MLP, `down(act(gate(x)) * up(x))`. Default: `"silu"`.
    pub hidden_act: HiddenAct,
    /// Whether norms stand before the output and the down projection (SubLN, as in BitNet b1.58 2B-4T). Default: `true`.
    pub sub_norm: bool,
    /// Whether projections are ternary or, as a full-precision twin, plain. Default: `"bitnet"`.
    pub quantization: Quantization,
    /// Standard deviation of initial weights, 1e-6 to 1. Default: `0.02`.
    pub initializer_range: f64,
    /// Width of a head where it is not `hidden_size / num_attention_heads`; comes with an imported model. Default: absent.
    pub head_dim: Option<usize>,
    /// Whether q, k and v have biases (Qwen2); comes with an imported model. Default: `false`.
    pub qkv_bias: bool,
    /// Whether queries and keys are normalized by head (Qwen3); comes with an imported model. Default: `false`.
    pub qk_norm: bool,
    /// The token that starts a text; when absent, the separator of documents. Default: absent.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text; when empty, the separator of documents. Default: `[]`.
    pub eos_token_ids: Vec<u32>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            hidden_size: 256,
            intermediate_size: 688,
            num_hidden_layers: 6,
            num_attention_heads: 4,
            num_key_value_heads: None,
            vocab_size: None,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            max_position_embeddings: None,
            tie_word_embeddings: true,
            hidden_act: HiddenAct::Silu,
            sub_norm: true,
            quantization: Quantization::Bitnet,
            initializer_range: 0.02,
            head_dim: None,
            qkv_bias: false,
            qk_norm: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }
}

impl ModelConfig {
    /// Key and value heads: `num_key_value_heads`, else `num_attention_heads`.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Width of one head: `head_dim`, else `hidden_size / num_attention_heads`.
    ///
    /// # Panics
    /// If `num_attention_heads` is zero, which [`Config::validate`] refuses.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or_else(|| self.hidden_size / self.num_attention_heads)
    }
}

/// Activation of the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// `x * sigmoid(x)`, as LLaMA.
    Silu,
    /// `max(x, 0)^2`, as BitNet b1.58 2B-4T.
    Relu2,
}

/// Arithmetic of the seven projections of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// Ternary weights (absmean) and 8-bit activations (absmax), straight-through gradients.
    Bitnet,
    /// Full precision.
    None,
}

/// `[init]`: the model to start from. Its shape comes with it: of `[model]` only `quantization` and `sub_norm` are then a
/// choice. So does what a BitNet has in full precision, unless `quantization.skip` names something else.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InitConfig {
    /// A model's folder in Hugging Face's layout; when absent, the weights are random. Default: absent.
    pub from: Option<String>,
    /// How sub-norms start that the model did not have (`model.sub_norm`). Default: `"blend"`.
    pub sub_norm: SubNormStart,
}

/// How sub-norms start in a model that was trained without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubNormStart {
    /// Blended in as quantization is (`quantization.warmup`), `x + lambda (norm(x) - x)`: at `lambda = 0` the model computes
    /// what it did before. Gains are calibrated as under `"calibrate"`.
    #[default]
    Blend,
    /// Whole from the first step, with the gain by which the norm's output is closest to its input, in least squares over
    /// some training text: `gain_i = Σ x_i n_i / Σ n_i^2` with `n` the input divided by its root mean square.
    Calibrate,
    /// Whole from the first step, with gains of 1.
    One,
}

/// `[distill]`: the loss is `cross_entropy * CE + logits * temperature^2 * KL + relations * R`.
///
/// `KL` is that of the teacher's next-token distribution from the student's, both at `temperature` ("Distilling the Knowledge
/// in a Neural Network", arXiv 1503.02531); `R` that of relations within one layer's queries, keys and values (BitDistill,
/// arXiv 2510.13998). Without a teacher the loss is CE.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// A full-precision model with the same tokenizer: a folder in Hugging Face's layout, or `"init"` for `init.from`. When
    /// absent, there is no distillation. Default: absent.
    pub teacher: Option<String>,
    /// Coefficient of the cross-entropy of the text's own tokens, 0 to 1e6. Default: `1.0`.
    pub cross_entropy: f64,
    /// Coefficient of the divergence of logits, 0 to 1e6. Default: `1.0`.
    pub logits: f64,
    /// What logits are divided by, 0.1 to 100. Default: `1.0`.
    pub temperature: f64,
    /// Coefficient of the divergence of relations, 0 to 1e6. Default: `0.0`.
    pub relations: f64,
    /// The layer whose relations are compared, counted from 0; when absent, the last but one. Default: absent.
    pub relation_layer: Option<usize>,
    /// Parts that queries, keys and values are cut into for their relations; when absent, the number of key and value heads.
    /// Default: absent.
    pub relation_heads: Option<usize>,
    /// What relations' scores are divided by, 0.01 to 100. Default: `1.0`.
    pub relation_temperature: f64,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            teacher: None,
            cross_entropy: 1.0,
            logits: 1.0,
            temperature: 1.0,
            relations: 0.0,
            relation_layer: None,
            relation_heads: None,
            relation_temperature: 1.0,
        }
    }
}

impl DistillConfig {
    /// Whether a teacher adds to the loss; one that only writes text does not.
    pub fn teaches(&self) -> bool {
        self.teacher.is_some() && self.logits + self.relations > 0.0
    }
}

/// `[data]`: where text comes from and how it is cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// The embedded corpus or the files named in `train`. Default: `"stories"`.
    pub source: DataSource,
    /// Files and folders to train on, relative to the working directory. Default: `[]`.
    pub train: Vec<PathBuf>,
    /// Files and folders to validate on; when empty, the end of the training tokens is held out. Default: `[]`.
    pub validation: Vec<PathBuf>,
    /// Share of the tokens held out when `validation` is empty, over 0 and at most 0.5. Default: `0.05`.
    pub validation_fraction: f64,
    /// Field of a `.jsonl` line that holds the text. Default: `"text"`.
    pub text_field: String,
    /// What a document of a `.txt` file is. Default: `"file"`.
    pub document_split: DocumentSplit,
    /// Tokens a training window predicts, 2 to 1,048,576. Default: `256`.
    pub sequence_length: usize,
    /// Special token that ends each document; when absent, the tokenizer's own end-of-text token. Default: absent.
    pub separator: Option<String>,
    /// Folder of cached tokens, named by content hashes. Default: `".bitnet-cache"`.
    pub cache_dir: PathBuf,
    /// Bytes of text the embedded corpus is expanded to, 1,000 to 2^30. Default: `4000000`.
    pub stories_bytes: usize,
    /// Seed of the embedded corpus, at most 2^63 - 1. Default: `1`.
    pub stories_seed: u64,
    /// Tokens that the teacher writes where it is the source, 1,000 to 2^32. Default: `2000000`.
    pub teacher_tokens: usize,
    /// Temperature at which it writes, over 0 and at most 100. Default: `1.0`.
    pub teacher_temperature: f64,
    /// Seed of what it writes, at most 2^63 - 1. Default: `1`.
    pub teacher_seed: u64,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            source: DataSource::Stories,
            train: Vec::new(),
            validation: Vec::new(),
            validation_fraction: 0.05,
            text_field: "text".into(),
            document_split: DocumentSplit::WholeFile,
            sequence_length: 256,
            separator: None,
            cache_dir: ".bitnet-cache".into(),
            stories_bytes: 4_000_000,
            stories_seed: 1,
            teacher_tokens: 2_000_000,
            teacher_temperature: 1.0,
            teacher_seed: 1,
        }
    }
}

/// Where training text comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataSource {
    /// The paths in `data.train`.
    Files,
    /// The embedded corpus: needs no file and no network.
    Stories,
    /// Text sampled from the teacher (`distill.teacher`), for those who have none: data-free distillation.
    Teacher,
    /// Conversations in the `.jsonl` files of `train`, `messages` or `prompt` and `completion`, of which the assistant's
    /// tokens are learnt. The chat template is that of `init.from`.
    Chat,
}

/// `[tokenizer]`: a given tokenizer, or the size of one to train.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokenizerConfig {
    /// A `tokenizer.json` to use; when absent, a byte-level BPE is trained on the training text. Default: absent.
    pub file: Option<PathBuf>,
    /// Size to train, 4,096 when absent; beside `file`, the size that file must have. Default: absent.
    pub vocab_size: Option<usize>,
}

impl TokenizerConfig {
    /// Size of a tokenizer to train: `vocab_size`, else 4,096.
    pub fn trained_size(&self) -> usize {
        self.vocab_size.unwrap_or(4096)
    }
}

/// `[train]`: steps, batches and guards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps of the whole run, 1 to 10^9. Default: `400`.
    pub steps: u64,
    /// Sequences a micro-batch. Default: `16`.
    pub batch_size: usize,
    /// Micro-batches a step; tokens a step = this * `batch_size` * `data.sequence_length`. Default: `1`.
    pub gradient_accumulation: usize,
    /// Arithmetic of a training step; evaluation and export always compute as inference does. Default: `"fast"`.
    pub precision: Precision,
    /// What a step keeps for its backward. Default: `"none"`.
    pub recompute: Recompute,
    /// How losses of conversations' tokens become that of a step; of plain text it is the mean. Default: `"mean"`.
    pub reduction: Reduction,
    /// Largest L2 norm of the whole gradient: `g *= min(1, gradient_clip / |g|)`; 0 = off. Default: `1.0`.
    pub gradient_clip: f64,
    /// Steps between two progress lines. Default: `10`.
    pub log_every: u64,
    /// Steps in a row with a non-finite loss or gradient that stop the run. Default: `5`.
    pub max_skipped_steps: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 400,
            batch_size: 16,
            gradient_accumulation: 1,
            precision: Precision::Fast,
            recompute: Recompute::None,
            reduction: Reduction::Mean,
            gradient_clip: 1.0,
            log_every: 10,
            max_skipped_steps: 5,
        }
    }
}

/// Arithmetic of a training step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Ternary projections are integer products in both directions, the gradient rounded to int8. Attention's forward is in
    /// f32; the head, attention's backward and projections that are not ternary (a full-precision model, or a share of
    /// quantization below 1) are in bf16 on AMD's processors with AVX512_BF16, else in f32.
    Fast,
    /// Gradients and all dense products in f32, by candle's graph: slow, for comparison.
    F32,
}

/// What a training step keeps of each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// All that the backward needs.
    None,
    /// The layer's input; the rest is computed a second time. Less memory, more time; the same result.
    Block,
}

/// `[optimizer]`: AdamW with decoupled decay, `w -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate, 1e-12 to 10. Default: `4e-3`.
    pub learning_rate: f64,
    /// Decay of the first moment, `m = beta1 * m + (1 - beta1) * g`, 0 to below 1. Default: `0.9`.
    pub beta1: f64,
    /// Decay of the second moment, `v = beta2 * v + (1 - beta2) * g^2`, 0 to below 1. Default: `0.95`.
    pub beta2: f64,
    /// Added to `sqrt(v_hat)`, 1e-30 to 1. Default: `1e-8`.
    pub eps: f64,
    /// Decay of matrices (never of norms and embeddings), 0 to 10. Default: `0.1`.
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { learning_rate: 4e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

/// `[schedule]`: learning rate and weight decay over time.
///
/// With `peak = optimizer.learning_rate`, steps counted from 0 and `n = train.steps`, the rate is
/// `peak * (step + 1) / warmup_steps` while `step < warmup_steps`; after that it follows `kind`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Shape after the warm-up. Default: `"cosine"`.
    pub kind: ScheduleKind,
    /// Steps over which the rate rises linearly to its peak; at most `train.steps`. Default: `50`.
    pub warmup_steps: u64,
    /// Floor of the cosine as a share of the peak, 0 to 1. Default: `0.1`.
    pub final_fraction: f64,
    /// Share of all steps at which stage two starts, over 0 and below 1. Default: `0.5`.
    pub stage_two_start: f64,
    /// Peak of stage two as a share of the peak, over 0 and at most 1 (b1.58: 1.5e-3 to 1e-3). Default: `0.66`.
    pub stage_two_learning_rate: f64,
    /// Weight decay in stage two, 0 to 10; stage one has `optimizer.weight_decay`. Default: `0.0`.
    pub stage_two_weight_decay: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::Cosine,
            warmup_steps: 50,
            final_fraction: 0.1,
            stage_two_start: 0.5,
            stage_two_learning_rate: 0.66,
            stage_two_weight_decay: 0.0,
        }
    }
}

/// Shape of the learning rate after the warm-up; `u = (step - warmup_steps) / (n - warmup_steps)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// `peak * (final_fraction + (1 - final_fraction) * (1 + cos(pi * u)) / 2)`.
    Cosine,
    /// `peak * (1 - u)`, and from `step >= stage_two_start * n` on `peak * stage_two_learning_rate * (1 - u)`
    /// with weight decay `stage_two_weight_decay` ("The Era of 1-bit LLMs: Training Tips, Code and FAQ").
    TwoStage,
    /// `peak`.
    Constant,
}

/// `[quantization]`: the share `lambda` of quantization, `x + lambda * (quantize(x) - x)`; evaluation and export use 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizationConfig {
    /// How lambda grows. Default: `"none"`.
    pub warmup: QuantizationWarmup,
    /// Share of all steps after which lambda is 1, over 0 and at most 1. Default: `0.5`.
    pub warmup_fraction: f64,
    /// Projections that stay in full precision, by module name; `*` stands for any part of it, as in `"*.down_proj"` or
    /// `"model.layers.0.*"`. Default: `[]`.
    pub skip: Vec<String>,
}

impl Default for QuantizationConfig {
    fn default() -> Self {
        Self { warmup: QuantizationWarmup::None, warmup_fraction: 0.5, skip: Vec::new() }
    }
}

/// How the share of quantization grows; `u = step / (warmup_fraction * train.steps)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizationWarmup {
    /// `lambda = 1` from the first step.
    None,
    /// `lambda = min(1, u)`.
    Linear,
    /// `lambda = 0` while `u < 1`, then 1.
    Step,
    /// `lambda = min(1, 1 - (1 - u)^3)`: most of it early.
    Cubic,
}

/// `[eval]`: loss on held-out text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalConfig {
    /// Steps between evaluations; 0 = only at the end. Default: `100`.
    pub every: u64,
    /// Validation windows used, the same ones each time; 0 = all. Default: `256`.
    pub windows: usize,
    /// Windows a forward pass; changes memory, not the result. Default: `16`.
    pub batch_size: usize,
}

impl Default for EvalConfig {
    fn default() -> Self {
        Self { every: 100, windows: 256, batch_size: 16 }
    }
}

/// `[checkpoint]`: when to save and what to keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; 0 = only at the end. Default: `100`.
    pub every: u64,
    /// Newest valid checkpoints to keep, at least 1. Default: `3`.
    pub keep: usize,
    /// Whether the one with the lowest validation loss is kept besides. Default: `true`.
    pub keep_best: bool,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 100, keep: 3, keep_best: true }
    }
}

/// `[sample]`: text generated while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// Steps between samples; 0 = only at the end. Default: `0`.
    pub every: u64,
    /// One sample for each prompt; the empty prompt starts a new document. Default: `[""]`.
    pub prompts: Vec<String>,
    /// Tokens to generate, 1 to `model.max_position_embeddings`. Default: `100`.
    pub tokens: usize,
    /// Divides the logits, 0 to 100; 0 = greedy. Default: `0.8`.
    pub temperature: f64,
    /// Draw from the k likeliest tokens; 0 = off. Default: `0`.
    pub top_k: usize,
    /// Draw from the smallest set of tokens whose probability reaches this, over 0 and at most 1. Default: `1.0`.
    pub top_p: f64,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { every: 0, prompts: vec![String::new()], tokens: 100, temperature: 0.8, top_k: 0, top_p: 1.0 }
    }
}

impl Config {
    /// Longest context, in tokens: `model.max_position_embeddings`, else `data.sequence_length`.
    pub fn max_positions(&self) -> usize {
        self.model.max_position_embeddings.unwrap_or(self.data.sequence_length)
    }

    /// Tokens an optimizer step sees: `batch_size * gradient_accumulation * sequence_length`.
    pub fn tokens_per_step(&self) -> usize {
        self.train.batch_size * self.train.gradient_accumulation * self.data.sequence_length
    }

    /// The config as TOML, keys in the order of the structs; loading it gives the same config again.
    ///
    /// # Errors
    /// [`ConfigError::Write`] if a path is not UTF-8 or an integer exceeds TOML's range of 2^63 - 1.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self).map_err(ConfigError::Write)
    }
}

#[cfg(test)]
mod tests;
