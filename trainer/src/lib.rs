//! Trains BitNet b1.58 models: from text to a checkpoint that runs elsewhere exactly as it was trained.
//!
//! In the order in which a run uses them:
//!
//! * [`config`]: the one description of a run; [`run_dir`] and [`checkpoint`]: its folder and what it leaves there;
//! * [`corpus`]: the embedded grammar of stories; [`data`]: from text to shuffled windows of tokens;
//! * [`parameters`], [`model`], [`optimizer`], [`schedule`]: what is trained and how; [`decoder`]: the same, fast;
//! * [`train`]: the loop; [`metrics`], [`progress`], [`interrupt`]: what it tells and how it is stopped;
//! * [`runtime`]: the trained model in the inference runtime; [`export`]: written out, and proven;
//! * [`stories`]: what a model of the embedded corpus has learnt; [`choices`]: how it answers questions;
//! * [`memory`]: what a run will need; [`bench`](mod@bench): how fast it is here;
//! * [`cli`]: the command line.
pub mod bench;
pub mod checkpoint;
pub mod choices;
pub mod cli;
pub mod config;
pub mod corpus;
pub mod data;
pub mod decoder;
pub mod export;
pub mod import;
pub mod interrupt;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod optimizer;
pub mod parameters;
pub mod progress;
pub mod report;
pub mod run_dir;
pub mod runtime;
pub mod schedule;
pub mod stories;
pub mod teacher;
pub mod train;
