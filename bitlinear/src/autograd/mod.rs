//! The operations of a BitNet as differentiable candle operations on the CPU.
//!
//! candle's own fused norm, softmax and rotary embedding cut the gradient without an error, and composing them from
//! small operations costs an allocation and a pass over memory for each. So each hot part is one operation with its
//! own backward, whose forward calls the same functions as the inference runtime ([`crate::math`], [`crate::kernels`]): hidden
//! states of both sides are equal bit for bit. Gradients are f32 throughout; [`crate::training`] has the faster ones.
//! A bias needs no operation of its own: candle's `broadcast_add` has the right gradient.
//!
//! Activations are f32 tensors `[tokens, features]`, sequences one after the other. Results do not depend on the
//! number of threads: work is cut into fixed chunks, and sums over tokens add chunk results in order.
use candle_core::{CpuStorage, Layout, Result, Tensor, bail};

mod attention;
mod bit_linear;
mod cross_entropy;
mod gated;
mod rms_norm;

pub use crate::training::Heads;
pub use attention::attention;
pub use bit_linear::{BitLinear, bit_linear, dense_linear};
pub use cross_entropy::{head_cross_entropy, head_loss};
pub use gated::gated;
pub use rms_norm::rms_norm;

/// Tokens that a task works on at once.
const TOKEN_CHUNK: usize = 32;

/// The f32 values of a contiguous CPU tensor.
fn values<'a>(storage: &'a CpuStorage, layout: &Layout, op: &'static str) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => {
            bail!("{op} needs contiguous tensors, got strides {:?}; call contiguous() first", layout.stride())
        }
    }
}

/// Runs `work` on the f32 values of some contiguous CPU tensors.
fn with_values<const N: usize, R>(
    tensors: [&Tensor; N],
    op: &'static str,
    work: impl FnOnce([&[f32]; N]) -> Result<R>,
) -> Result<R> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let candle_core::Storage::Cpu(storage) = &**storage else {
            bail!("{op} runs on the CPU only; move its tensors there");
        };
        *slice = values(storage, layout, op)?;
    }
    work(slices)
}

/// Rows and length of a row of a `[.., features]` layout.
fn rows(layout: &Layout) -> (usize, usize) {
    let columns = layout.dims().last().copied().unwrap_or(1);
    (layout.shape().elem_count() / columns.max(1), columns)
}

/// A tensor shaped like `like`.
fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())
}

#[cfg(test)]
mod tests;
