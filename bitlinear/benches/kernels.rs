//! The kernels alone: every kernel and layout on the shapes of a 2B model, with one, four and many rows of activations.
//!
//!     cargo bench -p bitlinear --no-default-features --bench kernels
//!
//! Prints a time with its spread, and what it means as weights a second. One row moves every packed byte once: where the
//! weight does not fit in the last cache, memory is the limit. Left out: the norm, and quantizing the activations.

use bitlinear::kernels::{Kernel, QuantizedRows, matmul_with};
use bitlinear::packed::{Layout, TernaryWeight};
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

criterion_group!(kernels, products);
criterion_main!(kernels);
