//! Text to token ids and back: a thin wrapper of the `tokenizers` crate.
//!
//! What it adds: the vocabulary is checked against the model, and decoding a stream never shows half a character.

use std::path::{Path, PathBuf};

/// The file in a model's folder.
pub const TOKENIZER: &str = "tokenizer.json";

/// The error type of the `tokenizers` crate.
type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why text and ids cannot be turned into each other.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read the tokenizer; {}; check that the file exists and may be read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a tokenizer.
    #[error("not a tokenizer that can be used; {}; copy it again from where the model was made", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What its reader says.
        source: Source,
    },
    /// The tokenizer has ids that the model does not have.
    #[error("token id {id} is not below vocab_size {vocab_size}; {}; the tokenizer is of another model", path.display())]
    Vocabulary {
        /// The file.
        path: PathBuf,
        /// The largest id.
        id: u32,
        /// The model's number of ids.
        vocab_size: usize,
    },
    /// The text could not be turned into ids.
    #[error("cannot encode a text of {bytes} bytes; tokenizer; check the text and the tokenizer")]
    Encode {
        /// Length of the text.
        bytes: usize,
        /// What the tokenizer says.
        source: Source,
    },
    /// The ids could not be turned into text.
    #[error("cannot decode {tokens} tokens; tokenizer; check the tokenizer's decoder")]
    Decode {
        /// Number of ids.
        tokens: usize,
        /// What the tokenizer says.
        source: Source,
    },
}

/// A tokenizer whose ids all belong to the model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in a model's folder.
    ///
    /// # Errors
    /// The file cannot be read, is not a tokenizer, or has ids from `vocab_size` on.
    pub fn read(folder: &Path, vocab_size: usize) -> Result<Self, TokenizerError> {
        let path = folder.join(TOKENIZER);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) => return Err(TokenizerError::Io { path, source }),
        };
        let inner = match parse(&bytes) {
            Ok(inner) => inner,
            Err(source) => return Err(TokenizerError::Format { path, source }),
        };
        match inner.get_vocab(true).into_values().max() {
            Some(id) if id as usize >= vocab_size => Err(TokenizerError::Vocabulary { path, id, vocab_size }),
            _ => Ok(Self { inner }),
        }
    }

    /// Ids of a text. `special` adds what the tokenizer puts around a text, such as a start token.
    ///
    /// # Errors
    /// The tokenizer cannot express the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        match self.inner.encode_fast(text, special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(source) => Err(TokenizerError::Encode { bytes: text.len(), source }),
        }
    }

    /// Text of ids, without special tokens. What is not UTF-8 becomes U+FFFD; unknown ids are left out.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, true).map_err(|source| TokenizerError::Decode { tokens: ids.len(), source })
    }

    /// A decoder that takes one id at a time.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, ids: Vec::new(), window: 0, last: 0, given: 0 }
    }
}

/// The `tokenizers` crate takes parts of its file for granted and panics where they are damaged: what is not JSON is
/// refused before it comes that far, and a panic on the rest is an error too.
fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, Source> {
    serde_json::from_slice::<serde_json::Value>(bytes)?;
    std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes))
        .unwrap_or_else(|_| Err("its reader failed".into()))
}

/// Turns ids into text one at a time; whole characters only. The pieces together are the text of all ids.
///
/// A token's text may depend on the one before it (a leading space) and a character may span several, so each step
/// decodes from the beginning of the last piece given out and holds back a tail that may still become a character.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Where decoding starts: the ids of the last whole piece but one.
    window: usize,
    /// Where the ids of the last whole piece end.
    last: usize,
    /// Bytes of the window's text that were given out.
    given: usize,
}

/// U+FFFD stands for up to three bytes of a character whose fourth has not come; decoders may write one for each.
const MAX_HELD_BACK: usize = 3;

impl DecodeStream<'_> {
    /// Takes one more id and returns the text that is complete by now.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids[self.window..])?;
        let mut whole = text.as_str();
        for _ in 0..MAX_HELD_BACK {
            whole = whole.strip_suffix('\u{fffd}').unwrap_or(whole);
        }
        let piece = whole.get(self.given..).unwrap_or_default().to_owned();
        self.given += piece.len();
        if !piece.is_empty() && whole.len() == text.len() {
            self.window = self.last;
            self.last = self.ids.len();
            self.given = self.tokenizer.decode(&self.ids[self.window..])?.len();
        }
        Ok(piece)
    }

    /// The rest: a tail that never became a character, as U+FFFD.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn finish(self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.ids[self.window..])?;
        Ok(text.get(self.given..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::decoders::byte_level::ByteLevel;
    use tokenizers::models::bpe::BPE;

    /// One token a byte: every character beyond ASCII spans several.
    fn bytes_only() -> Tokenizer {
        let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let vocab: Vec<(String, u32)> = alphabet.iter().map(|c| c.to_string()).zip(0..).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), Vec::new());
        let mut inner = tokenizers::Tokenizer::new(model.build().unwrap());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        inner.with_decoder(Some(ByteLevel::default()));
        Tokenizer { inner }
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream();
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn a_character_comes_whole() {
        let tokenizer = bytes_only();
        let pieces = streamed(&tokenizer, &tokenizer.encode("aé😀!", false).unwrap());
        assert_eq!(pieces, ["a", "", "é", "", "", "", "😀", "!", ""]);
    }

    #[test]
    fn half_a_character_at_the_end_is_marked() {
        let tokenizer = bytes_only();
        let ids = tokenizer.encode("a😀", false).unwrap();
        assert_eq!(streamed(&tokenizer, &ids[..3]), ["a", "", "", "\u{fffd}"]);
    }

    proptest! {
        #[test]
        fn pieces_make_the_text(text in "\\PC{0,20}", noise in prop::collection::vec(0u32..256, 0..30)) {
            let tokenizer = bytes_only();
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(streamed(&tokenizer, &ids).concat(), text);
            prop_assert_eq!(streamed(&tokenizer, &noise).concat(), tokenizer.decode(&noise).unwrap());
        }
    }
}
