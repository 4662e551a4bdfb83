//! The dense head and its cross-entropy as one operation: the logits of a few hundred tokens exist at a time.
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{tensor_like, values, with_values};
use crate::products::Precision;
use crate::training::HeadLoss;
use crate::{simd_fn, training};

/// Mean cross-entropy, in nats, of `softmax(hidden head^T)` with the target of each token.
///
/// The gradients are computed along with the loss, while the logits are there, and kept for the backward:
/// `dlogits = (softmax(logits) - onehot(target)) / tokens`, `dhidden = dlogits head`, `dhead = dlogits^T hidden`.
///
/// # Shapes
/// `hidden [tokens, features], head [vocab, features], targets [tokens] -> []`
///
/// # Errors
/// The shapes do not fit, a target is not in the vocabulary, or a tensor is not contiguous f32 on the CPU.
pub fn head_cross_entropy(hidden: &Tensor, head: &Tensor, targets: Arc<[u32]>) -> Result<Tensor> {
    check(hidden, head, &targets)?;
    hidden.apply_op2(head, Op { targets, gradients: Mutex::new(None) })
}

/// The losses, in nats, of all targets under `softmax(hidden head^T)`: [`head_cross_entropy`] before the mean, without
/// gradients.
///
/// # Errors
/// As [`head_cross_entropy`].
pub fn head_loss(hidden: &Tensor, head: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    check(hidden, head, targets)?;
    with_values([hidden, head], "head_loss", |[hidden, head]| {
        Ok(training::head_losses(hidden, head, targets))
    })
}

fn check(hidden: &Tensor, head: &Tensor, targets: &[u32]) -> Result<()> {
    let ((tokens, features), (vocab, head_features)) = (hidden.dims2()?, head.dims2()?);
    if features != head_features || tokens != targets.len() || tokens == 0 || features == 0 {
        bail!(
            "cross-entropy of hidden {:?} with head {:?} and {} targets; the shapes must agree",
            hidden.dims(),
            head.dims(),
            targets.len()
        );
    }
    if let Some(target) = targets.iter().find(|t| **t as usize >= vocab) {
        bail!("target {target} is not in the vocabulary of {vocab}; the tokens belong to another tokenizer");
    }
    Ok(())
}

struct Op {
    targets: Arc<[u32]>,
    /// Gradients of `hidden` and `head`, from the forward to the backward.
    gradients: Mutex<Option<(Vec<f32>, Vec<f32>)>>,
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "head_cross_entropy"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        head: &CpuStorage,
        head_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let hidden = values(hidden, hidden_layout, self.name())?;
        let head = values(head, head_layout, self.name())?;
        let (mut grad_hidden, mut grad_head) = (vec![0f32; hidden.len()], vec![0f32; head.len()]);
        let tokens = self.targets.len() as f64;
        let losses = training::head_loss(
            Precision::F32,
            [hidden, head],
            &HeadLoss::cross_entropy(&self.targets),
            (1.0 / tokens) as f32,
            0.0,
            &mut Default::default(),
            &mut grad_hidden,
            &mut grad_head,
        );
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some((grad_hidden, grad_head));
        Ok((CpuStorage::F32(vec![(losses.cross_entropy / tokens) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let taken = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((mut grad_hidden, mut grad_head)) = taken else {
            bail!("a second backward through head_cross_entropy; compute the loss again");
        };
        let scale = grad.to_scalar::<f32>()?;
        if scale != 1.0 {
            for gradient in [&mut grad_hidden, &mut grad_head] {
                gradient.par_chunks_mut(8192).for_each(|g| multiply_by(scale, g));
            }
        }
        Ok((Some(tensor_like(grad_hidden, hidden)?), Some(tensor_like(grad_head, head)?)))
    }
}

simd_fn! {
    fn multiply_by(factor: f32, values: &mut [f32]) {
        for value in values {
            *value *= factor;
        }
    }
}
