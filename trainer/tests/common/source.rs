//! Small models of random weights to start from, in folders as a user has them, and a config that fine-tunes one.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bitlinear::math::Activation;
use candle_core::Tensor;
use infer::checkpoint::hf;
use infer::config::ModelConfig;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tempfile::TempDir;
use tokenizers::{AddedToken, Tokenizer};
use trainer::data::train_tokenizer;
use trainer::parameters::{Parameters, Role};
use trainer::runtime::runnable;

/// Fine-tunes a model that `--set init.from` names for three steps, in milliseconds.
pub const CONFIG: &str = r#"
[run]
threads = 1

[data]
source = "files"
train = ["text.txt"]
validation_fraction = 0.1
sequence_length = 32
cache_dir = "cache"
teacher_tokens = 3000

[train]
steps = 3
batch_size = 2
log_every = 1

[schedule]
warmup_steps = 1

[eval]
every = 0
windows = 8

[checkpoint]
every = 0

[sample]
tokens = 8
"#;

/// Ends a turn; the last entry of the tokenizer.
pub const TURN_END: &str = "<|im_end|>";
/// Entries of the tokenizer: a byte-level vocabulary and [`TURN_END`].
pub const ENTRIES: usize = 290;

/// A template of ours in the style of ChatML.
pub const TEMPLATE: &str = "{% for message in messages %}{{ '<|endoftext|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|endoftext|>assistant\\n' }}{% endif %}";

/// A folder with `ft.toml`, `text.txt` and the Llama `source`.
pub fn folder() -> TempDir {
    let folder = super::folder();
    fs::write(folder.path().join("ft.toml"), CONFIG).unwrap();
    source(folder.path(), "source", |_| ());
    folder
}

/// The arguments that run `ft.toml` into the folder `out`, from the model in `from`.
pub fn tune<'a>(out: &'a str, from: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let sets = [from].into_iter().chain(sets.iter().copied()).flat_map(|set| ["--set", set]);
    ["train", "ft.toml", "--out", out].into_iter().chain(sets).collect()
}

/// A small Llama.
pub fn llama() -> ModelConfig {
    ModelConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 300,
        rms_norm_eps: 1e-6,
        rope_theta: 5000.0,
        max_position_embeddings: 64,
        tie_word_embeddings: false,
        hidden_act: Activation::Silu,
        sub_norm: false,
        qkv_bias: false,
        qk_norm: false,
        quantized: false,
        modules_to_not_convert: Vec::new(),
        bos_token_id: Some(0),
        eos_token_ids: vec![0],
    }
}

/// Writes a model into the folder `name`: [`llama`] as `change` has it, with random matrices, norms and biases.
pub fn source(folder: &Path, name: &str, change: impl Fn(&mut ModelConfig)) {
    let mut config = llama();
    change(&mut config);
    config.validate().unwrap();
    let parameters = Parameters::init(&config, 0.1, 7).unwrap();
    // As scattered as the embedding.
    let scatter = parameters.tensor("model.embed_tokens.weight").flatten_all().unwrap();
    for (tensor, parameter) in parameters.iter() {
        let shift = scatter.narrow(0, 0, parameter.value.dims()[0]).unwrap();
        let value: Option<Tensor> = match parameter.role {
            Role::Norm => Some((parameter.value.as_tensor() + shift).unwrap()),
            Role::Bias => Some(shift),
            _ => None,
        };
        value.iter().for_each(|value| parameters.set(tensor, value).unwrap());
    }
    let path = folder.join(name);
    hf::write(&path, &runnable(&config, &parameters).unwrap(), &BTreeMap::new()).unwrap();
    fs::write(path.join("tokenizer.json"), tokenizer(folder)).unwrap();
}

/// A byte-level tokenizer of `text.txt` that knows [`TURN_END`].
fn tokenizer(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("text.txt")).unwrap();
    let (mut tokenizer, _): (Tokenizer, _) = train_tokenizer(&[text], ENTRIES - 1).unwrap();
    tokenizer.add_special_tokens([AddedToken::from(TURN_END, true)]).unwrap();
    tokenizer.to_string(false).unwrap()
}

/// Tensors by name: type, shape and bytes.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a model's folder.
pub fn tensors(model: &Path) -> Tensors {
    let bytes = fs::read(model.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let copied = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(copied).collect()
}

/// Changes the tensors of a model's folder.
pub fn edit_tensors(model: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = tensors(model);
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(model.join("model.safetensors"), bytes).unwrap();
}

/// Twenty conversations of one or two turns.
pub fn conversations() -> String {
    let line = |i: usize| {
        let turn = |words: &str| {
            format!(
                r#"{{"role": "user", "content": "Who {words} {i}?"}}, {{"role": "assistant", "content": "Sam, {}."}}"#,
                "a".repeat(i % 5)
            )
        };
        let turns = if i.is_multiple_of(3) { [turn("ran"), turn("sat")].join(", ") } else { turn("found") };
        format!(r#"{{"messages": [{turns}]}}"#)
    };
    (0..20).map(line).collect::<Vec<_>>().join("\n")
}

/// Twenty prompts and completions.
pub fn completions() -> String {
    let line = |i: usize| format!(r#"{{"prompt": "Once {i}", "completion": " there lived {}."}}"#, i * i);
    (0..20).map(line).collect::<Vec<_>>().join("\n")
}
