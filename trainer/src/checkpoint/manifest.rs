//! `manifest.json`: what a whole checkpoint consists of. Written last; without it a folder is no checkpoint.
//!
//! The manifest covers the files by size and blake3, and itself by `checksum`, the blake3 of its own bytes with that
//! field empty, so that a flipped byte anywhere in the folder is noticed.

use super::CheckpointError;
use crate::run_dir::FileError;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

/// Name of the manifest in a checkpoint's folder.
pub(super) const MANIFEST: &str = "manifest.json";
/// Version of the folder's format; any change of the manifest's fields raises it.
pub(super) const FORMAT: u32 = 1;
/// Longest manifest read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name in the checkpoint's folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Hash of the content, 64 hexadecimal digits.
    pub blake3: String,
}

/// The list of what a checkpoint consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the folder's format.
    pub format_version: u32,
    /// Version of the crate that wrote it.
    pub crate_version: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Hash of the resolved config, 64 hexadecimal digits.
    pub config_blake3: String,
    /// The files, in the order they were written.
    pub files: Vec<FileEntry>,
    /// Hash of this manifest with an empty checksum, 64 hexadecimal digits.
    pub checksum: String,
}

/// What every version of the format has.
#[derive(Deserialize)]
struct AnyVersion {
    format_version: u32,
}

impl Manifest {
    /// The manifest's bytes, checksum included.
    pub(super) fn seal(mut self) -> Result<Vec<u8>, CheckpointError> {
        self.checksum = self.expected_checksum()?;
        serde_json::to_vec_pretty(&self).map_err(CheckpointError::Unwritable)
    }

    fn expected_checksum(&self) -> Result<String, CheckpointError> {
        let empty = Self { checksum: String::new(), ..self.clone() };
        let bytes = serde_json::to_vec(&empty).map_err(CheckpointError::Unwritable)?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    }

    /// Reads the manifest of the checkpoint in `folder` and checks it, but not yet the files.
    pub(super) fn read(folder: &Path) -> Result<Self, CheckpointError> {
        let path = folder.join(MANIFEST);
        if !is_plain_file(&path)? {
            return Err(CheckpointError::NoManifest { path: folder.into() });
        }
        let damaged = |problem: String| CheckpointError::BadManifest { path: path.clone(), problem };
        let mut bytes = Vec::new();
        let file = File::open(&path).map(|file| file.take(MAX_BYTES + 1));
        file.and_then(|mut file| file.read_to_end(&mut bytes)).map_err(FileError::at("read", &path))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(damaged(format!("it is longer than {MAX_BYTES} bytes")));
        }
        let AnyVersion { format_version: found } =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if found > FORMAT {
            return Err(CheckpointError::Format { path, found, supported: FORMAT });
        }
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if found != FORMAT || manifest.checksum != manifest.expected_checksum()? {
            return Err(damaged("its checksum does not fit".into()));
        }
        // A copy under another step's name would be resumed from, and kept, as that step.
        if step_of(folder).is_some_and(|step| step != manifest.step) {
            return Err(damaged(format!("it is of step {}", manifest.step)));
        }
        let mut names = BTreeSet::new();
        for FileEntry { name, .. } in &manifest.files {
            require_plain_name(name, &path)?;
            if !names.insert(name) {
                return Err(damaged(format!("it lists {name} twice")));
            }
        }
        Ok(manifest)
    }
}

impl FileEntry {
    /// Checks that the file in `folder` has the size and the content listed.
    pub(super) fn verify(&self, folder: &Path) -> Result<(), CheckpointError> {
        let path = folder.join(&self.name);
        if !is_plain_file(&path)? {
            return Err(CheckpointError::Missing { path });
        }
        let found = fs::metadata(&path).map_err(FileError::at("read", &path))?.len();
        if found != self.bytes {
            return Err(CheckpointError::Size { path, expected: self.bytes, found });
        }
        let mut hasher = blake3::Hasher::new();
        let hashed = File::open(&path).and_then(|file| hasher.update_reader(file).map(drop));
        hashed.map_err(FileError::at("read", &path))?;
        match hasher.finalize().to_hex().as_str() == self.blake3 {
            true => Ok(()),
            false => Err(CheckpointError::Damaged { path }),
        }
    }
}

/// The name of the folder for `step`: `step-00001000` for 1,000.
pub(super) fn name_of(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step in the name of a checkpoint's folder; only the one spelling of [`name_of`] counts.
pub(super) fn step_of(folder: &Path) -> Option<u64> {
    let name = folder.file_name()?.to_str()?;
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (name == name_of(step)).then_some(step)
}

/// Refuses names that could lead out of the folder, hide, or stand for the manifest.
pub(super) fn require_plain_name(name: &str, path: &Path) -> Result<(), CheckpointError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let hidden = name.is_empty() || name.starts_with('.') || name.len() > 200;
    if hidden || !name.bytes().all(plain) || name.eq_ignore_ascii_case(MANIFEST) {
        return Err(CheckpointError::UnsafeName { path: path.into(), name: name.into() });
    }
    Ok(())
}

/// Whether `path` is a file itself, not a link to one, nor a pipe whose opening would wait for ever.
fn is_plain_file(path: &Path) -> Result<bool, FileError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(metadata.is_file()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(FileError::new("read", path, error)),
    }
}
