//! Lean runtime for BitNet b1.58 models: what a program needs to run one, without a deep-learning stack.
//!
//! The arithmetic is that of [`bitlinear`], function for function what the trainer's forward pass uses, so that the
//! model that was trained is the model that runs.
//!
//! * [`config`]: a model's sizes and options, under Hugging Face's names;
//! * [`model`]: weights, KV cache and the forward pass;
//! * [`checkpoint`]: formats on disk, reading and writing beside each other;
//! * [`tokenizer`], [`sampler`], [`generate`](mod@generate): from text to text;
//! * [`eval`]: log-probabilities and perplexity; [`bench`](mod@bench): tokens a second; [`inspect`]: what a model
//!   is made of.
pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod eval;
pub mod generate;
pub mod inspect;
pub mod model;
pub mod sampler;
pub mod tokenizer;

pub use config::ModelConfig;
pub use model::{KvCache, Logits, Model, ModelError};
