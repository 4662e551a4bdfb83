//! Generation: a prompt in, tokens out, one at a time.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::model::{KvCache, KvPrecision, Logits, Model, ModelError};
use crate::sampler::{SampleError, Sampler, SamplingOptions};

/// Why a text cannot be continued.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// There is nothing to continue.
    #[error("the prompt has no tokens; prompt; give at least one")]
    EmptyPrompt,
    /// Prompt and new tokens do not fit the model's context.
    #[error(
        "{asked} new tokens after a prompt of {prompt} do not fit the context of {context} tokens; generation; ask for at most {}",
        context.saturating_sub(*prompt)
    )]
    Context {
        /// New tokens asked for.
        asked: usize,
        /// Tokens of the prompt.
        prompt: usize,
        /// The model's `max_position_embeddings`.
        context: usize,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The sampler refused.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// New tokens at most; `None` goes on to the end of the context.
    pub max_new_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// How keys and values are stored.
    pub kv: KvPrecision,
    /// Tokens that end the text; usually the config's `eos_token_ids`.
    pub stop_ids: Vec<u32>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model gave one of the stop tokens.
    EndOfText,
    /// As many tokens as asked for, or the end of the context.
    Length,
    /// The caller said so.
    Caller,
}

impl Stop {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndOfText => "end_of_text",
            Self::Length => "length",
            Self::Caller => "caller",
        }
    }
}

/// What was generated, and how long it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The new tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Time for the new tokens.
    pub decode: Duration,
}

/// Continues a prompt; calls `on_token` with each new token, and stops when it says so.
///
/// # Errors
/// The prompt is empty, prompt and new tokens do not fit `max_position_embeddings`, or model or sampler refuse.
pub fn generate(
    model: &Model,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation, GenerateError> {
    let context = model.config().max_position_embeddings;
    if prompt.is_empty() {
        return Err(GenerateError::EmptyPrompt);
    }
    let room = context.checked_sub(prompt.len());
    let limit = options.max_new_tokens.unwrap_or(room.unwrap_or(0));
    if room.is_none_or(|room| limit > room) {
        return Err(GenerateError::Context { asked: limit, prompt: prompt.len(), context });
    }
    let mut sampler = Sampler::new(options.sampling)?;
    let mut cache = KvCache::with_precision(model, prompt.len() + limit, options.kv)?;
    let start = Instant::now();
    let mut logits = model.forward(prompt, &mut cache, Logits::Last)?;
    let prefill = start.elapsed();
    let start = Instant::now();
    let mut tokens = Vec::new();
    let stop = loop {
        if tokens.len() == limit {
            break Stop::Length;
        }
        let token = sampler.sample(&logits)?;
        if options.stop_ids.contains(&token) {
            break Stop::EndOfText;
        }
        tokens.push(token);
        if on_token(token).is_break() {
            break Stop::Caller;
        }
        if tokens.len() < limit {
            logits = model.forward(&[token], &mut cache, Logits::Last)?;
        }
    };
    Ok(Generation { tokens, stop, prefill, decode: start.elapsed() })
}
