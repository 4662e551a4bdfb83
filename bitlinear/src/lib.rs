//! BitNet b1.58 arithmetic: the one place where training and inference agree.
//!
//! A BitLinear layer multiplies ternary weights (absmean, one scale a tensor) with int8 activations (absmax, one
//! scale a token). What is trained is what is run only if both sides round alike, so every formula that both sides compute exists once, on
//! plain slices:
//!
//! * [`quant`]: the two quantizers;
//! * [`packed`]: ternary weights at 2 or 1.6 bits each, with their shape and scale;
//! * [`kernels`]: integer products of packed weights with int8 rows, one file an instruction set, all equal bit for bit;
//! * [`pool`]: threads with barriers cheap enough for the pieces of a token;
//! * [`math`]: the f32 arithmetic around them (norm, rotary embedding, attention, activation functions);
//! * [`simd`]: one plain function compiled for several vector instruction sets;
//! * [`training`] (feature `train`): the operations of a training step with their backwards, on plain slices;
//!   [`products`]: the dense products among them;
//! * [`autograd`] (feature `candle`, on by default): the same as differentiable operations on candle tensors.
//!
//! Without features the crate depends on no deep-learning stack.
#[cfg(feature = "candle")]
pub mod autograd;
pub mod kernels;
pub mod math;
pub mod packed;
pub mod pool;
#[cfg(feature = "train")]
pub mod products;
pub mod quant;
pub mod simd;
#[cfg(feature = "train")]
pub mod training;
