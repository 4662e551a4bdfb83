//! What a training step is given: tokens, what to predict, how much each prediction counts, and who sees whom.

use super::windows::Windows;
use serde::{Deserialize, Serialize};

/// Rows of tokens, flattened one after the other: N tokens in all.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Inputs `[N]`.
    pub ids: Vec<u32>,
    /// Targets `[N]`: the token after each input. Where its weight is 0 it is any token of the vocabulary.
    pub targets: Vec<u32>,
    /// Factor of each target's loss `[N]`; none where every target counts the same.
    pub weights: Option<Vec<f32>>,
    /// Lengths of the pieces within which tokens attend to each other, in order; their sum is N. Positions count from 0
    /// in each.
    pub sequences: Vec<usize>,
}

impl Windows {
    /// [`Windows::batch`] as a [`Batch`]: every window is one sequence, every target counts.
    ///
    /// # Panics
    /// When an index is not below [`Windows::count`].
    pub fn whole_batch(&self, indices: &[u64]) -> Batch {
        let (ids, targets) = self.batch(indices);
        Batch { ids, targets, weights: None, sequences: vec![self.sequence_length(); indices.len()] }
    }
}

/// What the loss of one optimizer step is, given the loss `l_j` of each token that is to be learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// `sum_j l_j / n` over the n learnt tokens of all micro-batches of the step, so that a long answer counts as much
    /// as its tokens and the loss does not depend on how many there are.
    #[default]
    Mean,
    /// `sum_j l_j`: the gradient grows with the learnt tokens of a step, those of some hundred to some thousand times a
    /// mean's. Clipping by norm therefore cuts nearly every step. BitNet b1.58 2B4T was fine-tuned so.
    Sum,
}

impl Reduction {
    /// Scales the weights of all micro-batches of one optimizer step, such that their weighted sum of losses is this
    /// reduction. Weights come as 0 and 1. Batches without weights are left as they are.
    ///
    /// With `Mean` the weights of the step then sum to 1, up to f32 rounding; if all are 0 they stay so.
    pub fn scale(self, step: &mut [Batch]) {
        if self == Self::Sum {
            return;
        }
        let all = || step.iter().filter_map(|batch| batch.weights.as_ref()).flatten();
        let total: f64 = all().map(|&weight| f64::from(weight)).sum();
        if total > 0.0 {
            let weights = step.iter_mut().filter_map(|batch| batch.weights.as_mut()).flatten();
            weights.for_each(|weight| *weight = (f64::from(*weight) / total) as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Tokens;
    use super::*;

    fn batch(weights: Option<Vec<f32>>) -> Batch {
        Batch { ids: vec![0; 4], targets: vec![0; 4], weights, sequences: vec![4] }
    }

    #[test]
    fn a_mean_is_over_the_whole_step() {
        let ones = [vec![0.0, 1.0, 1.0, 0.0], vec![0.0, 0.0, 0.0, 1.0]];
        let step = ones.clone().map(|weights| batch(Some(weights)));
        let mut mean = step.to_vec();
        Reduction::Mean.scale(&mut mean);
        // Each is 1/3, not 1/2 of half a step and 1/1 of the other half.
        for (batch, ones) in mean.iter().zip(&ones) {
            let thirds: Vec<f32> = ones.iter().map(|one| one / 3.0).collect();
            assert_eq!(batch.weights.as_ref(), Some(&thirds));
        }
        let mut sum = step.to_vec();
        Reduction::Sum.scale(&mut sum);
        assert_eq!(sum, step);
    }

    #[test]
    fn nothing_to_scale_is_left_alone() {
        for weights in [None, Some(vec![0.0; 4])] {
            let mut step = [batch(weights.clone())];
            Reduction::Mean.scale(&mut step);
            assert_eq!(step, [batch(weights)]);
        }
        assert_eq!(serde_json::to_string(&Reduction::Sum).unwrap(), "\"sum\"");
    }

    #[test]
    fn a_batch_of_plain_text_is_its_windows() {
        let windows = Windows::new(Tokens::from_ids(&(0..9).collect::<Vec<_>>()), 4, "training").unwrap();
        let batch = windows.whole_batch(&[1, 0]);
        assert_eq!((batch.ids.clone(), batch.targets.clone()), windows.batch(&[1, 0]));
        assert_eq!((batch.weights, batch.sequences), (None, vec![4, 4]));
    }
}
