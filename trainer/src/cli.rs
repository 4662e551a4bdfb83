//! The command line of `trainer`: results on standard output, progress and logs on standard error; exit status 0 done,
//! 1 the user's mistake, 2 ours, 130 and 143 after a signal.
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::json;

use crate::choices::{self, ChoicesReport};
use crate::config::{Config, DataSource, Precision, TokenizerConfig};
use crate::data::{self, DataSettings, Dataset, DocumentSplit, Source, TokenizerChoice};
use crate::export::{self, ExportError, Which};
use crate::import;
use crate::interrupt::Interrupt;
use crate::memory::Estimate;
use crate::progress::Progress;
use crate::report::Report;
use crate::run_dir::{RunPaths, write_atomic};
use crate::runtime::{RuntimeError, runnable};
use crate::train::{Outcome, Resume, Session, TrainError, check_models, prepare_data};
use crate::{metrics, stories};

/// Trains BitNet b1.58 models and exports them, proven.
#[derive(Debug, Parser)]
#[command(name = "trainer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train the model that a config describes, then export it
    Train(TrainArgs),
    /// Loss, perplexity and bits a byte of a model or a run on some text, or how many choices it gets right
    Eval(EvalArgs),
    /// Write a run's model in Hugging Face's layout and prove that it runs as trained
    Export(ExportArgs),
    /// Shapes, scales and the share of -1, 0 and +1 in each projection of a model or a run
    Inspect(InspectArgs),
    /// Train a byte-level BPE tokenizer on some text
    Tokenizer(TokenizerArgs),
    /// Measure the speed of training a config's shape, on random tokens
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// The config, a TOML file
    config: PathBuf,
    /// Change a setting, for example --set train.steps=1000; can be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The run's folder, instead of the config's run.out
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on with an earlier run: auto (if there is one), never, or a run's folder
    #[arg(long, default_value = "auto", value_name = "auto|never|DIR")]
    resume: String,
    /// Check config and data, print what would be trained, and stop
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// A run's folder, or an exported model's
    model: PathBuf,
    /// A .txt, .jsonl, .u16 or .u32 file, or a folder of text
    #[arg(long, required_unless_present = "choices")]
    data: Option<PathBuf>,
    /// Multiple-choice questions, a .jsonl file of objects with query, choices and gold
    #[arg(long, value_name = "FILE")]
    choices: Option<PathBuf>,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct ExportArgs {
    /// The run's folder
    run: PathBuf,
    /// The model's new folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The layout
    #[arg(long, value_enum, default_value_t = Format::Hf)]
    format: Format,
    /// Which checkpoint: best, latest, or a step
    #[arg(long, default_value = "best", value_name = "best|latest|STEP")]
    step: String,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Hugging Face: safetensors and config.json
    Hf,
}

#[derive(Debug, Args)]
struct InspectArgs {
    /// A run's folder, or an exported model's
    model: PathBuf,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct TokenizerArgs {
    /// Text: .txt or .jsonl files, or folders
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// Entries of the vocabulary
    #[arg(long, default_value_t = TokenizerConfig::default().trained_size())]
    vocab_size: usize,
    /// The tokenizer.json to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// The config, a TOML file
    config: PathBuf,
    /// Change a setting, for example --set train.batch_size=4; can be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Steps that are measured
    #[arg(long, default_value_t = 8)]
    repetitions: usize,
    /// One JSON object on standard output
    #[arg(long)]
    json: bool,
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = u8::from(error.use_stderr());
            // Nobody to tell if even this cannot be written.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let run = move || match cli.command {
        Command::Train(args) => train(&args),
        Command::Eval(args) => eval(&args).map(|()| ExitCode::SUCCESS),
        Command::Export(args) => export(&args).map(|()| ExitCode::SUCCESS),
        Command::Inspect(args) => inspect(&args).map(|()| ExitCode::SUCCESS),
        Command::Tokenizer(args) => tokenizer(&args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench(&args).map(|()| ExitCode::SUCCESS),
    };
    // A panic has told its message already; it is a fault of ours.
    let Ok(done) = std::panic::catch_unwind(run) else { return ExitCode::from(2) };
    done.unwrap_or_else(|error| {
        if is_broken_pipe(&error) {
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {}", message(&error));
        ExitCode::from(if is_ours(&error) { 2 } else { 1 })
    })
}

/// An error and its causes on one line, but for a cause that what is before it quotes.
fn message(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        text if text.contains(&cause) => text.into(),
        text => format!("{text}: {cause}"),
    })
}

/// Whether a reader of our standard output went away, which is its right.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(broken))
}

/// Whether a failure is no mistake of the user's.
fn is_ours(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause.is::<candle_core::Error>()
            || matches!(
                cause.downcast_ref(),
                Some(TrainError::Candle(_) | TrainError::Runtime(RuntimeError::Candle(_)))
            )
            || matches!(cause.downcast_ref(), Some(ExportError::Disagrees { .. }))
    })
}

/// Prints a result.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

fn train(args: &TrainArgs) -> anyhow::Result<ExitCode> {
    let resume = match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        folder => Resume::From(folder.into()),
    };
    let mut config = Config::load(&args.config, &args.sets)?;
    config.run.out = match (&args.out, &resume) {
        (Some(out), Resume::From(folder)) if out != folder => bail!(
            "--out {} and --resume {} name two folders; command line; give one of them",
            out.display(),
            folder.display()
        ),
        (Some(folder), _) | (None, Resume::From(folder)) => folder.clone(),
        (None, Resume::Auto | Resume::Never) => config.run.out,
    };
    use_threads(config.run.threads)?;
    import::complete(&mut config)?;
    check_models(&config)?;
    let dataset = prepare_data(&config)?;
    describe(&config, &dataset)?;
    if args.dry_run {
        return Ok(ExitCode::SUCCESS);
    }
    let interrupt = Interrupt::install().map_err(TrainError::from)?;
    let mut session = Session::open(&config, dataset, &resume)?;
    if let Outcome::Interrupted(signal) = session.run(&interrupt)? {
        return Ok(ExitCode::from(signal.exit_code()));
    }
    let dataset = session.into_dataset();
    if config.run.export {
        finish(&config, &dataset)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Uses this many threads, one a core if none are named.
fn use_threads(threads: Option<usize>) -> anyhow::Result<()> {
    let refused = "the thread pool cannot be started; run.threads; try fewer";
    rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).build_global().context(refused)?;
    // The runtime that samples and proves has a pool of its own.
    bitlinear::pool::Pool::set_global(rayon::current_num_threads()).context(refused)?;
    Ok(())
}

/// Says on standard error what is about to be trained.
fn describe(config: &Config, dataset: &Dataset) -> anyhow::Result<()> {
    let shape = crate::runtime::model_config(config, dataset.vocab_size, dataset.separator)?;
    let windows = dataset.train.count();
    let (tokens, seen) =
        (config.tokens_per_step() as u64, config.train.steps * config.tokens_per_step() as u64);
    let kind = if shape.quantized { "BitNet b1.58" } else { "full precision" };
    eprint!("{}", config.to_toml()?);
    eprintln!();
    eprintln!(
        "model: {kind}, {} parameters, vocabulary {}",
        shape
            .parameters()
            .context("the model has more parameters than can be counted; [model]; use smaller sizes")?,
        dataset.vocab_size
    );
    eprintln!(
        "data: {} training tokens in {windows} windows, {} for validation",
        dataset.train.tokens(),
        dataset.validation.tokens()
    );
    eprintln!(
        "training: {} steps of {tokens} tokens, {:.2} epochs, seed {}, {} threads, kernel {}, dense products in {}",
        config.train.steps,
        seen as f64 / (windows * config.data.sequence_length as u64) as f64,
        config.run.seed,
        rayon::current_num_threads(),
        bitlinear::kernels::Kernel::active()?.name(),
        dense_products(config)
    );
    let teacher = import::teacher_folder(config).filter(|_| config.distill.teaches());
    let teacher = teacher.map(infer::checkpoint::hf::read_config).transpose()?;
    let memory = Estimate::new(config, &shape, teacher.as_ref().map(|(teacher, _)| teacher));
    eprintln!(
        "memory: about {} MiB at the peak: {} for parameters and optimizer, {} for activations, {} for buffers",
        memory.total() >> 20,
        memory.parameters >> 20,
        memory.activations >> 20,
        memory.buffers >> 20
    );
    Ok(memory.check()?)
}

/// What a step's dense products are computed in here.
fn dense_products(config: &Config) -> &'static str {
    let fast = config.train.precision == Precision::Fast && bitlinear::products::bf16_is_fast();
    if fast { "bf16" } else { "f32" }
}

/// After the last step: export, proof, and for the embedded corpus the report on it.
fn finish(config: &Config, dataset: &Dataset) -> anyhow::Result<()> {
    let run = &config.run.out;
    let out = RunPaths::new(run).export().join("hf");
    let trained = load_trained(run, Which::Best, dataset)?;
    let report = export::export(&trained, dataset, &out, true)?;
    let mut text = String::new();
    writeln!(text, "exported to {} ({} bytes), step {}", out.display(), report.bytes, report.step)?;
    writeln!(text, "proven: {}", report.parity)?;
    let bits = report.bits_per_byte.map(|bits| format!(", {bits:.4} bits per byte")).unwrap_or_default();
    writeln!(text, "validation loss {:.4} nats per token{bits}", report.loss)?;
    if let (DataSource::Stories, Some(tokenizer)) = (config.data.source, &dataset.tokenizer) {
        let model = infer::checkpoint::hf::read(&out)?;
        match stories::report(&model, tokenizer, config.data.stories_seed, 100)? {
            Some(judged) => writeln!(text, "{judged}\n")?,
            None => writeln!(
                text,
                "the context is too short to judge whole stories; raise data.sequence_length\n"
            )?,
        }
    }
    if let Some(folder) = &config.init.from {
        let report = Report::new(&import::read(Path::new(folder))?, &trained, report.loss, dataset)?;
        write_atomic(&run.join("report.json"), &serde_json::to_vec_pretty(&report)?)?;
        writeln!(text, "\n{report}\n")?;
    }
    let prompt = config.sample.prompts.iter().find(|prompt| !prompt.is_empty());
    write!(
        text,
        "next: cargo run --release --bin infer -- generate {} --prompt \"{}\"",
        out.display(),
        prompt.map_or("Once upon a time", |prompt| prompt)
    )?;
    print(&text)
}

fn load_trained(run: &Path, which: Which, dataset: &Dataset) -> anyhow::Result<export::Trained> {
    let checkpoint = export::checkpoint_of(run, which)?;
    Ok(export::load(&checkpoint, dataset.vocab_size, dataset.separator)?)
}

fn export(args: &ExportArgs) -> anyhow::Result<()> {
    let Format::Hf = args.format;
    let which = match args.step.as_str() {
        "best" => Which::Best,
        "latest" => Which::Latest,
        step => match step.parse() {
            Ok(step) => Which::Step(step),
            Err(_) => bail!("'{step}' is no checkpoint; --step; give best, latest or a number"),
        },
    };
    let config = export::config_of(&args.run)?;
    // What the run was trained on, for the proof; tokens come from the cache.
    let dataset = prepare_data(&config)?;
    let trained = load_trained(&args.run, which, &dataset)?;
    trained.state.require_same_data(&dataset, &args.run)?;
    let report = export::export(&trained, &dataset, &args.out, false)?;
    if args.json {
        return print(&serde_json::to_string(&report)?);
    }
    print(&format!(
        "exported to {} ({} bytes), step {}\nproven: {}",
        report.path.display(),
        report.bytes,
        report.step,
        report.parity
    ))
}

/// The runnable model of a run or of a model's folder, and where its tokenizer is.
fn any_model(path: &Path) -> anyhow::Result<(infer::Model, PathBuf)> {
    let paths = RunPaths::new(path);
    if !paths.is_run() {
        return Ok((infer::checkpoint::hf::read(path)?, path.join("tokenizer.json")));
    }
    let checkpoint = export::checkpoint_of(path, Which::Best)?;
    let separator = match paths.tokenizer() {
        file if file.exists() => {
            let (tokenizer, _) = data::load_tokenizer(&file)?;
            data::end_of_text_id(&tokenizer, export::config_of(path)?.data.separator.as_deref())?
        }
        _ => None,
    };
    let trained = export::load(&checkpoint, export::vocab_size_of(&checkpoint)?, separator)?;
    Ok((runnable(trained.model.config(), &trained.parameters)?, paths.tokenizer()))
}

fn eval(args: &EvalArgs) -> anyhow::Result<()> {
    let (model, tokenizer) = any_model(&args.model)?;
    let (mut text, mut object) = (String::new(), serde_json::Map::new());
    if let Some(path) = &args.data {
        let (evaluation, bits) = eval_text(&model, &tokenizer, path)?;
        object.insert("loss".into(), evaluation.loss.into());
        object.insert("perplexity".into(), evaluation.perplexity().into());
        object.insert("bits_per_byte".into(), bits.into());
        object.insert("tokens".into(), evaluation.tokens.into());
        object.insert("context".into(), evaluation.context.into());
        let bits = bits.map(|bits| format!("{bits:.4}")).unwrap_or_else(|| "unknown (no tokenizer)".into());
        writeln!(
            text,
            "loss {:.4} nats per token\nperplexity {:.3}\nbits per byte {bits}\ntokens {} in contexts of {}",
            evaluation.loss,
            evaluation.perplexity(),
            evaluation.tokens,
            evaluation.context
        )?;
    }
    if let Some(path) = &args.choices {
        let report = eval_choices(&model, &tokenizer, path)?;
        object.insert("choices".into(), serde_json::to_value(report)?);
        writeln!(text, "{report}")?;
    }
    let kernel = bitlinear::kernels::Kernel::active()?.name();
    if args.json {
        object.insert("kernel".into(), kernel.into());
        return print(&serde_json::Value::Object(object).to_string());
    }
    print(&format!("{text}kernel {kernel}"))
}

/// How well a model predicts some text, with its bits a byte where there is a tokenizer.
fn eval_text(
    model: &infer::Model,
    tokenizer: &Path,
    path: &Path,
) -> anyhow::Result<(infer::eval::Evaluation, Option<f64>)> {
    let vocab_size = model.config().vocab_size;
    let tokenizer = if tokenizer.exists() {
        TokenizerChoice::File { path: tokenizer.into(), vocab_size: Some(vocab_size) }
    } else if data::is_token_file(path) {
        TokenizerChoice::None { vocab_size }
    } else {
        bail!(
            "there is no tokenizer beside the model; {}; evaluate on a .u16 or .u32 file",
            tokenizer.display()
        );
    };
    let cache = tempfile::tempdir().context("a temporary folder cannot be made; system; free some space")?;
    let settings = text_settings(vec![path.into()], tokenizer, cache.path());
    let dataset = data::prepare(&settings, &|_, _| {})?;
    let ids = dataset.validation.ids();
    let context = model.config().max_position_embeddings;
    let evaluation = infer::eval::perplexity(model, &ids, context, infer::model::KvPrecision::F32)?;
    let bits = metrics::bits_per_byte(evaluation.loss, ids.len() as u64, dataset.validation_bytes);
    Ok((evaluation, bits))
}

/// How many questions a model gets right.
fn eval_choices(model: &infer::Model, tokenizer: &Path, path: &Path) -> anyhow::Result<ChoicesReport> {
    let questions = choices::read(path)?;
    let (tokenizer, _) = data::load_tokenizer(tokenizer)?;
    let mut progress = Progress::new("choices", 0, questions.len() as u64);
    let report =
        choices::evaluate(model, &tokenizer, &questions, |done| progress.update(done as u64, "", false))?;
    progress.finish();
    Ok(report)
}

/// Settings that read some text whole, as training and validation data alike.
fn text_settings(paths: Vec<PathBuf>, tokenizer: TokenizerChoice, cache: &Path) -> DataSettings {
    DataSettings {
        train: Source::Paths(paths.clone()),
        validation: Some(Source::Paths(paths)),
        validation_fraction: 0.5,
        text_field: "text".into(),
        document_split: DocumentSplit::WholeFile,
        tokenizer,
        separator: None,
        sequence_length: 1,
        cache_dir: cache.into(),
    }
}

fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let (model, _) = any_model(&args.model)?;
    let report = infer::inspect::Report::new(&model);
    if args.json { print(&serde_json::to_string(&report)?) } else { print(&report.to_string()) }
}

fn tokenizer(args: &TokenizerArgs) -> anyhow::Result<()> {
    let cache = tempfile::tempdir().context("a temporary folder cannot be made; system; free some space")?;
    let choice = TokenizerChoice::Train { vocab_size: args.vocab_size };
    let dataset = data::prepare(&text_settings(args.data.clone(), choice, cache.path()), &|_, _| {})?;
    let json = dataset.tokenizer_json.unwrap_or_default();
    write_atomic(&args.out, &json)?;
    let (tokens, bytes) = (dataset.train.tokens(), dataset.train_bytes.unwrap_or_default());
    print(&format!(
        "{}: {} entries; the text is {tokens} tokens, {:.2} bytes each",
        args.out.display(),
        dataset.vocab_size,
        bytes as f64 / tokens.max(1) as f64
    ))
}

fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    // No data is read, so none has to be named.
    let none = ["data.source=stories", "data.train=[]", "data.validation=[]"].map(str::to_owned);
    let mut config = Config::load(&args.config, &[&args.sets[..], &none].concat())?;
    use_threads(config.run.threads)?;
    import::complete(&mut config)?;
    let vocab_size = config.model.vocab_size.unwrap_or(config.tokenizer.trained_size());
    let shape = crate::runtime::model_config(&config, vocab_size, None)?;
    Estimate::new(&config, &shape, None).check()?;
    let report = crate::bench::run(&config, &shape, args.repetitions)?;
    let kernel = bitlinear::kernels::Kernel::active()?.name();
    let crate::bench::BenchReport { tokens, tokens_per_second: rate, parts, peak, peak_memory, .. } = &report;
    let (threads, share) = (bitlinear::pool::threads(), report.product_share());
    let dense = dense_products(&config);
    if args.json {
        let parts: std::collections::BTreeMap<_, _> = parts.iter().copied().collect();
        return print(
            &json!({
                "parameters": shape.parameters(),
                "tokens_per_step": tokens,
                "tokens_per_second": { "median": rate.median, "min": rate.min, "max": rate.max },
                "seconds": parts,
                "ternary_peak_gops": peak[0],
                "dense_peak_gops": peak[1],
                "product_share": share,
                "peak_memory_bytes": peak_memory,
                "kernel": kernel,
                "dense_products": dense,
                "threads": threads,
            })
            .to_string(),
        );
    }
    let mut text = format!(
        "{:.0} tokens/s ({:.0} to {:.0}), steps of {tokens} tokens\n",
        rate.median, rate.min, rate.max
    );
    let step = *tokens as f64 / rate.median;
    for (part, seconds) in parts {
        writeln!(text, "  {part:<10} {:>9.1} ms  {:>5.1} %", seconds * 1e3, seconds / step * 100.0)?;
    }
    writeln!(
        text,
        "products at this machine's best rate ({:.0} G operations/s ternary, {:.0} dense): {:.0} % of the step",
        peak[0],
        peak[1],
        share * 100.0
    )?;
    if let Some(bytes) = peak_memory {
        writeln!(text, "peak memory {:.0} MiB", *bytes as f64 / (1 << 20) as f64)?;
    }
    write!(text, "kernel {kernel}, dense products in {dense}, {threads} threads")?;
    print(&text)
}
