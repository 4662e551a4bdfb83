//! The head's loss with weights and a teacher: against the same formula in f64, and what must hold exactly.
use std::sync::Arc;

use proptest::prelude::{prop, prop_assert, proptest};
use rand::Rng;

use super::reference::{differences, log_softmax, wide};
use super::*;
use crate::math;
use crate::pool::Pool;
use crate::products::{Matrix, multiply};

/// A head's operands, and those of its teacher, which is wider.
struct Case {
    features: usize,
    vocab: usize,
    hidden: Vec<f32>,
    head: Vec<f32>,
    teacher_hidden: Vec<f32>,
    teacher_head: Vec<f32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Case {
    /// Every third token is masked.
    fn new(seed: u64, tokens: usize, features: usize, vocab: usize) -> Self {
        let (mut r, wide) = (random(seed), features + 3);
        Self {
            features,
            vocab,
            hidden: r.values(tokens * features),
            head: r.values(vocab * features),
            teacher_hidden: r.values(tokens * wide),
            teacher_head: r.values(vocab * wide),
            targets: (0..tokens).map(|_| r.0.random_range(0..vocab as u32)).collect(),
            weights: (0..tokens).map(|token| [0.7, 0.0, 2.5][token % 3]).collect(),
        }
    }

    fn teacher(&self, temperature: f32, coefficient: f32) -> Teacher<'_> {
        Teacher { hidden: &self.teacher_hidden, head: &self.teacher_head, temperature, coefficient }
    }

    fn operands(&self) -> [&[f32]; 2] {
        [&self.hidden, &self.head]
    }

    /// Losses and gradients, the latter written over NaN.
    fn run(&self, precision: Precision, loss: &HeadLoss<'_>, scale: f32) -> (Losses, Vec<f32>, Vec<f32>) {
        let (mut grad_hidden, mut grad_head) =
            (vec![f32::NAN; self.hidden.len()], vec![f32::NAN; self.head.len()]);
        let room = &mut Default::default();
        let operands = self.operands();
        let losses = head_loss(precision, operands, loss, scale, 0.0, room, &mut grad_hidden, &mut grad_head);
        (losses, grad_hidden, grad_head)
    }
}

fn logits(hidden: &[f64], head: &[f64]) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(hidden).map(|(a, b)| a * b).sum();
    head.chunks_exact(hidden.len()).map(dot).collect()
}

/// Cross-entropies and divergences, weighted and added up, in f64.
fn losses(hidden: &[f64], head: &[f64], loss: &HeadLoss<'_>) -> [f64; 2] {
    let tokens = loss.targets.len();
    let row = |values: &[f64], token: usize| {
        let features = values.len() / tokens;
        values[token * features..][..features].to_vec()
    };
    let mut total = [0f64; 2];
    for (token, target) in loss.targets.iter().enumerate() {
        let weight = loss.weights.map_or(1.0, |weights| f64::from(weights[token]));
        let student = logits(&row(hidden, token), head);
        total[0] -= weight * log_softmax(&student, 1.0)[*target as usize];
        if let Some(teacher) = loss.teacher {
            let temperature = f64::from(teacher.temperature);
            let teacher = logits(&row(&wide(teacher.hidden), token), &wide(teacher.head));
            let (p, q) = (log_softmax(&student, temperature), log_softmax(&teacher, temperature));
            total[1] += weight * p.iter().zip(&q).map(|(p, q)| q.exp() * (q - p)).sum::<f64>();
        }
    }
    total
}

/// What is minimised.
fn objective(hidden: &[f64], head: &[f64], loss: &HeadLoss<'_>) -> f64 {
    let [cross_entropy, divergence] = losses(hidden, head, loss);
    let factor = loss.teacher.map_or(0.0, |t| f64::from(t.coefficient) * f64::from(t.temperature).powi(2));
    f64::from(loss.cross_entropy) * cross_entropy + factor * divergence
}

#[test]
fn weights_and_a_teacher_have_the_derivatives_of_the_formula() {
    for (seed, (tokens, features, vocab)) in [(1, 1, 2), (4, 3, 2), (11, 5, 19)].into_iter().enumerate() {
        let case = Case::new(10 + seed as u64, tokens, features, vocab);
        let teachers =
            [None, Some(case.teacher(1.0, 1.0)), Some(case.teacher(2.0, 0.3)), Some(case.teacher(5.0, 2.0))];
        for (teacher, cross_entropy) in teachers.iter().flat_map(|t| [(*t, 1.0), (*t, 0.25), (*t, 0.0)]) {
            for weights in [None, Some(&case.weights[..])] {
                let loss = HeadLoss { targets: &case.targets, weights, cross_entropy, teacher };
                let (found, grad_hidden, grad_head) = case.run(Precision::F32, &loss, 0.5);
                let (hidden, head) = (wide(&case.hidden), wide(&case.head));
                let expected = losses(&hidden, &head, &loss);
                for (found, expected) in [found.cross_entropy, found.divergence].into_iter().zip(expected) {
                    assert!((found - expected).abs() <= 1e-6 * (1.0 + expected), "{found} {expected}");
                }
                if teacher.is_none() && cross_entropy == 0.0 {
                    assert!(grad_hidden.iter().chain(&grad_head).all(|g| *g == 0.0));
                    continue;
                }
                let of_hidden = differences(&case.hidden, |x| 0.5 * objective(x, &head, &loss));
                let of_head = differences(&case.head, |x| 0.5 * objective(&hidden, x, &loss));
                assert_close("hidden", &grad_hidden, &of_hidden, 1e-6);
                assert_close("head", &grad_head, &of_head, 1e-6);
            }
        }
    }
}

/// What a head computes without weights and teacher, from the same products and the same row.
fn plain(case: &Case, precision: Precision, scale: f32, keep: f32, grad_head: &mut [f32]) -> (f64, Vec<f32>) {
    let (features, vocab) = (case.features, case.vocab);
    let head = Matrix::new(&case.head, features);
    let (mut total, mut grad_hidden) = (0.0, Vec::new());
    let chunks = case.hidden.chunks(LOGITS_CHUNK * features).zip(case.targets.chunks(LOGITS_CHUNK));
    for (index, (hidden, targets)) in chunks.enumerate() {
        let hidden = Matrix::new(hidden, features);
        let mut logits = vec![0.0; targets.len() * vocab];
        multiply(precision, hidden, head.t(), 0.0, &mut logits);
        let rows = logits.chunks_exact_mut(vocab).zip(targets);
        let losses = rows.map(|(row, target)| {
            let loss = math::cross_entropy(row, *target as usize);
            row[*target as usize] -= 1.0;
            row.iter_mut().for_each(|value| *value *= scale);
            f64::from(loss)
        });
        total += losses.sum::<f64>();
        let logits = Matrix::new(&logits, vocab);
        let mut grad = vec![0.0; targets.len() * features];
        multiply(precision, logits, head, 0.0, &mut grad);
        multiply(precision, logits.t(), hidden, if index == 0 { keep } else { 1.0 }, grad_head);
        grad_hidden.extend(grad);
    }
    (total, grad_hidden)
}

#[test]
fn without_weights_and_teacher_it_is_the_plain_cross_entropy_bit_for_bit() {
    let case = Case::new(20, LOGITS_CHUNK + 70, 24, 50);
    let start = random(21).values(case.head.len());
    for precision in [Precision::F32, Precision::Bf16] {
        for keep in [0.0, 0.5, 1.0] {
            let (mut expected_head, mut grad_head) = (start.clone(), start.clone());
            let (expected, expected_hidden) = plain(&case, precision, 0.01, keep, &mut expected_head);
            for weights in [None, Some(&vec![1.0; case.targets.len()][..])] {
                let loss = HeadLoss { weights, ..HeadLoss::cross_entropy(&case.targets) };
                grad_head.copy_from_slice(&start);
                let mut grad_hidden = vec![f32::NAN; case.hidden.len()];
                let room = &mut Default::default();
                let operands = case.operands();
                let losses =
                    head_loss(precision, operands, &loss, 0.01, keep, room, &mut grad_hidden, &mut grad_head);
                assert_eq!(losses, Losses { cross_entropy: expected, divergence: 0.0 });
                assert_eq!((&grad_hidden, &grad_head), (&expected_hidden, &expected_head));
            }
        }
    }
}

#[test]
fn masked_tokens_have_no_gradient_and_leave_none() {
    let features = 12;
    let mut case = Case::new(30, 3 * LOGITS_CHUNK - 5, features, 33);
    // All of the first chunk and a third of the rest, with targets that no vocabulary has.
    case.weights[..LOGITS_CHUNK].fill(0.0);
    let masked = case.targets.iter_mut().zip(&case.weights).filter(|(_, weight)| **weight == 0.0);
    masked.for_each(|(target, _)| *target = u32::MAX);
    let kept: Vec<usize> = (0..case.targets.len()).filter(|token| case.weights[*token] != 0.0).collect();
    let rows = |values: &[f32]| -> Vec<f32> {
        let width = values.len() / case.targets.len();
        kept.iter().flat_map(|token| values[token * width..][..width].to_vec()).collect()
    };
    let alone = Case {
        hidden: rows(&case.hidden),
        teacher_hidden: rows(&case.teacher_hidden),
        weights: rows(&case.weights),
        targets: kept.iter().map(|token| case.targets[*token]).collect(),
        head: case.head.clone(),
        teacher_head: case.teacher_head.clone(),
        ..case
    };
    let run = |case: &Case| {
        let (weights, teacher) = (Some(&case.weights[..]), Some(case.teacher(2.0, 0.5)));
        let loss = HeadLoss { targets: &case.targets, weights, cross_entropy: 1.0, teacher };
        case.run(Precision::F32, &loss, 0.1)
    };
    let ((losses, grad_hidden, grad_head), (expected, expected_hidden, expected_head)) =
        (run(&case), run(&alone));
    for (token, grad) in grad_hidden.chunks_exact(features).enumerate() {
        assert_eq!(case.weights[token] == 0.0, grad.iter().all(|g| *g == 0.0), "token {token}");
    }
    // Only the order of sums differs.
    assert_close("hidden", &rows(&grad_hidden), &expected_hidden, 1e-6);
    assert_close("head", &grad_head, &expected_head, 1e-6);
    assert!((losses.cross_entropy / expected.cross_entropy - 1.0).abs() < 1e-6);
    assert!((losses.divergence / expected.divergence - 1.0).abs() < 1e-6);
}

#[test]
fn where_all_is_masked_the_heads_gradient_is_what_is_kept() {
    let case = Case::new(31, 9, 4, 5);
    let weights = vec![0.0; 9];
    let loss = HeadLoss { weights: Some(&weights), ..HeadLoss::cross_entropy(&case.targets) };
    for (keep, before, after) in [(0.0, f32::NAN, 0.0), (0.5, 3.0, 1.5), (1.0, 3.0, 3.0)] {
        let (mut grad_hidden, mut grad_head) = (vec![f32::NAN; 36], vec![before; 20]);
        let room = &mut Default::default();
        let operands = case.operands();
        let losses =
            head_loss(Precision::F32, operands, &loss, 1.0, keep, room, &mut grad_hidden, &mut grad_head);
        assert_eq!((losses, grad_hidden), (Losses::default(), vec![0.0; 36]));
        assert_eq!(grad_head, vec![after; 20]);
    }
}

#[test]
fn a_student_that_is_its_teacher_has_nothing_to_learn() {
    let case = Case::new(40, 20, 48, 300);
    for precision in [Precision::F32, Precision::Bf16] {
        let teacher =
            Some(Teacher { hidden: &case.hidden, head: &case.head, temperature: 3.0, coefficient: 1.0 });
        let loss = HeadLoss { targets: &case.targets, weights: None, cross_entropy: 0.0, teacher };
        let (losses, grad_hidden, grad_head) = case.run(precision, &loss, 1.0);
        assert_eq!(losses.divergence, 0.0);
        assert!(grad_hidden.iter().chain(&grad_head).all(|g| *g == 0.0), "{precision:?}");
    }
}

#[test]
fn losses_and_gradients_do_not_depend_on_the_number_of_threads() {
    let case = Case::new(50, 2 * LOGITS_CHUNK + 9, 40, 300);
    let (weights, teacher) = (Some(&case.weights[..]), Some(case.teacher(2.0, 0.5)));
    let loss = HeadLoss { targets: &case.targets, weights, cross_entropy: 0.5, teacher };
    for precision in [Precision::F32, Precision::Bf16] {
        let [one, two, three] = [1, 2, 3]
            .map(|threads| Arc::new(Pool::new(threads).unwrap()).install(|| case.run(precision, &loss, 0.1)));
        assert!(one == two && one == three, "{precision:?}");
    }
}

proptest! {
    /// With the unit matrix as the head, the logits are the hidden values and their gradients its gradient.
    #[test]
    fn rows_of_all_sizes_are_stable(
        pairs in prop::collection::vec((-300f32..300.0, -300f32..300.0), 2..40),
        temperature in 0.25f32..20.0,
    ) {
        let (hidden, teacher_hidden): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        let vocab = hidden.len();
        let unit: Vec<f32> = (0..vocab * vocab).map(|at| f32::from(u8::from(at % (vocab + 1) == 0))).collect();
        let teacher = Teacher { hidden: &teacher_hidden, head: &unit, temperature, coefficient: 1.0 };
        let loss = HeadLoss { teacher: Some(teacher), ..HeadLoss::cross_entropy(&[1]) };
        let (mut slopes, mut grad_head, room) = (vec![0.0; vocab], vec![0.0; vocab * vocab], &mut Default::default());
        let found =
            head_loss(Precision::F32, [&hidden, &unit], &loss, 1.0, 0.0, room, &mut slopes, &mut grad_head);
        let expected = losses(&wide(&hidden), &wide(&unit), &loss);
        // The cross-entropy is the difference of two numbers of up to 300, whose last place is 2^-15.
        let rounding = [1e-6 * (1.0 + expected[0]) + 2f64.powi(-15), 1e-6 * (1.0 + expected[1])];
        let found = [found.cross_entropy, found.divergence];
        let off = (0..2).find(|i| (found[*i] - expected[*i]).abs() > rounding[*i]);
        prop_assert!(off.is_none(), "{found:?} {expected:?}");
        // Probabilities of student, teacher and target add up to one each.
        let sum: f32 = slopes.iter().sum();
        prop_assert!(sum.abs() <= 1e-5 * (1.0 + temperature), "{sum}");
        prop_assert!(slopes.iter().all(|slope| slope.abs() <= 1.0 + temperature));
    }
}
