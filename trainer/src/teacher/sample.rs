//! Text that a teacher writes, for those who have none to train on.
use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bitlinear::pool;
use infer::checkpoint::hf;
use infer::generate::{GenerateOptions, generate};
use infer::model::KvPrecision;
use infer::sampler::SamplingOptions;

use super::TeacherError;
use crate::config::DataConfig;
use crate::progress::Progress;
use crate::run_dir::{FileError, write_atomic};

/// Part of every name: to be raised when the same teacher would write something else.
const FORMAT: &str = "teacher's text 2";
/// Documents in a file. Files that are there already are not written again, so sampling that was stopped goes on.
const DOCUMENTS: u64 = 256;
/// Longest document, in tokens.
const MAX_DOCUMENT: usize = 1024;

/// Token files with at least `data.teacher_tokens` tokens that the model in `folder` wrote, made where they are missing.
///
/// Each document starts with the model's first token and is sampled at `data.teacher_temperature` until the model ends it or
/// its context is full. Document `i` depends on the seed and `i` alone.
///
/// # Errors
/// The model cannot be read or run, or names no token that starts a text; a file cannot be written.
pub fn write_text(folder: &Path, data: &DataConfig) -> Result<Vec<PathBuf>, TeacherError> {
    let (config, _) = hf::read_config(folder)?;
    let first = config.bos_token_id.or_else(|| config.eos_token_ids.first().copied());
    let first = first.ok_or_else(|| TeacherError::NoFirstToken(folder.into()))?;
    let name = name(folder, data)?;
    let wide = config.vocab_size > 1 << 16;
    let options = |document: u64| GenerateOptions {
        max_new_tokens: Some(config.max_position_embeddings.min(MAX_DOCUMENT) - 1),
        sampling: SamplingOptions {
            temperature: data.teacher_temperature as f32,
            top_k: 0,
            top_p: 1.0,
            // An odd factor: different seeds stay so, and far apart.
            seed: data.teacher_seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(document),
        },
        kv: KvPrecision::F32,
        stop_ids: config.eos_token_ids.iter().copied().chain([first]).collect(),
    };
    let mut progress = Progress::new("writing text", 0, data.teacher_tokens as u64);
    let (mut files, mut tokens) = (Vec::new(), 0);
    // Read only if there is something to write.
    let mut model = None;
    while tokens < data.teacher_tokens as u64 {
        let part = files.len() as u64;
        let path = data.cache_dir.join(format!("{name}-{part}.{}", if wide { "u32" } else { "u16" }));
        if !path.exists() {
            let model = match &model {
                Some(model) => model,
                None => model.insert(hf::read(folder)?),
            };
            // A document a task: within one, products run in the task's own thread.
            let documents = pool::map(part * DOCUMENTS..(part + 1) * DOCUMENTS, |_, document| {
                let generation =
                    generate(model, &[first], &options(document), &mut |_| ControlFlow::Continue(()))?;
                Ok([vec![first], generation.tokens].concat())
            });
            let ids = documents.into_iter().collect::<Result<Vec<_>, TeacherError>>()?.concat();
            let bytes: Vec<u8> = match wide {
                true => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
                false => ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect(),
            };
            std::fs::create_dir_all(&data.cache_dir).map_err(FileError::at("make", &data.cache_dir))?;
            write_atomic(&path, &bytes)?;
        }
        let bytes = path.metadata().map_err(FileError::at("read", &path))?.len();
        tokens += bytes / if wide { 4 } else { 2 };
        files.push(path);
        progress.update(tokens.min(data.teacher_tokens as u64), "tokens", false);
    }
    progress.finish();
    Ok(files)
}

/// A name for the text of this model with these settings.
fn name(folder: &Path, data: &DataConfig) -> Result<String, TeacherError> {
    let list = std::fs::read_dir(folder).map_err(FileError::at("list", folder))?;
    let mut paths: Vec<_> = list.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "safetensors" || end == "json"));
    paths.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    hasher.update(FORMAT.as_bytes());
    hasher.update(&data.teacher_seed.to_le_bytes()).update(&data.teacher_temperature.to_le_bytes());
    for path in paths {
        let failed = FileError::at("read", &path);
        hasher.update_reader(File::open(&path).map_err(&failed)?).map_err(&failed)?;
    }
    Ok(format!("teacher-{}", &hasher.finalize().to_hex()[..32]))
}
