//! Before and after: what a conversion cost, and what it brought.
use std::collections::BTreeMap;

use infer::bench::{BenchError, BenchOptions, bench};
use infer::config::{ModelConfig, Storage};
use infer::model::KvPrecision;
use serde::Serialize;

use crate::data::Dataset;
use crate::export::Trained;
use crate::import::{self, ImportError, Imported};
use crate::metrics::bits_per_byte;
use crate::model::Model;
use crate::parameters::Parameters;
use crate::runtime::{RuntimeError, runnable};
use crate::train::{CodeShares, TrainError, code_shares, validation_loss};

/// Tokens of the prompt, and new tokens, that speed is measured with.
const TOKENS: usize = 64;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The loss cannot be computed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The imported model does not start.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A model does not become runnable.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The speed cannot be measured.
    #[error(transparent)]
    Bench(#[from] BenchError),
}

/// One model of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// What it is.
    pub model: &'static str,
    /// Validation loss, nats a token.
    pub loss: f64,
    /// `e^loss`
    pub perplexity: f64,
    /// Validation loss in bits a byte of text.
    pub bits_per_byte: Option<f64>,
    /// Bytes of its weights.
    pub bytes: usize,
    /// New tokens a second here (median of three).
    pub tokens_per_second: f64,
}

/// A conversion's report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The model as imported (a BitNet as it is run); if it was made ternary, as ternarized without training, the same
    /// projections; as trained.
    pub rows: Vec<Row>,
    /// Share of the loss that ternarization cost and training won back: `(naive - trained) / (naive - imported)`; none where
    /// the imported model was a BitNet already, or the trained one is not.
    pub gap_closed: Option<f64>,
    /// Shares of codes of each projection, and of codes that differ from the naive ones.
    pub projections: BTreeMap<String, CodeShares>,
}

impl Report {
    /// Compares a trained model, whose validation loss is `loss`, with the one that it was made of, on the rows that training
    /// evaluates.
    ///
    /// # Errors
    /// A model cannot be evaluated or run.
    pub fn new(
        imported: &Imported,
        trained: &Trained,
        loss: f64,
        dataset: &Dataset,
    ) -> Result<Self, ReportError> {
        let shape = trained.model.config();
        let evaluated = |name, shape: &ModelConfig, parameters| -> Result<Row, ReportError> {
            let config = &trained.config;
            let model = Model::new(shape.clone(), config.data.sequence_length);
            let chosen = dataset.validation.evaluation(config.eval.windows as u64);
            let batch_size = config.eval.batch_size;
            let loss = validation_loss(&model, parameters, &dataset.validation, &chosen, batch_size)?;
            row(name, shape, parameters, loss, dataset)
        };
        let naive = ModelConfig {
            quantized: true,
            modules_to_not_convert: shape.modules_to_not_convert.clone(),
            ..imported.shape.clone()
        };
        // As training starts, but for sub-norms.
        let start = import::start(&naive, imported)?;
        let before = match imported.storage {
            Storage::Dense => evaluated("imported", &imported.shape, &imported.parameters)?,
            _ => evaluated("imported", &naive, &start)?,
        };
        let after = row("trained", shape, &trained.parameters, loss, dataset)?;
        let mut projections = BTreeMap::new();
        if shape.quantized {
            projections = code_shares(&trained.parameters, &start).map_err(TrainError::from)?;
            projections.retain(|name, _| shape.is_ternary(name.trim_end_matches(".weight")));
        }
        if !shape.quantized || imported.storage != Storage::Dense {
            return Ok(Self { rows: vec![before, after], gap_closed: None, projections });
        }
        let naive = evaluated("ternarized, untrained", &naive, &start)?;
        let gap_closed = (naive.loss - after.loss) / (naive.loss - before.loss);
        let gap_closed = Some(gap_closed).filter(|share| share.is_finite());
        Ok(Self { rows: vec![before, naive, after], gap_closed, projections })
    }
}

fn row(
    name: &'static str,
    shape: &ModelConfig,
    parameters: &Parameters,
    loss: f64,
    dataset: &Dataset,
) -> Result<Row, ReportError> {
    let runnable = runnable(shape, parameters)?;
    let each = TOKENS.min(shape.max_position_embeddings / 2);
    let options =
        BenchOptions { prompt_tokens: each, gen_tokens: each, repetitions: 3, kv: KvPrecision::F32 };
    let embedding = if shape.tie_word_embeddings { 0 } else { runnable.weights().embed_tokens.bytes() };
    Ok(Row {
        model: name,
        loss,
        perplexity: loss.exp(),
        bits_per_byte: bits_per_byte(loss, dataset.validation.tokens(), dataset.validation_bytes),
        bytes: runnable.bytes_per_token() + embedding,
        tokens_per_second: bench(&runnable, &options)?.generation.median,
    })
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:<22} {:>9} {:>11} {:>9} {:>12} {:>9}",
            "", "loss", "perplexity", "bits/byte", "bytes", "tokens/s"
        )?;
        for row in &self.rows {
            let bits = row.bits_per_byte.map_or_else(|| "-".into(), |bits| format!("{bits:.4}"));
            writeln!(
                f,
                "{:<22} {:>9.4} {:>11.3} {bits:>9} {:>12} {:>9.0}",
                row.model, row.loss, row.perplexity, row.bytes, row.tokens_per_second
            )?;
        }
        if let Some(gap_closed) = self.gap_closed {
            writeln!(f, "{:.1} % of what ternarization cost is won back", gap_closed * 100.0)?;
        }
        if self.projections.is_empty() {
            return Ok(());
        }
        write!(f, "{:<40} {:>6} {:>6} {:>6} {:>8}", "codes, %", "-1", "0", "+1", "flipped")?;
        for (name, shares) in &self.projections {
            let [minus, zero, plus, flipped] =
                [shares.minus, shares.zero, shares.plus, shares.flipped].map(|share| share * 100.0);
            let name = name.trim_start_matches("model.layers.").trim_end_matches(".weight");
            write!(f, "\n{name:<40} {minus:>6.1} {zero:>6.1} {plus:>6.1} {flipped:>8.1}")?;
        }
        Ok(())
    }
}
