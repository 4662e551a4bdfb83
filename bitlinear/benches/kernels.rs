//! The kernels alone: every kernel and layout on the shapes of a 2B model, with one, four and many rows of activations; and
//! what the gradient of a weight takes.
//!
//!     cargo bench -p bitlinear --no-default-features --bench kernels
//!
//! Prints a time with its spread, and what it means as weights a second. One row moves every packed byte once: where the
//! weight does not fit in the last cache, memory is the limit. Left out: the norm, and quantizing the activations.

use bitlinear::kernels::{
    ActivationPanels, GradientPanels, Kernel, QuantizedRows, matmul_with, weight_gradient,
};
use bitlinear::packed::{Layout, TernaryWeight};
use bitlinear::quant::ternarize;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn products(criterion: &mut Criterion) {
    for (outs, columns) in [(6912, 2560), (2560, 6912)] {
        let codes: Vec<i8> = (0..outs * columns).map(|at| ((at * 7919) >> 5) as i8 % 2).collect();
        let weight = TernaryWeight::pack(&codes, outs, columns, 0.02).expect("ternary codes");
        for rows in [1, 4, 256] {
            let activations: Vec<f32> = (0..rows * columns).map(|at| (at as f32 * 0.37).sin()).collect();
            let x = QuantizedRows::quantize(&activations, columns);
            let mut output = vec![0f32; rows * outs];
            let mut group = criterion.benchmark_group(format!("{rows}x{columns}x{outs}"));
            group.throughput(Throughput::Elements((rows * outs * columns) as u64)).sample_size(10);
            for layout in Layout::ALL {
                let weight = weight.with_layout(layout);
                for kernel in Kernel::available().into_iter().filter(|kernel| kernel.name() != "scalar") {
                    group.bench_function(BenchmarkId::new(kernel.name(), layout.name()), |bencher| {
                        bencher
                            .iter(|| matmul_with(kernel, &x, &weight, &mut output).expect("shapes that fit"));
                    });
                }
            }
            group.finish();
        }
    }
}

/// The gradient of a weight: both operands made ready, then their product.
fn gradients(criterion: &mut Criterion) {
    let (tokens, outs, columns) = (2048, 768, 2048);
    let values = |len: usize| -> Vec<f32> { (0..len).map(|at| (at as f32 * 0.37).sin()).collect() };
    let x = QuantizedRows::quantize(&values(tokens * columns), columns);
    let values = values(tokens * outs);
    let (mut gradient, mut activations) = (GradientPanels::default(), ActivationPanels::default());
    let mut output = vec![0f32; outs * columns];
    let mut group = criterion.benchmark_group(format!("gradient {tokens}x{outs}x{columns}"));
    group.sample_size(10).throughput(Throughput::Elements((tokens * outs) as u64));
    group.bench_function("quantize", |bencher| bencher.iter(|| gradient.fill(&values, outs, x.scales())));
    group.throughput(Throughput::Elements((tokens * columns) as u64));
    group.bench_function("interleave", |bencher| bencher.iter(|| activations.fill(&x)));
    group.throughput(Throughput::Elements((tokens * outs * columns) as u64));
    gradient.fill(&values, outs, x.scales());
    activations.fill(&x);
    for kernel in Kernel::available().into_iter().filter(|kernel| kernel.name() != "scalar") {
        group.bench_function(kernel.name(), |bencher| {
            bencher.iter(|| {
                weight_gradient(kernel, &gradient, &activations, 0.0, &mut output).expect("shapes that fit")
            });
        });
    }
    group.finish();
}

/// What the backward pass makes of a weight.
fn transposes(criterion: &mut Criterion) {
    let (outs, columns) = (2048, 2048);
    let weights: Vec<f32> = (0..outs * columns).map(|at| (at as f32 * 0.37).sin()).collect();
    let mut codes = vec![0; weights.len()];
    let mut group = criterion.benchmark_group(format!("weight {outs}x{columns}"));
    group.sample_size(10).throughput(Throughput::Elements((outs * columns) as u64));
    group.bench_function("ternarize", |bencher| bencher.iter(|| ternarize(&weights, 0.6, &mut codes)));
    ternarize(&weights, 0.6, &mut codes);
    group.bench_function("transpose", |bencher| {
        bencher.iter(|| TernaryWeight::transposed(&[&codes], columns).expect("ternary codes"));
    });
    group.finish();
}

criterion_group!(kernels, products, gradients, transposes);
criterion_main!(kernels);
