//! The training loop: read [`Session::run`] and the step it calls ([`Learner::step`]), everything else is a helper.
//!
//! A session owns what a run changes: parameters, optimizer, position in the data, metrics. All of it goes into a
//! checkpoint, and everything else is a function of the config and the step, so a run that stops and resumes is bit for
//! bit the run that did not stop.
mod calibrate;
mod codes;
mod learner;
mod session;
mod state;

use std::path::PathBuf;

use bitlinear::training::ProjectionError;

pub use codes::{CodeShares, code_shares};
pub use learner::{Learner, Step, StepTimes};
pub(crate) use session::MODEL;
pub use session::{Session, check_models, prepare_data, validation_loss};
pub use state::{Best, TrainState};

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::data::DataError;
use crate::data::chat::ChatError;
use crate::import::ImportError;
use crate::interrupt::{InterruptError, Signal};
use crate::parameters::ParameterError;
use crate::run_dir::{FileError, RunDirError};
use crate::runtime::RuntimeError;
use crate::teacher::TeacherError;

/// What to do about an earlier run in the same folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// Go on with it if there is one, else start.
    Auto,
    /// Start; a folder in use is an error.
    Never,
    /// Go on with the run in this folder; none there is an error.
    From(PathBuf),
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// A signal asked to stop; a checkpoint was written.
    Interrupted(Signal),
}

/// Why training cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The config.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Conversations.
    #[error(transparent)]
    Chat(Box<ChatError>),
    /// The model to start from.
    #[error(transparent)]
    Import(Box<ImportError>),
    /// The teacher.
    #[error(transparent)]
    Teacher(Box<TeacherError>),
    /// A checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The contents of a checkpoint.
    #[error(transparent)]
    Parameters(#[from] ParameterError),
    /// The run's folder.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Signal handlers.
    #[error(transparent)]
    Interrupt(#[from] InterruptError),
    /// The inference runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The kernels of a training step.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    /// candle.
    #[error("a tensor operation failed; training; {0}")]
    Candle(#[from] candle_core::Error),
    /// The run was made with other settings.
    #[error(
        "the run in this folder was made with another {keys}; {path}; use another --out, or the run's own settings"
    )]
    ConfigChanged {
        /// The keys that differ, with both values.
        keys: String,
        /// The run's folder.
        path: PathBuf,
    },
    /// The run was made with other data.
    #[error(
        "the {what} changed since this run started; {path}; bring the old one back, or use another --out"
    )]
    DataChanged {
        /// `data` or `tokenizer`.
        what: &'static str,
        /// The run's folder.
        path: PathBuf,
    },
    /// Checkpoints are there, but none is whole.
    #[error("no checkpoint can be used; {path}; {reasons}; use another --out to start again")]
    NoValidCheckpoint {
        /// The folder of the checkpoints.
        path: PathBuf,
        /// What is wrong with each.
        reasons: String,
    },
    /// A variable gets no useful gradient at step 0.
    #[error(
        "at step 0 the gradient of '{name}' has norm {norm}; gradient check; \
         every trainable variable must learn: the graph is cut, or the data is degenerate (a single repeated token)"
    )]
    DeadGradient {
        /// The variable.
        name: String,
        /// The norm of its gradient.
        norm: f64,
    },
    /// Too many steps in a row without a finite loss.
    #[error(
        "{in_a_row} steps in a row had no finite loss or gradient (last: loss {loss}, gradient norm {norm}); step {step}; \
         start again in a new --out with a lower optimizer.learning_rate or more schedule.warmup_steps"
    )]
    Diverged {
        /// The step.
        step: u64,
        /// Skipped steps in a row.
        in_a_row: u64,
        /// The last loss.
        loss: f64,
        /// The last gradient norm; NaN if it was not computed.
        norm: f64,
    },
}

// Boxed, so that a result of a step stays small.
impl From<ChatError> for TrainError {
    fn from(error: ChatError) -> Self {
        Self::Chat(Box::new(error))
    }
}

impl From<ImportError> for TrainError {
    fn from(error: ImportError) -> Self {
        Self::Import(Box::new(error))
    }
}

impl From<TeacherError> for TrainError {
    fn from(error: TeacherError) -> Self {
        Self::Teacher(Box::new(error))
    }
}
