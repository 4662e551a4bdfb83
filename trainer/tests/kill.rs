//! Signals: whatever moment they come at, what is on disk loads, and the run goes on from there.
#![cfg(unix)]

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{assert_same_run, command, done, folder, metrics, names, train};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trainer::checkpoint::CheckpointStore;

/// Longest wait for something that must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a process that writes into files: a pipe that nobody reads would stop it.
fn start(folder: &Path, args: &[&str]) -> Child {
    let file = |name: &str| File::create(folder.join(name)).unwrap();
    command(folder, args).stdout(file("stdout")).stderr(file("stderr")).spawn().unwrap()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        sleep(Duration::from_millis(1));
    }
}

fn wait_for(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the end of the process", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

fn send(signal: &str, child: &Child) {
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{signal} {}", child.id())).status().unwrap();
    assert!(sent.success());
}

/// The newest step of which there is a checkpoint; every folder of that name must be whole.
fn newest(run: &Path) -> u64 {
    let latest = CheckpointStore::new(run.join("checkpoints")).latest_valid().unwrap();
    assert!(latest.rejected.is_empty(), "{:?}", latest.rejected);
    latest.checkpoint.map_or(0, |checkpoint| checkpoint.step())
}

#[test]
fn fifty_kills_harm_nothing() {
    const KILLS: usize = 50;
    const STEPS: u64 = 160;
    let folder = folder();
    let path = folder.path();
    // Steps of some milliseconds, so that kills fall into steps as well as into checkpoints.
    let settings = ["train.steps=160", "train.gradient_accumulation=8", "eval.every=25"];
    let seldom = [&settings[..], &["checkpoint.keep_best=false"]].concat();
    let often = [&settings[..], &["checkpoint.every=2", "checkpoint.keep=2"]].concat();
    done(path, &train("whole", &seldom));

    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (mut kills, mut runs, mut steps) = (0, 0, 0);
    while kills < KILLS {
        // One run takes all the kills, unless the machine is so fast that it ends before: then there is another one.
        runs += 1;
        let name = format!("killed-{runs}");
        let run = path.join(&name);
        let mut known = 0;
        while kills < KILLS {
            let before = names(&run.join("checkpoints"));
            let mut child = start(path, &train(&name, &often));
            if rng.random() {
                sleep(Duration::from_millis(rng.random_range(20..150)));
            } else {
                // Around the moment at which a checkpoint is begun, finished or removed.
                wait_until("a checkpoint", || {
                    names(&run.join("checkpoints")) != before || child.try_wait().unwrap().is_some()
                });
                sleep(Duration::from_millis(rng.random_range(0..20)));
            }
            child.kill().unwrap();
            let finished = wait_for(&mut child).success();
            let now = newest(&run);
            assert!(now >= known, "step {known} was safe, now there is step {now}");
            steps += now - known;
            known = now;
            if finished {
                break;
            }
            kills += 1;
        }
        // A fixed number, so that a slow disk does not make the rest slow.
        done(path, &train(&name, &seldom));
        assert_same_run(&path.join("whole"), &run, STEPS);
        let left = names(&run.join("checkpoints"));
        assert!(left.iter().all(|name| name.len() == "step-00000000".len()), "leftovers: {left:?}");
    }
    println!("{kills} kills over {runs} runs, {steps} steps between them");
    assert!(steps > 0, "no process lived long enough to write a checkpoint");
}

#[test]
fn the_first_signal_saves_the_step_it_stops_at() {
    let folder = folder();
    let run = folder.path().join("run");
    let args = train("run", &["train.steps=1000000000", "train.log_every=7"]);
    let mut last = 0;
    for (signal, code) in [("INT", 130), ("TERM", 143), ("INT", 130)] {
        let mut child = start(folder.path(), &args);
        // The log is cut back to the checkpoint at the start, and grows once there are steps.
        wait_until("steps", || {
            let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
            lines.ends_with('\n') && metrics(&run).last().is_some_and(|m| m["step"].as_u64() > Some(last))
        });
        send(signal, &child);
        assert_eq!(wait_for(&mut child).code(), Some(code));
        let step = newest(&run);
        assert!(step > last, "{step} after {last}");
        let stderr = fs::read_to_string(folder.path().join("stderr")).unwrap();
        assert!(stderr.contains(&format!("stopped at step {step};")), "{stderr}");
        assert_eq!(stderr.contains("resuming from"), last > 0, "{stderr}");
        assert_eq!(fs::read_to_string(folder.path().join("stdout")).unwrap(), "");
        assert!(!run.join("export/hf").exists());
        last = step;
    }
}

#[test]
fn the_second_signal_ends_at_once_and_harms_nothing() {
    let folder = folder();
    let path = folder.path();
    let settings = ["train.steps=6", "checkpoint.every=1", "checkpoint.keep=9"];
    done(path, &train("whole", &settings));
    // Samples change nothing in a run, and so many keep step 2 busy for longer than this test waits.
    let prompts = "\"\",".repeat(250_000);
    let sample = format!("[sample]\nevery = 2\nprompts = [{prompts}]");
    fs::write(path.join("endless.toml"), common::CONFIG.replace("[sample]", &sample)).unwrap();
    for (first, second, code) in [("INT", "TERM", 143), ("TERM", "INT", 130)] {
        let name = format!("run-{code}");
        let mut args = train(&name, &settings);
        args[1] = "endless.toml";
        let mut child = start(path, &args);
        let run = path.join(&name);
        wait_until("step 2", || names(&run.join("checkpoints")).contains(&"step-00000002".into()));
        send(first, &child);
        sleep(Duration::from_millis(50));
        assert_eq!(child.try_wait().unwrap(), None, "the first signal waits for the end of the step");
        send(second, &child);
        assert_eq!(wait_for(&mut child).code(), Some(code));
        assert!(!fs::read_to_string(path.join("stderr")).unwrap().contains("stopped at step"));
        assert_eq!(newest(&run), 2);
        done(path, &train(&name, &settings));
        assert_same_run(&path.join("whole"), &run, 6);
    }
}
