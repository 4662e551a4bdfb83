//! Small random models, and a tokenizer to go with them.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod files;

use std::path::Path;

use bitlinear::math::Activation;
use bitlinear::packed::TernaryWeight;
use infer::ModelConfig;
use infer::model::{F32Data, Layer, Model, Projection, Table, Weights};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A config of two small layers; the projections' sizes are not multiples of a packed block.
pub fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 32,
        intermediate_size: 44,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        vocab_size: 300,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        max_position_embeddings: 96,
        tie_word_embeddings: true,
        hidden_act: Activation::Silu,
        sub_norm: true,
        quantized: true,
        qkv_bias: false,
        qk_norm: false,
        modules_to_not_convert: Vec::new(),
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
    }
}

/// A Qwen2, and a Qwen3 whose heads are wider together than the residual stream.
pub fn qwens() -> [ModelConfig; 2] {
    let plain = ModelConfig { sub_norm: false, tie_word_embeddings: false, ..config() };
    [ModelConfig { qkv_bias: true, ..plain.clone() }, ModelConfig { qk_norm: true, head_dim: 16, ..plain }]
}

/// The same model with some projections dense: alone, beside ternary ones of the same input, and all of one input.
pub fn mixed(config: ModelConfig) -> ModelConfig {
    let names = [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.self_attn.q_proj",
    ];
    ModelConfig { modules_to_not_convert: names.map(str::to_owned).to_vec(), ..config }
}

/// Every combination of the options of BitNet and Llama, the Qwens, and each of these with some projections dense.
pub fn variants() -> Vec<ModelConfig> {
    let mut all = Vec::new();
    let llama = ModelConfig { sub_norm: false, ..config() };
    for ternary in qwens().into_iter().chain([config(), llama]) {
        all.extend([mixed(ternary.clone()), ModelConfig { quantized: false, ..ternary.clone() }, ternary]);
    }
    for bits in 0..16 {
        for num_key_value_heads in [1, 2, 4] {
            all.push(ModelConfig {
                num_key_value_heads,
                tie_word_embeddings: bits & 1 == 0,
                sub_norm: bits & 2 == 0,
                quantized: bits & 4 == 0,
                hidden_act: if bits & 8 == 0 { Activation::Silu } else { Activation::Relu2 },
                ..config()
            });
        }
    }
    all
}

/// Latent weights of the seven projections of every layer.
pub fn latents(config: &ModelConfig, seed: u64) -> Vec<[Vec<f32>; 7]> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xabcd);
    (0..config.num_hidden_layers)
        .map(|_| config.projections().map(|(_, out, columns)| values(&mut rng, out * columns, 0.0, 0.3)))
        .collect()
}

/// About normal values.
pub fn values(rng: &mut ChaCha8Rng, len: usize, mean: f32, deviation: f32) -> Vec<f32> {
    let normal = |rng: &mut ChaCha8Rng| (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    (0..len).map(|_| mean + deviation * normal(rng)).collect()
}

/// A model with random weights, whose projections come from [`latents`] of the same seed.
pub fn model(config: &ModelConfig, seed: u64) -> Model {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut biases_rng = ChaCha8Rng::seed_from_u64(seed ^ 0xb1a5);
    let mut norm = |width| F32Data::from(values(&mut rng, width, 1.0, 0.2));
    let layers = latents(config, seed)
        .into_iter()
        .enumerate()
        .map(|(index, latents)| {
            let mut projections =
                latents.into_iter().zip(config.projections()).map(|(latent, (name, out, columns))| {
                    if config.is_ternary(&format!("model.layers.{index}.{name}")) {
                        Projection::Ternary(TernaryWeight::from_latent(&latent, out, columns).unwrap())
                    } else {
                        Projection::Dense(latent.into())
                    }
                });
            let mut next = || projections.next().unwrap();
            let qkv = [next(), next(), next()];
            let qkv_bias = config.qkv_bias.then(|| {
                let widths = [config.attention_width(), config.kv_width(), config.kv_width()];
                [0, 1, 2].map(|i| bias(&mut biases_rng, &qkv[i], widths[i]))
            });
            let [q_proj, k_proj, v_proj] = qkv;
            Layer {
                input_layernorm: norm(config.hidden_size),
                qkv_bias,
                qk_norm: config.qk_norm.then(|| [norm(config.head_dim), norm(config.head_dim)]),
                q_proj,
                k_proj,
                v_proj,
                o_proj: next(),
                attn_sub_norm: config.sub_norm.then(|| norm(config.hidden_size)),
                post_attention_layernorm: norm(config.hidden_size),
                gate_proj: next(),
                up_proj: next(),
                down_proj: next(),
                ffn_sub_norm: config.sub_norm.then(|| norm(config.intermediate_size)),
            }
        })
        .collect();
    let norm = norm(config.hidden_size);
    let mut table = || Table::from(values(&mut rng, config.vocab_size * config.hidden_size, 0.0, 0.5));
    let embed_tokens = table();
    let lm_head = (!config.tie_word_embeddings).then(table);
    Model::new(config.clone(), Weights { embed_tokens, layers, norm, lm_head }).unwrap()
}

/// A bias that a checkpoint can hold to the last bit: beside packed codes it is stored divided by their scale.
fn bias(rng: &mut ChaCha8Rng, projection: &Projection, width: usize) -> F32Data {
    let scale = match projection {
        Projection::Ternary(weight) => weight.weight_scale(),
        Projection::Dense(_) => 1.0,
    };
    let stored = values(rng, width, 0.0, 0.5 / scale);
    stored.into_iter().map(|value| value * scale).collect::<Vec<_>>().into()
}

/// Random token ids.
pub fn ids(config: &ModelConfig, len: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x1d5);
    (0..len).map(|_| rng.random_range(0..config.vocab_size as u32)).collect()
}

/// The bits of f32 values: equal only if every value is the same, signs of zeros included.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Trains a small byte-level BPE tokenizer of at most 300 ids and writes it into a folder.
pub fn write_tokenizer(folder: &Path) {
    use tokenizers::decoders::byte_level::ByteLevel;
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};
    let text = "the cat sat on the mat and the dog ran after the cat until the night fell";
    let special = ["<s>", "</s>"].map(|name| AddedToken::from(name, true)).to_vec();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(300)
        .min_frequency(1)
        .show_progress(false)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        tokenizers::NormalizerWrapper,
        ByteLevel,
        tokenizers::PostProcessorWrapper,
        ByteLevel,
    >::new()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(ByteLevel::new(false, true, false)))
    .with_decoder(Some(ByteLevel::default()))
    .build()
    .unwrap();
    tokenizer.train(&mut trainer, [text].into_iter()).unwrap();
    let json = tokenizer.to_string(false).unwrap();
    // What we wrote must be one that we can read.
    let _: Tokenizer = json.parse().unwrap();
    std::fs::write(folder.join("tokenizer.json"), json).unwrap();
}
