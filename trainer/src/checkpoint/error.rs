//! What can be wrong with a checkpoint, each message naming the file and what to do.

use crate::run_dir::FileError;
use std::path::PathBuf;

/// A checkpoint that cannot be written or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The disk has too little room for the next checkpoint.
    #[error(
        "the next checkpoint needs {need} bytes and {free} are free; {}; free some space, lower checkpoint.keep \
         or choose another --out",
        path.display()
    )]
    NoSpace {
        /// The folder of checkpoints.
        path: PathBuf,
        /// Bytes needed, with a tenth to spare.
        need: u64,
        /// Bytes free.
        free: u64,
    },
    /// The state cannot be written so that it can be read again.
    #[error("the training state does not survive its own file; state.json; report this as a bug")]
    Unwritable(#[source] serde_json::Error),
    /// A state of another shape than this program's.
    #[error("state.json does not hold the state expected; {}; use the version that wrote it", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is missing or wrong.
        source: serde_json::Error,
    },
    /// The folder has no manifest: it was never finished, or is no checkpoint.
    #[error("the checkpoint has no manifest.json; {}; use another checkpoint", path.display())]
    NoManifest {
        /// The checkpoint's folder.
        path: PathBuf,
    },
    /// The manifest is damaged.
    #[error("the manifest is damaged: {problem}; {}; use another checkpoint", path.display())]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A program with a newer format wrote the checkpoint.
    #[error(
        "the checkpoint has format {found}, this version reads {supported}; {}; use the newer version",
        path.display()
    )]
    Format {
        /// The manifest.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Version read by this program.
        supported: u32,
    },
    /// A file name that a manifest (or a caller) may not use.
    #[error("{name:?} is no plain file name; {}; use another checkpoint", path.display())]
    UnsafeName {
        /// The manifest or folder.
        path: PathBuf,
        /// The name.
        name: String,
    },
    /// A file is missing, or is a link, a folder or a device.
    #[error("a file of the checkpoint is missing or no plain file; {}; use another checkpoint", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file has another size than the manifest says.
    #[error("a file has {found} bytes instead of {expected}; {}; use another checkpoint", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes according to the manifest.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file's bytes differ from what was written.
    #[error("a file is damaged, its blake3 differs from the manifest; {}; use another checkpoint", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}
