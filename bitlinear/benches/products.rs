//! Dense products of training, in f32 and bf16, on one thread and on all.
//!
//!     cargo bench -p bitlinear --no-default-features --features train --bench products
//!
//! Prints a time with its spread, and what it means as multiply-adds a second: half of the floating-point operations.

use std::sync::Arc;
use std::time::Duration;

use bitlinear::pool::Pool;
use bitlinear::products::{Matrix, Precision, multiply};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|at| (at as f32 * 0.37).sin()).collect()
}

fn products(criterion: &mut Criterion) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pools = [1, cores].map(|threads| Arc::new(Pool::new(threads).expect("threads")));
    // Logits of a chunk of tokens, the gradients of its hidden states and of the head, a layer.
    for (name, m, k, n) in [
        ("logits", 512, 768, 32000),
        ("hidden", 512, 32000, 768),
        ("head", 32000, 512, 768),
        ("layer", 4096, 256, 688),
    ] {
        let (a, b, mut out) = (wave(m * k), wave(k * n), vec![0f32; m * n]);
        let a = if name == "head" { Matrix::new(&a, m).t() } else { Matrix::new(&a, k) };
        let b = if name == "logits" || name == "layer" { Matrix::new(&b, k).t() } else { Matrix::new(&b, n) };
        let mut group = criterion.benchmark_group(format!("{name} {m}x{k}x{n}"));
        group.throughput(Throughput::Elements((m * n * k) as u64));
        group
            .sample_size(10)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_secs(2));
        for pool in &pools {
            for precision in [Precision::F32, Precision::Bf16] {
                let id = BenchmarkId::new(format!("{precision:?}"), format!("{} threads", pool.threads()));
                group.bench_function(id, |bencher| {
                    pool.install(|| bencher.iter(|| multiply(precision, a, b, 0.0, &mut out)));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
