//! `prepare` as the trainer calls it: both kinds of data, the cache, the splits, hostile input.

use super::*;
use std::cell::Cell;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const STORY: &str = "The cat sat on the mat. The hat was on the cat's mat, and the cat isn't glad.\r\n";

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn write(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn settings(folder: &TempDir, train: Source) -> DataSettings {
    DataSettings {
        train,
        validation: None,
        validation_fraction: 0.25,
        text_field: "text".to_owned(),
        document_split: DocumentSplit::WholeFile,
        tokenizer: TokenizerChoice::Train { vocab_size: 270 },
        separator: None,
        sequence_length: 8,
        cache_dir: folder.path().join("cache"),
    }
}

fn stories(folder: &TempDir) -> DataSettings {
    let documents = (0..10).map(|i| format!("{i} {}", STORY.repeat(i % 3 + 1))).collect();
    settings(folder, Source::Documents(documents))
}

fn token_settings(folder: &TempDir, paths: &[PathBuf], vocab_size: usize) -> DataSettings {
    let tokenizer = TokenizerChoice::None { vocab_size };
    DataSettings { tokenizer, ..settings(folder, Source::Paths(paths.to_vec())) }
}

fn run(settings: &DataSettings) -> Result<Dataset, DataError> {
    prepare(settings, &|_, _| {})
}

fn ids(rows: &Rows) -> Vec<u32> {
    rows.ids()
}

fn u16s(ids: impl IntoIterator<Item = u16>) -> Vec<u8> {
    ids.into_iter().flat_map(u16::to_le_bytes).collect()
}

/// The only cache file with this extension.
fn cached(folder: &TempDir, extension: &str) -> PathBuf {
    let files = fs::read_dir(folder.path().join("cache")).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.remove(0)
}

#[test]
fn documents_come_back_separated_and_the_split_is_exact() {
    let folder = folder();
    let settings = stories(&folder);
    let Source::Documents(documents) = &settings.train else { unreachable!() };
    let data = run(&settings).unwrap();
    let tokenizer = data.tokenizer.as_ref().unwrap();
    assert_eq!((data.separator, data.vocab_size), (Some(0), 270));
    let decode = |windows| -> Vec<String> {
        ids(windows)
            .split_inclusive(|&id| id == 0)
            .map(|document| {
                assert_eq!(document.last(), Some(&0));
                tokenizer.decode(document, true).unwrap()
            })
            .collect()
    };
    let (train, validation) = (decode(&data.train), decode(&data.validation));
    let total: usize = documents.iter().map(String::len).sum();
    assert_eq!(validation.concat().len(), total / 4);
    assert_eq!(train.concat() + &validation.concat(), documents.concat());
    assert_eq!(train[0], documents[0]);
    assert_eq!(validation.last(), documents.last());
    assert_eq!(
        (data.train_bytes, data.validation_bytes),
        (Some((total - total / 4) as u64), Some(total as u64 / 4))
    );
    let table = token_byte_table(tokenizer);
    assert_eq!(Tokens::from_ids(&ids(&data.train)).text_bytes(&table), data.train_bytes.unwrap());
    assert!(data.warnings.is_empty());
}

#[test]
fn the_tokenizer_sees_only_the_training_part() {
    let folder = folder();
    let train = Source::Documents(vec![STORY.repeat(3)]);
    let settings = |unseen: &str| {
        let validation = Some(Source::Documents(vec![unseen.repeat(40)]));
        DataSettings { validation, ..settings(&folder, train.clone()) }
    };
    let (one, two) = (run(&settings("zqzq ")).unwrap(), run(&settings("xwxw ")).unwrap());
    assert_eq!(one.tokenizer_json, two.tokenizer_json);
    assert_eq!(one.tokenizer_hash, two.tokenizer_hash);
    assert_ne!(one.dataset_hash, two.dataset_hash);
    assert_eq!(ids(&one.train), ids(&two.train));
}

#[test]
fn a_cache_hit_equals_a_miss_and_damage_is_mended() {
    let folder = folder();
    let settings = stories(&folder);
    let calls = Cell::new(Vec::new());
    let run = || {
        calls.set(Vec::new());
        let record = |done, total| {
            let mut seen = calls.take();
            seen.push((done, total));
            calls.set(seen);
        };
        let data = prepare(&settings, &record).unwrap();
        let content = (
            ids(&data.train),
            ids(&data.validation),
            data.dataset_hash,
            data.tokenizer_hash,
            data.train_bytes,
        );
        (content, data.warnings, calls.take())
    };
    let (miss, warnings, progress) = run();
    assert!(warnings.is_empty());
    let (done, total) = *progress.last().unwrap();
    assert_eq!(done, total);
    assert!(progress.is_sorted());
    let (hit, warnings, progress) = run();
    assert_eq!((&hit, warnings.len(), progress.len()), (&miss, 0, 0));
    for extension in ["tokens", "tokenizer"] {
        let path = cached(&folder, extension);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 4;
        fs::write(&path, damaged).unwrap();
        let (mended, warnings, _) = run();
        assert_eq!((&mended, warnings.len()), (&miss, 1), "{extension}");
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}

#[test]
fn what_tokens_depend_on_changes_the_cache_name() {
    let folder = folder();
    let base = stories(&folder);
    run(&base).unwrap();
    let count = || {
        fs::read_dir(folder.path().join("cache"))
            .unwrap()
            .filter(|entry| {
                entry.as_ref().unwrap().path().extension().is_some_and(|extension| extension == "tokens")
            })
            .count()
    };
    let mut documents = vec!["another".to_owned()];
    let Source::Documents(old) = &base.train else { unreachable!() };
    documents.extend(old.iter().cloned());
    let variants = [
        DataSettings { validation_fraction: 0.3, ..base.clone() },
        DataSettings { separator: Some(" the".to_owned().replace(' ', "\u{120}")), ..base.clone() },
        DataSettings { tokenizer: TokenizerChoice::Train { vocab_size: 265 }, ..base.clone() },
        DataSettings { train: Source::Documents(vec![old.concat()]), ..base.clone() },
        DataSettings { train: Source::Documents(documents), ..base.clone() },
    ];
    for (index, variant) in variants.iter().enumerate() {
        run(variant).unwrap();
        assert_eq!(count(), index + 2, "variant {index}");
    }
    run(&DataSettings { sequence_length: 5, ..base }).unwrap();
    assert_eq!(count(), variants.len() + 1, "the sequence length does not matter");
}

#[test]
fn a_given_tokenizer_gives_the_tokens_that_training_it_gave() {
    let folder = folder();
    let trained = run(&stories(&folder)).unwrap();
    let path = write(&folder, "tokenizer.json", trained.tokenizer_json.as_ref().unwrap());
    let with = |vocab_size| DataSettings {
        tokenizer: TokenizerChoice::File { path: path.clone(), vocab_size },
        ..stories(&folder)
    };
    let given = run(&with(None)).unwrap();
    assert_eq!((ids(&given.train), given.vocab_size), (ids(&trained.train), 270));
    assert_eq!(given.tokenizer_hash, trained.tokenizer_hash);
    let padded = run(&with(Some(512))).unwrap();
    assert_eq!((padded.vocab_size, padded.warnings.len()), (512, 1));
    match run(&with(Some(269))) {
        Err(DataError::TokenizerTooLarge { found: 270, vocab_size: 269, .. }) => {}
        other => panic!("{other:?}"),
    }
    let unknown = DataSettings { separator: Some("<|none|>".to_owned()), ..with(None) };
    assert!(matches!(run(&unknown), Err(DataError::UnknownSeparator { .. })));
    fs::write(&path, &trained.tokenizer_json.unwrap()[..1000]).unwrap();
    assert!(matches!(run(&with(None)), Err(DataError::BadTokenizer { .. })));
}

#[test]
fn wide_vocabularies_and_tokenizers_without_separator_work() {
    let folder = folder();
    let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"WhitespaceSplit"},"post_processor":null,"decoder":null,
        "model":{"type":"WordLevel","vocab":{"a":0,"b":70000},"unk_token":"a"}}"#;
    let path = write(&folder, "tokenizer.json", json);
    let tokenizer = TokenizerChoice::File { path, vocab_size: None };
    let train = Source::Documents(vec!["a b b".to_owned(), "b a ".repeat(10)]);
    let data = run(&DataSettings { tokenizer, sequence_length: 3, ..settings(&folder, train) }).unwrap();
    assert_eq!((data.separator, data.vocab_size), (None, 70_001));
    assert_eq!(ids(&data.train)[..5], [0, 70_000, 70_000, 70_000, 0]);
}

#[test]
fn token_files_are_split_by_count_and_checked() {
    let folder = folder();
    let path = write(&folder, "a.u16", u16s(0..1009));
    let mut settings = token_settings(&folder, std::slice::from_ref(&path), 1009);
    settings.validation_fraction = 1.0 / 20.0;
    let data = run(&settings).unwrap();
    assert_eq!((data.train.tokens(), data.validation.tokens()), (1009 - 50, 50));
    assert_eq!(ids(&data.validation), (959..1009).collect::<Vec<_>>());
    assert_eq!((data.train_bytes, data.tokenizer_hash), (None, None));
    assert!(!settings.cache_dir.exists(), "one token file is used in place");
    settings.tokenizer = TokenizerChoice::None { vocab_size: 1000 };
    match run(&settings) {
        Err(DataError::TokenOutOfRange { id: 1000, position: 41, vocab_size: 1000, split: "validation" }) => {
        }
        other => panic!("{other:?}"),
    }
    settings.tokenizer = TokenizerChoice::Train { vocab_size: 300 };
    assert!(matches!(run(&settings), Err(DataError::TokenizerChoice { .. })));
}

#[test]
fn several_token_files_are_joined_in_order() {
    let folder = folder();
    let wide: Vec<u8> = [100_000u32, 7].iter().flat_map(|id| id.to_le_bytes()).collect();
    let paths = [write(&folder, "b.u16", u16s(0..50)), write(&folder, "a.u32", wide)];
    let mut settings = token_settings(&folder, &paths, 100_001);
    settings.validation = Some(Source::Paths(vec![paths[0].clone()]));
    let data = run(&settings).unwrap();
    assert_eq!(ids(&data.train), (0..50).chain([100_000, 7]).collect::<Vec<_>>());
    assert_eq!(ids(&data.validation), (0..50).collect::<Vec<_>>());
    assert_eq!(run(&settings).unwrap().dataset_hash, data.dataset_hash);
    fs::write(&paths[0], u16s(1..51)).unwrap();
    assert_ne!(run(&settings).unwrap().dataset_hash, data.dataset_hash);
}

#[test]
fn a_tokenizer_beside_token_files_counts_their_bytes() {
    let folder = folder();
    let trained = run(&stories(&folder)).unwrap();
    let tokens = write(&folder, "a.u16", u16s(ids(&trained.train).into_iter().map(|id| id as u16)));
    let path = write(&folder, "tokenizer.json", trained.tokenizer_json.unwrap());
    let tokenizer = TokenizerChoice::File { path, vocab_size: None };
    let data = run(&DataSettings { tokenizer, ..token_settings(&folder, &[tokens], 0) }).unwrap();
    assert_eq!(data.train_bytes.unwrap() + data.validation_bytes.unwrap(), trained.train_bytes.unwrap());
    assert_eq!(data.vocab_size, 270);
}

#[test]
fn validation_text_beside_token_files_is_read_by_their_tokenizer() {
    let folder = folder();
    let trained = run(&stories(&folder)).unwrap();
    let tokens = write(&folder, "a.u16", u16s(ids(&trained.train).into_iter().map(|id| id as u16)));
    let text = write(&folder, "unseen.txt", STORY.repeat(4));
    let path = write(&folder, "tokenizer.json", trained.tokenizer_json.as_ref().unwrap());
    let tokenizer = TokenizerChoice::File { path, vocab_size: Some(300) };
    let validation = Some(Source::Paths(vec![text.clone()]));
    let files = token_settings(&folder, &[tokens], 0);
    let beside = DataSettings { tokenizer: tokenizer.clone(), validation, ..files };
    let data = run(&beside).unwrap();
    // All of the tokens are trained on, none held out.
    assert_eq!(ids(&data.train), ids(&trained.train));
    assert_eq!((data.vocab_size, data.separator), (300, Some(0)));
    let found = ids(&data.validation);
    assert_eq!(found.last(), Some(&0));
    assert_eq!(data.tokenizer.as_ref().unwrap().decode(&found, true).unwrap(), STORY.repeat(4));
    assert_eq!(data.validation_bytes, Some(4 * STORY.len() as u64));
    assert_eq!(data.train_bytes, trained.train_bytes);
    // As when the text is all there is.
    let whole = settings(&folder, Source::Paths(vec![text.clone()]));
    let whole = DataSettings { tokenizer, validation_fraction: 0.25, ..whole };
    let whole = run(&DataSettings { validation: Some(Source::Paths(vec![text.clone()])), ..whole }).unwrap();
    assert_eq!(found, ids(&whole.validation));
    // Other text is other data.
    fs::write(&text, STORY.repeat(5)).unwrap();
    assert_ne!(run(&beside).unwrap().dataset_hash, data.dataset_hash);

    for tokenizer in [TokenizerChoice::None { vocab_size: 270 }, TokenizerChoice::Train { vocab_size: 270 }] {
        let result = run(&DataSettings { tokenizer, ..beside.clone() });
        assert!(matches!(result, Err(DataError::TokenizerChoice { .. })));
    }
    fs::write(&text, "").unwrap();
    assert!(matches!(run(&beside), Err(DataError::Empty { .. })));
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let folder = folder();
    let base = stories(&folder);
    for fraction in [0.0, 1.0, -0.1, f64::NAN, f64::INFINITY] {
        let result = run(&DataSettings { validation_fraction: fraction, ..base.clone() });
        assert!(matches!(result, Err(DataError::ValidationFraction(_))), "{fraction}");
    }
    assert!(matches!(
        run(&DataSettings { sequence_length: 0, ..base.clone() }),
        Err(DataError::SequenceLength(0))
    ));
    let none = TokenizerChoice::None { vocab_size: 300 };
    assert!(matches!(
        run(&DataSettings { tokenizer: none, ..base.clone() }),
        Err(DataError::TokenizerChoice { .. })
    ));
    let tokens = write(&folder, "a.u16", u16s(0..50));
    let mixed = DataSettings { validation: Some(Source::Paths(vec![tokens])), ..base.clone() };
    assert!(matches!(run(&mixed), Err(DataError::TokenizerChoice { .. })));
    for nothing in [Source::Documents(vec![]), Source::Documents(vec![String::new()])] {
        assert!(matches!(run(&settings(&folder, nothing)), Err(DataError::Empty { .. })));
    }
    assert!(matches!(run(&settings(&folder, Source::Paths(vec![]))), Err(DataError::NoSources { .. })));
    let blocked = DataSettings { cache_dir: write(&folder, "file", b"x"), ..base };
    assert!(matches!(run(&blocked), Err(DataError::Io { .. })));
}

#[test]
fn too_little_data_says_how_much_is_needed() {
    let folder = folder();
    let one_token = token_settings(&folder, &[write(&folder, "a.u16", u16s([3]))], 10);
    match run(&one_token) {
        Err(DataError::TooFewTokens { split: "training", tokens: 1, needed: 9 }) => {}
        other => panic!("{other:?}"),
    }
    let mut short = token_settings(&folder, &[write(&folder, "b.u16", u16s(0..20))], 20);
    match run(&short) {
        Err(DataError::TooFewTokens { split: "validation", tokens: 5, needed: 9 }) => {}
        other => panic!("{other:?}"),
    }
    short.sequence_length = 15;
    assert!(matches!(
        run(&short),
        Err(DataError::TooFewTokens { split: "training", tokens: 15, needed: 16 })
    ));
    let mut one_byte = settings(&folder, Source::Paths(vec![write(&folder, "a.txt", b"x")]));
    assert!(matches!(run(&one_byte), Err(DataError::VocabularyNotFilled { found: 257, .. })));
    one_byte.tokenizer = TokenizerChoice::Train { vocab_size: 257 };
    assert!(matches!(run(&one_byte), Err(DataError::TooFewTokens { tokens: 2, .. })));
}

#[test]
fn odd_text_survives_the_whole_way() {
    let folder = folder();
    let hostile =
        ["a\0b\r\n\u{feff}\u{202e}\u{10ffff}\n\n\n", &"x".repeat(10 << 20), &" \n".repeat(1 << 20), STORY]
            .map(str::to_owned);
    let mut settings = settings(&folder, Source::Documents(hostile.to_vec()));
    settings.tokenizer = TokenizerChoice::Train { vocab_size: 262 };
    settings.validation = Some(Source::Documents(vec![STORY.to_owned()]));
    let data = run(&settings).unwrap();
    let ids = ids(&data.train);
    let documents: Vec<_> = ids
        .split(|&id| id == 0)
        .map(|ids| data.tokenizer.as_ref().unwrap().decode(ids, false).unwrap())
        .collect();
    assert!(documents[..4] == hostile && documents.len() == 5);
}

#[test]
fn messages_say_what_where_and_what_to_do() {
    let folder = folder();
    let path = write(&folder, "a.txt", b"ab\xff");
    let error = run(&settings(&folder, Source::Paths(vec![path.clone()]))).unwrap_err().to_string();
    assert_eq!(error, format!("not UTF-8; {} at byte 2; convert the file to UTF-8", path.display()));
    assert_eq!(
        Windows::new(Tokens::from_ids(&[1, 2]), 8, "validation").unwrap_err().to_string(),
        "2 tokens, but one window needs 9; validation data; give more text, shorten the sequence length or change the validation fraction"
    );
}

/// The folder of real text beside the repository, or none, saying so.
fn shared() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    let data = std::env::var_os("BITNET_SHARED").map_or(beside, PathBuf::from).join("data");
    if data.join("docs.u16").exists() {
        return Some(data);
    }
    eprintln!("skipped: no real text at {}", data.display());
    None
}

/// The token file was made document by document, without the blank lines that join documents in the text: with a
/// "\n\n" put back wherever the two part, the decoded tokens are the text, and the bytes counted are those decoded.
#[test]
fn real_token_files_count_the_bytes_of_their_text() {
    let Some(data) = shared() else { return };
    let folder = folder();
    let path = data.join("docs.tokenizer.json");
    let tokenizer = TokenizerChoice::File { path, vocab_size: Some(4096) };
    let files = token_settings(&folder, &[data.join("docs.u16")], 4096);
    let prepared = run(&DataSettings { tokenizer, validation_fraction: 1.0 / 20.0, ..files }).unwrap();
    let (train, validation) = (ids(&prepared.train), ids(&prepared.validation));
    assert_eq!((train.len() + validation.len(), validation.len()), (7_045_868, 352_293));
    let decoded = prepared.tokenizer.unwrap().decode(&[train, validation].concat(), false).unwrap();
    assert_eq!(prepared.train_bytes.unwrap() + prepared.validation_bytes.unwrap(), decoded.len() as u64);
    let text = fs::read(data.join("docs.txt")).unwrap();
    let (mut at, mut joins) = (0, 0);
    for &byte in decoded.as_bytes() {
        if text[at] != byte {
            assert_eq!(&text[at..at + 2], b"\n\n", "at byte {at}");
            (at, joins) = (at + 2, joins + 1);
            assert_eq!(text[at], byte, "at byte {at}");
        }
        at += 1;
    }
    assert_eq!(at, text.len());
    assert!(joins > 0 && decoded.len() + 2 * joins == text.len());
}

#[test]
fn real_text_cut_into_pieces_gives_the_tokens_of_the_whole() {
    let Some(data) = shared() else { return };
    let folder = folder();
    let (tokenizer, _) = load_tokenizer(&data.join("docs.tokenizer.json")).unwrap();
    let mut text = fs::read_to_string(data.join("docs.txt")).unwrap();
    text.truncate(text.floor_char_boundary(2 << 20));
    let whole = tokenizer.encode_fast(&text[..], false).unwrap();
    let choice = TokenizerChoice::File { path: data.join("docs.tokenizer.json"), vocab_size: None };
    let validation = Some(Source::Documents(vec![STORY.to_owned()]));
    let base = settings(&folder, Source::Documents(vec![text]));
    let prepared = run(&DataSettings { tokenizer: choice, validation, ..base }).unwrap();
    assert!(ids(&prepared.train) == whole.get_ids());
    assert_eq!(prepared.separator, None);
}
