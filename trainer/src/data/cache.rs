//! A folder of files that can be made again: tokenized text and trained tokenizers, named by what they were made from.
//!
//! An entry is a data file and a JSON sidecar with the blake3 of data and notes. The hash is verified at every use, which
//! reads the file once and so costs about what loading it costs; in return a damaged entry is never trained on, but
//! rebuilt with a warning. Files appear whole: written under a temporary name in the same folder, synced, renamed.

use super::error::DataError;
use super::tokens::map;
use memmap2::Mmap;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// What stands beside an entry's data.
#[derive(Serialize, Deserialize)]
struct Sidecar<N> {
    /// Bytes of the data.
    length: u64,
    /// blake3 of the data followed by the notes as compact JSON, hex.
    blake3: String,
    notes: N,
}

/// An entry's data under construction.
pub(super) struct Writer {
    file: BufWriter<NamedTempFile>,
    hasher: blake3::Hasher,
    length: u64,
    path: PathBuf,
}

impl Writer {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        self.file.write_all(bytes).map_err(DataError::io("write", &self.path))
    }
}

/// The entry `name`, made by `build` unless a whole one is there.
///
/// # Errors
/// Those of `build`, and `Io` when the folder cannot be written. An entry that cannot be used is not an error.
pub(super) fn entry<N: Serialize + DeserializeOwned>(
    folder: &Path,
    name: &str,
    warnings: &mut Vec<String>,
    build: impl FnOnce(&mut Writer) -> Result<N, DataError>,
) -> Result<(Mmap, N), DataError> {
    let path = folder.join(name);
    match open(&path) {
        Ok(Some(entry)) => return Ok(entry),
        Ok(None) => {}
        Err(reason) => {
            warnings.push(format!("damaged cache file ({reason}); {}; it was made again", path.display()))
        }
    }
    fs::create_dir_all(folder).map_err(DataError::io("create", folder))?;
    let file = NamedTempFile::new_in(folder).map_err(DataError::io("write in", folder))?;
    let mut writer =
        Writer { file: BufWriter::new(file), hasher: blake3::Hasher::new(), length: 0, path: path.clone() };
    let notes = build(&mut writer)?;
    let Writer { file, hasher, length, .. } = writer;
    let file = file.into_inner().map_err(|error| DataError::io("write", &path)(error.into_error()))?;
    persist(file, &path)?;
    let sidecar = Sidecar { length, blake3: digest(hasher, &notes), notes };
    let mut file = NamedTempFile::new_in(folder).map_err(DataError::io("write in", folder))?;
    serde_json::to_writer_pretty(&mut file, &sidecar)
        .map_err(|error| DataError::io("write", &path)(error.into()))?;
    persist(file, &sidecar_path(&path))?;
    Ok((map(&path)?, sidecar.notes))
}

fn sidecar_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

fn digest(mut hasher: blake3::Hasher, notes: &impl Serialize) -> String {
    // Numbers and strings only, in the order of their declaration: this cannot fail and always gives the same bytes.
    hasher.update(serde_json::to_string(notes).unwrap_or_default().as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// Moves a finished temporary file to its place so that a crash leaves the old file or the new one.
fn persist(file: NamedTempFile, path: &Path) -> Result<(), DataError> {
    file.as_file().sync_all().map_err(DataError::io("sync", path))?;
    file.persist(path).map_err(|error| DataError::io("rename to", path)(error.error))?;
    // Windows has no way to sync a folder.
    #[cfg(unix)]
    if let Some(folder) = path.parent() {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(DataError::io("sync", folder))?;
    }
    Ok(())
}

/// The entry if there is one, or why it cannot be used.
fn open<N: Serialize + DeserializeOwned>(path: &Path) -> Result<Option<(Mmap, N)>, String> {
    let text = match fs::read(sidecar_path(path)) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let sidecar: Sidecar<N> = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
    let data = map(path).map_err(|error| error.to_string())?;
    if data.len() as u64 != sidecar.length {
        return Err(format!("{} bytes instead of {}", data.len(), sidecar.length));
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&data);
    if digest(hasher, &sidecar.notes) != sidecar.blake3 {
        return Err("its hash differs from the recorded one".to_owned());
    }
    Ok(Some((data, sidecar.notes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data and note of the entry, whether it was built, and the warnings.
    fn get(folder: &Path, content: &[u8]) -> (Vec<u8>, u64, bool, Vec<String>) {
        let (mut built, mut warnings) = (false, Vec::new());
        let (data, note) = entry(folder, "x.bin", &mut warnings, |writer| {
            built = true;
            content.chunks(3).try_for_each(|chunk| writer.write(chunk))?;
            Ok(42u64)
        })
        .unwrap();
        (data.to_vec(), note, built, warnings)
    }

    #[test]
    fn an_entry_is_built_once() {
        let folder = tempfile::tempdir().unwrap();
        let nested = folder.path().join("a/b");
        assert_eq!(get(&nested, b"content"), (b"content".to_vec(), 42, true, vec![]));
        assert_eq!(get(&nested, b"other"), (b"content".to_vec(), 42, false, vec![]));
        let mut names: Vec<_> =
            fs::read_dir(&nested).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["x.bin", "x.bin.json"]);
    }

    #[test]
    fn every_flipped_byte_is_found_and_mended() {
        let folder = tempfile::tempdir().unwrap();
        get(folder.path(), b"content");
        for name in ["x.bin", "x.bin.json"] {
            let path = folder.path().join(name);
            let whole = fs::read(&path).unwrap();
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 1;
                if name.ends_with("json")
                    && bytes[at].is_ascii_whitespace()
                    && whole[at].is_ascii_whitespace()
                {
                    continue;
                }
                fs::write(&path, &bytes).unwrap();
                let (data, note, built, warnings) = get(folder.path(), b"content");
                assert_eq!((&data[..], note, built), (&b"content"[..], 42, true), "{name} byte {at}");
                assert!(warnings.len() == 1 && warnings[0].contains("x.bin"), "{warnings:?}");
            }
        }
        assert!(!get(folder.path(), b"content").2);
    }

    #[test]
    fn short_empty_and_missing_halves_are_built_again() {
        let folder = tempfile::tempdir().unwrap();
        let (data, sidecar) = (folder.path().join("x.bin"), folder.path().join("x.bin.json"));
        for (path, bytes, warned) in [
            (&data, Some(&b"con"[..]), 1),
            (&data, Some(b""), 1),
            (&data, None, 1),
            (&sidecar, Some(b""), 1),
            (&sidecar, None, 0),
        ] {
            get(folder.path(), b"content");
            match bytes {
                Some(bytes) => fs::write(path, bytes).unwrap(),
                None => fs::remove_file(path).unwrap(),
            }
            let (found, _, built, warnings) = get(folder.path(), b"content");
            assert_eq!(
                (&found[..], built, warnings.len()),
                (&b"content"[..], true, warned),
                "{path:?} {bytes:?}"
            );
        }
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let result = entry::<u64>(folder.path(), "x.bin", &mut Vec::new(), |writer| {
            writer.write(b"half")?;
            Err(DataError::SequenceLength(0))
        });
        assert!(matches!(result, Err(DataError::SequenceLength(0))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), b"").unwrap();
        let result = entry::<u64>(&folder.path().join("file/cache"), "x.bin", &mut Vec::new(), |_| Ok(0));
        assert!(matches!(result, Err(DataError::Io { .. })));
    }
}
