//! How well a model has learnt the embedded corpus: the one text whose exact entropy is known.
use infer::Model;
use infer::sampler::SamplingOptions;
use rayon::prelude::*;
use serde::Serialize;
use tokenizers::Tokenizer;

use crate::corpus::Grammar;
use crate::runtime::{RuntimeError, continue_text};

/// Stories that the loss is measured on.
const SCORED: u64 = 200;
/// Temperature of the stories that are judged.
const TEMPERATURE: f32 = 0.8;

/// What a model of the embedded corpus reaches.
#[derive(Debug, Clone, Serialize)]
pub struct StoryReport {
    /// Mean bits of a fresh story under the model, its end included.
    pub bits_per_story: f64,
    /// The corpus's exact entropy: no model can be below it.
    pub entropy_bits_per_story: f64,
    /// The model's, in bits a byte.
    pub bits_per_byte: f64,
    /// The entropy in bits a byte.
    pub entropy_bits_per_byte: f64,
    /// Stories sampled from the model.
    pub sampled: usize,
    /// Share of their sentences that the grammar can generate.
    pub sentences_in_language: f64,
    /// Share of the stories that the grammar can generate as a whole.
    pub stories_in_language: f64,
    /// One of them.
    pub example: String,
}

impl std::fmt::Display for StoryReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "fresh stories: {:.2} bits each ({:.4} per byte); the corpus's entropy is {:.2} ({:.4}): {:.2} bits above the limit",
            self.bits_per_story,
            self.bits_per_byte,
            self.entropy_bits_per_story,
            self.entropy_bits_per_byte,
            self.bits_per_story - self.entropy_bits_per_story
        )?;
        writeln!(
            f,
            "{} sampled stories: {:.1} % of the sentences and {:.1} % of the whole stories belong to the language",
            self.sampled,
            100.0 * self.sentences_in_language,
            100.0 * self.stories_in_language
        )?;
        write!(f, "\n{}", self.example)
    }
}

/// Scores fresh stories and judges `sampled` generated ones.
///
/// Fresh stories come from stream `seed + 1` of the grammar, which training on stream `seed` has not seen.
///
/// Nothing if the model's context cannot hold whole stories.
///
/// # Errors
/// The tokenizer or the model fails.
pub fn report(
    model: &Model,
    tokenizer: &Tokenizer,
    seed: u64,
    sampled: usize,
) -> Result<Option<StoryReport>, RuntimeError> {
    let grammar = Grammar::embedded();
    let (mut bits, mut bytes) = (0.0, 0);
    for index in 0..SCORED {
        let story = grammar.story(seed.wrapping_add(1), index);
        let encoding = tokenizer
            .encode(story.as_str(), false)
            .map_err(|source| RuntimeError::Tokenizer { text: story.clone(), message: source.to_string() })?;
        let config = model.config();
        let ids: Vec<u32> = config
            .bos_token_id
            .into_iter()
            .chain(encoding.get_ids().iter().copied())
            .chain(config.eos_token_ids.first().copied())
            .collect();
        if ids.len() > config.max_position_embeddings + 1 {
            return Ok(None);
        }
        let nats: f64 = infer::eval::score(model, &ids)?.into_iter().map(|log| -f64::from(log)).sum();
        bits += nats / std::f64::consts::LN_2;
        bytes += story.len();
    }
    let stories: Vec<String> = (0..sampled)
        .into_par_iter()
        .map(|number| {
            let sampling = SamplingOptions {
                temperature: TEMPERATURE,
                top_k: 0,
                top_p: 1.0,
                seed: seed ^ ((number as u64) << 20),
            };
            continue_text(model, tokenizer, "", None, sampling)
        })
        .collect::<Result<_, _>>()?;
    let verdicts: Vec<_> = stories.iter().map(|story| grammar.recognize(story)).collect();
    let sentences: usize = verdicts.iter().map(|v| v.sentences).sum();
    let good: usize = verdicts.iter().map(|v| v.sentences_in_language).sum();
    let whole = verdicts.iter().filter(|v| v.story_in_language).count();
    let entropy = grammar.entropy();
    let example = verdicts.iter().position(|v| v.story_in_language).unwrap_or(0);
    Ok(Some(StoryReport {
        bits_per_story: bits / SCORED as f64,
        entropy_bits_per_story: entropy.bits_per_story,
        bits_per_byte: bits / bytes as f64,
        entropy_bits_per_byte: entropy.bits_per_byte,
        sampled,
        sentences_in_language: good as f64 / sentences.max(1) as f64,
        stories_in_language: whole as f64 / sampled.max(1) as f64,
        example: stories.into_iter().nth(example).unwrap_or_default(),
    }))
}
