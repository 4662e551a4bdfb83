//! One run: what it owns, and its loop.
use std::path::Path;
use std::time::Instant;

use infer::bench::peak_memory;
use infer::config::ModelConfig;
use infer::sampler::SamplingOptions;

use super::calibrate::calibrate;
use super::codes::Codes;
use super::learner::{Learner, Step, adamw};
use super::state::{Best, TrainState};
use super::{Outcome, Resume, TrainError};
use crate::checkpoint::{Checkpoint, CheckpointStore, Part};
use crate::config::{Config, DataSource, SubNormStart};
use crate::corpus::Grammar;
use crate::data::chat::ChatSettings;
use crate::data::{self, DataSettings, Dataset, Source, TokenizerChoice};
use crate::import;
use crate::interrupt::Interrupt;
use crate::metrics::{EvalRecord, Record, TrainRecord, bits_per_byte};
use crate::model::Model;
use crate::optimizer::AdamW;
use crate::parameters::Parameters;
use crate::progress::Progress;
use crate::run_dir::{MetricsLog, RunDir, write_atomic};
use crate::teacher::{self, Teacher};
use crate::{runtime, schedule};

/// Latent weights.
pub(crate) const MODEL: &str = "model.safetensors";
/// Both moments of each.
const OPTIMIZER: &str = "optimizer.safetensors";
/// Ternary codes at the last evaluation, against which flips are counted.
const CODES: &str = "codes.safetensors";

/// A run in memory, its folder locked.
pub struct Session {
    config: Config,
    dir: RunDir,
    store: CheckpointStore,
    dataset: Dataset,
    learner: Learner,
    state: TrainState,
    metrics: MetricsLog,
    /// Codes at the last evaluation.
    codes: Codes,
    progress: Progress,
}

/// Reads and tokenizes the data that a config names, with progress on standard error.
///
/// # Errors
/// The data cannot be used.
pub fn prepare_data(config: &Config) -> Result<Dataset, TrainError> {
    let progress = std::cell::RefCell::new(None);
    let show = |what, unit| {
        let progress = &progress;
        move |done, total| {
            let mut progress = progress.borrow_mut();
            progress.get_or_insert_with(|| Progress::new(what, 0, total)).update(done, unit, false);
        }
    };
    let dataset = match (config.data.source, &config.init.from) {
        (DataSource::Chat, Some(folder)) => {
            let settings = chat_settings(config, Path::new(folder));
            data::chat::prepare_chat(&settings, &show("tokenizing", "conversations"))?
        }
        _ => data::prepare(&text_settings(config)?, &show("tokenizing", "bytes"))?,
    };
    if let Some(progress) = progress.into_inner() {
        progress.finish();
    }
    for warning in &dataset.warnings {
        eprintln!("warning: {warning}");
    }
    Ok(dataset)
}

/// Refuses a shape, or a teacher, that no data goes with: before the time that data takes.
///
/// # Errors
/// The model's config or the teacher's is refused, or the two do not go together.
pub fn check_models(config: &Config) -> Result<(), TrainError> {
    let Some(vocab_size) = config.model.vocab_size.or(config.tokenizer.vocab_size) else { return Ok(()) };
    let shape = runtime::model_config(config, vocab_size, None).map_err(runtime::RuntimeError::from)?;
    match import::teacher_folder(config) {
        Some(folder) => Ok(teacher::check(folder, &config.distill, config.data.sequence_length, &shape)?),
        None => Ok(()),
    }
}

fn chat_settings(config: &Config, folder: &Path) -> ChatSettings {
    let data = &config.data;
    ChatSettings {
        train: data.train.clone(),
        validation: data.validation.clone(),
        validation_fraction: data.validation_fraction,
        folder: folder.into(),
        vocab_size: config.model.vocab_size,
        sequence_length: data.sequence_length,
        seed: config.run.seed,
        now: None,
    }
}

fn text_settings(config: &Config) -> Result<DataSettings, TrainError> {
    let data = &config.data;
    let train = match data.source {
        DataSource::Stories => {
            Source::Documents(Grammar::embedded().stories(data.stories_seed, data.stories_bytes))
        }
        DataSource::Files | DataSource::Chat => Source::Paths(data.train.clone()),
        DataSource::Teacher => match import::teacher_folder(config) {
            Some(folder) => Source::Paths(teacher::write_text(folder, data)?),
            None => Source::Paths(Vec::new()),
        },
    };
    let only_tokens =
        matches!(&train, Source::Paths(paths) if paths.iter().all(|path| data::is_token_file(path)));
    let tokenizer = match &config.tokenizer.file {
        Some(path) => TokenizerChoice::File {
            path: path.clone(),
            vocab_size: config.model.vocab_size.or(config.tokenizer.vocab_size),
        },
        None if only_tokens => {
            let size = config.model.vocab_size.or(config.tokenizer.vocab_size);
            TokenizerChoice::None { vocab_size: size.unwrap_or(config.tokenizer.trained_size()) }
        }
        None => TokenizerChoice::Train { vocab_size: config.tokenizer.trained_size() },
    };
    Ok(DataSettings {
        train,
        validation: (!data.validation.is_empty()).then(|| Source::Paths(data.validation.clone())),
        validation_fraction: data.validation_fraction,
        text_field: data.text_field.clone(),
        document_split: data.document_split,
        tokenizer,
        separator: data.separator.clone(),
        sequence_length: data.sequence_length,
        cache_dir: data.cache_dir.clone(),
    })
}

impl Session {
    /// Starts a run, or goes on with the one in the config's folder.
    ///
    /// # Errors
    /// The folder is in use, its run has other settings or data, or no checkpoint of it is whole.
    pub fn open(config: &Config, dataset: Dataset, resume: &Resume) -> Result<Self, TrainError> {
        let dir = match resume {
            Resume::Never => RunDir::create(&config.run.out)?,
            Resume::Auto => RunDir::open_or_create(&config.run.out)?,
            Resume::From(path) => RunDir::open(path)?,
        };
        let paths = dir.paths().clone();
        let shape = runtime::model_config(config, dataset.vocab_size, dataset.separator)
            .map_err(runtime::RuntimeError::from)?;
        let store = CheckpointStore::new(paths.checkpoints());
        store.remove_leftovers()?;
        let checkpoint = if paths.is_run() {
            require_same_config(config, &paths.config())?;
            latest(&store)?
        } else {
            None
        };
        let adamw = adamw(config);
        let (parameters, optimizer, codes, state) = match &checkpoint {
            Some(checkpoint) => {
                let state: TrainState = checkpoint.state()?;
                state.require_same_data(&dataset, paths.root())?;
                let parameters = Parameters::from_safetensors(&shape, &checkpoint.read(MODEL)?)?;
                let moments = checkpoint.read(OPTIMIZER)?;
                let optimizer = AdamW::from_safetensors(adamw, state.updates, &parameters, &moments)?;
                let codes = Codes::from_safetensors(&checkpoint.read(CODES)?)?;
                (parameters, optimizer, codes, state)
            }
            None => {
                let parameters = first_parameters(config, &shape, &dataset)?;
                let optimizer = AdamW::new(adamw, &parameters);
                let codes = Codes::of(&parameters)?;
                (parameters, optimizer, codes, TrainState::new(config.run.seed, &dataset))
            }
        };
        // One that only writes text is not needed any more.
        let teacher = match import::teacher_folder(config).filter(|_| config.distill.teaches()) {
            Some(folder) => {
                Some(Teacher::load(folder, &config.distill, config.data.sequence_length, &shape)?)
            }
            None => None,
        };
        // Only now that the earlier run, if there is one, is known to be this one, and nothing can be refused any more: a
        // config that is written binds the folder to it.
        if let Some(json) = &dataset.tokenizer_json {
            write_atomic(&paths.tokenizer(), json)?;
        }
        write_atomic(&paths.config(), config.to_toml()?.as_bytes())?;
        let (metrics, _) = MetricsLog::resume(&paths.metrics(), state.step)?;
        let learner = Learner::new(config, shape, parameters, optimizer, teacher);
        let progress = Progress::new("training", state.step, config.train.steps);
        let config = config.clone();
        Ok(Self { config, dir, store, dataset, learner, state, metrics, codes, progress })
    }

    /// The data, once the run is over.
    pub fn into_dataset(self) -> Dataset {
        self.dataset
    }

    /// The loop: schedule, micro-steps, clip, update, log, evaluate, checkpoint, sample.
    ///
    /// # Errors
    /// The loss is not finite for too long, a file cannot be written; the last checkpoint stays whole.
    pub fn run(&mut self, interrupt: &Interrupt) -> Result<Outcome, TrainError> {
        let steps = self.config.train.steps;
        // A run that was killed between a checkpoint and the sample of the same step makes that up.
        if self.state.step > 0 && self.due(self.config.sample.every) && !self.sample_path().exists() {
            self.sample()?;
        }
        while self.state.step < steps {
            let start = Instant::now();
            let step = self.step()?;
            self.log(&step, start)?;
            self.guard(&step)?;
            let improved = self.due(self.config.eval.every) && self.evaluate()?;
            let stop = interrupt.requested();
            let best = improved && self.config.checkpoint.keep_best;
            if best || stop.is_some() || self.due(self.config.checkpoint.every) {
                self.save()?;
            }
            if self.due(self.config.sample.every) {
                self.sample()?;
            }
            if let Some(signal) = stop.filter(|_| self.state.step < steps) {
                self.progress.finish();
                eprintln!("stopped at step {}; the same command goes on from there", self.state.step);
                return Ok(Outcome::Interrupted(signal));
            }
        }
        self.progress.finish();
        Ok(Outcome::Finished)
    }

    /// One optimizer step on the next batches.
    fn step(&mut self) -> Result<Step, TrainError> {
        let Self { config, learner, dataset, state, .. } = self;
        let at = state.step;
        state.step += 1;
        let mut batches: Vec<_> = (0..config.train.gradient_accumulation)
            .map(|_| {
                let chosen = state.sampler.next_batch(dataset.train.count(), config.train.batch_size);
                dataset.train.batch(&chosen)
            })
            .collect();
        config.train.reduction.scale(&mut batches);
        let step = learner.step(config, at, &batches)?;
        state.updates = learner.optimizer.updates();
        Ok(step)
    }

    /// Writes the step's metrics and moves the bar.
    fn log(&mut self, step: &Step, start: Instant) -> Result<(), TrainError> {
        let (config, done) = (&self.config, self.state.step);
        let tokens = config.tokens_per_step() as u64;
        let tokens_per_second = tokens as f64 / start.elapsed().as_secs_f64();
        let due = done.is_multiple_of(config.train.log_every) || done == config.train.steps || done == 1;
        let distill = self.learner.teaches();
        let divergence =
            if distill { format!(" | divergence {:.4}", step.loss.divergence) } else { String::new() };
        let message =
            format!("loss {:.4}{divergence} | {tokens_per_second:.0} tokens/s", step.loss.cross_entropy);
        self.progress.update(done, &message, due);
        if !step.updated {
            let (loss, grad_norm) = (step.loss.total.to_string(), step.grad_norm.to_string());
            self.progress
                .say(&format!("warning: step {done} skipped: loss {loss}, gradient norm {grad_norm}"));
            self.metrics.append(&Record::Skipped { step: done, loss, grad_norm })?;
        } else if due {
            let train = &self.dataset.train;
            self.metrics.append(&Record::Train(TrainRecord {
                step: done,
                tokens: done * tokens,
                epoch: self.state.sampler.epoch(train.count()),
                loss: step.loss.cross_entropy,
                divergence: distill.then_some(step.loss.divergence),
                relations: (config.distill.relations > 0.0 && distill).then_some(step.loss.relations),
                bits_per_byte: bits_per_byte(
                    step.loss.cross_entropy,
                    train.tokens(),
                    self.dataset.train_bytes,
                ),
                learning_rate: schedule::learning_rate(config, done - 1),
                weight_decay: schedule::weight_decay(config, done - 1),
                lambda: schedule::lambda(config, done - 1),
                grad_norm: step.grad_norm,
                skipped: self.state.skipped,
                tokens_per_second,
                peak_memory_bytes: peak_memory(),
            }))?;
        }
        Ok(())
    }

    /// Counts skipped steps and stops after too many in a row.
    fn guard(&mut self, step: &Step) -> Result<(), TrainError> {
        if step.updated {
            self.state.skipped_in_a_row = 0;
            return Ok(());
        }
        self.state.skipped += 1;
        self.state.skipped_in_a_row += 1;
        if self.state.skipped_in_a_row >= self.config.train.max_skipped_steps {
            self.progress.finish();
            return Err(TrainError::Diverged {
                step: self.state.step,
                in_a_row: self.state.skipped_in_a_row,
                loss: step.loss.total,
                norm: step.grad_norm,
            });
        }
        Ok(())
    }

    /// Whether something that happens `every` so many steps (0 = only at the end) happens now.
    fn due(&self, every: u64) -> bool {
        self.state.step == self.config.train.steps || every > 0 && self.state.step.is_multiple_of(every)
    }

    /// Validation loss, fully quantized; returns whether it is the best so far.
    fn evaluate(&mut self) -> Result<bool, TrainError> {
        let windows = self.dataset.validation.evaluation(self.config.eval.windows as u64);
        let loss = validation_loss(
            &self.learner.model,
            &self.learner.parameters,
            &self.dataset.validation,
            &windows,
            self.config.eval.batch_size,
        )?;
        let codes = Codes::of(&self.learner.parameters)?;
        let quantized = self.learner.model.config().quantized;
        let validation = &self.dataset.validation;
        let bpb = bits_per_byte(loss, validation.tokens(), self.dataset.validation_bytes);
        let step = self.state.step;
        self.metrics.append(&Record::Eval(EvalRecord {
            step,
            loss,
            perplexity: loss.exp(),
            bits_per_byte: bpb,
            tokens: (windows.len() * validation.sequence_length()) as u64,
            layers: if quantized { codes.shares(&self.codes) } else { Default::default() },
        }))?;
        self.codes = codes;
        let improved = loss.is_finite() && self.state.best.is_none_or(|best| loss < best.loss);
        if improved {
            self.state.best = Some(Best { step, loss });
        }
        let bits = bpb.map(|bpb| format!(", {bpb:.4} bits per byte")).unwrap_or_default();
        let mark = if improved { " (best)" } else { "" };
        self.progress.say(&format!("step {step}: validation loss {loss:.4}{bits}{mark}"));
        Ok(improved)
    }

    /// Writes a checkpoint of this step and removes those that are not to be kept.
    fn save(&mut self) -> Result<(), TrainError> {
        self.metrics.sync()?;
        let values = self.learner.parameters.values()?;
        let model = self.learner.parameters.iter();
        let model = model.map(|(name, p)| (name.to_owned(), p.value.dims(), values.get(name)));
        let moments = self.learner.optimizer.state(&self.learner.parameters);
        let codes = self.codes.to_safetensors()?;
        let parts = vec![
            Part::tensors(MODEL, model.collect()),
            Part::tensors(OPTIMIZER, moments),
            Part::from_bytes(CODES, &codes),
        ];
        self.store.save(self.state.step, &self.config.to_toml()?, &self.state, parts)?;
        let best = self.state.best.filter(|_| self.config.checkpoint.keep_best).map(|best| best.step);
        self.store.prune(self.config.checkpoint.keep, best)?;
        Ok(())
    }

    /// Where the sample of this step is.
    fn sample_path(&self) -> std::path::PathBuf {
        self.dir.paths().samples().join(format!("step-{:08}.txt", self.state.step))
    }

    /// Generates text from each prompt into `samples/`.
    fn sample(&mut self) -> Result<(), TrainError> {
        let Some(tokenizer) = &self.dataset.tokenizer else { return Ok(()) };
        let sample = &self.config.sample;
        let model = runtime::runnable(self.learner.model.config(), &self.learner.parameters)?;
        let mut text = String::new();
        for (number, prompt) in sample.prompts.iter().enumerate() {
            let sampling = SamplingOptions {
                temperature: sample.temperature as f32,
                top_k: sample.top_k,
                top_p: sample.top_p as f32,
                seed: self.config.run.seed ^ (self.state.step << 16) ^ number as u64,
            };
            match runtime::continue_text(&model, tokenizer, prompt, Some(sample.tokens), sampling) {
                Ok(continued) => text.push_str(&format!("{prompt}{continued}\n\n")),
                // A prompt that does not fit is no reason to lose a run.
                Err(error) => self.progress.say(&format!("warning: no sample for prompt {number}: {error}")),
            }
        }
        write_atomic(&self.sample_path(), text.as_bytes())?;
        self.progress.say(&format!("sample at step {}: {}", self.state.step, text.trim()));
        Ok(())
    }
}

/// What a run starts with: fresh parameters, or those of `init.from`.
fn first_parameters(
    config: &Config,
    shape: &ModelConfig,
    dataset: &Dataset,
) -> Result<Parameters, TrainError> {
    let Some(folder) = &config.init.from else {
        return Ok(Parameters::init(shape, config.model.initializer_range, config.run.seed)?);
    };
    let imported = import::read(Path::new(folder))?;
    let parameters = import::start(shape, &imported)?;
    if shape.sub_norm && !imported.shape.sub_norm && config.init.sub_norm != SubNormStart::One {
        calibrate(shape, &parameters, &dataset.train)?;
    }
    Ok(parameters)
}

/// Mean loss, in nats a learnt token, over some rows, fully quantized; NaN if none is learnt.
///
/// # Errors
/// candle fails.
pub fn validation_loss(
    model: &Model,
    parameters: &Parameters,
    rows: &data::Rows,
    chosen: &[u64],
    batch_size: usize,
) -> Result<f64, TrainError> {
    let (mut sum, mut count) = (0.0, 0.0);
    for chosen in chosen.chunks(batch_size) {
        let batch = rows.batch(chosen);
        let losses = model.losses(parameters, &batch)?;
        let weight = |token: usize| batch.weights.as_ref().map_or(1.0, |weights| f64::from(weights[token]));
        sum += losses.iter().enumerate().map(|(token, loss)| weight(token) * f64::from(*loss)).sum::<f64>();
        count += (0..losses.len()).map(weight).sum::<f64>();
    }
    Ok(sum / count)
}

/// The newest whole checkpoint; the user hears of those that were passed over.
fn latest(store: &CheckpointStore) -> Result<Option<Checkpoint>, TrainError> {
    let latest = store.latest_valid()?;
    let reasons: Vec<_> =
        latest.rejected.iter().map(|r| format!("{}: {}", r.path.display(), r.reason)).collect();
    for reason in &reasons {
        eprintln!("warning: checkpoint passed over: {reason}");
    }
    match latest.checkpoint {
        Some(checkpoint) => {
            eprintln!("resuming from {}", checkpoint.path().display());
            Ok(Some(checkpoint))
        }
        None if reasons.is_empty() => Ok(None),
        None => Err(TrainError::NoValidCheckpoint {
            path: store.path_of(0).parent().unwrap_or(Path::new("")).into(),
            reasons: reasons.join("; "),
        }),
    }
}

/// Settings that may differ when a run goes on: they change neither weights nor the order of data.
const FREE: [&str; 12] = [
    "run.name",
    "run.out",
    "run.threads",
    "run.export",
    "data.train",
    "data.validation",
    "data.cache_dir",
    "tokenizer.file",
    "train.log_every",
    "train.recompute",
    "checkpoint.",
    "sample.",
];

/// Refuses to go on with a run whose config differs in more than [`FREE`] keys (paths are free: contents are hashed).
fn require_same_config(config: &Config, stored: &Path) -> Result<(), TrainError> {
    let flat = |config: &Config| -> Result<_, TrainError> {
        let mut keys = std::collections::BTreeMap::new();
        // What `to_toml` writes is TOML, so the parse cannot fail but on a fault of ours, which shows as a difference.
        let table: toml::Table = config.to_toml()?.parse().unwrap_or_default();
        for (section, values) in table {
            for (key, value) in values.as_table().into_iter().flatten() {
                keys.insert(format!("{section}.{key}"), value.to_string());
            }
        }
        Ok(keys)
    };
    let (now, then) = (flat(config)?, flat(&Config::load(stored, &[])?)?);
    let names: std::collections::BTreeSet<_> = now.keys().chain(then.keys()).collect();
    let value = |keys: &std::collections::BTreeMap<String, String>, name: &String| {
        keys.get(name).cloned().unwrap_or_else(|| "absent".into())
    };
    let changed: Vec<_> = names
        .into_iter()
        .filter(|name| {
            !FREE.iter().any(|free| *name == free || free.ends_with('.') && name.starts_with(free))
        })
        .filter(|name| now.get(*name) != then.get(*name))
        .map(|name| format!("{name} ({} then, {} now)", value(&then, name), value(&now, name)))
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let path = stored.parent().unwrap_or(stored).into();
    Err(TrainError::ConfigChanged { keys: changed.join(", "), path })
}
