//! A run's folder: where each thing lies, and the lock that keeps two runs out of it.
//!
//! Reading needs no lock ([`RunPaths`]); training holds a [`RunDir`]. The lock is the operating system's, on an open
//! file: it goes with the process however that ends, so there is no stale lock to clear by hand. The file itself
//! stays, because removing it would let two processes hold "the" lock on two different files.

mod files;
mod metrics;

pub use files::{FileError, sync_dir, write_atomic, write_atomic_with};
pub use metrics::{MetricsLog, truncate_after};

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Name of the lock file.
const LOCK: &str = ".lock";
/// Folders of a run.
const FOLDERS: [&str; 3] = ["checkpoints", "samples", "export"];

/// A run folder that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// A new run was asked for in a folder that holds something.
    #[error(
        "the run folder is not empty; {}; continue that run with --resume auto or choose another --out",
        path.display()
    )]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// The folder holds no run.
    #[error("this is no run folder, it has no config.toml; {}; give the folder of a run", path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// Another process trains in this folder.
    #[error(
        "another run{} holds this folder; {}; wait for it, stop it or choose another --out",
        pid.map_or(String::new(), |pid| format!(" (process {pid})")),
        path.display()
    )]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The process, as far as the lock file tells.
        pid: Option<u32>,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A record of the metrics cannot be written as JSON.
    #[error("a metrics record is no JSON; metrics.jsonl; report this as a bug")]
    Record(#[source] serde_json::Error),
}

/// Where each thing of a run lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunPaths(PathBuf);

impl RunPaths {
    /// The layout under `path`, whether or not anything is there.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The run's folder.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The resolved config.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// The tokenizer the run was trained with.
    pub fn tokenizer(&self) -> PathBuf {
        self.0.join("tokenizer.json")
    }

    /// The log of metrics, one JSON object a line.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    /// The folder of generated samples.
    pub fn samples(&self) -> PathBuf {
        self.0.join("samples")
    }

    /// The folder of exported models.
    pub fn export(&self) -> PathBuf {
        self.0.join("export")
    }

    /// Whether a run was started here: its config is written.
    pub fn is_run(&self) -> bool {
        self.config().is_file()
    }
}

/// A run's folder, locked for this process until dropped.
#[derive(Debug)]
pub struct RunDir {
    paths: RunPaths,
    _lock: File,
}

impl RunDir {
    /// Makes the folder of a new run at `path` and locks it. What an attempt left that wrote no file counts as empty.
    ///
    /// # Errors
    /// [`RunDirError::NotEmpty`] if it holds anything, [`RunDirError::Locked`] if a run is just starting there,
    /// a file error if it cannot be made.
    pub fn create(path: &Path) -> Result<Self, RunDirError> {
        fs::create_dir_all(path).map_err(FileError::at("make the run folder", path))?;
        // Before the lock too, so that a folder that is no run's gets no lock file.
        require_fresh(path)?;
        let lock = lock(path)?;
        require_fresh(path)?;
        for name in FOLDERS {
            let folder = path.join(name);
            fs::create_dir_all(&folder).map_err(FileError::at("make the folder", &folder))?;
        }
        sync_dir(path)?;
        Ok(Self { paths: RunPaths::new(path), _lock: lock })
    }

    /// Opens the folder of an earlier run at `path` and locks it.
    ///
    /// # Errors
    /// [`RunDirError::NotARun`] if it has no config, [`RunDirError::Locked`] if another process trains in it.
    pub fn open(path: &Path) -> Result<Self, RunDirError> {
        let paths = RunPaths::new(path);
        if !paths.is_run() {
            return Err(RunDirError::NotARun { path: path.into() });
        }
        let lock = lock(path)?;
        for name in FOLDERS {
            let folder = path.join(name);
            fs::create_dir_all(&folder).map_err(FileError::at("make the folder", &folder))?;
        }
        Ok(Self { paths, _lock: lock })
    }

    /// Opens the run at `path` if there is one, else makes a new one: what `--resume auto` means.
    ///
    /// # Errors
    /// As [`RunDir::open`] or [`RunDir::create`].
    pub fn open_or_create(path: &Path) -> Result<Self, RunDirError> {
        match RunPaths::new(path).is_run() {
            true => Self::open(path),
            false => Self::create(path),
        }
    }

    /// Where each thing lies.
    pub fn paths(&self) -> &RunPaths {
        &self.paths
    }
}

/// Refuses a folder that holds anything but the lock and empty folders of the layout.
fn require_fresh(path: &Path) -> Result<(), RunDirError> {
    let read = FileError::at("read the run folder", path);
    for entry in fs::read_dir(path).map_err(&read)? {
        let name = entry.map_err(&read)?.file_name();
        let inner = path.join(&name);
        let ours = name == LOCK
            || FOLDERS.iter().any(|folder| name == *folder)
                && inner.is_dir()
                && fs::read_dir(&inner).map_err(&read)?.next().is_none();
        if !ours {
            return Err(RunDirError::NotEmpty { path: path.into() });
        }
    }
    Ok(())
}

/// Takes the lock of the folder and writes this process's number into it.
fn lock(path: &Path) -> Result<File, RunDirError> {
    let lock_path = path.join(LOCK);
    let failed = FileError::at("lock the run folder", &lock_path);
    let mut options = OpenOptions::new();
    let mut file =
        options.create(true).truncate(false).read(true).write(true).open(&lock_path).map_err(&failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(RunDirError::Locked { path: path.into(), pid: holder(&mut file) });
        }
        Err(TryLockError::Error(error)) => return Err(failed(error).into()),
    }
    let write = |file: &mut File| -> io::Result<()> {
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(failed)?;
    Ok(file)
}

/// The process number in a lock file, if one can be read.
fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    // Only decorates a message that is right without it (Windows does not let others read a locked file).
    read.is_ok().then(|| text.trim().parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_new_run_has_its_layout() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/run");
        let run = RunDir::create(&path).unwrap();
        let paths = run.paths();
        assert!(paths.checkpoints().is_dir() && paths.samples().is_dir() && paths.export().is_dir());
        assert_eq!(paths.config(), path.join("config.toml"));
        assert_eq!(paths.tokenizer(), path.join("tokenizer.json"));
        assert_eq!(paths.metrics(), path.join("metrics.jsonl"));
    }

    #[test]
    fn a_folder_with_anything_in_it_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "x").unwrap();
        let error = RunDir::create(dir.path()).unwrap_err();
        assert!(matches!(error, RunDirError::NotEmpty { .. }), "{error}");
        assert!(error.to_string().contains("--resume auto"), "{error}");
        let error = RunDir::open(dir.path()).unwrap_err();
        assert!(matches!(error, RunDirError::NotARun { .. }), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_attempt_without_files_may_be_repeated_and_a_run_may_not() {
        let dir = tempfile::tempdir().unwrap();
        drop(RunDir::create(dir.path()).unwrap());
        let run = RunDir::open_or_create(dir.path()).unwrap();
        write_atomic(&run.paths().config(), b"").unwrap();
        drop(run);
        assert!(matches!(RunDir::create(dir.path()).unwrap_err(), RunDirError::NotEmpty { .. }));
        RunDir::open_or_create(dir.path()).unwrap();
        fs::remove_file(dir.path().join("config.toml")).unwrap();
        fs::write(dir.path().join("samples/a.txt"), "").unwrap();
        assert!(matches!(RunDir::create(dir.path()).unwrap_err(), RunDirError::NotEmpty { .. }));
    }

    #[test]
    fn one_run_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(dir.path()).unwrap();
        fs::write(run.paths().config(), "").unwrap();
        for error in [RunDir::open(dir.path()).unwrap_err(), RunDir::open_or_create(dir.path()).unwrap_err()]
        {
            let message = error.to_string();
            assert!(matches!(error, RunDirError::Locked { .. }), "{message}");
            if cfg!(unix) {
                assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
            }
        }
        drop(run);
        RunDir::open(dir.path()).unwrap();
    }

    #[test]
    fn the_lock_goes_with_its_process() {
        const VARIABLE: &str = "RUN_DIR_TEST_HOLDS_LOCK";
        if let Some(path) = std::env::var_os(VARIABLE) {
            // The child: takes the lock, says so, and ends without running any destructor.
            let _run = RunDir::open(Path::new(&path)).unwrap();
            std::process::exit(3);
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.toml"), "").unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "--quiet", "run_dir::tests::the_lock_goes_with_its_process"]);
        let output = child.env(VARIABLE, dir.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(3));
        let pid: u32 = fs::read_to_string(dir.path().join(LOCK)).unwrap().trim().parse().unwrap();
        assert_ne!(pid, std::process::id());
        RunDir::open(dir.path()).unwrap();
    }

    #[test]
    fn garbage_in_the_lock_file_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(LOCK), [0xff; 5000]).unwrap();
        let _run = RunDir::create(dir.path()).unwrap();
        let text = fs::read_to_string(dir.path().join(LOCK)).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_place_that_cannot_hold_a_folder_is_a_clear_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let error = RunDir::create(&file.join("run")).unwrap_err();
        assert!(matches!(error, RunDirError::File(_)) && error.to_string().contains("run folder"), "{error}");
        assert!(matches!(RunDir::create(&file).unwrap_err(), RunDirError::File(_)));
        assert!(matches!(RunDir::open(&file).unwrap_err(), RunDirError::NotARun { .. }));
    }
}
