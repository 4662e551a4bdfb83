//! Reading documents from files and folders, and cutting them into a training and a validation part.
//!
//! The whole text is held in memory: hashing, tokenizer training and the split all need it, and a corpus too large for
//! that is better given as token files, which are memory-mapped. Beyond the text itself, memory is bounded.

use super::error::DataError;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The longest `.jsonl` line accepted, bytes.
const MAX_LINE: u64 = 64 << 20;

/// How a `.txt` file becomes documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DocumentSplit {
    /// One file is one document.
    #[default]
    #[serde(rename = "file")]
    WholeFile,
    /// Blank lines (empty or white space only) separate documents. They, and the line break before them, are dropped.
    BlankLines,
    /// Each line is a document, without its line break; empty ones are dropped.
    Lines,
}

/// Bytes of one token in a token file, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// `.u16`, for vocabularies of up to 65,536.
    U16,
    /// `.u32`.
    U32,
}

impl Width {
    /// The narrowest width that holds every id below `vocab_size`.
    pub fn for_vocabulary(vocab_size: usize) -> Self {
        if vocab_size <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// Bytes a token.
    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// What a list of paths holds once folders are opened.
pub(super) enum Files {
    Text(Vec<PathBuf>),
    Tokens(Vec<(PathBuf, Width)>),
}

/// Whether a path names a token file, `.u16` or `.u32`.
pub fn is_token_file(path: &Path) -> bool {
    matches!(kind(path), Some(Kind::Tokens(_)))
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Text,
    JsonLines,
    Tokens(Width),
}

fn kind(path: &Path) -> Option<Kind> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    match extension.as_str() {
        "txt" => Some(Kind::Text),
        "jsonl" => Some(Kind::JsonLines),
        "u16" => Some(Kind::Tokens(Width::U16)),
        "u32" => Some(Kind::Tokens(Width::U32)),
        _ => None,
    }
}

/// Opens folders and sorts the paths into text or token files, in the order given (folders: by path).
pub(super) fn list(paths: &[PathBuf], split: &'static str) -> Result<Files, DataError> {
    let (mut text, mut tokens) = (Vec::new(), Vec::new());
    for path in paths {
        let metadata = fs::metadata(path).map_err(|source| match source.kind() {
            ErrorKind::NotFound => DataError::Missing { path: path.clone() },
            _ => DataError::Io { action: "read", path: path.clone(), source },
        })?;
        match kind(path) {
            _ if metadata.is_dir() => text.extend(text_files(path)?),
            Some(Kind::Tokens(width)) if metadata.is_file() => tokens.push((path.clone(), width)),
            Some(_) if metadata.is_file() => text.push(path.clone()),
            // A pipe or device would block or never end.
            _ => return Err(DataError::UnknownKind { path: path.clone() }),
        }
    }
    match (text.first(), tokens.first()) {
        (Some(text), Some((tokens, _))) => {
            Err(DataError::Mixed { text: text.clone(), tokens: tokens.clone() })
        }
        (Some(_), None) => Ok(Files::Text(text)),
        (None, Some(_)) => Ok(Files::Tokens(tokens)),
        (None, None) => Err(DataError::NoSources { split }),
    }
}

/// All `.txt` and `.jsonl` files below `root`, sorted by path. Hidden entries are skipped.
fn text_files(root: &Path) -> Result<Vec<PathBuf>, DataError> {
    let (mut found, mut others) = (Vec::new(), Vec::new());
    let mut visited = HashSet::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        // Links may lead back up: a folder is entered once, under its real name.
        if !visited.insert(fs::canonicalize(&folder).map_err(DataError::io("open", &folder))?) {
            continue;
        }
        for entry in fs::read_dir(&folder).map_err(DataError::io("list", &folder))? {
            let entry = entry.map_err(DataError::io("list", &folder))?;
            let (name, path) = (entry.file_name(), entry.path());
            if name.to_string_lossy().starts_with('.') {
                continue;
            }
            let usable = matches!(kind(&path), Some(Kind::Text | Kind::JsonLines));
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => folders.push(path),
                Ok(metadata) if metadata.is_file() && usable => found.push(path),
                // A dangling link is passed over, unless it is named like data: then data is missing.
                Err(source) if usable => {
                    return Err(DataError::Io { action: "read", path, source });
                }
                Ok(_) | Err(_) => others.push(name.to_string_lossy().into_owned()),
            }
        }
    }
    if found.is_empty() {
        others.sort();
        others.truncate(5);
        return Err(DataError::NothingUsable { path: root.to_path_buf(), found: others });
    }
    found.sort();
    Ok(found)
}

/// Reads the documents of all files, in order. An empty document is left out; an empty file is a warning, unless it is
/// the only one.
pub(super) fn read_documents(
    files: &[PathBuf],
    text_field: &str,
    split: DocumentSplit,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>, DataError> {
    let mut documents = Vec::new();
    for path in files {
        let before = documents.len();
        match kind(path) {
            Some(Kind::JsonLines) => read_json_lines(path, text_field, &mut documents)?,
            _ => read_text(path, split, &mut documents)?,
        }
        if documents.len() == before {
            if files.len() == 1 {
                return Err(DataError::Empty { place: path.display().to_string() });
            }
            warnings.push(format!("no text in it; {}; the file was passed over", path.display()));
        }
    }
    Ok(documents)
}

fn read_text(path: &Path, split: DocumentSplit, documents: &mut Vec<String>) -> Result<(), DataError> {
    let bytes = fs::read(path).map_err(DataError::io("read", path))?;
    let mut text = String::from_utf8(bytes).map_err(|error| DataError::NotUtf8 {
        path: path.to_path_buf(),
        offset: error.utf8_error().valid_up_to() as u64,
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    match split {
        DocumentSplit::BlankLines => split_blank_lines(&text, documents),
        DocumentSplit::Lines => {
            documents.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        }
        DocumentSplit::WholeFile if text.is_empty() => {}
        DocumentSplit::WholeFile => documents.push(text),
    }
    Ok(())
}

fn split_blank_lines(text: &str, documents: &mut Vec<String>) {
    let mut document = String::new();
    let mut close = |document: &mut String| {
        let length = document.strip_suffix("\r\n").or(document.strip_suffix('\n')).unwrap_or(document).len();
        document.truncate(length);
        if !document.is_empty() {
            documents.push(std::mem::take(document));
        }
    };
    for line in text.split_inclusive('\n') {
        if line.trim().is_empty() {
            close(&mut document);
        } else {
            document.push_str(line);
        }
    }
    close(&mut document);
}

fn read_json_lines(path: &Path, field: &str, documents: &mut Vec<String>) -> Result<(), DataError> {
    for_each_line(path, |line, text| {
        let document = parse_field(text, field)
            .map_err(|source| DataError::BadJson { path: path.to_path_buf(), line, source })?
            .ok_or_else(|| DataError::MissingField {
                path: path.to_path_buf(),
                line,
                field: field.to_owned(),
            })?;
        if !document.is_empty() {
            documents.push(document);
        }
        Ok(())
    })
}

/// Calls `each(number, text)` for the lines of a file that are not blank; numbers count from 1, blank lines too.
///
/// # Errors
/// `Io`, `NotUtf8`, `LineTooLong` beyond 64 MiB, or what `each` returns first.
pub(crate) fn for_each_line<E: From<DataError>>(
    path: &Path,
    mut each: impl FnMut(u64, &str) -> Result<(), E>,
) -> Result<(), E> {
    let mut reader = BufReader::new(File::open(path).map_err(DataError::io("open", path))?);
    let (mut buffer, mut offset) = (Vec::new(), 0);
    for line in 1.. {
        buffer.clear();
        let length = (&mut reader)
            .take(MAX_LINE + 1)
            .read_until(b'\n', &mut buffer)
            .map_err(DataError::io("read", path))?;
        if length == 0 {
            break;
        }
        if length as u64 > MAX_LINE {
            return Err(DataError::LineTooLong { path: path.to_path_buf(), line, limit: MAX_LINE }.into());
        }
        let text = std::str::from_utf8(&buffer).map_err(|error| DataError::NotUtf8 {
            path: path.to_path_buf(),
            offset: offset + error.valid_up_to() as u64,
        })?;
        offset += length as u64;
        let text = if line == 1 { text.trim_start_matches('\u{feff}') } else { text };
        if !text.trim().is_empty() {
            each(line, text)?;
        }
    }
    Ok(())
}

/// The string under `field` of a JSON object, read without building the rest of it: a line of 64 MiB stays 64 MiB.
fn parse_field(line: &str, field: &str) -> Result<Option<String>, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(line);
    let text = Field(field).deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(text)
}

struct Field<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for Field<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Field<'_> {
    type Value = Option<String>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut text = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == self.0 {
                text = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(text)
    }
}

/// Moves the last `floor(total bytes * fraction)` bytes into a second list of documents.
///
/// The cut moves down to a character boundary, so validation may gain up to three bytes. A document that the cut falls
/// into gives both parts a half, each a document of its own from then on.
pub(super) fn split_documents(mut documents: Vec<String>, fraction: f64) -> (Vec<String>, Vec<String>) {
    let total: usize = documents.iter().map(String::len).sum();
    let mut keep = total - (total as f64 * fraction) as usize;
    let mut first = 0;
    while first < documents.len() && documents[first].len() <= keep {
        keep -= documents[first].len();
        first += 1;
    }
    let mut validation = documents.split_off(first);
    if let Some(document) = validation.first_mut() {
        let tail = document.split_off(document.floor_char_boundary(keep));
        let head = std::mem::replace(document, tail);
        if !head.is_empty() {
            documents.push(head);
        }
    }
    (documents, validation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn write(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn read(path: &Path) -> Result<Vec<String>, DataError> {
        read_with(path, DocumentSplit::WholeFile)
    }

    fn read_with(path: &Path, split: DocumentSplit) -> Result<Vec<String>, DataError> {
        let Files::Text(files) = list(&[path.to_path_buf()], "training")? else { panic!("not text") };
        read_documents(&files, "text", split, &mut Vec::new())
    }

    #[test]
    fn text_is_kept_byte_for_byte_but_for_the_byte_order_mark() {
        let folder = folder();
        let path = write(&folder, "a.TXT", b"\xef\xbb\xbfone\r\ntwo\0\n\n");
        assert_eq!(read(&path).unwrap(), ["one\r\ntwo\0\n\n"]);
        assert_eq!(read(&write(&folder, "one.txt", b"x")).unwrap(), ["x"]);
    }

    #[test]
    fn blank_lines_separate_documents() {
        let folder = folder();
        let path = write(&folder, "a.txt", b"\n\na\nb\n\n \t\n\nc\r\nd\r\n\r\ne");
        assert_eq!(read_with(&path, DocumentSplit::BlankLines).unwrap(), ["a\nb", "c\r\nd", "e"]);
        let lines = read_with(&path, DocumentSplit::Lines).unwrap();
        assert!(lines.iter().all(|line| !line.is_empty() && !line.contains(['\n', '\r'])), "{lines:?}");
        assert_eq!(
            lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty()).collect::<String>(),
            "abcde"
        );
    }

    #[test]
    fn empty_files_are_refused_alone_and_reported_in_company() {
        let folder = folder();
        let empty = write(&folder, "a.txt", b"");
        assert!(matches!(read(&empty), Err(DataError::Empty { .. })));
        assert!(matches!(read(&write(&folder, "bom.txt", b"\xef\xbb\xbf")), Err(DataError::Empty { .. })));
        assert!(matches!(
            read(&write(&folder, "a.jsonl", b"\n{\"text\":\"\"}\n")),
            Err(DataError::Empty { .. })
        ));
        let mut warnings = Vec::new();
        let full = write(&folder, "b.txt", b"b");
        let documents =
            read_documents(&[empty, full], "text", DocumentSplit::WholeFile, &mut warnings).unwrap();
        assert_eq!(documents, ["b"]);
        assert!(warnings.len() == 1 && warnings[0].contains("a.txt"), "{warnings:?}");
    }

    #[test]
    fn bad_utf8_names_file_and_byte() {
        let folder = folder();
        for (name, bytes, expected) in [
            ("a.txt", &b"\xef\xbb\xbfab\xffcd"[..], 5),
            ("cut.txt", b"ab\xe2\x82", 2),
            ("a.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"\xff\"}\n", 22),
        ] {
            let path = write(&folder, name, bytes);
            match read(&path) {
                Err(DataError::NotUtf8 { path: found, offset }) => {
                    assert_eq!((found, offset), (path, expected))
                }
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn json_lines_give_the_field_asked_for() {
        let folder = folder();
        let lines = b"\xef\xbb\xbf{\"text\":\"a\\n\\u00e9\",\"n\":[1,{\"text\":2}]}\r\n\n{\"other\":\"z\",\"text\":\"b\"}";
        let path = write(&folder, "a.jsonl", lines);
        assert_eq!(read(&path).unwrap(), ["a\né", "b"]);
        let other =
            read_documents(std::slice::from_ref(&path), "other", DocumentSplit::WholeFile, &mut Vec::new());
        assert!(matches!(other, Err(DataError::MissingField { line: 1, .. })), "{other:?}");
    }

    #[test]
    fn bad_json_names_file_and_line() {
        let folder = folder();
        for bad in [
            "{",
            "[1]",
            "\"text\"",
            "{\"text\":1}",
            "{\"text\":null}",
            "{\"text\":\"a\"} x",
            "{\"text\":\"a\\ud800\"}",
            "nul",
        ] {
            let path = write(&folder, "a.jsonl", format!("{{\"text\":\"ok\"}}\n\n{bad}\n").as_bytes());
            match read(&path) {
                Err(DataError::BadJson { path: found, line, .. }) => {
                    assert_eq!((found, line), (path, 3), "{bad}")
                }
                other => panic!("{bad}: {other:?}"),
            }
        }
        let deep = format!("{{\"x\":{}", "[".repeat(1 << 20));
        assert!(matches!(read(&write(&folder, "b.jsonl", deep.as_bytes())), Err(DataError::BadJson { .. })));
    }

    #[test]
    fn a_json_line_has_a_limit() {
        let folder = folder();
        let mut bytes = b"{\"text\":\"ok\"}\n{\"text\":\"".to_vec();
        bytes.resize(bytes.len() + MAX_LINE as usize, b'a');
        bytes.extend(b"\"}\n");
        let result = read(&write(&folder, "a.jsonl", &bytes));
        assert!(matches!(result, Err(DataError::LineTooLong { line: 2, .. })));
    }

    #[test]
    fn folders_are_read_in_path_order_without_hidden_or_odd_files() {
        let folder = folder();
        write(&folder, "b.txt", b"3");
        write(&folder, "a/z.jsonl", b"{\"text\":\"2\"}");
        write(&folder, "a/b.txt", b"1");
        write(&folder, ".hidden.txt", b"no");
        write(&folder, ".git/x.txt", b"no");
        write(&folder, "picture.png", b"\xff\xff");
        write(&folder, "tokens.u16", b"\0\0");
        assert_eq!(read(folder.path()).unwrap(), ["1", "2", "3"]);
    }

    #[test]
    fn folders_without_text_say_what_they_hold() {
        let folder = folder();
        write(&folder, "picture.png", b"x");
        write(&folder, "tokens.u16", b"\0\0");
        match read(folder.path()) {
            Err(DataError::NothingUsable { found, .. }) => {
                assert_eq!(found, ["picture.png", "tokens.u16"])
            }
            other => panic!("{other:?}"),
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_pipes_and_folders_named_like_text_do_not_hang() {
        use std::os::unix::{fs::symlink, net::UnixListener};
        let folder = folder();
        write(&folder, "a/one.txt", b"1");
        write(&folder, "folder.txt/two.txt", b"2");
        symlink(folder.path(), folder.path().join("a/up")).unwrap();
        symlink(folder.path().join("a"), folder.path().join("again")).unwrap();
        symlink("self", folder.path().join("self")).unwrap();
        let _socket = UnixListener::bind(folder.path().join("socket.txt")).unwrap();
        let documents = read(folder.path()).unwrap();
        assert_eq!(documents, ["1", "2"]);
        assert!(matches!(read(&folder.path().join("socket.txt")), Err(DataError::UnknownKind { .. })));
        symlink("nowhere", folder.path().join("lost.txt")).unwrap();
        assert!(matches!(read(folder.path()), Err(DataError::Io { .. })));
    }

    #[test]
    fn unusable_paths_are_told_apart() {
        let folder = folder();
        assert!(matches!(list(&[], "training"), Err(DataError::NoSources { split: "training" })));
        assert!(matches!(read(&folder.path().join("none.txt")), Err(DataError::Missing { .. })));
        assert!(matches!(read(&write(&folder, "a.csv", b"x")), Err(DataError::UnknownKind { .. })));
        assert!(matches!(read(&write(&folder, "bare", b"x")), Err(DataError::UnknownKind { .. })));
        let mixed = [write(&folder, "a.txt", b"x"), write(&folder, "a.u16", b"\0\0")];
        assert!(matches!(list(&mixed, "training"), Err(DataError::Mixed { .. })));
    }

    #[test]
    fn the_split_is_exact_and_never_cuts_a_character() {
        let documents: Vec<String> = ["abcde", "fg", "hé€😀z"].map(String::from).to_vec();
        let all = documents.concat();
        for percent in 0..=100 {
            let fraction = f64::from(percent) / 100.0;
            let (train, validation) = split_documents(documents.clone(), fraction);
            assert_eq!(train.concat() + &validation.concat(), all);
            let wanted = (all.len() as f64 * fraction) as usize;
            let size = validation.concat().len();
            assert!((wanted..wanted + 4).contains(&size), "{percent}: {size} for {wanted}");
            assert!(size == wanted || !all.is_char_boundary(all.len() - wanted));
            assert!(train.iter().chain(&validation).all(|document| !document.is_empty()));
        }
        let (train, validation) = split_documents(vec!["ab".into(), "cd".into()], 0.5);
        assert_eq!((train, validation), (vec!["ab".to_owned()], vec!["cd".to_owned()]));
    }
}
