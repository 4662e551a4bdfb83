//! The operations of a BitNet with their backwards, on plain slices: what a training step on the CPU is made of.
//!
//! Nothing here builds a graph. A forward writes what its backward needs where the caller says, and a backward adds to
//! gradients or overwrites them as the caller says, so that buffers are used again from layer to layer and from step to
//! step. Activations are row-major `[tokens, features]`, sequences one after the other.
//!
//! Products of quantized layers are integer products in both directions. Forward: ternary weights times int8
//! activations, as in inference. Backward: the gradient is quantized to int8 as well, for `grad_input` with a scale for
//! each token, for `grad_weight` with a scale for each output and block of tokens. That is twice as fast as bf16 on
//! processors with VNNI. The rounding is at most 1/254 of the largest value of its token or block and has no bias: gradients keep a
//! cosine above 0.999 with those of f32. (It happens in `quant::quantize_row_above`, called by
//! [`QuantizedRows::fill_gradients_with`](crate::kernels::QuantizedRows::fill_gradients_with), and in
//! [`GradientPanels::fill`](crate::kernels::GradientPanels::fill).) Layers that are not fully quantized compute densely.
//!
//! Results do not depend on the number of threads: work is cut into fixed chunks, and sums over tokens add chunk results
//! in order.
mod attention;
mod bias;
mod divergence;
mod head;
mod linear;
mod mlp;
mod norm;
mod relations;

#[cfg(feature = "candle")]
pub(crate) use attention::{Group, Sequence};
pub use attention::{Heads, attention, attention_backward};
pub use bias::{add_bias, bias_backward};
pub use head::{HeadLoss, LOGITS_CHUNK, Losses, Teacher, head_loss, head_losses};
pub use linear::{Input, Latent, ProjectionError, Projections, Scratch};
pub use mlp::gated_backward;
pub use norm::{Norm, rms_norm_backward};
pub use relations::{Relations, relation_loss};

/// Tokens that a task works on at once.
const TOKEN_CHUNK: usize = 32;

/// `sum = keep * sum + Σ parts`, in the order of parts; `keep` 0 does not read `sum`.
fn add_up(parts: &[Vec<f32>], keep: f32, sum: &mut [f32]) {
    for (at, sum) in sum.iter_mut().enumerate() {
        let start = if keep == 0.0 { 0.0 } else { keep * *sum };
        *sum = parts.iter().fold(start, |sum, part| sum + part[at]);
    }
}

#[cfg(all(test, feature = "candle"))]
mod tests;
