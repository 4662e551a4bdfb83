//! Turning documents into tokens on all cores, with the same result as encoding each document whole.
//!
//! Long documents are cut into pieces where the tokenizer's splitting expression surely splits as well and where no
//! look-ahead can see the cut: before a space, or around a single line break. Each piece then gives exactly the tokens
//! that it has in the whole document. A tokenizer of which this is not known encodes each document whole: slower, in
//! more memory, never different.

use super::error::DataError;
use rayon::prelude::*;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

/// Bytes of text in a piece: large enough to hide the cost of a call, small enough to spread.
const PIECE: usize = 1 << 16;
/// Bytes of text encoded between two reports of progress; bounds the tokens held in memory.
const BATCH: usize = 4 << 20;

/// Splitting expressions besides GPT-2's that never join a character to a space after it, nor text to a single line
/// break before it: Llama 3's and Qwen 2's.
const KNOWN_PATTERNS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Where documents may be cut.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Cut {
    AtSpaces,
    Never,
}

impl Cut {
    /// Where cutting provably leaves this tokenizer's tokens as they are.
    fn for_tokenizer(tokenizer: &Tokenizer) -> Self {
        let plain = |bytes: &ByteLevel| !bytes.add_prefix_space;
        let splits = match tokenizer.get_pre_tokenizer() {
            Some(PreTokenizerWrapper::ByteLevel(bytes)) => plain(bytes) && bytes.use_regex,
            Some(PreTokenizerWrapper::Sequence(steps)) => match steps.as_ref() {
                [PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)] => {
                    let known = matches!(&split.pattern, SplitPattern::Regex(pattern) if KNOWN_PATTERNS.contains(&pattern.as_str()));
                    known
                        && !split.invert
                        && split.behavior == SplitDelimiterBehavior::Isolated
                        && plain(bytes)
                        && !bytes.use_regex
                }
                _ => false,
            },
            _ => false,
        };
        let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let added_stay_whole = added.values().all(|token| {
            !(token.lstrip
                || token.rstrip
                || token.single_word
                || token.content.contains(char::is_whitespace))
        });
        if splits && tokenizer.get_normalizer().is_none() && added_stay_whole {
            Self::AtSpaces
        } else {
            Self::Never
        }
    }
}

/// Cuts `text` at the first allowed places at or after every `size` bytes.
pub(super) fn pieces(text: &str, size: usize, cut: Cut) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = if cut == Cut::Never { rest.len() } else { cut_after(rest, size) };
        let (piece, tail) = rest.split_at(end);
        rest = tail;
        Some(piece)
    })
}

/// The first place at or after byte `from` that follows a visible character and precedes a space, or that follows a
/// line break standing alone between visible characters. The end, if there is none.
fn cut_after(text: &str, from: usize) -> usize {
    if from >= text.len() {
        return text.len();
    }
    let from = text.floor_char_boundary(from);
    let mut before = text[..from].chars().rev();
    let (mut last, mut second) = (before.next(), before.next());
    let visible = |character: Option<char>| character.is_some_and(|character| !character.is_whitespace());
    for (at, next) in text[from..].char_indices() {
        let alone = last == Some('\n') && visible(second) && !next.is_whitespace();
        if (visible(last) && next == ' ') || alone {
            return from + at;
        }
        (last, second) = (Some(next), last);
    }
    text.len()
}

/// Encodes all documents in order, `separator` after each, and hands the tokens to `sink` piece by piece.
///
/// `progress` is told the bytes of text of each batch. The tokens do not depend on the number of threads.
pub(super) fn encode_documents(
    tokenizer: &Tokenizer,
    documents: &[String],
    separator: Option<u32>,
    mut progress: impl FnMut(usize),
    mut sink: impl FnMut(&[u32]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let cut = Cut::for_tokenizer(tokenizer);
    let mut parts = documents.iter().flat_map(|document| {
        let mut parts = pieces(document, PIECE, cut).peekable();
        std::iter::from_fn(move || parts.next().map(|part| (part, parts.peek().is_none())))
    });
    loop {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH
            && let Some((part, last)) = parts.next()
        {
            bytes += part.len();
            batch.push((part, last));
        }
        if batch.is_empty() {
            return Ok(());
        }
        let encoded: Vec<Vec<u32>> = batch
            .par_iter()
            .map(|&(part, last)| {
                let encoding = tokenizer
                    .encode_fast(part, false)
                    .map_err(|source| DataError::Tokenizer { doing: "encoding text", source })?;
                let mut ids = encoding.get_ids().to_vec();
                ids.extend(separator.filter(|_| last));
                Ok(ids)
            })
            .collect::<Result<_, DataError>>()?;
        encoded.iter().try_for_each(|ids| sink(ids))?;
        progress(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::{END_OF_TEXT, train};
    use super::*;
    use proptest::prelude::*;
    use std::sync::OnceLock;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::Split;
    use tokenizers::{AddedToken, NormalizerWrapper};

    /// GPT-2's, Llama 3's and Qwen 2's splitting over one vocabulary rich in white space and punctuation.
    fn tokenizers() -> &'static [Tokenizer] {
        static ALL: OnceLock<Vec<Tokenizer>> = OnceLock::new();
        ALL.get_or_init(|| {
            let text =
                "a b's  c\n\nd.\n e;\n\n f  \n\t g 12 345 6\r\n'll  ..\n\n\n   h\u{a0}i \u{3000}j é😀 "
                    .repeat(40);
            let gpt2 = train(&[text], 285).unwrap().0;
            let with = |pattern: &str| {
                let split =
                    Split::new(SplitPattern::Regex(pattern.into()), SplitDelimiterBehavior::Isolated, false)
                        .unwrap();
                let mut tokenizer = gpt2.clone();
                tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
                    split.into(),
                    ByteLevel::new(false, true, false).into(),
                ])));
                tokenizer
            };
            let others = KNOWN_PATTERNS.map(with);
            std::iter::once(gpt2).chain(others).collect()
        })
    }

    fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn cutting_changes_no_token(
            text in "([ab'.,;12\n\r\t \u{a0}\u{3000}é😀]|'s|'ll|  |\n\n|<\\|endoftext\\|>){0,40}", size in 0usize..12
        ) {
            for tokenizer in tokenizers() {
                prop_assert_eq!(Cut::for_tokenizer(tokenizer), Cut::AtSpaces);
                let parts: Vec<&str> = pieces(&text, size, Cut::AtSpaces).collect();
                prop_assert_eq!(parts.concat(), text.clone());
                let cut: Vec<u32> = parts.iter().flat_map(|part| encode(tokenizer, part)).collect();
                prop_assert_eq!(cut, encode(tokenizer, &text), "{:?}", parts);
            }
        }
    }

    #[test]
    fn cuts_are_found_where_there_are_any() {
        let parts: Vec<_> = pieces("ab cd\nef  gh\n\nij\u{3000} kl", 1, Cut::AtSpaces).collect();
        assert_eq!(parts, ["ab", " cd\n", "ef", "  gh\n\nij\u{3000} kl"]);
        assert_eq!(pieces("ab cd", 1, Cut::Never).collect::<Vec<_>>(), ["ab cd"]);
        assert_eq!(pieces("", 1, Cut::AtSpaces).count(), 0);
    }

    #[test]
    fn other_tokenizers_encode_documents_whole() {
        let gpt2 = &tokenizers()[0];
        let mut prefixed = gpt2.clone();
        prefixed.with_pre_tokenizer(Some(ByteLevel::new(true, true, true)));
        let mut unsplit = gpt2.clone();
        unsplit.with_pre_tokenizer(None::<PreTokenizerWrapper>);
        let mut normalized = gpt2.clone();
        normalized
            .with_normalizer(Some(NormalizerWrapper::from(tokenizers::normalizers::Lowercase)))
            .unwrap();
        let mut stripping = gpt2.clone();
        stripping.add_special_tokens([AddedToken::from("<x>", true).lstrip(true)]).unwrap();
        let mut spaced = gpt2.clone();
        spaced.add_special_tokens([AddedToken::from("a b", true)]).unwrap();
        for tokenizer in [prefixed, unsplit, normalized, stripping, spaced] {
            assert_eq!(Cut::for_tokenizer(&tokenizer), Cut::Never);
        }
    }

    #[test]
    fn documents_are_separated_and_order_does_not_depend_on_threads() {
        let tokenizer = &tokenizers()[0];
        let documents: Vec<String> =
            (0..300).map(|i| format!("document {i}. a b c\n").repeat(i % 7 * 400 + 1)).collect();
        let mut expected = Vec::new();
        for document in &documents {
            expected.extend(encode(tokenizer, document));
            expected.push(0);
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut ids, mut done) = (Vec::new(), 0);
            pool.install(|| {
                encode_documents(
                    tokenizer,
                    &documents,
                    Some(0),
                    |bytes| done += bytes,
                    |part| {
                        ids.extend_from_slice(part);
                        Ok(())
                    },
                )
            })
            .unwrap();
            assert!(ids == expected, "{threads} threads");
            assert_eq!(done, documents.iter().map(String::len).sum::<usize>());
        }
        assert_eq!(END_OF_TEXT, tokenizer.id_to_token(0).unwrap());
    }
}
