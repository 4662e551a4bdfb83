//! What a checkpoint holds besides tensors.
use serde::{Deserialize, Serialize};

use crate::data::{Dataset, Sampler};

/// The position of a run. Schedules are functions of `step`, and sampled text of the seed and `step`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainState {
    /// Steps done, skipped ones included.
    pub step: u64,
    /// Optimizer updates made.
    pub updates: u64,
    /// Seed and position of the data order.
    pub sampler: Sampler,
    /// Steps skipped for want of a finite loss or gradient.
    pub skipped: u64,
    /// The last of them in a row.
    pub skipped_in_a_row: u64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// blake3 of the data.
    pub dataset_hash: String,
    /// blake3 of the tokenizer, if there is one.
    pub tokenizer_hash: Option<String>,
}

impl TrainState {
    /// The start of a run on this data.
    pub fn new(seed: u64, dataset: &Dataset) -> Self {
        Self {
            step: 0,
            updates: 0,
            sampler: Sampler::new(seed, 0),
            skipped: 0,
            skipped_in_a_row: 0,
            best: None,
            dataset_hash: dataset.dataset_hash.clone(),
            tokenizer_hash: dataset.tokenizer_hash.clone(),
        }
    }
}

/// The best evaluation of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done at that evaluation; a checkpoint of that step exists while `checkpoint.keep_best` is on.
    pub step: u64,
    /// Validation loss, nats a token.
    pub loss: f64,
}
