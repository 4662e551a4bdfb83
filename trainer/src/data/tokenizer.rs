//! Training and loading tokenizers.
//!
//! Training goes through the `tokenizers` library, so that the result is a `tokenizer.json` that every other tool reads.
//! Its merge loop breaks ties by token ids, hence the same text gives the same file whatever the hash seeds and the
//! number of threads; a test here holds it to that.

use super::encode::{Cut, pieces};
use super::error::DataError;
use std::io::Read;
use std::path::Path;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper, Tokenizer};

/// The separator that a trained tokenizer puts between documents; its id is 0.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Fewest entries of a trained vocabulary: every byte and the end of text.
const MIN_VOCABULARY: usize = 257;
/// Most entries: beyond any tokenizer in use, and small enough to allocate.
const MAX_VOCABULARY: usize = 1 << 20;
/// A `tokenizer.json` larger than this is something else; the largest in use have some 30 MB.
const MAX_FILE: u64 = 256 << 20;
/// Text beyond this is not used for training: the library counts pairs in 32 bits.
pub(super) const MAX_TRAINING_BYTES: usize = 1 << 30;

/// Trains a byte-level BPE tokenizer (GPT-2's splitting, no normalizer, all 256 bytes in the alphabet) and returns it
/// with the bytes of its `tokenizer.json`. Every text survives encoding and decoding unchanged.
///
/// # Errors
/// `VocabularySize` unless `257 <= vocab_size <= 2^20`; `VocabularyNotFilled` when the text has too few different words.
pub fn train(documents: &[impl AsRef<str>], vocab_size: usize) -> Result<(Tokenizer, Vec<u8>), DataError> {
    if !(MIN_VOCABULARY..=MAX_VOCABULARY).contains(&vocab_size) {
        return Err(DataError::VocabularySize {
            asked: vocab_size,
            min: MIN_VOCABULARY,
            max: MAX_VOCABULARY,
        });
    }
    let failed = |source| DataError::Tokenizer { doing: "training it", source };
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_decoder(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(Some(document_start().map_err(failed)?));
    tokenizer.train(&mut trainer, training_pieces(documents).into_iter()).map_err(failed)?;
    let found = vocabulary_size(&tokenizer);
    if found != vocab_size {
        return Err(DataError::VocabularyNotFilled { asked: vocab_size, found });
    }
    let json = tokenizer.to_string(true).map_err(failed)?.into_bytes();
    // What is used is what is written.
    let tokenizer = parse(&json).map_err(failed)?;
    Ok((tokenizer, json))
}

/// Puts a separator before a prompt (where special tokens are asked for): documents are trained after a separator, so a
/// prompt without one would look like the middle of a text.
fn document_start() -> Result<TemplateProcessing, tokenizers::Error> {
    let mut builder = TemplateProcessing::builder();
    builder.try_single(format!("{END_OF_TEXT} $A"))?.special_tokens(vec![(END_OF_TEXT, 0)]);
    Ok(builder.build()?)
}

/// Text in pieces that can be counted in parallel, without the separators that stand in it, up to a total of 1 GiB.
fn training_pieces(documents: &[impl AsRef<str>]) -> Vec<&str> {
    let mut left = MAX_TRAINING_BYTES;
    let mut out = Vec::new();
    let parts = documents.iter().flat_map(|document| document.as_ref().split(END_OF_TEXT));
    for piece in parts.flat_map(|part| pieces(part, 1 << 16, Cut::AtSpaces)).flat_map(short_runs) {
        if piece.len() > left {
            break;
        }
        left -= piece.len();
        out.push(piece);
    }
    out
}

/// Cuts `text` inside runs of more than 256 characters that are all white space or all not: merging a word takes the
/// square of its length, and a line of megabytes without a space (base64, minified code) would take for ever.
fn short_runs(text: &str) -> Vec<&str> {
    const LIMIT: usize = 256;
    let (mut start, mut run, mut previous) = (0, 0, None);
    let mut out = Vec::new();
    for (at, character) in text.char_indices() {
        let space = Some(character.is_whitespace());
        run = if space == previous { run + 1 } else { 1 };
        previous = space;
        if run > LIMIT {
            out.push(&text[start..at]);
            (start, run) = (at, 1);
        }
    }
    out.push(&text[start..]);
    out
}

/// Loads a `tokenizer.json` and returns it with the file's bytes.
///
/// Truncation, padding and dropout are switched off in the loaded tokenizer: they would cut documents short or make
/// tokens depend on chance.
///
/// # Errors
/// `Missing`, `Io`, or `BadTokenizer` for a file that is truncated, foreign or larger than 256 MiB.
pub fn load(path: &Path) -> Result<(Tokenizer, Vec<u8>), DataError> {
    let bad = |source| DataError::BadTokenizer { path: path.to_path_buf(), source };
    let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => DataError::Missing { path: path.to_path_buf() },
        _ => DataError::Io { action: "read", path: path.to_path_buf(), source },
    })?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(bad("not a file of at most 256 MiB".into()));
    }
    let mut json = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_end(&mut json))
        .map_err(DataError::io("read", path))?;
    let tokenizer = parse(&json).map_err(bad)?;
    Ok((tokenizer, json))
}

/// The `tokenizers` crate takes parts of its file for granted and panics where they are damaged: what is not JSON is
/// refused before it comes that far, and a panic on the rest is an error too.
pub(super) fn parse(json: &[u8]) -> tokenizers::Result<Tokenizer> {
    serde_json::from_slice::<serde::de::IgnoredAny>(json)?;
    let read = std::panic::catch_unwind(|| Tokenizer::from_bytes(json));
    let mut tokenizer = read.unwrap_or_else(|_| Err("its reader failed".into()))?;
    if vocabulary_size(&tokenizer) == 0 {
        return Err("its vocabulary is empty".into());
    }
    tokenizer.with_truncation(None)?.with_padding(None);
    if let ModelWrapper::BPE(model) = tokenizer.get_model()
        && model.dropout.is_some()
    {
        let mut model = model.clone();
        model.dropout = None;
        tokenizer.with_model(model);
    }
    Ok(tokenizer)
}

/// Entries that a model needs for this tokenizer: its highest id + 1, added tokens included.
pub fn vocabulary_size(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
}

/// The token after each document: the one called `name`, else the first known of `<|endoftext|>`, `<|end_of_text|>`
/// and `</s>`, else none.
///
/// # Errors
/// `UnknownSeparator` when `name` is given and is no token.
pub fn end_of_text_id(tokenizer: &Tokenizer, name: Option<&str>) -> Result<Option<u32>, DataError> {
    if let Some(name) = name {
        let unknown = || DataError::UnknownSeparator { name: name.to_owned() };
        return tokenizer.token_to_id(name).map(Some).ok_or_else(unknown);
    }
    Ok([END_OF_TEXT, "<|end_of_text|>", "</s>"].iter().find_map(|name| tokenizer.token_to_id(name)))
}

/// Bytes of text that token `id` stands for; 0 for special tokens and for ids outside the vocabulary.
///
/// Exact for byte-level tokenizers. For SentencePiece's, which put a space before a text, it counts that space too.
pub fn token_bytes(tokenizer: &Tokenizer, id: u32) -> usize {
    let Some(token) = tokenizer.id_to_token(id) else {
        return 0;
    };
    if let Some(added) = tokenizer.get_added_vocabulary().get_added_tokens_decoder().get(&id) {
        return if added.special { 0 } else { token.len() };
    }
    if matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
        // Each character of the byte alphabet stands for one byte.
        return token.chars().count();
    }
    match token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) {
        Some(hex) if hex.len() == 2 => 1,
        _ => token.replace('\u{2581}', " ").len(),
    }
}

/// [`token_bytes`] of every id: `table[id]`, one entry for each id of the vocabulary.
pub fn token_byte_table(tokenizer: &Tokenizer) -> Vec<u32> {
    (0..vocabulary_size(tokenizer) as u32).map(|id| token_bytes(tokenizer, id) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::OnceLock;

    const TEXT: &str = "the cat sat on the mat, and the other cat's hat was on the mat; 12 hats, 345 cats!\n\n  \
        when the cat isn't there, they'll sit on that hat. été 😀 naïve\r\n\tthe end of the tale of the cat\0\n";

    fn small() -> &'static (Tokenizer, Vec<u8>) {
        static SMALL: OnceLock<(Tokenizer, Vec<u8>)> = OnceLock::new();
        SMALL.get_or_init(|| train(&[TEXT], 300).unwrap())
    }

    fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    proptest! {
        #[test]
        fn any_text_survives(text in any::<String>()) {
            let tokenizer = &small().0;
            let ids = encode(tokenizer, &text);
            prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text.clone());
            prop_assert_eq!(ids.iter().map(|&id| token_bytes(tokenizer, id)).sum::<usize>(), text.len());
        }

        #[test]
        fn short_runs_lose_nothing(text in "(a{0,600}| {0,600}|é{0,300}|\n){0,6}") {
            let parts = short_runs(&text);
            prop_assert_eq!(parts.concat(), text.clone());
            for part in parts {
                for run in part.split(char::is_whitespace) {
                    prop_assert!(run.chars().count() <= 256);
                }
            }
        }
    }

    #[test]
    fn a_prompt_starts_a_document() {
        let tokenizer = &small().0;
        let ids = |special| tokenizer.encode("the cat", special).unwrap().get_ids().to_vec();
        assert_eq!(ids(true), [&[0], &ids(false)[..]].concat());
        assert_eq!(tokenizer.decode(&ids(true), true).unwrap(), "the cat");
    }

    #[test]
    fn the_end_of_text_is_token_zero_and_learnt_from_no_text() {
        let (tokenizer, json) = small();
        assert_eq!(vocabulary_size(tokenizer), 300);
        assert_eq!(end_of_text_id(tokenizer, None).unwrap(), Some(0));
        assert_eq!(end_of_text_id(tokenizer, Some("cat")).unwrap(), tokenizer.token_to_id("cat"));
        assert!(matches!(end_of_text_id(tokenizer, Some("nope")), Err(DataError::UnknownSeparator { .. })));
        assert_eq!(encode(tokenizer, "a<|endoftext|>b")[1], 0);
        assert_eq!(token_bytes(tokenizer, 0), 0);
        assert_eq!(token_bytes(tokenizer, 300), 0);
        let marked = [&TEXT[..41], END_OF_TEXT, &TEXT[41..]].concat();
        assert_eq!(&train(&[marked], 300).unwrap().1, &train(&[&TEXT[..41], &TEXT[41..]], 300).unwrap().1);
        assert!(std::str::from_utf8(json).unwrap().contains("\"add_prefix_space\": false"));
    }

    /// Every hash map of the library has its own seed, so repeated runs in one process visit pairs in different orders.
    #[test]
    fn training_gives_the_same_bytes_whatever_the_hash_order_and_threads() {
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        for alphabet in [2u32, 3, 5] {
            // Short words over few letters: nearly every count is tied, and one string arises from several merges.
            let mut state = 1u32;
            let text: String = (0..3000)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let draw = (state >> 16) % (alphabet + 1);
                    char::from(if draw == alphabet { b' ' } else { b'a' + draw as u8 })
                })
                .collect();
            let first = train(&[&text], 400).unwrap().1;
            for _ in 0..8 {
                assert_eq!(first, train(&[&text], 400).unwrap().1, "{alphabet} letters");
            }
            assert_eq!(first, one.install(|| train(&[&text], 400)).unwrap().1);
        }
    }

    /// Hash seeds also differ between processes: this test runs itself again in fresh ones and compares.
    #[test]
    fn training_gives_the_same_bytes_in_every_process() {
        const MARK: &str = "TOKENIZER_DETERMINISM_CHILD";
        let digest = blake3::hash(&small().1).to_hex().to_string();
        if std::env::var_os(MARK).is_some() {
            println!("digest={digest}");
            return;
        }
        let name = std::thread::current().name().unwrap().to_owned();
        for _ in 0..3 {
            let child = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", &name, "--nocapture"])
                .env(MARK, "1")
                .output()
                .unwrap();
            let output = String::from_utf8(child.stdout).unwrap();
            assert!(output.contains(&format!("digest={digest}")), "{output}");
        }
    }

    #[test]
    fn impossible_vocabularies_are_refused() {
        for size in [0, 1, 256, (1 << 20) + 1, usize::MAX] {
            assert!(matches!(train(&[TEXT], size), Err(DataError::VocabularySize { .. })), "{size}");
        }
        assert_eq!(vocabulary_size(&train(&[""], 257).unwrap().0), 257);
        match train(&["aaaa"], 1000) {
            Err(DataError::VocabularyNotFilled { asked: 1000, found }) => assert_eq!(found, 259),
            other => panic!("{:?}", other.map(|_| ())),
        }
    }

    #[test]
    fn long_runs_do_not_stall_training() {
        let blob = "ab".repeat(5 << 20);
        let spaces = " ".repeat(1 << 20);
        let (tokenizer, _) = train(&[TEXT, &blob, &spaces], 280).unwrap();
        let ids = encode(&tokenizer, &blob);
        assert!(ids.len() < blob.len() / 2);
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), blob);
    }

    #[test]
    fn truncated_and_foreign_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert!(matches!(load(&path), Err(DataError::Missing { .. })));
        assert!(matches!(load(folder.path()), Err(DataError::BadTokenizer { .. })));
        let json = &small().1;
        let cuts = (0..json.len()).step_by(997).map(|end| json[..end].to_vec());
        let foreign =
            [&b"{}"[..], b"null", b"\xff\xfe", b"[1,2]", br#"{"model_type":"llama"}"#].map(<[u8]>::to_vec);
        for bytes in cuts.chain(foreign) {
            std::fs::write(&path, &bytes).unwrap();
            match load(&path) {
                Err(error @ DataError::BadTokenizer { .. }) => {
                    assert!(error.to_string().contains("tokenizer.json"))
                }
                other => panic!("{} bytes: {:?}", bytes.len(), other.map(|_| ())),
            }
        }
        std::fs::write(&path, json).unwrap();
        assert_eq!(&load(&path).unwrap().1, json);
    }

    #[test]
    fn settings_that_change_tokens_by_length_or_chance_are_switched_off() {
        let mut value: serde_json::Value = serde_json::from_slice(&small().1).unwrap();
        value["truncation"] = serde_json::json!(
            {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        value["padding"] = serde_json::json!({"strategy": {"Fixed": 500}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT});
        value["model"]["dropout"] = serde_json::json!(0.9);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, value.to_string()).unwrap();
        assert_eq!(encode(&load(&path).unwrap().0, TEXT), encode(&small().0, TEXT));
    }
}
