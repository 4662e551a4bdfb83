//! Fixed windows over a token stream, and the seeded order in which training visits them.
//!
//! The order is a function of (seed, epoch) and the position one number, so a run resumes exactly from its cursor alone.
//! Windows do not overlap except that each one's last target is the next one's first input; documents follow each other
//! within a window, told apart by their separator.

use super::error::DataError;
use super::tokens::Tokens;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::ops::Range;

/// Longest sequence accepted, tokens: a batch must stay allocatable.
const MAX_SEQUENCE: usize = 1 << 24;

/// A split cut into windows: window i is tokens `[i*T, i*T + T + 1)`, its first T the inputs, its last T the targets.
#[derive(Debug, Clone)]
pub struct Windows {
    tokens: Tokens,
    sequence_length: usize,
}

impl Windows {
    /// Cuts `tokens` into `(len - 1) / sequence_length` windows; the tail that fills none is left out.
    ///
    /// # Errors
    /// `SequenceLength` unless it is 1 to 2^24; `TooFewTokens` when not one window is whole.
    pub fn new(tokens: Tokens, sequence_length: usize, split: &'static str) -> Result<Self, DataError> {
        check_length(sequence_length)?;
        if tokens.len() <= sequence_length {
            return Err(DataError::TooFewTokens { split, tokens: tokens.len(), needed: sequence_length + 1 });
        }
        Ok(Self { tokens, sequence_length })
    }

    /// Number of windows, at least 1.
    pub fn count(&self) -> u64 {
        ((self.tokens.len() - 1) / self.sequence_length) as u64
    }

    /// T, tokens.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// The token stream.
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Inputs and targets of the given windows, each flattened `[indices.len() * T]`: `targets[j] = inputs[j + 1]`
    /// within a window.
    ///
    /// # Panics
    /// When an index is not below [`Windows::count`].
    pub fn batch(&self, indices: &[u64]) -> (Vec<u32>, Vec<u32>) {
        let length = self.sequence_length;
        let (mut inputs, mut targets) =
            (Vec::with_capacity(indices.len() * length), Vec::with_capacity(indices.len() * length));
        for &index in indices {
            assert!(index < self.count(), "window {index} of {}", self.count());
            let start = index as usize * length;
            let window = self.tokens.get(start..start + length + 1);
            inputs.extend_from_slice(&window[..length]);
            targets.extend_from_slice(&window[1..]);
        }
        (inputs, targets)
    }

    /// At most `limit` windows (0: all), spread evenly over the split, in order, the same at every call:
    /// `i * count / limit`.
    pub fn evaluation(&self, limit: u64) -> Vec<u64> {
        spread(self.count(), limit)
    }

    /// The tokens that window `index` reads, `T + 1` of them.
    pub fn range(&self, index: u64) -> Range<usize> {
        let start = index as usize * self.sequence_length;
        start..start + self.sequence_length + 1
    }
}

/// At most `limit` (0: all) of `count` indices, `i * count / limit`.
pub(super) fn spread(count: u64, limit: u64) -> Vec<u64> {
    let limit = if limit == 0 { count } else { limit.min(count) };
    (0..limit).map(|i| (u128::from(i) * u128::from(count) / u128::from(limit)) as u64).collect()
}

/// Refuses a sequence length outside `1..=2^24`, before any text is read.
pub(super) fn check_length(sequence_length: usize) -> Result<(), DataError> {
    if (1..=MAX_SEQUENCE).contains(&sequence_length) {
        Ok(())
    } else {
        Err(DataError::SequenceLength(sequence_length))
    }
}

/// A permutation of `0..count`, drawn from `seed` and afresh for each `epoch` (Fisher-Yates over ChaCha8, the epoch as
/// the generator's stream).
pub fn epoch_order(seed: u64, epoch: u64, count: u64) -> Vec<u64> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    // A name of its own: other users of the same seed draw other numbers.
    key[8..18].copy_from_slice(b"data order");
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(epoch);
    let mut order: Vec<u64> = (0..count).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, below(&mut rng, last as u64 + 1) as usize);
    }
    order
}

/// A uniform number below `bound` (Lemire's multiply and reject). Ours, because the order is part of a run's state and
/// must not change with a library's version.
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
    }
}

/// Which windows come next: an endless sequence of epochs, each visiting every window exactly once.
///
/// `cursor` counts the windows handed out since the start of the run. A sampler made with any cursor continues as one
/// that was run up to it; only seed and cursor are serialized.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Sampler {
    seed: u64,
    cursor: u64,
    /// Order of the epoch last used, with (epoch, count).
    #[serde(skip)]
    order: Option<((u64, u64), Vec<u64>)>,
}

impl Sampler {
    /// A sampler that has handed out `cursor` windows.
    pub fn new(seed: u64, cursor: u64) -> Self {
        Self { seed, cursor, order: None }
    }

    /// Windows handed out so far.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Epochs begun so far as a number: `cursor / count`, 1.0 when every window was visited once.
    pub fn epoch(&self, count: u64) -> f64 {
        self.cursor as f64 / count as f64
    }

    /// The next `batch` windows of `count`; a batch may straddle epochs.
    ///
    /// # Panics
    /// When `count` is 0.
    pub fn next_batch(&mut self, count: u64, batch: usize) -> Vec<u64> {
        assert!(count > 0, "a split has at least one window");
        (0..batch)
            .map(|_| {
                let key = (self.cursor / count, count);
                let (_, order) = match self.order.take() {
                    Some(order) if order.0 == key => self.order.insert(order),
                    _ => self.order.insert((key, epoch_order(self.seed, key.0, count))),
                };
                let window = order[(self.cursor % count) as usize];
                self.cursor += 1;
                window
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn windows(tokens: u32, length: usize) -> Result<Windows, DataError> {
        Windows::new(Tokens::from_ids(&(0..tokens).collect::<Vec<_>>()), length, "training")
    }

    #[test]
    fn windows_are_whole_and_shifted_by_one() {
        let windows = windows(14, 4).unwrap();
        assert_eq!(windows.count(), 3);
        let (inputs, targets) = windows.batch(&[2, 0]);
        assert_eq!(inputs, [8, 9, 10, 11, 0, 1, 2, 3]);
        assert_eq!(targets, [9, 10, 11, 12, 1, 2, 3, 4]);
        assert_eq!(windows.range(2), 8..13);
    }

    #[test]
    fn a_split_needs_one_whole_window() {
        assert_eq!(windows(5, 4).unwrap().count(), 1);
        assert_eq!(windows(8, 4).unwrap().count(), 1);
        assert_eq!(windows(9, 4).unwrap().count(), 2);
        for tokens in 0..5 {
            match windows(tokens, 4) {
                Err(DataError::TooFewTokens { tokens: found, needed: 5, .. }) => {
                    assert_eq!(found, tokens as usize)
                }
                other => panic!("{other:?}"),
            }
        }
        for length in [0, (1 << 24) + 1, usize::MAX] {
            assert!(matches!(windows(9, length), Err(DataError::SequenceLength(_))));
        }
    }

    #[test]
    #[should_panic(expected = "window 3 of 3")]
    fn a_window_outside_the_split_panics() {
        windows(14, 4).unwrap().batch(&[3]);
    }

    #[test]
    fn evaluation_windows_are_spread_in_order() {
        let windows = windows(101, 10).unwrap();
        assert_eq!(windows.evaluation(4), [0, 2, 5, 7]);
        assert_eq!(windows.evaluation(10), (0..10).collect::<Vec<_>>());
        assert_eq!(windows.evaluation(u64::MAX), windows.evaluation(10));
        assert_eq!(windows.evaluation(0), windows.evaluation(10));
    }

    #[test]
    fn the_order_is_pinned() {
        // Changing these numbers breaks the resume of every run in progress.
        assert_eq!(epoch_order(1, 0, 8), [2, 3, 0, 1, 6, 4, 5, 7]);
        assert_eq!(epoch_order(1, 1, 8), [3, 0, 2, 1, 7, 6, 5, 4]);
    }

    #[test]
    fn the_shuffle_is_uniform() {
        let mut counts = std::collections::HashMap::new();
        for epoch in 0..24_000 {
            *counts.entry(epoch_order(7, epoch, 4)).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 24);
        // 1000 each, standard deviation 31: the bounds are 6 of them away.
        assert!(counts.values().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    #[test]
    fn every_cursor_resumes_the_same_sequence() {
        const COUNT: u64 = 7;
        let all = Sampler::new(3, 0).next_batch(COUNT, 40);
        for cursor in 0..=36 {
            let mut resumed = Sampler::new(3, cursor as u64);
            let text = serde_json::to_string(&resumed).unwrap();
            assert_eq!(text, format!("{{\"seed\":3,\"cursor\":{cursor}}}"));
            assert_eq!(resumed.next_batch(COUNT, 4), all[cursor..cursor + 4]);
            let mut parsed: Sampler = serde_json::from_str(&text).unwrap();
            assert_eq!(parsed.next_batch(COUNT, 4), all[cursor..cursor + 4]);
            assert_eq!(parsed.cursor(), cursor as u64 + 4);
        }
    }

    proptest! {
        #[test]
        fn an_epoch_visits_every_window_once(seed: u64, count in 1u64..60, batch in 1usize..17) {
            let mut sampler = Sampler::new(seed, 0);
            let mut visited = Vec::new();
            while (visited.len() as u64) < 3 * count {
                visited.extend(sampler.next_batch(count, batch));
            }
            for (epoch, windows) in visited.chunks_exact(count as usize).enumerate() {
                prop_assert_eq!(windows, &epoch_order(seed, epoch as u64, count)[..]);
                let mut sorted = windows.to_vec();
                sorted.sort_unstable();
                prop_assert_eq!(sorted, (0..count).collect::<Vec<_>>());
            }
        }

        #[test]
        fn epochs_and_seeds_differ(seed: u64, epoch in 0u64..1000) {
            let order = epoch_order(seed, epoch, 64);
            prop_assert_ne!(&order, &epoch_order(seed, epoch + 1, 64));
            prop_assert_ne!(&order, &epoch_order(seed.wrapping_add(1), epoch, 64));
        }
    }
}
