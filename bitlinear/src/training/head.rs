//! The dense head and its cross-entropy: the logits of a few hundred tokens exist at a time.
use super::TOKEN_CHUNK;
use crate::products::{Matrix, Precision, multiply};
use crate::{math, pool, simd_fn};

/// Tokens whose logits exist at once.
pub const LOGITS_CHUNK: usize = 512;

/// Sum of the cross-entropies, in nats, of `softmax(hidden head^T)` with the target of each token, and its gradients times
/// `scale`: `dlogits = scale (softmax(logits) - onehot(target))`, `grad_hidden = dlogits head` (written),
/// `grad_head = keep * grad_head + dlogits^T hidden`.
///
/// # Shapes
/// `hidden, grad_hidden [tokens, features], head, grad_head [vocab, features], targets [tokens]`; `logits` is used as room.
///
/// # Panics
/// If the shapes do not fit or a target is not in the vocabulary.
#[allow(clippy::too_many_arguments)] // the operands of one formula
pub fn head_cross_entropy(
    precision: Precision,
    [hidden, head]: [&[f32]; 2],
    targets: &[u32],
    scale: f32,
    mut keep: f32,
    logits: &mut Vec<f32>,
    grad_hidden: &mut [f32],
    grad_head: &mut [f32],
) -> f64 {
    let (features, vocab) = shapes(hidden, head, targets);
    assert!(grad_hidden.len() == hidden.len() && grad_head.len() == head.len(), "gradients like operands");
    let matrix = Matrix::new(head, features);
    let mut total = 0f64;
    let chunk = LOGITS_CHUNK * features;
    let chunks = hidden.chunks(chunk).zip(grad_hidden.chunks_mut(chunk)).zip(targets.chunks(LOGITS_CHUNK));
    for ((hidden, grad_hidden), targets) in chunks {
        let hidden = Matrix::new(hidden, features);
        logits.resize(targets.len() * vocab, 0.0);
        multiply(precision, hidden, matrix.t(), 0.0, logits);
        total += losses(logits, targets, Some(scale)).into_iter().map(f64::from).sum::<f64>();
        let logits = Matrix::new(logits, vocab);
        multiply(precision, logits, matrix, 0.0, grad_hidden);
        multiply(precision, logits.t(), hidden, keep, grad_head);
        keep = 1.0;
    }
    total
}

/// The cross-entropies themselves, in f32 throughout and without gradients.
///
/// # Shapes
/// `hidden [tokens, features], head [vocab, features], targets [tokens] -> [tokens]`
///
/// # Panics
/// If the shapes do not fit or a target is not in the vocabulary.
pub fn head_losses(hidden: &[f32], head: &[f32], targets: &[u32]) -> Vec<f32> {
    let (features, vocab) = shapes(hidden, head, targets);
    let chunks = hidden.chunks(LOGITS_CHUNK * features).zip(targets.chunks(LOGITS_CHUNK));
    let mut logits = Vec::new();
    let mut all = Vec::with_capacity(targets.len());
    for (hidden, targets) in chunks {
        logits.resize(targets.len() * vocab, 0.0);
        let (hidden, head) = (Matrix::new(hidden, features), Matrix::new(head, features));
        multiply(Precision::F32, hidden, head.t(), 0.0, &mut logits);
        all.extend(losses(&mut logits, targets, None));
    }
    all
}

/// Features and vocabulary.
fn shapes(hidden: &[f32], head: &[f32], targets: &[u32]) -> (usize, usize) {
    assert!(!targets.is_empty() && hidden.len().is_multiple_of(targets.len()), "a target for each token");
    let features = hidden.len() / targets.len();
    assert!(features > 0 && head.len().is_multiple_of(features), "a head of as many features");
    (features, head.len() / features)
}

/// The loss of each row of logits. The rows become probabilities, or with a scale the gradient of the scaled loss.
fn losses(logits: &mut [f32], targets: &[u32], scale: Option<f32>) -> Vec<f32> {
    let vocab = logits.len() / targets.len();
    let chunks = logits.chunks_mut(TOKEN_CHUNK / 4 * vocab).zip(targets.chunks(TOKEN_CHUNK / 4));
    let losses = pool::map(chunks, |_, (logits, targets)| {
        let rows = logits.chunks_exact_mut(vocab).zip(targets);
        rows.map(|(row, target)| match scale {
            Some(scale) => gradient(row, *target as usize, scale),
            None => cross_entropy(row, *target as usize),
        })
        .collect::<Vec<f32>>()
    });
    losses.concat()
}

simd_fn! {
    fn cross_entropy(logits: &mut [f32], target: usize) -> f32 {
        math::cross_entropy(logits, target)
    }
}

simd_fn! {
    fn gradient(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        let loss = math::cross_entropy(logits, target);
        logits[target] -= 1.0;
        for value in logits.iter_mut() {
            *value *= scale;
        }
        loss
    }
}
