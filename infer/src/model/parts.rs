//! Where the time of a pass goes.

use std::time::{Duration, Instant};

/// A part of a pass through the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Embedding, rotary embedding, cache and residual stream.
    Other,
    /// Norms and gated activations, each with the quantizer behind it.
    NormQuantize,
    /// The products with q, k and v.
    Qkv,
    /// Attention over the cache.
    Attention,
    /// The product with o.
    Output,
    /// The products with gate and up.
    GateUp,
    /// The product with down.
    Down,
    /// The product with the head.
    Head,
}

impl Part {
    /// All parts, in the order of a pass.
    pub const ALL: [Self; 8] = [
        Self::Other,
        Self::NormQuantize,
        Self::Qkv,
        Self::Attention,
        Self::Output,
        Self::GateUp,
        Self::Down,
        Self::Head,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Other => "other",
            Self::NormQuantize => "norm_quantize",
            Self::Qkv => "qkv",
            Self::Attention => "attention",
            Self::Output => "output",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Head => "head",
        }
    }
}

/// Time by part.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    times: [Duration; Part::ALL.len()],
    last: Option<Instant>,
}

impl Parts {
    /// Time of one part.
    pub fn time(&self, part: Part) -> Duration {
        self.times[part as usize]
    }

    /// A pass begins: what went by since the last one counts for nothing.
    pub(super) fn begin(&mut self) {
        self.last = Some(Instant::now());
    }

    /// What went by since the last call belongs to `part`.
    pub(super) fn end(&mut self, part: Part) {
        let now = Instant::now();
        if let Some(last) = self.last.replace(now) {
            self.times[part as usize] += now - last;
        }
    }
}
