//! `metrics.jsonl`: one JSON object a line, only ever appended to, and cut back to the checkpoint when a run resumes.
//!
//! A line is one write, so a killed process loses at most the line it was writing. Lines are flushed to the system each
//! time but to the disk only by [`MetricsLog::sync`], which the loop calls before each checkpoint: a flush for each
//! step would cost more than some steps.

use super::{FileError, RunDirError, files::write_atomic_with};
use serde::Serialize;
use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
};

/// Longest line read back, in bytes; longer ones are dropped as damage.
const MAX_LINE: u64 = 16 << 20;

/// The open log of a run.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log of a new run, or goes on at the end of what is there.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn create(path: &Path) -> Result<Self, RunDirError> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(FileError::at("open the metrics", path))?;
        Ok(Self { path: path.into(), file })
    }

    /// Opens the log of a run that goes on from `step`, after [`truncate_after`]; also returns the lines dropped.
    ///
    /// # Errors
    /// If the file cannot be read, rewritten or opened.
    pub fn resume(path: &Path, step: u64) -> Result<(Self, u64), RunDirError> {
        let dropped = truncate_after(path, step)?;
        Ok((Self::create(path)?, dropped))
    }

    /// Appends `record` as one line.
    ///
    /// # Errors
    /// [`RunDirError::Record`] if it is no JSON object; a file error if it cannot be written.
    pub fn append(&mut self, record: &impl Serialize) -> Result<(), RunDirError> {
        let mut line = serde_json::to_vec(record).map_err(RunDirError::Record)?;
        line.push(b'\n');
        Ok(self.file.write_all(&line).map_err(FileError::at("write the metrics", &self.path))?)
    }

    /// Makes every line so far durable.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn sync(&self) -> Result<(), RunDirError> {
        Ok(self.file.sync_data().map_err(FileError::at("flush the metrics", &self.path))?)
    }
}

/// Drops the lines whose `step` is above `step`, a last line without its end and lines that are no JSON object, and
/// returns their number. A line without a step belongs to the one before it. A missing file stays missing.
///
/// After it, a resumed run's log goes on as the uninterrupted one's would.
///
/// # Errors
/// If the file cannot be read or replaced; it is then as it was.
pub fn truncate_after(path: &Path, step: u64) -> Result<u64, RunDirError> {
    let old = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(FileError::new("read the metrics", path, error).into()),
    };
    let mut old = BufReader::new(old);
    let mut dropped = 0;
    write_atomic_with(path, |new| {
        let mut at = 0;
        let mut line = Vec::new();
        while read_line(&mut old, &mut line)? {
            let object = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&line);
            let whole = line.ends_with(b"\n");
            if let Ok(object) = &object {
                at = object.get("step").and_then(serde_json::Value::as_u64).unwrap_or(at);
            }
            match whole && object.is_ok() && at <= step {
                true => new.write_all(&line)?,
                false => dropped += 1,
            }
        }
        Ok(())
    })?;
    Ok(dropped)
}

/// Reads one line with its end into `line`; of an overlong one only the start. False at the end of the file.
fn read_line(file: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    file.by_ref().take(MAX_LINE).read_until(b'\n', line)?;
    if line.len() as u64 == MAX_LINE && !line.ends_with(b"\n") {
        file.skip_until(b'\n')?;
    }
    Ok(!line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::fs;

    #[test]
    fn a_record_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        log.append(&json!({"step": 1, "note": "two\nlines"})).unwrap();
        log.append(&json!({"step": 2, "loss": 0.5})).unwrap();
        log.sync().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"note\":\"two\\nlines\",\"step\":1}\n{\"loss\":0.5,\"step\":2}\n");
        drop(log);
        MetricsLog::create(&path).unwrap().append(&json!({"step": 3})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), text + "{\"step\":3}\n");
    }

    #[test]
    fn resuming_gives_the_log_of_an_uninterrupted_run() {
        let dir = tempfile::tempdir().unwrap();
        let record = |step: u64| json!({"step": step, "loss": 1.0 / step as f64});
        let event = |step: u64| json!({"event": "evaluated", "at": step});
        let write = |log: &mut MetricsLog, steps: std::ops::RangeInclusive<u64>| {
            for step in steps {
                log.append(&record(step)).unwrap();
                log.append(&event(step)).unwrap();
            }
        };
        let whole = dir.path().join("whole.jsonl");
        write(&mut MetricsLog::create(&whole).unwrap(), 1..=20);
        let whole = fs::read(&whole).unwrap();
        for (checkpoint, stopped) in [(0, 1), (7, 7), (7, 8), (10, 19), (19, 20)] {
            for torn in [b"".as_slice(), b"{\"step\":3", b"{\"step\":3}", b"\xff\n", b"[1]\n"] {
                let path = dir.path().join("resumed.jsonl");
                let _ = fs::remove_file(&path);
                let mut log = MetricsLog::create(&path).unwrap();
                write(&mut log, 1..=stopped);
                log.file.write_all(torn).unwrap();
                let (mut log, dropped) = MetricsLog::resume(&path, checkpoint).unwrap();
                assert_eq!(dropped, 2 * (stopped - checkpoint) + u64::from(!torn.is_empty()));
                write(&mut log, checkpoint + 1..=20);
                assert!(fs::read(&path).unwrap() == whole, "from {checkpoint}, stopped at {stopped}");
            }
        }
    }

    #[test]
    fn a_missing_log_is_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        assert_eq!(truncate_after(&path, 3).unwrap(), 0);
        assert!(!path.exists());
        assert!(truncate_after(dir.path(), 3).is_err());
    }

    #[test]
    fn overlong_lines_are_dropped_without_reading_them_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let long = vec![b' '; MAX_LINE as usize + 5];
        fs::write(&path, [b"{\"step\":1}\n", long.as_slice(), b"\n{\"step\":2}\n"].concat()).unwrap();
        assert_eq!(truncate_after(&path, 9).unwrap(), 1);
        assert_eq!(fs::read(&path).unwrap(), b"{\"step\":1}\n{\"step\":2}\n");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_can_be_cut_and_cutting_twice_changes_nothing(
            lines in prop::collection::vec("[{}\"step:0-9,a\n]{0,12}", 0..8), step in 0u64..5,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("m");
            fs::write(&path, lines.join("{\"step\":2}\n")).unwrap();
            truncate_after(&path, step).unwrap();
            let once = fs::read(&path).unwrap();
            prop_assert_eq!(truncate_after(&path, step).unwrap(), 0);
            prop_assert_eq!(fs::read(&path).unwrap(), once);
        }
    }
}
