//! A full-precision model that a student learns from: what it makes of a batch, and text that it writes.
mod sample;

use std::path::{Path, PathBuf};

use bitlinear::training::{self, ProjectionError};
use infer::checkpoint::{CheckpointError, hf};
use infer::config::{ModelConfig, Storage};
use infer::generate::GenerateError;

pub use sample::write_text;

use crate::config::DistillConfig;
use crate::data::Batch;
use crate::decoder::{Decoder, Lesson, RelationLesson, StepWeights, head_name};
use crate::import::{self, ImportError, Imported};
use crate::parameters::Values;
use crate::run_dir::FileError;
use crate::schedule::Shares;

/// Why a teacher does not teach.
#[derive(Debug, thiserror::Error)]
pub enum TeacherError {
    /// Its files.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// Its files, to run.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// It does not write.
    #[error("the teacher cannot write text; {0}")]
    Generate(#[from] GenerateError),
    /// A file of what it wrote.
    #[error(transparent)]
    File(#[from] FileError),
    /// Nothing to start a text with.
    #[error("the model names no token that starts or ends a text; {}; add bos_token_id to its config.json", .0.display())]
    NoFirstToken(PathBuf),
    /// The kernels.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    /// candle.
    #[error("a tensor cannot be read; {0}")]
    Candle(#[from] candle_core::Error),
}

/// A teacher and what it made of the last batch.
pub struct Teacher {
    model: Imported,
    decoder: Decoder,
    relations: Option<KeptRelations>,
}

/// What relations are computed from.
struct KeptRelations {
    heads: usize,
    temperature: f32,
    /// The student's layer and the teacher's.
    layers: [usize; 2],
    /// The teacher's queries, keys and values.
    qkv: [Vec<f32>; 3],
}

/// Refuses the model in a folder as the teacher of a student of this shape; of its files only the config is read.
///
/// # Errors
/// The config is refused, the weights are ternary, the vocabulary has another size, its context is shorter than
/// `sequence_length`, or its heads do not divide into relations as the student's do.
pub fn check(
    folder: &Path,
    distill: &DistillConfig,
    sequence_length: usize,
    student: &ModelConfig,
) -> Result<(), TeacherError> {
    let (shape, storage) = hf::read_config(folder)?;
    let refused = |what, found: usize, expected: usize| {
        let (found, expected) = (found.to_string(), expected.to_string());
        Err(ImportError::Teacher { what, found, expected, path: folder.into() }.into())
    };
    if storage != Storage::Dense {
        return Err(ImportError::QuantizedTeacher(folder.into()).into());
    }
    if shape.vocab_size != student.vocab_size {
        return refused("vocabulary", shape.vocab_size, student.vocab_size);
    }
    if shape.max_position_embeddings < sequence_length {
        return refused("context (data.sequence_length)", shape.max_position_embeddings, sequence_length);
    }
    let heads = distill.relation_heads.unwrap_or(student.num_key_value_heads);
    for width in [student, &shape].into_iter().flat_map(|m| [m.attention_width(), m.kv_width()]) {
        if distill.relations > 0.0 && !width.is_multiple_of(heads) {
            return refused("width that distill.relation_heads must divide", width, heads);
        }
    }
    Ok(())
}

impl Teacher {
    /// Reads the model in a folder, to teach a student of this shape.
    ///
    /// # Errors
    /// As [`check`]; the weights are refused.
    ///
    /// # Panics
    /// If the student has no layer `distill.relation_layer`, which [`Config::validate`](crate::config::Config::validate)
    /// refuses.
    pub fn load(
        folder: &Path,
        distill: &DistillConfig,
        sequence_length: usize,
        student: &ModelConfig,
    ) -> Result<Self, TeacherError> {
        check(folder, distill, sequence_length, student)?;
        let model = import::read(folder)?;
        let shape = &model.shape;
        let heads = distill.relation_heads.unwrap_or(student.num_key_value_heads);
        let relations = (distill.relations > 0.0).then(|| {
            let layer = distill.relation_layer.unwrap_or(student.num_hidden_layers.saturating_sub(2));
            let from_end = student.num_hidden_layers - layer;
            KeptRelations {
                heads,
                temperature: distill.relation_temperature as f32,
                layers: [layer, shape.num_hidden_layers.saturating_sub(from_end)],
                qkv: Default::default(),
            }
        });
        let decoder = Decoder::new(shape.clone(), sequence_length, true);
        Ok(Self { decoder, relations, model })
    }

    /// Reads a batch.
    ///
    /// # Errors
    /// No kernel can run.
    pub fn read(&mut self, batch: &Batch) -> Result<(), TeacherError> {
        let Self { model, decoder, relations } = self;
        let values = model.parameters.values()?;
        let weights = StepWeights::new(&model.shape, &values, Shares::FULL)?;
        decoder.read(&weights, batch, |at, saved| {
            if let Some(relations) = relations.as_mut().filter(|relations| relations.layers[1] == at) {
                for (kept, rows) in relations.qkv.iter_mut().zip(saved.qkv()) {
                    kept.clear();
                    kept.extend_from_slice(rows);
                }
            }
        })?;
        Ok(())
    }

    /// What the student is to learn from the last batch; `values` are [`Teacher::values`].
    pub fn lesson<'a>(&'a self, distill: &DistillConfig, values: &'a Values<'a>) -> Lesson<'a> {
        let logits = (distill.logits > 0.0).then(|| training::Teacher {
            hidden: self.decoder.hidden(),
            head: values.get(head_name(&self.model.shape)),
            temperature: distill.temperature as f32,
            coefficient: distill.logits as f32,
        });
        let relations = self.relations.as_ref().map(|relations| RelationLesson {
            layer: relations.layers[0],
            heads: relations.heads,
            temperature: relations.temperature,
            teacher: relations.qkv.each_ref().map(Vec::as_slice),
            coefficient: distill.relations as f32,
        });
        Lesson { cross_entropy: distill.cross_entropy as f32, logits, relations }
    }

    /// The values that [`Teacher::lesson`] refers to.
    ///
    /// # Errors
    /// candle cannot read a tensor.
    pub fn values(&self) -> candle_core::Result<Values<'_>> {
        self.model.parameters.values()
    }
}
