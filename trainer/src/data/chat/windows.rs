//! Packed conversations as rows that training visits like windows of plain text.

use super::super::batch::Batch;
use super::super::windows::spread;
use super::encode::Example;
use super::pack::pack;
use std::ops::Range;

/// Conversations of one split, packed into rows of T tokens.
///
/// A row holds whole examples one after the other, each a sequence of its own, and then padding, which is one too.
#[derive(Debug, Clone)]
pub struct ChatWindows {
    /// All examples, one after the other.
    ids: Vec<u32>,
    /// Which tokens the assistant says; as long as `ids`.
    assistant: Vec<bool>,
    /// Where in `ids` each example is.
    examples: Vec<Range<usize>>,
    /// The examples of each row.
    rows: Vec<Vec<usize>>,
    sequence_length: usize,
    padding: u32,
}

impl ChatWindows {
    /// Packs examples of at most `sequence_length` tokens in an order drawn from `seed`.
    pub(super) fn new(examples: Vec<Example>, sequence_length: usize, padding: u32, seed: u64) -> Self {
        let (mut ids, mut assistant, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        for example in examples {
            ranges.push(ids.len()..ids.len() + example.ids.len());
            ids.extend(example.ids);
            assistant.extend(example.assistant);
        }
        let lengths: Vec<_> = ranges.iter().map(Range::len).collect();
        let rows = pack(&lengths, sequence_length, seed);
        Self { ids, assistant, examples: ranges, rows, sequence_length, padding }
    }

    /// Number of rows, at least 1.
    pub fn count(&self) -> u64 {
        self.rows.len() as u64
    }

    /// T, tokens in a row.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// Number of examples.
    pub fn examples(&self) -> u64 {
        self.examples.len() as u64
    }

    /// Tokens of all examples; the rest of `count * T` is padding.
    pub fn tokens(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Those tokens, one example after the other.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Tokens that are learnt: those of the assistant that have one before them in their example.
    pub fn learnt(&self) -> u64 {
        let targets = |range: &Range<usize>| &self.assistant[range.start + 1..range.end];
        self.examples.iter().flat_map(targets).filter(|&&assistant| assistant).count() as u64
    }

    /// The given rows. A target's weight is 1 where it is a token that the assistant says and follows the input in the
    /// same example, else 0: at the last token of each example, and in the padding.
    ///
    /// # Panics
    /// When an index is not below [`ChatWindows::count`].
    pub fn batch(&self, indices: &[u64]) -> Batch {
        let size = indices.len() * self.sequence_length;
        let (mut ids, mut targets) = (Vec::with_capacity(size), Vec::with_capacity(size));
        let (mut weights, mut sequences) = (Vec::with_capacity(size), Vec::new());
        for (number, &index) in indices.iter().enumerate() {
            assert!(index < self.count(), "row {index} of {}", self.count());
            for &example in &self.rows[index as usize] {
                let range = self.examples[example].clone();
                let rest = range.start + 1..range.end;
                sequences.push(range.len());
                ids.extend_from_slice(&self.ids[range]);
                targets.extend_from_slice(&self.ids[rest.clone()]);
                targets.push(self.padding);
                weights.extend(self.assistant[rest].iter().map(|&assistant| f32::from(u8::from(assistant))));
                weights.push(0.0);
            }
            let end = (number + 1) * self.sequence_length;
            if ids.len() < end {
                sequences.push(end - ids.len());
            }
            ids.resize(end, self.padding);
            targets.resize(end, self.padding);
            weights.resize(end, 0.0);
        }
        Batch { ids, targets, weights: Some(weights), sequences }
    }

    /// At most `limit` rows (0: all), spread evenly, the same at every call: `i * count / limit`.
    pub fn evaluation(&self, limit: u64) -> Vec<u64> {
        spread(self.count(), limit)
    }

    /// Feeds all examples to a hash, in the order in which they were read.
    pub(super) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.examples().to_le_bytes());
        for range in &self.examples {
            hasher.update(&(range.len() as u64).to_le_bytes());
            for (id, &assistant) in self.ids[range.clone()].iter().zip(&self.assistant[range.clone()]) {
                hasher.update(&id.to_le_bytes()).update(&[u8::from(assistant)]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::windows::Sampler;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_row_is_its_examples_and_padding() {
        let examples = vec![
            Example { ids: vec![1, 2, 3], assistant: vec![false, true, true] },
            Example { ids: vec![4, 5], assistant: vec![true, true] },
        ];
        let windows = ChatWindows::new(examples, 7, 9, 0);
        assert_eq!((windows.count(), windows.examples(), windows.tokens(), windows.learnt()), (1, 2, 5, 3));
        let batch = windows.batch(&[0]);
        assert_eq!(batch.ids, [1, 2, 3, 4, 5, 9, 9]);
        assert_eq!(batch.targets, [2, 3, 9, 5, 9, 9, 9]);
        assert_eq!(batch.weights, Some(vec![1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]));
        assert_eq!(batch.sequences, [3, 2, 2]);
        assert_eq!(windows.batch(&[0, 0]).sequences, [3, 2, 2, 3, 2, 2]);
    }

    #[test]
    #[should_panic(expected = "row 1 of 1")]
    fn a_row_outside_panics() {
        let example = Example { ids: vec![1, 2], assistant: vec![false, true] };
        ChatWindows::new(vec![example], 2, 0, 0).batch(&[1]);
    }

    fn examples() -> impl Strategy<Value = Vec<Example>> {
        let token = (10u32..500, any::<bool>());
        let example = prop::collection::vec(token, 2..17).prop_map(|tokens| {
            let (ids, mut assistant): (Vec<u32>, Vec<bool>) = tokens.into_iter().unzip();
            *assistant.last_mut().unwrap() = true;
            Example { ids, assistant }
        });
        prop::collection::vec(example, 1..80)
    }

    proptest! {
        #[test]
        fn an_epoch_has_every_example_once_and_none_is_mixed(
            examples in examples(), seed: u64, per_step in 1usize..5, length in 16usize..40
        ) {
            let windows = ChatWindows::new(examples.clone(), length, 3, seed);
            let mut sampler = Sampler::new(seed, 0);
            let mut seen = Vec::new();
            let (mut left, mut learnt) = (windows.count(), 0);
            while left > 0 {
                let rows = sampler.next_batch(windows.count(), per_step.min(left as usize));
                left -= rows.len() as u64;
                let batch = windows.batch(&rows);
                prop_assert_eq!(&batch, &windows.batch(&rows));
                let weights = batch.weights.unwrap();
                prop_assert_eq!(batch.ids.len(), rows.len() * length);
                prop_assert_eq!((batch.targets.len(), weights.len()), (batch.ids.len(), batch.ids.len()));
                let mut start = 0;
                for size in batch.sequences {
                    let at = start..start + size;
                    // Nothing crosses a row.
                    prop_assert_eq!(start / length, (at.end - 1) / length);
                    start = at.end;
                    let (ids, weights) = (&batch.ids[at.clone()], &weights[at.clone()]);
                    if ids.iter().all(|&id| id == 3) {
                        prop_assert!(weights.iter().all(|&weight| weight == 0.0));
                        prop_assert_eq!(at.end % length, 0);
                        continue;
                    }
                    prop_assert_eq!(&batch.targets[at.start..at.end - 1], &ids[1..]);
                    prop_assert_eq!(weights[size - 1], 0.0);
                    learnt += weights.iter().sum::<f32>() as u64;
                    seen.push((ids.to_vec(), weights.to_vec()));
                }
                prop_assert_eq!(start, batch.ids.len());
            }
            let mut expected: Vec<_> = examples
                .iter()
                .map(|example| {
                    let next = example.assistant[1..].iter().map(|&is| f32::from(u8::from(is)));
                    (example.ids.clone(), next.chain([0.0]).collect::<Vec<_>>())
                })
                .collect();
            let order = |a: &(Vec<u32>, Vec<f32>), b: &(Vec<u32>, Vec<f32>)| a.partial_cmp(b).unwrap();
            seen.sort_by(order);
            expected.sort_by(order);
            prop_assert_eq!(seen, expected);
            prop_assert_eq!(learnt, windows.learnt());
        }
    }
}
