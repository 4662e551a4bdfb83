//! Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, the second ends the process at once.
//!
//! The second signal must work even while the main thread is deep in a long step, so it is handled inside of the signal
//! handler by an immediate exit, which runs no destructor. That harms nothing: files are written aside and renamed.

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// A request to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT, as from Ctrl-C.
    Interrupt,
    /// SIGTERM, as from a job scheduler; Windows never sends it.
    Terminate,
}

impl Signal {
    const ALL: [Self; 2] = [Self::Interrupt, Self::Terminate];

    /// The system's number of the signal.
    fn number(self) -> i32 {
        match self {
            Self::Interrupt => SIGINT,
            Self::Terminate => SIGTERM,
        }
    }

    /// The exit status shells expect: 128 + number, so 130 or 143.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

/// The signals cannot be handled.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot handle Ctrl-C and SIGTERM; signal handlers of this process; report this with your system's name"
)]
pub struct InterruptError(#[from] io::Error);

/// Whether someone asked this process to stop; clones share the answer.
///
/// The default one listens to no signal and is only set by [`Interrupt::request`].
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    /// The number of the signal that came; 0 = none.
    number: Arc<AtomicUsize>,
}

impl Interrupt {
    /// Handles SIGINT and SIGTERM from now on to the end of the process.
    ///
    /// # Errors
    /// If the system refuses the handlers.
    pub fn install() -> Result<Self, InterruptError> {
        let interrupt = Self::default();
        let seen = Arc::new(AtomicBool::new(false));
        for signal in Signal::ALL {
            // Actions run in the order of registration: the check comes before the flag it checks.
            let code = i32::from(signal.exit_code());
            flag::register_conditional_shutdown(signal.number(), code, Arc::clone(&seen))?;
            flag::register_usize(signal.number(), Arc::clone(&interrupt.number), signal.number() as usize)?;
            flag::register(signal.number(), Arc::clone(&seen))?;
        }
        Ok(interrupt)
    }

    /// The signal that asked to stop, if one did.
    pub fn requested(&self) -> Option<Signal> {
        let number = self.number.load(Ordering::SeqCst);
        Signal::ALL.into_iter().find(|signal| signal.number() as usize == number)
    }

    /// Asks to stop as if `signal` had come; never exits.
    pub fn request(&self, signal: Signal) {
        self.number.store(signal.number() as usize, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;
    use std::process::Command;

    const VARIABLE: &str = "INTERRUPT_TEST_SIGNALS";

    /// Runs `test` again in a process of its own, as signals are for a whole process; returns its exit status.
    fn status_of(test: &str, signals: &str) -> Option<i32> {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "--quiet", &format!("interrupt::tests::{test}")]);
        child.env(VARIABLE, signals).output().unwrap().status.code()
    }

    #[test]
    fn the_first_signal_asks_and_the_second_exits() {
        if let Ok(signals) = std::env::var(VARIABLE) {
            let interrupt = Interrupt::install().unwrap();
            let shared = interrupt.clone();
            assert_eq!(interrupt.requested(), None);
            let signals = signals.chars().map(|letter| match letter {
                'i' => Signal::Interrupt,
                _ => Signal::Terminate,
            });
            for signal in signals {
                raise(signal.number()).unwrap();
                // A second signal ends the process above, before this line.
                assert_eq!(shared.requested(), Some(signal));
            }
            std::process::exit(7);
        }
        let cases = [("", 7), ("i", 7), ("t", 7), ("ii", 130), ("tt", 143), ("it", 143), ("ti", 130)];
        for (signals, code) in cases {
            let name = "the_first_signal_asks_and_the_second_exits";
            assert_eq!(status_of(name, signals), Some(code), "{signals:?}");
        }
    }

    #[test]
    fn a_request_needs_no_signal() {
        let interrupt = Interrupt::default();
        assert_eq!(interrupt.requested(), None);
        interrupt.clone().request(Signal::Terminate);
        assert_eq!(interrupt.requested(), Some(Signal::Terminate));
        assert_eq!([Signal::Interrupt, Signal::Terminate].map(Signal::exit_code), [130, 143]);
    }
}
