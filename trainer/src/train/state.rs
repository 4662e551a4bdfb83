//! What a checkpoint holds besides tensors.
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::TrainError;
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

    /// Refuses data that the run at `path` was not trained on.
    ///
    /// # Errors
    /// [`TrainError::DataChanged`].
    pub fn require_same_data(&self, dataset: &Dataset, path: &Path) -> Result<(), TrainError> {
        let changed = |what| Err(TrainError::DataChanged { what, path: path.into() });
        if self.tokenizer_hash != dataset.tokenizer_hash {
            return changed("tokenizer");
        }
        if self.dataset_hash != dataset.dataset_hash {
            return changed("data");
        }
        Ok(())
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
