//! The five commands, each from its arguments to its report.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bitlinear::packed::Layout;
use infer::bench::{self, BenchOptions, BenchReport, Spread};
use infer::checkpoint::{hf, write_atomic};
use infer::eval;
use infer::generate::{self, GenerateOptions};
use infer::inspect::Report;
use infer::model::{KvCache, Logits, Part};
use infer::sampler::SamplingOptions;
use infer::tokenizer::Tokenizer;
use infer::{Model, ModelConfig};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::{BenchArgs, GenerateArgs, Head, Holding, InspectArgs, LogitsArgs, PerplexityArgs};

/// New tokens where nobody says how many.
const DEFAULT_NEW_TOKENS: usize = 256;

/// What a report says of the machine.
#[derive(Clone, Copy)]
pub struct Machine {
    pub kernel: &'static str,
    pub threads: usize,
}

impl Machine {
    /// Adds kernel and threads to a report and prints it: as JSON, or a line for each value.
    fn report(self, json: bool, mut report: Value) -> Result<()> {
        report["kernel"] = self.kernel.into();
        report["threads"] = self.threads.into();
        let mut out = io::stdout().lock();
        if json {
            return finish(writeln!(out, "{report}"));
        }
        for (key, value) in report.as_object().into_iter().flatten() {
            match value {
                Value::String(text) => writeln!(out, "{key}: {text}"),
                Value::Number(n) if n.is_f64() => writeln!(out, "{key}: {:.4}", n.as_f64().unwrap_or(0.0)),
                other => writeln!(out, "{key}: {other}"),
            }
            .context("cannot write to stdout")?;
        }
        finish(Ok(()))
    }
}

fn finish(written: io::Result<()>) -> Result<()> {
    written.and_then(|()| io::stdout().flush()).context("cannot write to stdout")
}

/// Reads a model's folder, to be held as asked for; tells where the model is if it is a training run's.
fn read(folder: &Path, holding: Option<&Holding>) -> Result<Model> {
    let exported = folder.join("export/hf");
    if !folder.join(hf::CONFIG).exists() && exported.join(hf::CONFIG).exists() {
        bail!("this is a training run, not a model; {}; use {}", folder.display(), exported.display());
    }
    let model = hf::read_with(folder, holding.and_then(Holding::layout))?;
    Ok(holding.map_or(Head::Exact, |holding| holding.head).of(model)?)
}

/// Says in a report how the model was held.
fn say_how(report: &mut Value, model: &Model, holding: &Holding) {
    report["layout"] = model.layout().map_or("none", Layout::name).into();
    report["head"] = model.head_precision().into();
    report["kv"] = holding.kv().name().into();
}

pub fn generate(args: &GenerateArgs, machine: Machine) -> Result<()> {
    let model = read(&args.model, Some(&args.holding))?;
    let config = model.config();
    let tokenizer = Tokenizer::read(&args.model, config.vocab_size)?;
    let mut prompt = tokenizer.encode(&args.prompt, true)?;
    if prompt.is_empty() {
        // An empty text starts where every text starts.
        prompt.extend(config.bos_token_id);
    }
    let room = config.max_position_embeddings.saturating_sub(prompt.len());
    let options = GenerateOptions {
        max_new_tokens: Some(args.n.unwrap_or(room.min(DEFAULT_NEW_TOKENS))),
        sampling: SamplingOptions {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
        },
        kv: args.holding.kv(),
        stop_ids: config.eos_token_ids.clone(),
    };
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let mut failed: Option<anyhow::Error> = None;
    let mut show = |piece: &str| -> Result<()> {
        text.push_str(piece);
        if !args.common.json {
            let mut out = io::stdout().lock();
            finish(out.write_all(piece.as_bytes()))?;
        }
        Ok(())
    };
    let mut prompt_shown = args.common.json;
    let generation = generate::generate(&model, &prompt, &options, &mut |id| {
        // The prompt is part of the text, but it is shown only once the model has accepted it.
        let echo = if std::mem::replace(&mut prompt_shown, true) { Ok(()) } else { show(&args.prompt) };
        match echo.and_then(|()| Ok(stream.push(id)?)).and_then(|piece| show(&piece)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(error) = failed {
        return Err(error);
    }
    show(&stream.finish()?)?;
    let speed = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let (prefill, decode) = (generation.prefill.as_secs_f64(), generation.decode.as_secs_f64());
    // The first new token comes out of the prompt's pass.
    let decoded = generation.tokens.len().saturating_sub(1);
    let (prompt_speed, speed) = (speed(prompt.len(), prefill), speed(decoded, decode));
    if args.common.json {
        let mut report = json!({
            "prompt": args.prompt, "text": text, "prompt_ids": prompt, "ids": generation.tokens,
            "stop": generation.stop.name(), "prefill_seconds": prefill, "decode_seconds": decode,
            "prompt_tokens_per_second": prompt_speed, "tokens_per_second": speed,
        });
        say_how(&mut report, &model, &args.holding);
        return machine.report(true, report);
    }
    finish(writeln!(io::stdout()))?;
    let _ = writeln!(
        io::stderr(),
        "prompt {} tokens, {prompt_speed:.0} tokens/s; new {} tokens, {speed:.0} tokens/s; stop: {}; kernel {}, {} threads, layout {}, head {}, kv {}",
        prompt.len(),
        generation.tokens.len(),
        generation.stop.name(),
        machine.kernel,
        machine.threads,
        model.layout().map_or("none", Layout::name),
        model.head_precision(),
        args.holding.kv().name(),
    );
    Ok(())
}

pub fn logits(args: &LogitsArgs, machine: Machine) -> Result<()> {
    let model = read(&args.model, Some(&args.holding))?;
    let mut cache = KvCache::with_precision(&model, args.ids.len(), args.holding.kv())?;
    let logits = model.forward(&args.ids, &mut cache, Logits::All)?;
    let shape = vec![args.ids.len(), model.config().vocab_size];
    let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = TensorView::new(Dtype::F32, shape.clone(), &bytes).context("cannot write the logits")?;
    let file = safetensors::serialize([("logits", view)], None).context("cannot write the logits")?;
    write_atomic(&args.out, &file)?;
    let mut report =
        json!({"out": args.out.display().to_string(), "tokens": shape[0], "vocab_size": shape[1]});
    say_how(&mut report, &model, &args.holding);
    machine.report(args.common.json, report)
}

pub fn perplexity(args: &PerplexityArgs, machine: Machine) -> Result<()> {
    let model = read(&args.model, Some(&args.holding))?;
    let (ids, text_bytes) = read_tokens(&args.data, &args.model, model.config())?;
    let context = args.context.unwrap_or(model.config().max_position_embeddings);
    let start = Instant::now();
    let evaluation = eval::perplexity(&model, &ids, context, args.holding.kv())
        .with_context(|| format!("cannot evaluate {}", args.data.display()))?;
    let seconds = start.elapsed().as_secs_f64();
    let bits_per_byte = text_bytes.map(|bytes| evaluation.bits_per_byte(ids.len(), bytes));
    let mut report = json!({
        "loss": evaluation.loss, "perplexity": evaluation.perplexity(), "tokens": evaluation.tokens,
        "context": evaluation.context, "tokens_per_second": evaluation.tokens as f64 / seconds,
    });
    if let Some(bits) = bits_per_byte {
        report["bits_per_byte"] = bits.into();
    }
    say_how(&mut report, &model, &args.holding);
    machine.report(args.common.json, report)
}

/// Token ids of a data file, and the bytes of its text where it is one.
fn read_tokens(data: &Path, model: &Path, config: &ModelConfig) -> Result<(Vec<u32>, Option<usize>)> {
    let kind = data.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if !["txt", "u16", "u32"].contains(&kind) {
        bail!(
            "cannot tell what is in it; {}; name it .txt (UTF-8), .u16 or .u32 (little-endian ids)",
            data.display()
        );
    }
    let bytes = std::fs::read(data)
        .with_context(|| format!("cannot read the data; {}; check that the file exists", data.display()))?;
    let whole = |rest: &[u8]| match rest {
        [] => Ok(()),
        _ => bail!("{} bytes are not whole ids; {}; the file is cut short", bytes.len(), data.display()),
    };
    match kind {
        "u16" => {
            let (ids, rest) = bytes.as_chunks::<2>();
            whole(rest)?;
            Ok((ids.iter().map(|id| u32::from(u16::from_le_bytes(*id))).collect(), None))
        }
        "u32" => {
            let (ids, rest) = bytes.as_chunks::<4>();
            whole(rest)?;
            Ok((ids.iter().map(|id| u32::from_le_bytes(*id)).collect(), None))
        }
        _ => {
            let text = std::str::from_utf8(&bytes).map_err(|error| {
                let at = error.valid_up_to();
                anyhow::anyhow!("byte {at} is not UTF-8; {}; convert the text to UTF-8", data.display())
            })?;
            let ids = Tokenizer::read(model, config.vocab_size)?.encode(text, false)?;
            Ok((ids, Some(text.len())))
        }
    }
}

pub fn bench(args: &BenchArgs, machine: Machine) -> Result<()> {
    // Where no layout is asked for, all are tried; the 2-bit one first, so that ties go to it.
    let layouts = args.holding.layout().map_or(Layout::ALL.to_vec(), |layout| vec![layout]);
    let config = bench_config(args)?;
    let context = config.max_position_embeddings;
    let prompt_tokens = args.prompt_tokens.unwrap_or(context.div_ceil(2).min(128));
    let gen_tokens = args.gen_tokens.unwrap_or(context.saturating_sub(prompt_tokens).min(64));
    let options =
        BenchOptions { prompt_tokens, gen_tokens, repetitions: args.repetitions, kv: args.holding.kv() };
    if prompt_tokens.saturating_add(gen_tokens) > context || prompt_tokens == context {
        bail!(
            "a prompt of {prompt_tokens} tokens and new ones after it do not fit the context of {context}; \
             --prompt-tokens, --gen-tokens; give fewer"
        );
    }
    // Told before a large model is made.
    options.check()?;
    let mut model = args.holding.head.of(bench_model(args, &config, layouts[0])?)?;
    let mut reports = Vec::new();
    for layout in layouts {
        model = model.with_layout(layout);
        reports.push((model.layout(), bench::bench(&model, &options)?));
        if model.layout().is_none() {
            break; // nothing ternary: there is no other layout
        }
    }
    let fastest =
        |a: &(_, BenchReport), b: &(_, BenchReport)| a.1.generation.median.total_cmp(&b.1.generation.median);
    // The first of equals: `max_by` takes the last.
    let Some((layout, best)) = reports.iter().rev().max_by(|a, b| fastest(a, b)) else { return Ok(()) };
    let name = |layout: &Option<Layout>| layout.map_or("none", Layout::name);
    let mut value = json!({
        "parameters": model.config().parameters(), "repetitions": args.repetitions,
        "peak_memory_bytes": bench::peak_memory(),
    });
    say_how(&mut value, &model, &args.holding);
    // The model is held as it was measured last.
    value["layout"] = name(layout).into();
    for (key, entry) in if args.common.json { bench_json(best, &options) } else { bench_text(best, &options) }
    {
        value[key] = entry;
    }
    if reports.len() > 1 {
        let rows = reports.iter().map(|(layout, report)| layout_row(name(layout), report, args.common.json));
        value["layouts"] = if args.common.json {
            rows.collect()
        } else {
            rows.filter_map(|row| row.as_str().map(str::to_owned)).collect::<Vec<_>>().join("; ").into()
        };
    }
    machine.report(args.common.json, value)
}

/// The config of the model to measure.
fn bench_config(args: &BenchArgs) -> Result<ModelConfig> {
    match (&args.shape, &args.model) {
        (Some(shape), _) => {
            let text = std::fs::read(shape).with_context(|| {
                format!("cannot read the shape; {}; give a model's config.json", shape.display())
            })?;
            let config = ModelConfig::from_json(&text).with_context(|| {
                format!("the shape cannot be used; {}; give a model's config.json", shape.display())
            })?;
            Ok(config.0)
        }
        (None, Some(model)) => Ok(hf::read_config(model)?.0),
        (None, None) => bail!("nothing to measure; bench; give a model's folder or --shape"),
    }
}

/// The model to measure: read, or made up.
fn bench_model(args: &BenchArgs, config: &ModelConfig, layout: Layout) -> Result<Model> {
    match (&args.shape, &args.model) {
        (Some(_), _) => Ok(bench::random_model(config, 0, layout)?),
        (None, Some(model)) => Ok(hf::read_with(model, Some(layout))?),
        (None, None) => bail!("nothing to measure; bench; give a model's folder or --shape"),
    }
}

fn layout_row(name: &str, report: &BenchReport, json: bool) -> Value {
    if !json {
        let (prompt, new) = (report.prompt.median, report.generation.median);
        return format!("{name}: prompt {prompt:.1}, new {new:.1} tokens/s").into();
    }
    json!({
        "layout": name, "prompt_tokens_per_second": report.prompt.median,
        "gen_tokens_per_second": report.generation.median, "bytes_per_token": report.bytes_per_token,
    })
}

/// Bandwidths, in 10^9 bytes a second, of machines that a report speaks of beside this one.
const OTHER_BANDWIDTHS: [f64; 2] = [200.0, 800.0];

fn bench_json(report: &BenchReport, options: &BenchOptions) -> Vec<(&'static str, Value)> {
    let speed = |s: Spread| json!({"median": s.median, "min": s.min, "max": s.max});
    let parts = |parts: &[(Part, f64)]| -> Value {
        parts
            .iter()
            .map(|(part, seconds)| (part.name().to_owned(), json!(seconds)))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    let elsewhere = OTHER_BANDWIDTHS
        .map(|gb| json!({"gigabytes_per_second": gb, "gen_tokens_per_second": report.generation_at(gb)}));
    vec![
        ("prompt_tokens", options.prompt_tokens.into()),
        ("gen_tokens", options.gen_tokens.into()),
        ("prompt_tokens_per_second", speed(report.prompt)),
        ("gen_tokens_per_second", speed(report.generation)),
        ("bytes_per_token", report.bytes_per_token.into()),
        ("gigabytes_per_second", report.gigabytes_per_second().into()),
        ("read_bandwidth", report.read_bandwidth.into()),
        ("bandwidth_share", report.bandwidth_share().into()),
        ("gigaoperations_per_second", report.gigaoperations_per_second().into()),
        ("prompt_seconds_per_token", parts(&report.prompt_parts)),
        ("gen_seconds_per_token", parts(&report.generation_parts)),
        ("by_bandwidth", elsewhere.to_vec().into()),
    ]
}

fn bench_text(report: &BenchReport, options: &BenchOptions) -> Vec<(&'static str, Value)> {
    let line = |s: Spread| format!("{:.1} tokens/s (min {:.1}, max {:.1})", s.median, s.min, s.max);
    let parts = |parts: &[(Part, f64)]| {
        let total: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
        let shares =
            parts.iter().map(|(part, seconds)| format!("{} {:.1} %", part.name(), 100.0 * seconds / total));
        format!("{:.3} ms: {}", total * 1e3, shares.collect::<Vec<_>>().join(", "))
    };
    let elsewhere =
        OTHER_BANDWIDTHS.map(|gb| format!("{:.1} tokens/s at {gb:.0} GB/s", report.generation_at(gb)));
    vec![
        (
            "prompt",
            format!(
                "{} tokens, {}, {:.0} GOP/s",
                options.prompt_tokens,
                line(report.prompt),
                report.gigaoperations_per_second()
            )
            .into(),
        ),
        ("generation", format!("{} tokens, {}", options.gen_tokens, line(report.generation)).into()),
        (
            "weights",
            format!(
                "{} bytes a token, {:.2} GB/s, {:.0} % of the {:.2} GB/s that the threads can read",
                report.bytes_per_token,
                report.gigabytes_per_second(),
                100.0 * report.bandwidth_share(),
                report.read_bandwidth,
            )
            .into(),
        ),
        ("prompt_token", parts(&report.prompt_parts).into()),
        ("new_token", parts(&report.generation_parts).into()),
        ("elsewhere", format!("by the same share of the bandwidth: {}", elsewhere.join(", ")).into()),
    ]
}

pub fn inspect(args: &InspectArgs, machine: Machine) -> Result<()> {
    let report = Report::new(&read(&args.model, None)?);
    if args.common.json {
        let report = serde_json::to_value(&report).context("cannot write the report")?;
        return machine.report(true, report);
    }
    finish(writeln!(io::stdout(), "{report}\nkernel: {}", machine.kernel))
}
