//! What a model is made of: sizes, and scale and share of -1, 0 and +1 of each projection.
use std::fmt;

use bitlinear::packed::Layout;
use serde::Serialize;

use crate::model::{Model, Projection};

/// A model's sizes and projections.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Sizes and options, as `config.json` has them.
    pub config: serde_json::Value,
    /// Number of weights, a tied head counted once.
    pub parameters: Option<u64>,
    /// Layout of the ternary weights in memory, if there are any.
    pub layout: Option<&'static str>,
    /// Bytes of weights that a generated token reads in this layout.
    pub bytes_per_token: usize,
    /// The seven projections of each layer.
    pub projections: Vec<ProjectionReport>,
}

/// One projection.
#[derive(Debug, Clone, Serialize)]
pub struct ProjectionReport {
    /// Its name, without `.weight`.
    pub name: String,
    /// `[out_features, in_features]`
    pub shape: [usize; 2],
    /// What is known of a ternary one; nothing of a dense one.
    pub ternary: Option<TernaryReport>,
}

/// A ternary weight's scale and codes.
#[derive(Debug, Clone, Serialize)]
pub struct TernaryReport {
    /// What a code is multiplied by.
    pub weight_scale: f32,
    /// Share of -1.
    pub minus: f64,
    /// Share of 0.
    pub zero: f64,
    /// Share of +1.
    pub plus: f64,
}

impl Report {
    /// Looks at every projection of a model.
    pub fn new(model: &Model) -> Self {
        let layers = model.weights().layers.iter().enumerate();
        let projections = layers.flat_map(|(index, layer)| {
            let shapes = model.config().projections().into_iter();
            shapes.zip(layer.projections()).map(move |((name, out, columns), projection)| ProjectionReport {
                name: format!("model.layers.{index}.{name}"),
                shape: [out, columns],
                ternary: TernaryReport::new(projection),
            })
        });
        Self {
            config: model.config().to_json(),
            parameters: model.config().parameters(),
            layout: model.layout().map(Layout::name),
            bytes_per_token: model.bytes_per_token(),
            projections: projections.collect(),
        }
    }
}

impl TernaryReport {
    fn new(projection: &Projection) -> Option<Self> {
        let Projection::Ternary(weight) = projection else { return None };
        let codes = weight.unpack();
        let share = |code| codes.iter().filter(|c| **c == code).count() as f64 / codes.len() as f64;
        Some(Self { weight_scale: weight.weight_scale(), minus: share(-1), zero: share(0), plus: share(1) })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:#}", self.config)?;
        writeln!(
            f,
            "{:<40} {:>14} {:>12} {:>7} {:>7} {:>7}",
            "projection", "shape", "scale", "-1", "0", "+1"
        )?;
        for ProjectionReport { name, shape, ternary } in &self.projections {
            let shape = format!("{}x{}", shape[0], shape[1]);
            match ternary {
                Some(TernaryReport { weight_scale, minus, zero, plus }) => {
                    writeln!(
                        f,
                        "{name:<40} {shape:>14} {weight_scale:>12.6} {minus:>7.4} {zero:>7.4} {plus:>7.4}"
                    )?;
                }
                None => writeln!(f, "{name:<40} {shape:>14} {:>12}", "dense f32")?,
            }
        }
        writeln!(f, "parameters: {}", self.parameters.unwrap_or(0))?;
        writeln!(f, "layout: {}", self.layout.unwrap_or("none"))?;
        write!(f, "bytes_per_token: {}", self.bytes_per_token)
    }
}
