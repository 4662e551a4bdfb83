//! Checks across values: ranges, divisibility, contradictions.
//!
//! The upper limits are far beyond any model a CPU can train; they keep every product of sizes within 64 bits, so that
//! the estimates of parameters and memory made from a valid config cannot overflow.

use super::{Config, ConfigError, DataSource, Precision, Quantization};
use std::{
    fmt::Debug,
    ops::{Bound, RangeBounds},
    path::{Component, Path},
};

/// Rows that one byte of a packed matrix interleaves.
const PACK_GROUP: usize = 4;
/// Largest seed TOML can hold.
const MAX_SEED: u64 = i64::MAX as u64;

impl Config {
    /// Checks every range and every rule between values.
    ///
    /// # Errors
    /// The first broken one, as [`ConfigError::OutOfRange`], [`ConfigError::NotDivisible`] or [`ConfigError::Conflict`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_settings()?;
        self.validate_model_ranges()?;
        self.validate_model_shape()?;
        self.validate_fit()
    }

    /// [`Config::validate`] without what depends on the model's shape.
    pub(super) fn validate_settings(&self) -> Result<(), ConfigError> {
        self.validate_run()?;
        // Before the model, whose context derives from the sequence length.
        self.validate_data()?;
        self.validate_tokenizer()?;
        self.validate_distillation()?;
        self.validate_training()?;
        self.validate_schedule()?;
        self.validate_reports()
    }

    /// Checks the other sections against the model's shape.
    fn validate_fit(&self) -> Result<(), ConfigError> {
        let layer = self.distill.relation_layer.unwrap_or(0);
        within("distill.relation_layer", layer, 0..self.model.num_hidden_layers)?;
        let context = ("model.max_position_embeddings", self.max_positions());
        if context.1 < self.data.sequence_length {
            let length = ("data.sequence_length", self.data.sequence_length);
            return Err(conflict(context, length, "make the context at least as long as a training window"));
        }
        if self.sample.tokens > context.1 {
            let rule = "ask for at most as many tokens as the context holds";
            return Err(conflict(("sample.tokens", self.sample.tokens), context, rule));
        }
        Ok(())
    }

    fn validate_run(&self) -> Result<(), ConfigError> {
        let run = &self.run;
        let parts: Vec<_> = Path::new(&run.name).components().collect();
        let plain = matches!(parts[..], [Component::Normal(part)] if part == run.name.as_str());
        if !plain || run.name.contains(['/', '\\']) || run.name.chars().any(char::is_control) {
            return Err(ConfigError::OutOfRange {
                key: "run.name",
                value: format!("{:?}", run.name),
                allowed: "one plain folder name, without separators".into(),
            });
        }
        within("run.seed", run.seed, 0..=MAX_SEED)?;
        run.threads.map_or(Ok(()), |threads| within("run.threads", threads, 1..=4096))
    }

    fn validate_model_ranges(&self) -> Result<(), ConfigError> {
        let model = &self.model;
        within("model.hidden_size", model.hidden_size, 1..=1 << 16)?;
        within("model.intermediate_size", model.intermediate_size, 1..=1 << 18)?;
        within("model.num_hidden_layers", model.num_hidden_layers, 1..=1024)?;
        within("model.num_attention_heads", model.num_attention_heads, 1..=1024)?;
        within("model.num_key_value_heads", model.kv_heads(), 1..=1024)?;
        within("model.vocab_size", model.vocab_size.unwrap_or(1), 1..=1 << 24)?;
        within("model.max_position_embeddings", self.max_positions(), 2..=1 << 20)?;
        within("model.rms_norm_eps", model.rms_norm_eps, 1e-12..=0.1)?;
        within("model.rope_theta", model.rope_theta, 1.0..=1e12)?;
        within("model.initializer_range", model.initializer_range, 1e-6..=1.0)?;
        within("model.head_dim", model.head_dim.unwrap_or(2), 2..=1 << 16)
    }

    fn validate_model_shape(&self) -> Result<(), ConfigError> {
        let model = &self.model;
        let (heads, kv_heads) = (model.num_attention_heads, model.kv_heads());
        if model.head_dim.is_none() {
            divides("model.hidden_size", model.hidden_size, "`model.num_attention_heads`", heads)?;
        }
        divides("model.num_attention_heads", heads, "`model.num_key_value_heads`", kv_heads)?;
        let head_dim = model.head_dim();
        if !head_dim.is_multiple_of(2) {
            // Rotary embedding turns pairs of features.
            let by = "twice `model.num_attention_heads` (heads of even width)";
            return Err(ConfigError::NotDivisible {
                key: "model.hidden_size",
                value: model.hidden_size,
                by,
                divisor: 2 * heads,
            });
        }
        if model.quantization == Quantization::Bitnet {
            let group = "the packing group of ternary rows";
            divides("model.hidden_size", model.hidden_size, group, PACK_GROUP)?;
            divides("model.intermediate_size", model.intermediate_size, group, PACK_GROUP)?;
            if !(kv_heads * head_dim).is_multiple_of(PACK_GROUP) {
                let by = "the heads that fill a packing group of 4 rows";
                return Err(ConfigError::NotDivisible {
                    key: "model.num_key_value_heads",
                    value: kv_heads,
                    by,
                    divisor: PACK_GROUP / 2,
                });
            }
        }
        Ok(())
    }

    fn validate_data(&self) -> Result<(), ConfigError> {
        let data = &self.data;
        within("data.sequence_length", data.sequence_length, 2..=1 << 20)?;
        let above_zero = (Bound::Excluded(0.0), Bound::Included(0.5));
        within("data.validation_fraction", data.validation_fraction, above_zero)?;
        within("data.stories_bytes", data.stories_bytes, 1000..=1 << 30)?;
        within("data.stories_seed", data.stories_seed, 0..=MAX_SEED)?;
        not_empty("data.text_field", &data.text_field)?;
        not_empty("data.cache_dir", &data.cache_dir.to_string_lossy())?;
        not_empty("data.separator", data.separator.as_deref().unwrap_or("absent"))?;
        let (files, stories) = (("data.source", "files"), ("data.source", "stories"));
        match data.source {
            DataSource::Files | DataSource::Chat if data.train.is_empty() => {
                let rule = "name files or folders, as in --set data.train=PATH";
                let chat = ("data.source", "chat");
                let source = if data.source == DataSource::Chat { chat } else { files };
                Err(conflict(("data.train", &data.train), source, rule))
            }
            DataSource::Chat if self.init.from.is_none() => {
                let rule = "name the model to fine-tune: it brings tokenizer and chat template";
                Err(conflict(("init.from", "absent"), ("data.source", "chat"), rule))
            }
            DataSource::Chat if self.train.precision == Precision::F32 => {
                let rule = "conversations are part of the fast step only: leave train.precision out";
                Err(conflict(("train.precision", "f32"), ("data.source", "chat"), rule))
            }
            DataSource::Stories if !data.train.is_empty() => {
                let rule = "set data.source = \"files\" to train on these paths";
                Err(conflict(("data.train", &data.train), stories, rule))
            }
            DataSource::Teacher if !data.train.is_empty() => {
                let rule = "set data.source = \"files\" to train on these paths";
                Err(conflict(("data.train", &data.train), ("data.source", "teacher"), rule))
            }
            DataSource::Stories if !data.validation.is_empty() => {
                let rule = "leave the paths out: the embedded corpus holds out its own end";
                Err(conflict(("data.validation", &data.validation), stories, rule))
            }
            _ => Ok(()),
        }
    }

    fn validate_distillation(&self) -> Result<(), ConfigError> {
        let (distill, data) = (&self.distill, &self.data);
        within("distill.cross_entropy", distill.cross_entropy, 0.0..=1e6)?;
        within("distill.logits", distill.logits, 0.0..=1e6)?;
        within("distill.temperature", distill.temperature, 0.1..=100.0)?;
        within("distill.relations", distill.relations, 0.0..=1e6)?;
        within("distill.relation_temperature", distill.relation_temperature, 0.01..=100.0)?;
        within("distill.relation_heads", distill.relation_heads.unwrap_or(1), 1..=1024)?;
        within("data.teacher_tokens", data.teacher_tokens as u64, 1000..=1 << 32)?;
        let temperatures = (Bound::Excluded(0.0), Bound::Included(100.0));
        within("data.teacher_temperature", data.teacher_temperature, temperatures)?;
        within("data.teacher_seed", data.teacher_seed, 0..=MAX_SEED)?;
        if self.init.from.as_deref() == Some("") {
            not_empty("init.from", "")?;
        }
        let teacher = ("distill.teacher", distill.teacher.as_deref().unwrap_or("absent"));
        if distill.teacher.as_deref() == Some("init") && self.init.from.is_none() {
            let rule = "name the model to start from, or a teacher of its own";
            return Err(conflict(teacher, ("init.from", "absent"), rule));
        }
        if distill.teacher.is_none() {
            if data.source == DataSource::Teacher {
                let rule = "name the teacher that is to write the text";
                return Err(conflict(teacher, ("data.source", "teacher"), rule));
            }
            return Ok(());
        }
        if self.train.precision == Precision::F32 {
            let rule = "distillation is part of the fast step only: leave train.precision out";
            return Err(conflict(("train.precision", "f32"), teacher, rule));
        }
        if distill.cross_entropy + distill.logits + distill.relations == 0.0 {
            let rule =
                "give one of distill.cross_entropy, distill.logits and distill.relations a coefficient";
            return Err(conflict(("distill.logits", distill.logits), teacher, rule));
        }
        Ok(())
    }

    fn validate_tokenizer(&self) -> Result<(), ConfigError> {
        let tokenizer = &self.tokenizer;
        if let Some(file) = &tokenizer.file {
            not_empty("tokenizer.file", &file.to_string_lossy())?;
        }
        if let Some(size) = tokenizer.vocab_size {
            // A byte-level vocabulary starts with the 256 bytes and an end-of-text token.
            let least = if tokenizer.file.is_none() { 257 } else { 1 };
            within("tokenizer.vocab_size", size, least..=1 << 24)?;
        }
        match (self.model.vocab_size, tokenizer.vocab_size) {
            (Some(model), Some(size)) if model != size => Err(conflict(
                ("model.vocab_size", model),
                ("tokenizer.vocab_size", size),
                "give one of the two, the other follows",
            )),
            _ => Ok(()),
        }
    }

    fn validate_training(&self) -> Result<(), ConfigError> {
        let (train, optimizer) = (&self.train, &self.optimizer);
        within("train.steps", train.steps, 1..=1_000_000_000)?;
        within("train.batch_size", train.batch_size, 1..=1 << 16)?;
        within("train.gradient_accumulation", train.gradient_accumulation, 1..=1 << 16)?;
        within("train.gradient_clip", train.gradient_clip, 0.0..=1e9)?;
        within("train.log_every", train.log_every, 1..=1_000_000_000)?;
        within("train.max_skipped_steps", train.max_skipped_steps, 1..=1_000_000)?;
        within("optimizer.learning_rate", optimizer.learning_rate, 1e-12..=10.0)?;
        within("optimizer.beta1", optimizer.beta1, 0.0..1.0)?;
        within("optimizer.beta2", optimizer.beta2, 0.0..1.0)?;
        within("optimizer.eps", optimizer.eps, 1e-30..=1.0)?;
        within("optimizer.weight_decay", optimizer.weight_decay, 0.0..=10.0)
    }

    fn validate_schedule(&self) -> Result<(), ConfigError> {
        let (schedule, steps) = (&self.schedule, self.train.steps);
        let share = (Bound::Excluded(0.0), Bound::Included(1.0));
        let inside = (Bound::Excluded(0.0), Bound::Excluded(1.0));
        within("schedule.warmup_steps", schedule.warmup_steps, 0..=1_000_000_000)?;
        within("schedule.final_fraction", schedule.final_fraction, 0.0..=1.0)?;
        within("schedule.stage_two_start", schedule.stage_two_start, inside)?;
        within("schedule.stage_two_learning_rate", schedule.stage_two_learning_rate, share)?;
        within("schedule.stage_two_weight_decay", schedule.stage_two_weight_decay, 0.0..=10.0)?;
        within("quantization.warmup_fraction", self.quantization.warmup_fraction, share)?;
        if schedule.warmup_steps > steps {
            return Err(conflict(
                ("schedule.warmup_steps", schedule.warmup_steps),
                ("train.steps", steps),
                "set both, and warm up for at most as many steps as there are",
            ));
        }
        Ok(())
    }

    fn validate_reports(&self) -> Result<(), ConfigError> {
        let (eval, checkpoint, sample) = (&self.eval, &self.checkpoint, &self.sample);
        within("eval.every", eval.every, 0..=1_000_000_000)?;
        within("eval.windows", eval.windows, 0..=1 << 40)?;
        within("eval.batch_size", eval.batch_size, 1..=1 << 16)?;
        within("checkpoint.every", checkpoint.every, 0..=1_000_000_000)?;
        within("checkpoint.keep", checkpoint.keep, 1..=1_000_000)?;
        within("sample.every", sample.every, 0..=1_000_000_000)?;
        within("sample.tokens", sample.tokens, 1..=1 << 20)?;
        within("sample.temperature", sample.temperature, 0.0..=100.0)?;
        within("sample.top_k", sample.top_k, 0..=1 << 24)?;
        within("sample.top_p", sample.top_p, (Bound::Excluded(0.0), Bound::Included(1.0)))
    }
}

/// Refuses a value outside of `range`; NaN is outside of every range.
fn within<T>(key: &'static str, value: T, range: impl RangeBounds<T>) -> Result<(), ConfigError>
where
    T: PartialOrd + Debug,
{
    if range.contains(&value) {
        return Ok(());
    }
    let low = match range.start_bound() {
        Bound::Included(low) => format!("at least {low:?}"),
        Bound::Excluded(low) => format!("more than {low:?}"),
        Bound::Unbounded => "any number".into(),
    };
    let high = match range.end_bound() {
        Bound::Included(high) => format!(" and at most {high:?}"),
        Bound::Excluded(high) => format!(" and less than {high:?}"),
        Bound::Unbounded => String::new(),
    };
    Err(ConfigError::OutOfRange { key, value: format!("{value:?}"), allowed: low + &high })
}

/// Refuses a `value` that `divisor` does not divide.
fn divides(key: &'static str, value: usize, by: &'static str, divisor: usize) -> Result<(), ConfigError> {
    match value.is_multiple_of(divisor) {
        true => Ok(()),
        false => Err(ConfigError::NotDivisible { key, value, by, divisor }),
    }
}

/// Refuses an empty text.
fn not_empty(key: &'static str, text: &str) -> Result<(), ConfigError> {
    match text.is_empty() {
        true => Err(ConfigError::OutOfRange {
            key,
            value: "\"\"".into(),
            allowed: "a text that is not empty".into(),
        }),
        false => Ok(()),
    }
}

/// The error for two values that contradict each other.
fn conflict(
    (key, value): (&'static str, impl Debug),
    (other, other_value): (&'static str, impl Debug),
    rule: &'static str,
) -> ConfigError {
    let (value, other_value) = (format!("{value:?}"), format!("{other_value:?}"));
    ConfigError::Conflict { key, value, other, other_value, rule }
}
