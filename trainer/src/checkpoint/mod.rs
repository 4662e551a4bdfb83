//! Checkpoints that are whole or not there, whatever happens while they are written.
//!
//! A checkpoint is written into a temporary folder, each file flushed to the disk, the manifest last, and the folder
//! renamed into place. Loading verifies every byte. That reads and hashes each checkpoint once more, a second or two a
//! gigabyte, and buys that a damaged one is never trained on: the newest valid one is taken instead.
//!
//! Nothing here knows models: a caller hands over named writers or tensors, and a serialisable state. Writing and pruning presume
//! that the caller holds the run's lock ([`crate::run_dir::RunDir`]); reading needs none.

mod error;
mod manifest;

pub use error::CheckpointError;
pub use manifest::{FileEntry, Manifest};

use crate::run_dir::{FileError, sync_dir};
use manifest::{FORMAT, MANIFEST, name_of, require_plain_name, step_of};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

/// Name of the file that holds the state.
const STATE: &str = "state.json";
/// Name of the file that holds the resolved config.
const CONFIG: &str = "config.toml";
/// What marks a folder that is being written or deleted.
const TEMPORARY: &str = ".tmp-";

/// Writes a file's content.
type WriteContent<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

/// One file to be written into a checkpoint.
pub struct Part<'a> {
    name: &'a str,
    bytes: u64,
    write: WriteContent<'a>,
}

impl<'a> Part<'a> {
    /// A file `name` of about `bytes` bytes, whose content `write` streams; the size is for the check of free space.
    pub fn new(name: &'a str, bytes: u64, write: impl FnOnce(&mut dyn Write) -> io::Result<()> + 'a) -> Self {
        Self { name, bytes, write: Box::new(write) }
    }

    /// A file `name` whose content is in memory.
    pub fn from_bytes(name: &'a str, content: &'a [u8]) -> Self {
        Self::new(name, content.len() as u64, |file| file.write_all(content))
    }

    /// A safetensors file `name` of f32 tensors (name, shape, values), streamed: they are not copied, which beside a training
    /// step may be more than the memory holds.
    pub fn tensors(name: &'a str, mut tensors: Vec<(String, &'a [usize], &'a [f32])>) -> Self {
        // The order of `safetensors::serialize`.
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let bytes: usize = tensors.iter().map(|(.., values)| size_of_val(*values)).sum();
        Self::new(name, bytes as u64, move |file| {
            let mut end = 0;
            let infos = tensors.iter().map(|(name, shape, values)| {
                let start = end;
                end += size_of_val(*values);
                let data_offsets = (start, end);
                (name.clone(), TensorInfo { dtype: Dtype::F32, shape: shape.to_vec(), data_offsets })
            });
            let header = Metadata::new(None, infos.collect()).map_err(io::Error::other)?;
            let mut header = serde_json::to_vec(&header)?;
            header.resize(header.len().next_multiple_of(8), b' ');
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            tensors.iter().try_for_each(|(.., values)| {
                values.chunks(1 << 16).try_for_each(|chunk| {
                    let bytes: Vec<u8> = chunk.iter().flat_map(|x| x.to_le_bytes()).collect();
                    file.write_all(&bytes)
                })
            })
        })
    }
}

/// The folder of a run's checkpoints, `step-00001000` and so on.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    root: PathBuf,
}

/// A checkpoint whose every byte was verified when it was loaded.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

/// A checkpoint that was passed over.
#[derive(Debug)]
pub struct Rejected {
    /// Its folder.
    pub path: PathBuf,
    /// Why.
    pub reason: CheckpointError,
}

/// What [`CheckpointStore::latest_valid`] found.
#[derive(Debug)]
pub struct Latest {
    /// The newest valid checkpoint, if there is one.
    pub checkpoint: Option<Checkpoint>,
    /// The newer ones that are not valid, newest first.
    pub rejected: Vec<Rejected>,
}

impl CheckpointStore {
    /// The checkpoints in `root`, which need not exist yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder of the checkpoint of `step`: `step-00001000` for 1,000.
    pub fn path_of(&self, step: u64) -> PathBuf {
        self.root.join(name_of(step))
    }

    /// Writes the checkpoint of `step`: the `parts`, `state` as `state.json`, the resolved config as `config.toml` and
    /// the manifest. A valid checkpoint of that step stays as it is; a broken one is replaced.
    ///
    /// # Errors
    /// If the disk is too full or refuses, a part cannot be written or has no plain name, or `state` cannot be read
    /// back. Other checkpoints are untouched and no temporary folder is left.
    pub fn save<S: Serialize + DeserializeOwned>(
        &self,
        step: u64,
        config: &str,
        state: &S,
        parts: Vec<Part<'_>>,
    ) -> Result<PathBuf, CheckpointError> {
        let path = self.path_of(step);
        if load(&path).is_ok() {
            return Ok(path);
        }
        let state = serde_json::to_vec_pretty(state).map_err(CheckpointError::Unwritable)?;
        // JSON turns NaN into null, which would only be noticed by the run that cannot resume.
        serde_json::from_slice::<S>(&state).map_err(CheckpointError::Unwritable)?;
        let own = [Part::from_bytes(STATE, &state), Part::from_bytes(CONFIG, config.as_bytes())];
        let parts: Vec<_> = parts.into_iter().chain(own).collect();
        fs::create_dir_all(&self.root).map_err(FileError::at("make the folder", &self.root))?;
        self.require_space(&parts)?;
        let temp = self.temporary(step, "");
        let manifest = Manifest {
            format_version: FORMAT,
            crate_version: env!("CARGO_PKG_VERSION").into(),
            step,
            config_blake3: blake3::hash(config.as_bytes()).to_hex().to_string(),
            files: Vec::new(),
            checksum: String::new(),
        };
        let written = write_folder(&temp, manifest, parts).and_then(|()| self.publish(step, &temp));
        if written.is_err() {
            // The first error is the one to report; leftovers are removed at the next start.
            let _ = fs::remove_dir_all(&temp);
        }
        written.map(|()| path)
    }

    /// Steps and folders of all checkpoints, oldest first, valid or not.
    ///
    /// # Errors
    /// If the folder cannot be read; a missing one has no checkpoints.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
        let paths = self.names()?.into_iter().map(|name| self.root.join(name));
        let mut found: Vec<_> = paths.filter_map(|path| step_of(&path).map(|step| (step, path))).collect();
        found.sort();
        Ok(found)
    }

    /// The newest checkpoint that is valid, and the newer ones that are not.
    ///
    /// # Errors
    /// If the folder cannot be read. What is wrong with one checkpoint is a reason to pass it over, not an error.
    pub fn latest_valid(&self) -> Result<Latest, CheckpointError> {
        let mut rejected = Vec::new();
        for (_, path) in self.list()?.into_iter().rev() {
            match load(&path) {
                Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), rejected }),
                Err(reason) => rejected.push(Rejected { path, reason }),
            }
        }
        Ok(Latest { checkpoint: None, rejected })
    }

    /// Deletes what is older than the newest `keep` valid checkpoints (at least one), except the one of step `best`.
    /// Returns the steps deleted. With fewer valid ones nothing is deleted, so the last one never is.
    ///
    /// # Errors
    /// If a folder cannot be read or deleted.
    pub fn prune(&self, keep: usize, best: Option<u64>) -> Result<Vec<u64>, CheckpointError> {
        let mut valid = 0;
        let mut deleted = Vec::new();
        for (step, path) in self.list()?.into_iter().rev() {
            if valid < keep.max(1) {
                valid += usize::from(load(&path).is_ok());
            } else if Some(step) != best {
                self.delete(step, &path)?;
                deleted.push(step);
            }
        }
        Ok(deleted)
    }

    /// Removes what killed processes left half written or half deleted; returns how many folders.
    ///
    /// # Errors
    /// If a folder cannot be read or removed.
    pub fn remove_leftovers(&self) -> Result<usize, CheckpointError> {
        let names = self.names()?;
        let leftovers = names.iter().filter(|name| name.starts_with("step-") && name.contains(TEMPORARY));
        let mut removed = 0;
        for path in leftovers.map(|name| self.root.join(name)) {
            fs::remove_dir_all(&path).map_err(FileError::at("remove the leftover", &path))?;
            removed += 1;
        }
        Ok(removed)
    }

    /// Names in the folder; names that are not UTF-8 are not ours.
    fn names(&self) -> Result<Vec<String>, CheckpointError> {
        let read = FileError::at("read the folder of checkpoints", &self.root);
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(&read)?,
        };
        let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name().into_string())).collect();
        Ok(names.map_err(read)?.into_iter().flatten().collect())
    }

    /// `step-00001000.tmp-PID`, with a suffix to tell apart two for one step.
    fn temporary(&self, step: u64, suffix: &str) -> PathBuf {
        self.root.join(format!("{}{TEMPORARY}{}{suffix}", name_of(step), std::process::id()))
    }

    /// Refuses to start writing `parts` and a tenth more onto a disk that cannot hold them.
    fn require_space(&self, parts: &[Part<'_>]) -> Result<(), CheckpointError> {
        let bytes = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.bytes));
        let need = bytes.saturating_add(bytes / 10);
        let free = free_space(&self.root).map_err(FileError::at("ask for the free space", &self.root))?;
        match free {
            Some(free) if free < need => {
                Err(CheckpointError::NoSpace { path: self.root.clone(), need, free })
            }
            _ => Ok(()),
        }
    }

    /// Renames the finished folder into place, moving a broken checkpoint of that step away.
    fn publish(&self, step: u64, temp: &Path) -> Result<(), CheckpointError> {
        let path = self.path_of(step);
        if fs::symlink_metadata(&path).is_ok() {
            self.delete(step, &path)?;
        }
        fs::rename(temp, &path).map_err(FileError::at("finish the checkpoint", &path))?;
        Ok(sync_dir(&self.root)?)
    }

    /// Deletes a checkpoint; from the first moment on it no longer has a checkpoint's name.
    fn delete(&self, step: u64, path: &Path) -> Result<(), CheckpointError> {
        let doomed = self.temporary(step, "-old");
        let failed = FileError::at("delete the checkpoint", path);
        fs::rename(path, &doomed).map_err(&failed)?;
        sync_dir(&self.root)?;
        match doomed.is_dir() {
            true => fs::remove_dir_all(&doomed),
            false => fs::remove_file(&doomed),
        }
        .map_err(failed)?;
        Ok(())
    }
}

/// Loads the checkpoint in the folder `path` after verifying every byte of it.
///
/// # Errors
/// The first thing wrong with it.
pub fn load(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let manifest = Manifest::read(path)?;
    manifest.files.iter().try_for_each(|file| file.verify(path))?;
    Ok(Checkpoint { path: path.into(), manifest })
}

impl Checkpoint {
    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// What it consists of.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The path of one of its files, for a memory map.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] if the manifest does not list `name`.
    pub fn file(&self, name: &str) -> Result<PathBuf, CheckpointError> {
        self.entry(name).map(|(path, _)| path)
    }

    /// The bytes of one of its files, verified once more as they are read.
    ///
    /// # Errors
    /// If the manifest does not list `name`, or the file cannot be read or has changed.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, CheckpointError> {
        let (path, entry) = self.entry(name)?;
        let mut bytes = Vec::new();
        let file = File::open(&path).map(|file| file.take(entry.bytes.saturating_add(1)));
        file.and_then(|mut file| file.read_to_end(&mut bytes)).map_err(FileError::at("read", &path))?;
        match blake3::hash(&bytes).to_hex().as_str() == entry.blake3 {
            true => Ok(bytes),
            false => Err(CheckpointError::Damaged { path }),
        }
    }

    /// The training state.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and if it is no `S`.
    pub fn state<S: DeserializeOwned>(&self) -> Result<S, CheckpointError> {
        let bytes = self.read(STATE)?;
        let path = self.path.join(STATE);
        serde_json::from_slice(&bytes).map_err(|source| CheckpointError::State { path, source })
    }

    /// The path of the resolved config it was trained with, for `Config::load`.
    ///
    /// # Errors
    /// As [`Checkpoint::file`].
    pub fn config(&self) -> Result<PathBuf, CheckpointError> {
        self.file(CONFIG)
    }

    fn entry(&self, name: &str) -> Result<(PathBuf, &FileEntry), CheckpointError> {
        let path = self.path.join(name);
        match self.manifest.files.iter().find(|file| file.name == name) {
            Some(entry) => Ok((path, entry)),
            None => Err(CheckpointError::Missing { path }),
        }
    }
}

/// Writes all files and the manifest into a new folder `temp`, everything flushed to the disk.
fn write_folder(temp: &Path, mut manifest: Manifest, parts: Vec<Part<'_>>) -> Result<(), CheckpointError> {
    if temp.exists() {
        fs::remove_dir_all(temp).map_err(FileError::at("remove the leftover", temp))?;
    }
    fs::create_dir(temp).map_err(FileError::at("make the folder", temp))?;
    for part in parts {
        require_plain_name(part.name, temp)?;
        manifest.files.push(write_part(temp, part)?);
    }
    let sealed = manifest.seal()?;
    write_part(temp, Part::from_bytes(MANIFEST, &sealed))?;
    Ok(sync_dir(temp)?)
}

/// Writes one file, hashing what passes through; a name written twice is refused.
fn write_part(folder: &Path, part: Part<'_>) -> Result<FileEntry, CheckpointError> {
    let path = folder.join(part.name);
    let write = || -> io::Result<Hashed<BufWriter<File>>> {
        let file = BufWriter::with_capacity(1 << 20, File::create_new(&path)?);
        let mut file = Hashed { inner: file, hasher: blake3::Hasher::new(), bytes: 0 };
        (part.write)(&mut file)?;
        file.flush()?;
        file.inner.get_ref().sync_all()?;
        Ok(file)
    };
    let written = write().map_err(FileError::at("write the checkpoint", &path))?;
    Ok(FileEntry {
        name: part.name.into(),
        bytes: written.bytes,
        blake3: written.hasher.finalize().to_hex().to_string(),
    })
}

/// A writer that hashes and counts what it passes on.
struct Hashed<W> {
    inner: W,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(data)?;
        self.hasher.update(&data[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Bytes this process may still write beside `path`, where the system can be asked.
#[cfg(unix)]
fn free_space(path: &Path) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(Some(stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// Bytes this process may still write beside `path`: unknown here, so that a full disk is noticed by the write.
#[cfg(not(unix))]
fn free_space(_path: &Path) -> io::Result<Option<u64>> {
    Ok(None)
}

#[cfg(test)]
mod tests;
