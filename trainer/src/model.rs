//! The model as candle operations: what `infer` runs, with gradients. It evaluates, proves exports, and trains where
//! `train.precision` is `"f32"`; otherwise [`crate::decoder`] trains.
//!
//! Semantics are those of transformers' `BitNetForCausalLM` (with sub-norms) and `LlamaForCausalLM` (without). Every
//! operation comes from [`bitlinear::autograd`], whose forward is the inference runtime's own arithmetic.
use std::sync::Arc;

use bitlinear::autograd::{self, Heads};
use bitlinear::math::RopeTable;
use candle_core::{Device, Result, Tensor};
use infer::config::ModelConfig;

use crate::data::Batch;
use crate::parameters::Parameters;
use crate::schedule::Shares;

/// A view of parameters as a model.
#[derive(Debug, Clone)]
pub struct Model {
    config: ModelConfig,
    rope: Arc<RopeTable>,
}

impl Model {
    /// A model of this shape for sequences of up to `sequence_length` tokens.
    pub fn new(config: ModelConfig, sequence_length: usize) -> Self {
        let rope = RopeTable::new(config.head_dim, sequence_length, config.rope_theta);
        Self { config, rope: Arc::new(rope) }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Hidden states after the last norm for sequences of these lengths, with shares of quantization (ignored by a
    /// full-precision model) and of sub-norms.
    ///
    /// # Shapes
    /// `ids [tokens] -> [tokens, hidden_size]`
    ///
    /// # Errors
    /// The lengths do not add up to the number of ids, or an id is not in the vocabulary.
    pub fn hidden(
        &self,
        parameters: &Weights<'_>,
        ids: &[u32],
        sequences: &[usize],
        shares: Shares,
    ) -> Result<Tensor> {
        let config = &self.config;
        let eps = config.rms_norm_eps;
        let heads = Heads {
            sequences: sequences.to_vec(),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            rope: Arc::clone(&self.rope),
        };
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let mut x = parameters.get("model.embed_tokens")?.index_select(&ids, 0)?;
        for layer in 0..config.num_hidden_layers {
            let get = |name: &str| parameters.get(&format!("model.layers.{layer}.{name}"));
            let norm = |x: &Tensor, name: &str| autograd::rms_norm(x, &get(name)?, eps);
            let sub_norm = |x: &Tensor, name: &str| match shares.sub_norm {
                1.0 => norm(x, name),
                // A tensor: candle takes a product with the number 0 for the end of the graph, and the gain would be cut off.
                share => {
                    let share = Tensor::new(&[share], &Device::Cpu)?;
                    x + (norm(x, name)? - x)?.broadcast_mul(&share)?
                }
            };
            let linear = |x: &Tensor, name: &str| {
                let ternary = config.is_ternary(&format!("model.layers.{layer}.{name}"));
                match (ternary, config.quantized) {
                    (true, _) => autograd::bit_linear(x, &get(name)?, shares.quantization),
                    (false, true) => autograd::dense_linear(x, &get(name)?),
                    (false, false) => autograd::bit_linear(x, &get(name)?, 0.0),
                }
            };
            let head_norm = |x: Tensor, name: &str| match config.qk_norm {
                true => norm(&x.reshape(((), config.head_dim))?, name)?.reshape(x.shape()),
                false => Ok(x),
            };
            let biased = |x: Tensor, part: &str| match config.qkv_bias {
                true => {
                    let name = format!("model.layers.{layer}.self_attn.{part}_proj.bias");
                    x.broadcast_add(&parameters.tensor(&name))
                }
                false => Ok(x),
            };

            let h = norm(&x, "input_layernorm")?;
            let (q, k, v) = (
                head_norm(biased(linear(&h, "self_attn.q_proj")?, "q")?, "self_attn.q_norm")?,
                head_norm(biased(linear(&h, "self_attn.k_proj")?, "k")?, "self_attn.k_norm")?,
                biased(linear(&h, "self_attn.v_proj")?, "v")?,
            );
            let mut a = autograd::attention(&q, &k, &v, &heads)?;
            if config.sub_norm {
                a = sub_norm(&a, "self_attn.attn_sub_norm")?;
            }
            x = (x + linear(&a, "self_attn.o_proj")?)?;

            let h = norm(&x, "post_attention_layernorm")?;
            let (gate, up) = (linear(&h, "mlp.gate_proj")?, linear(&h, "mlp.up_proj")?);
            let mut m = autograd::gated(&gate, &up, config.hidden_act)?;
            if config.sub_norm {
                m = sub_norm(&m, "mlp.ffn_sub_norm")?;
            }
            x = (x + linear(&m, "mlp.down_proj")?)?;
        }
        autograd::rms_norm(&x, &parameters.get("model.norm")?, eps)
    }

    /// Mean cross-entropy of all targets, whatever their weight, in nats a token, with a gradient for each trainable parameter.
    ///
    /// # Errors
    /// As [`Model::hidden`]; a target is not in the vocabulary.
    pub fn loss(&self, parameters: &Parameters, batch: &Batch, shares: Shares) -> Result<Tensor> {
        let weights = Weights::trained(parameters);
        let hidden = self.hidden(&weights, &batch.ids, &batch.sequences, shares)?;
        autograd::head_cross_entropy(&hidden, &self.head(&weights)?, batch.targets.as_slice().into())
    }

    /// Cross-entropy of each target, in nats, fully quantized and without a graph.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn losses(&self, parameters: &Parameters, batch: &Batch) -> Result<Vec<f32>> {
        let weights = Weights::fixed(parameters);
        let hidden = self.hidden(&weights, &batch.ids, &batch.sequences, Shares::FULL)?;
        autograd::head_loss(&hidden, &self.head(&weights)?, &batch.targets)
    }

    /// Logits `[ids, vocab_size]` of one sequence, fully quantized and without a graph.
    ///
    /// # Errors
    /// As [`Model::hidden`].
    pub fn logits(&self, parameters: &Parameters, ids: &[u32]) -> Result<Tensor> {
        let weights = Weights::fixed(parameters);
        let hidden = self.hidden(&weights, ids, &[ids.len()], Shares::FULL)?;
        hidden.matmul(&self.head(&weights)?.t()?)
    }

    /// The dense head `[vocab_size, hidden_size]`.
    fn head(&self, parameters: &Weights<'_>) -> Result<Tensor> {
        parameters.get(if self.config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" })
    }
}

/// Parameters as a forward pass sees them.
pub struct Weights<'a> {
    parameters: &'a Parameters,
    trained: bool,
}

impl<'a> Weights<'a> {
    /// With gradients.
    pub fn trained(parameters: &'a Parameters) -> Self {
        Self { parameters, trained: true }
    }

    /// Without: nothing computed from them builds a graph.
    pub fn fixed(parameters: &'a Parameters) -> Self {
        Self { parameters, trained: false }
    }

    fn get(&self, module: &str) -> Result<Tensor> {
        Ok(self.tensor(&format!("{module}.weight")))
    }

    fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.parameters.tensor(name);
        if self.trained { tensor.clone() } else { tensor.detach() }
    }
}
