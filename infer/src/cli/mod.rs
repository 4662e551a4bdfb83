//! The command line: arguments, exit codes, and how errors are told.
//!
//! Results go to stdout, the rest to stderr; exit 0 done, 1 the user's mistake, 2 ours. Who closes the pipe early has
//! seen enough: that ends the program quietly.

mod commands;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bitlinear::kernels::{Bits, Kernel, KernelError};
use bitlinear::packed::Layout;
use bitlinear::pool::{self, Pool};
use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use infer::bench::BenchError;
use infer::eval::EvalError;
use infer::generate::GenerateError;
use infer::model::KvPrecision;
use infer::{Model, ModelError};

/// Most threads that can be asked for.
const MAX_THREADS: usize = 1024;

/// Runs BitNet b1.58 models on the CPU.
///
/// BITLINEAR_KERNEL=scalar|avx2|avx512vnni|amx|neon|neondot forces a kernel; every report names the one that ran.
#[derive(Parser)]
#[command(name = "infer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a text.
    Generate(GenerateArgs),
    /// Write the logits of given tokens to a safetensors file: f32 [tokens, vocab] as tensor "logits".
    Logits(LogitsArgs),
    /// Measure how well a model predicts a text.
    Perplexity(PerplexityArgs),
    /// Measure tokens a second.
    Bench(BenchArgs),
    /// Show a model's sizes, and scale and share of -1/0/+1 of each weight.
    Inspect(InspectArgs),
}

#[derive(Args)]
struct Common {
    /// Threads to compute with [default: one for each core]
    #[arg(long, value_name = "T")]
    threads: Option<usize>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// How a model is held in memory.
#[derive(Args)]
struct Holding {
    /// Layout of the ternary weights, in bits a weight: no logit depends on it [default: the faster one here, by the model's size; bench tries both]
    #[arg(long, value_name = "2bit|1.6bit", value_parser = PossibleValuesParser::new(Layout::ALL.map(Layout::name)))]
    layout: Option<String>,
    /// The head as it is in the file, or rounded: to int8, or to int4 with exact logits for the likeliest tokens
    #[arg(long, value_enum, default_value_t = Head::Exact)]
    head: Head,
    /// Keys and values as computed, or rounded to f16: half the memory, and no longer exact
    #[arg(long, value_name = "f32|f16", default_value = "f32",
        value_parser = PossibleValuesParser::new(KvPrecision::ALL.map(KvPrecision::name)))]
    kv: String,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Head {
    Exact,
    Int8,
    Int4,
}

impl Head {
    /// The model with this head.
    fn of(self, model: Model) -> Result<Model, ModelError> {
        match self {
            Self::Exact => Ok(model),
            Self::Int8 => model.with_int_head(Bits::Eight),
            Self::Int4 => model.with_int_head(Bits::Four),
        }
    }
}

impl Holding {
    /// The layout, if one was asked for.
    fn layout(&self) -> Option<Layout> {
        self.layout.as_deref().and_then(Layout::from_name)
    }

    fn kv(&self) -> KvPrecision {
        // The parser lets no other name pass.
        KvPrecision::from_name(&self.kv).unwrap_or_default()
    }
}

#[derive(Args)]
struct GenerateArgs {
    /// Folder with config.json, model.safetensors and tokenizer.json
    model: PathBuf,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    /// New tokens at most [default: 256, or what the context has room for]
    #[arg(short, value_name = "N")]
    n: Option<usize>,
    /// 0 takes the likeliest token, 1 draws as the model says, more is more varied
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Draw from the K likeliest tokens only; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that together have probability P only
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the draws: the same one gives the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    holding: Holding,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct LogitsArgs {
    /// Folder with config.json and model.safetensors
    model: PathBuf,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true)]
    ids: Vec<u32>,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    holding: Holding,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct PerplexityArgs {
    /// Folder with config.json and model.safetensors (and tokenizer.json for a text)
    model: PathBuf,
    /// A UTF-8 text (.txt) or little-endian token ids (.u16, .u32)
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Tokens in a window [default: the model's context]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    holding: Holding,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["model", "shape"])))]
struct BenchArgs {
    /// Folder with config.json and model.safetensors
    model: Option<PathBuf>,
    /// A config.json: random ternary weights of this shape
    #[arg(long, value_name = "SHAPE.json")]
    shape: Option<PathBuf>,
    /// Tokens of the prompt [default: 128, or half the context]
    #[arg(long, value_name = "P")]
    prompt_tokens: Option<usize>,
    /// New tokens [default: 64, or what the context has room for]
    #[arg(long, value_name = "G")]
    gen_tokens: Option<usize>,
    /// How often to measure; the median counts
    #[arg(long, value_name = "R", default_value_t = 5)]
    repetitions: usize,
    #[command(flatten)]
    holding: Holding,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct InspectArgs {
    /// Folder with config.json and model.safetensors
    model: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout and are no mistake; a closed pipe is no mistake either.
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    match std::panic::catch_unwind(|| run(cli.command)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            complain(&format!("{error:#}"));
            ExitCode::from(if is_ours(&error) { 2 } else { 1 })
        }
        Err(_) => {
            complain("the program has a fault; the message above says where; please report it");
            ExitCode::from(2)
        }
    }
}

fn complain(message: &str) {
    // If stderr is closed there is nobody left to tell.
    let _ = writeln!(io::stderr(), "error: {message}");
}

fn run(command: Command) -> Result<()> {
    // A kernel that cannot run is told before a model is read.
    let kernel = Kernel::active()?.name();
    let common = match &command {
        Command::Generate(GenerateArgs { common, .. })
        | Command::Logits(LogitsArgs { common, .. })
        | Command::Perplexity(PerplexityArgs { common, .. })
        | Command::Bench(BenchArgs { common, .. })
        | Command::Inspect(InspectArgs { common, .. }) => common,
    };
    set_threads(common.threads)?;
    let machine = commands::Machine { kernel, threads: pool::threads() };
    match command {
        Command::Generate(args) => commands::generate(&args, machine),
        Command::Logits(args) => commands::logits(&args, machine),
        Command::Perplexity(args) => commands::perplexity(&args, machine),
        Command::Bench(args) => commands::bench(&args, machine),
        Command::Inspect(args) => commands::inspect(&args, machine),
    }
}

fn set_threads(threads: Option<usize>) -> Result<()> {
    let Some(threads) = threads else { return Ok(()) };
    if !(1..=MAX_THREADS).contains(&threads) {
        bail!("cannot compute with {threads} threads; --threads; give 1 to {MAX_THREADS}, or leave it out");
    }
    let refused = || format!("cannot start {threads} threads; --threads; give a smaller number");
    // Two pools: rayon's for what comes before and after a model's pass.
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().with_context(refused)?;
    Pool::set_global(threads).with_context(refused)?;
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|e| e.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| kind == io::ErrorKind::BrokenPipe)
}

/// Whether an error can only come from a fault in this program.
fn is_ours(error: &anyhow::Error) -> bool {
    let causes = [
        error.downcast_ref::<ModelError>(),
        error.downcast_ref().and_then(|e| if let GenerateError::Model(e) = e { Some(e) } else { None }),
        error.downcast_ref().and_then(|e| if let EvalError::Model(e) = e { Some(e) } else { None }),
        error.downcast_ref().and_then(|e| if let BenchError::Model(e) = e { Some(e) } else { None }),
    ];
    let fault = |e: &ModelError| {
        matches!(e, ModelError::ForeignCache | ModelError::Kernel(KernelError::Shape { .. }))
    };
    causes.into_iter().flatten().any(fault)
}
