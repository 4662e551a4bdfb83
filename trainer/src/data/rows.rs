//! What training visits in shuffled order: windows of text, or packed conversations.
use super::{Batch, ChatWindows, Windows};

/// One split of the data, in rows of as many tokens each.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Windows over a stream of text.
    Text(Windows),
    /// Conversations, of which the assistant's tokens are learnt.
    Chat(ChatWindows),
}

impl Rows {
    /// Number of rows, at least 1.
    pub fn count(&self) -> u64 {
        match self {
            Self::Text(windows) => windows.count(),
            Self::Chat(windows) => windows.count(),
        }
    }

    /// Tokens in a row.
    pub fn sequence_length(&self) -> usize {
        match self {
            Self::Text(windows) => windows.sequence_length(),
            Self::Chat(windows) => windows.sequence_length(),
        }
    }

    /// Tokens of the whole split, without padding.
    pub fn tokens(&self) -> u64 {
        match self {
            Self::Text(windows) => windows.tokens().len() as u64,
            Self::Chat(windows) => windows.tokens(),
        }
    }

    /// All those tokens in order.
    pub fn ids(&self) -> Vec<u32> {
        match self {
            Self::Text(windows) => windows.tokens().get(0..windows.tokens().len()),
            Self::Chat(windows) => windows.ids().to_vec(),
        }
    }

    /// Some rows.
    ///
    /// # Panics
    /// When an index is not below [`Rows::count`].
    pub fn batch(&self, indices: &[u64]) -> Batch {
        match self {
            Self::Text(windows) => windows.whole_batch(indices),
            Self::Chat(windows) => windows.batch(indices),
        }
    }

    /// At most `limit` rows (0: all), spread evenly over the split, the same at every call.
    pub fn evaluation(&self, limit: u64) -> Vec<u64> {
        match self {
            Self::Text(windows) => windows.evaluation(limit),
            Self::Chat(windows) => windows.evaluation(limit),
        }
    }
}
