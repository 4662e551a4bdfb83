//! A run that stops and goes on is, bit for bit, the run that did not stop; threads change nothing either.

mod common;

use std::fs;

use common::{assert_same_run, checkpoint, config, copy, done, files, folder, metrics, train};
use trainer::config::Config;
use trainer::interrupt::{Interrupt, Signal};
use trainer::train::{Outcome, Resume, Session, prepare_data};

const STEPS: u64 = 20;

/// Everything that has a state, happening at intervals that do not fit each other.
const SETTINGS: [&str; 9] = [
    "train.gradient_accumulation=2",
    "quantization.warmup=linear",
    "quantization.warmup_fraction=0.7",
    "schedule.kind=two_stage",
    "eval.every=3",
    "checkpoint.every=7",
    "checkpoint.keep=2",
    "sample.every=5",
    "sample.prompts=[\"\", \"The\"]",
];

fn run(config: &Config, interrupt: &Interrupt) -> Outcome {
    let dataset = prepare_data(config).unwrap();
    Session::open(config, dataset, &Resume::Auto).unwrap().run(interrupt).unwrap()
}

#[test]
fn a_run_may_stop_after_any_step() {
    let folder = folder();
    let config = |out: &str| config(folder.path(), out, &SETTINGS);
    let whole = config("whole");
    assert_eq!(run(&whole, &Interrupt::default()), Outcome::Finished);
    assert_eq!(metrics(&whole.run.out).len(), 20 + 7);

    // A session that is asked to stop from the start does one step: this run stops after each of its steps.
    let stopping = config("stopping");
    let asked = Interrupt::default();
    asked.request(Signal::Terminate);
    for step in 1..STEPS {
        assert_eq!(run(&stopping, &asked), Outcome::Interrupted(Signal::Terminate));
        // A copy of it stops here for the last time.
        let copied = config(&format!("from-{step}"));
        copy(&stopping.run.out, &copied.run.out);
        assert_eq!(run(&copied, &Interrupt::default()), Outcome::Finished);
        assert_same_run(&whole.run.out, &copied.run.out, STEPS);
    }
    assert_eq!(run(&stopping, &asked), Outcome::Finished, "nothing is left to stop");
    assert_same_run(&whole.run.out, &stopping.run.out, STEPS);
}

#[test]
fn a_run_may_go_on_from_any_of_its_checkpoints() {
    let folder = folder();
    let config = |out: &str, more: &[&str]| config(folder.path(), out, &[&SETTINGS, more].concat());
    let whole = config("whole", &["checkpoint.every=1", "checkpoint.keep=99"]);
    assert_eq!(run(&whole, &Interrupt::default()), Outcome::Finished);
    for step in 1..STEPS {
        // As after a crash: later metrics and samples are there, the later checkpoints are not.
        let copied = config(&format!("from-{step}"), &["checkpoint.every=0", "checkpoint.keep_best=false"]);
        copy(&whole.run.out, &copied.run.out);
        for later in step + 1..=STEPS {
            fs::remove_dir_all(copied.run.out.join(checkpoint(later))).unwrap();
        }
        assert_eq!(run(&copied, &Interrupt::default()), Outcome::Finished);
        assert_same_run(&whole.run.out, &copied.run.out, STEPS);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let folder = folder();
    let path = folder.path();
    let one = ["model.hidden_size=64", "model.intermediate_size=172", "data.sequence_length=32"];
    let two = ["train.batch_size=5", "train.steps=6", "quantization.warmup=linear", "run.threads=1"];
    let three = ["train.gradient_accumulation=2", "eval.every=2", "sample.tokens=30"];
    let settings = [&one[..], &two, &three].concat();
    let (report, said) = done(path, &train("one", &settings));
    assert!(said.contains(" 1 threads"), "{said}");
    for threads in ["run.threads=2", "run.threads=5"] {
        let (other, said) = done(path, &train(threads, &[&settings[..], &[threads]].concat()));
        assert!(said.contains(&format!(" {} threads", &threads[12..])), "{said}");
        assert_same_run(&path.join("one"), &path.join(threads), 6);
        assert!(files(&path.join("one/export/hf")) == files(&path.join(threads).join("export/hf")));
        assert_eq!(other.replace(threads, "one"), report);
    }
}
