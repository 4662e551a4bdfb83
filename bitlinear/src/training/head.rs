//! The dense head and its loss, cross-entropy or distillation or both: the logits of a few hundred tokens exist at a time.
use std::ops::Range;

use super::TOKEN_CHUNK;
use super::divergence::divergence;
use crate::products::{Matrix, Precision, multiply};
use crate::{math, pool, simd_fn};

/// Tokens whose logits exist at once.
pub const LOGITS_CHUNK: usize = 512;

/// Tokens whose losses a task computes.
const ROWS: usize = TOKEN_CHUNK / 4;

/// What the head is trained for: `Σ_t weight_t (cross_entropy CE_t + coefficient temperature^2 KL_t)` over tokens `t`.
///
/// `CE_t = -ln softmax(logits_t)[target_t]`, and `KL_t = KL(softmax(teacher_t / temperature) ‖ softmax(logits_t / temperature))`
/// with the logits of the [`Teacher`], in nats.
///
/// Source: "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531, section 2), whose factor `temperature^2` keeps the
/// gradient's size when the temperature changes. BitDistill (arXiv 2510.13998) writes its formula without and its code with
/// the factor: the coefficient of the code is the one here, and that of the formula is `temperature^2` times as large.
#[derive(Debug, Clone, Copy)]
pub struct HeadLoss<'a> {
    /// The next token of each, `[tokens]`; of a token that weighs 0 it may be any number.
    pub targets: &'a [u32],
    /// The weight of each token in all terms, `[tokens]`, finite; 0 takes it out, and all are 1 without.
    pub weights: Option<&'a [f32]>,
    /// Coefficient of the cross-entropy.
    pub cross_entropy: f32,
    /// Whom to learn from besides the targets.
    pub teacher: Option<Teacher<'a>>,
}

impl<'a> HeadLoss<'a> {
    /// The cross-entropy of all targets alone.
    pub fn cross_entropy(targets: &'a [u32]) -> Self {
        Self { targets, weights: None, cross_entropy: 1.0, teacher: None }
    }

    /// The weight of a token.
    fn weight(&self, token: usize) -> f32 {
        self.weights.map_or(1.0, |weights| weights[token])
    }
}

/// A model of the same vocabulary whose distributions are to be learnt.
#[derive(Debug, Clone, Copy)]
pub struct Teacher<'a> {
    /// What goes into its head, `[tokens, teacher_features]`.
    pub hidden: &'a [f32],
    /// Its head, `[vocab, teacher_features]`.
    pub head: &'a [f32],
    /// Divides the logits of both, above 0: the higher, the more the unlikely tokens count.
    pub temperature: f32,
    /// Coefficient of the divergence.
    pub coefficient: f32,
}

/// Sums over tokens, each times its weight, in nats, before coefficients and `temperature^2`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Losses {
    /// `Σ weight_t CE_t`
    pub cross_entropy: f64,
    /// `Σ weight_t KL_t`, 0 without a teacher.
    pub divergence: f64,
}

/// The [`HeadLoss`] of `logits = hidden head^T`, and its gradients times `scale`. With `p` and `q` the distributions of student
/// and teacher, `τ` the temperature and `b` the teacher's coefficient,
/// `dlogits_t = scale weight_t (cross_entropy (p(1) - onehot(target)) + b τ (p(τ) - q(τ)))`, `grad_hidden = dlogits head`
/// (written), `grad_head = keep * grad_head + dlogits^T hidden`.
///
/// The teacher's logits are products of the same precision: equal models have equal logits, and a divergence of 0. In f32 beside
/// a student's in bf16 they take twice the time and bring the gradient no nearer to that of f32.
///
/// Nothing is computed for chunks of [`LOGITS_CHUNK`] tokens that all weigh 0.
///
/// # Shapes
/// `hidden, grad_hidden [tokens, features], head, grad_head [vocab, features]`; `logits` is used as room, for the
/// student's and for the teacher's.
///
/// # Panics
/// If the shapes do not fit, the target of a token with a weight is not in the vocabulary, or the temperature is not above 0.
#[allow(clippy::too_many_arguments)] // the operands of one formula
pub fn head_loss(
    precision: Precision,
    [hidden, head]: [&[f32]; 2],
    loss: &HeadLoss<'_>,
    scale: f32,
    mut keep: f32,
    logits: &mut [Vec<f32>; 2],
    grad_hidden: &mut [f32],
    grad_head: &mut [f32],
) -> Losses {
    let (features, vocab) = shapes(hidden, head, loss.targets);
    check(loss, vocab);
    assert!(grad_hidden.len() == hidden.len() && grad_head.len() == head.len(), "gradients like operands");
    let matrix = Matrix::new(head, features);
    let [logits, teacher_logits] = logits;
    let mut total = Losses::default();
    let chunk = LOGITS_CHUNK * features;
    let chunks = hidden.chunks(chunk).zip(grad_hidden.chunks_mut(chunk));
    for (first, (hidden, grad_hidden)) in (0..).step_by(LOGITS_CHUNK).zip(chunks) {
        let hidden = Matrix::new(hidden, features);
        let tokens = first..first + hidden.rows();
        if tokens.clone().all(|token| loss.weight(token) == 0.0) {
            grad_hidden.fill(0.0);
            continue;
        }
        logits.resize(tokens.len() * vocab, 0.0);
        multiply(precision, hidden, matrix.t(), 0.0, logits);
        if let Some(teacher) = loss.teacher {
            teacher.logits(precision, loss.targets.len(), tokens, teacher_logits);
        }
        let sums = slopes(loss, scale, first, logits, teacher_logits, vocab);
        total.cross_entropy += sums.cross_entropy;
        total.divergence += sums.divergence;
        let logits = Matrix::new(logits, vocab);
        multiply(precision, logits, matrix, 0.0, grad_hidden);
        multiply(precision, logits.t(), hidden, keep, grad_head);
        keep = 1.0;
    }
    keep_only(keep, grad_head);
    total
}

/// `values = keep * values`; `keep` 0 does not read them.
fn keep_only(keep: f32, values: &mut [f32]) {
    match keep {
        1.0 => {}
        0.0 => values.fill(0.0),
        _ => values.iter_mut().for_each(|value| *value *= keep),
    }
}

impl Teacher<'_> {
    /// Logits of some of all `tokens`.
    fn logits(&self, precision: Precision, tokens: usize, range: Range<usize>, logits: &mut Vec<f32>) {
        let features = self.hidden.len() / tokens;
        let hidden = Matrix::new(&self.hidden[range.start * features..range.end * features], features);
        let head = Matrix::new(self.head, features);
        logits.resize(hidden.rows() * head.rows(), 0.0);
        multiply(precision, hidden, head.t(), 0.0, logits);
    }
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
        let chunks = logits.chunks_mut(ROWS * vocab).zip(targets.chunks(ROWS));
        let losses = pool::map(chunks, |_, (logits, targets)| {
            let rows = logits.chunks_exact_mut(vocab).zip(targets);
            rows.map(|(row, target)| cross_entropy(row, *target as usize)).collect::<Vec<f32>>()
        });
        all.extend(losses.concat());
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

/// That weights and teacher fit as many tokens and the vocabulary.
fn check(loss: &HeadLoss<'_>, vocab: usize) {
    let tokens = loss.targets.len();
    assert!(loss.weights.is_none_or(|weights| weights.len() == tokens), "a weight for each token");
    if let Some(teacher) = loss.teacher {
        let (_, teacher_vocab) = shapes(teacher.hidden, teacher.head, loss.targets);
        assert_eq!(teacher_vocab, vocab, "teacher and student have one vocabulary");
        assert!(teacher.temperature > 0.0, "a temperature of {}", teacher.temperature);
    }
}

/// Logits of the tokens from `first` on become their gradients, and the teacher's its probabilities; their losses are
/// added up.
fn slopes(
    loss: &HeadLoss<'_>,
    scale: f32,
    first: usize,
    logits: &mut [f32],
    teacher_logits: &mut [f32],
    vocab: usize,
) -> Losses {
    let mut teacher_chunks = loss.teacher.map(|_| teacher_logits.chunks_mut(ROWS * vocab));
    let chunks = logits.chunks_mut(ROWS * vocab);
    let chunks = chunks.map(|chunk| (chunk, teacher_chunks.as_mut().and_then(Iterator::next)));
    let losses = pool::map(chunks, |chunk, (logits, mut teacher_logits)| {
        let mut room = vec![0f32; teacher_logits.as_ref().map_or(0, |_| vocab)];
        let rows = logits.chunks_exact_mut(vocab).enumerate().map(|(row, logits)| {
            let token = first + chunk * ROWS + row;
            let teacher_row = teacher_logits.as_mut().map(|rows| &mut rows[row * vocab..][..vocab]);
            slope(loss, scale, token, logits, teacher_row, &mut room)
        });
        rows.collect::<Vec<_>>()
    });
    let mut sums = Losses::default();
    for (token, losses) in (first..).zip(losses.into_iter().flatten()) {
        let weight = f64::from(loss.weight(token));
        sums.cross_entropy += weight * f64::from(losses[0]);
        sums.divergence += weight * f64::from(losses[1]);
    }
    sums
}

/// One token of [`slopes`]: its cross-entropy and divergence, 0 where it is masked.
fn slope(
    loss: &HeadLoss<'_>,
    scale: f32,
    token: usize,
    logits: &mut [f32],
    teacher_logits: Option<&mut [f32]>,
    room: &mut [f32],
) -> [f32; 2] {
    let (weight, target) = (loss.weight(token), loss.targets[token] as usize);
    if weight == 0.0 {
        logits.fill(0.0);
        return [0.0; 2];
    }
    let scale = scale * weight;
    match loss.teacher.zip(teacher_logits) {
        None => [gradient(logits, target, scale * loss.cross_entropy), 0.0],
        Some((teacher, teacher_logits)) => {
            let scales = [scale * loss.cross_entropy, scale * teacher.coefficient * teacher.temperature];
            gradients(logits, target, teacher_logits, teacher.temperature, scales, room)
        }
    }
}

simd_fn! {
    fn cross_entropy(logits: &mut [f32], target: usize) -> f32 {
        math::cross_entropy(logits, target)
    }
}

simd_fn! {
    /// The loss; the logits become the gradient of the scaled loss.
    fn gradient(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        scaled_gradient(logits, target, scale)
    }
}

simd_fn! {
    /// The loss and the divergence; the logits become the gradient of the sum of both, each scaled.
    fn gradients(
        logits: &mut [f32],
        target: usize,
        teacher_logits: &mut [f32],
        temperature: f32,
        scales: [f32; 2],
        room: &mut [f32],
    ) -> [f32; 2] {
        let divergence = divergence(logits, teacher_logits, temperature, room);
        let loss = scaled_gradient(logits, target, scales[0]);
        for ((slope, p), q) in logits.iter_mut().zip(room.iter()).zip(teacher_logits.iter()) {
            *slope += scales[1] * (p - q);
        }
        [loss, divergence]
    }
}

#[inline(always)]
fn scaled_gradient(logits: &mut [f32], target: usize, scale: f32) -> f32 {
    let loss = math::cross_entropy(logits, target);
    logits[target] -= 1.0;
    for value in logits.iter_mut() {
        *value *= scale;
    }
    loss
}
