//! Writing files so that a crash leaves the old one or the new one, never half of either.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

/// A file operation that failed, sorted by what the user can do about it. What the system said is its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The place may not be written or read.
    #[error("cannot {action}, the place is read-only or not yours; {}; check its permissions or choose another folder", path.display())]
    Denied {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk or the quota is full.
    #[error("cannot {action}, the disk or your quota is full; {}; free some space or choose another disk", path.display())]
    Full {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {action}; {}; check the path and the disk", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl FileError {
    /// Makes the error of doing `action` ("write the checkpoint") to `path`.
    pub fn new(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::Denied { action, path, source }
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { action, path, source },
            _ => Self::Io { action, path, source },
        }
    }

    /// As [`FileError::new`], for `map_err`.
    pub fn at<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Self + 'a {
        move |source| Self::new(action, path, source)
    }
}

/// Makes the names in a folder durable; where folders cannot be flushed (Windows), does nothing.
///
/// # Errors
/// If the folder cannot be opened or flushed.
pub fn sync_dir(path: &Path) -> Result<(), FileError> {
    if cfg!(unix) {
        let flushed = File::open(path).and_then(|dir| dir.sync_all());
        flushed.map_err(FileError::at("flush the folder", path))?;
    }
    Ok(())
}

/// Replaces `path` by `bytes`: temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// If any of the four fails; `path` is then as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_atomic_with(path, |file| file.write_all(bytes))
}

/// As [`write_atomic`], the content coming from `write`, so that it need not be held in memory.
///
/// # Errors
/// As [`write_atomic`], and those of `write`.
pub fn write_atomic_with(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), FileError> {
    let temp = temp_beside(path);
    let written = File::create(&temp).and_then(|file| {
        let mut file = BufWriter::new(file);
        write(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()
    });
    if let Err(error) = written.and_then(|()| fs::rename(&temp, path)) {
        // The first error is the one to report; a leftover temporary file is harmless.
        let _ = fs::remove_file(&temp);
        return Err(FileError::new("write the file", path, error));
    }
    sync_dir(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// `dir/.NAME.tmp-PID` for `dir/NAME`: the same folder, as a rename cannot cross file systems.
fn temp_beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".tmp-{}", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_the_whole_file_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        write_atomic(&path, b"a long first version").unwrap();
        write_atomic(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(dir.path()), ["a.toml"]);
    }

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        write_atomic(&path, b"old").unwrap();
        let error = write_atomic_with(&path, |file| {
            file.write_all(&[7; 100_000])?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err();
        assert!(matches!(error, FileError::Full { .. }), "{error}");
        assert!(error.to_string().contains("a.toml"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.toml"]);
    }

    #[test]
    fn errors_are_sorted_by_remedy() {
        let sort = |kind: io::ErrorKind| FileError::new("x", Path::new("y"), kind.into());
        assert!(matches!(sort(io::ErrorKind::PermissionDenied), FileError::Denied { .. }));
        assert!(matches!(sort(io::ErrorKind::ReadOnlyFilesystem), FileError::Denied { .. }));
        assert!(matches!(sort(io::ErrorKind::QuotaExceeded), FileError::Full { .. }));
        assert!(matches!(sort(io::ErrorKind::NotFound), FileError::Io { .. }));
    }
}
