//! A bar on a terminal, plain lines elsewhere; both on standard error.
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The progress of some long work.
pub struct Progress {
    /// On a terminal.
    bar: Option<ProgressBar>,
    what: &'static str,
    total: u64,
    start: Instant,
    first: u64,
    last_line: Option<Instant>,
}

/// Shortest time between two plain lines that nobody asked for.
const LINE_PAUSE: Duration = Duration::from_secs(60);

impl Progress {
    /// Work of `total` parts, of which `done` are done already; `what` names the work.
    pub fn new(what: &'static str, done: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let template = "{prefix} {wide_bar} {percent}% {msg} | {eta} left";
            // A template that indicatif does not take would only cost the looks.
            bar.set_style(
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_prefix(what);
            bar.set_position(done);
            bar.reset_eta();
            bar
        });
        Self { bar, what, total, start: Instant::now(), first: done, last_line: None }
    }

    /// `done` parts are done; `line` asks for a plain line where there is no bar.
    pub fn update(&mut self, done: u64, message: &str, line: bool) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if line || self.last_line.is_none_or(|last| last.elapsed() > LINE_PAUSE) {
            let spent = self.start.elapsed();
            let rate = spent.as_secs_f64() / done.saturating_sub(self.first).max(1) as f64;
            let left = Duration::from_secs_f64(rate * self.total.saturating_sub(done) as f64);
            let separator = if message.is_empty() { "" } else { " | " };
            eprintln!("{} {done}/{}{separator}{message} | {} left", self.what, self.total, clock(left));
            self.last_line = Some(Instant::now());
        }
    }

    /// Says something without disturbing the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Leaves the terminal as it was.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `1:02:03` or `2:03`.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_on_a_clock() {
        assert_eq!(clock(Duration::from_secs(59)), "0:59");
        assert_eq!(clock(Duration::from_secs(3_723)), "1:02:03");
    }
}
