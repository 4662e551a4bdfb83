//! Model files: each format's reader and writer beside each other.
//!
//! Files are untrusted. Everything that a reader takes from one is checked against the config before memory is asked
//! for, and what it refuses is named: file, tensor, position. Files are written whole or not at all.

pub mod hf;
pub mod packing;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bitlinear::packed::PackError;
use safetensors::{Dtype, SafeTensorError};

use crate::config::ConfigError;
use crate::model::ModelError;

/// Why a model could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("cannot {action} {}; check that the path exists and may be used", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// `config.json` or `generation_config.json` is refused.
    #[error("the config cannot be used; {}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ConfigError,
    },
    /// The safetensors container is damaged.
    #[error("not a whole safetensors file; {}; copy or export it again", path.display())]
    Container {
        /// The file.
        path: PathBuf,
        /// What its reader says.
        source: SafeTensorError,
    },
    /// The index of a checkpoint in several files is damaged.
    #[error("{problem}; {}; it must map tensor names to file names in this folder", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A tensor that the config asks for is not there.
    #[error("tensor '{tensor}' is missing; {}; the files are of another model or not complete", path.display())]
    Missing {
        /// The tensor.
        tensor: String,
        /// The model's folder.
        path: PathBuf,
    },
    /// A tensor that the config has no place for.
    #[error("tensor '{tensor}' has no place in this model; {}; the config is of another model", path.display())]
    Unexpected {
        /// The tensor.
        tensor: String,
        /// The file that has it.
        path: PathBuf,
    },
    /// A tensor's type is not the one expected.
    #[error("tensor '{tensor}' is {found}, expected {expected}; {}; the config is of another model", path.display())]
    Type {
        /// The tensor.
        tensor: String,
        /// The type found.
        found: Dtype,
        /// Types that are read here.
        expected: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A tensor's shape is not the one expected.
    #[error("tensor '{tensor}' has shape {found:?}, expected {expected:?}; {}; the config is of another model", path.display())]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape found.
        found: Vec<usize>,
        /// The shape that the config asks for.
        expected: Vec<usize>,
        /// The file.
        path: PathBuf,
    },
    /// A weight is NaN or infinite.
    #[error("value {at} of tensor '{tensor}' is {value}; {}; the file is damaged or the training went wrong", path.display())]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Index of the value.
        at: usize,
        /// The value.
        value: f32,
        /// The file.
        path: PathBuf,
    },
    /// A packed weight has the code that no ternary value has.
    #[error("code 3 at row {row}, column {column} of tensor '{tensor}'; {}; the file is damaged", path.display())]
    Code {
        /// The tensor.
        tensor: String,
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        column: usize,
        /// The file.
        path: PathBuf,
    },
    /// A ternary weight's scale or codes are refused.
    #[error("tensor '{tensor}' of {}", path.display())]
    Pack {
        /// The tensor.
        tensor: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: PackError,
    },
    /// A weight whose rows do not fill the layout.
    #[error(
        "{rows} rows of tensor '{tensor}' are not a multiple of 4; the packed layout has four rows a byte; choose other sizes"
    )]
    Rows {
        /// The tensor.
        tensor: String,
        /// Its rows.
        rows: usize,
    },
    /// The weights do not make a model.
    #[error(transparent)]
    Model(#[from] ModelError),
}

pub(crate) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> CheckpointError + use<> {
    let path = path.to_owned();
    move |source| CheckpointError::Io { action, path, source }
}

/// Writes a file whole or not at all: to a temporary file in the same folder, flushed to the disk, then renamed.
///
/// # Errors
/// The file system refuses; what was there before is then still there.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = folder.join(name);
    let written = write_synced(&temporary, bytes).and_then(|()| fs::rename(&temporary, path));
    if let Err(source) = written {
        // The first error is the one to report; a file that was never made cannot be removed either.
        let _ = fs::remove_file(&temporary);
        return Err(CheckpointError::Io { action: "write", path: path.to_owned(), source });
    }
    // The rename itself lasts only once the folder is on the disk. Elsewhere than on Unix a folder cannot be opened.
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("flush", folder))?;
    }
    Ok(())
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
