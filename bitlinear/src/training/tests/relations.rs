//! The distillation of relations against the same formula in f64, and what must hold exactly.
use std::sync::Arc;

use proptest::prelude::{prop, prop_assert, proptest};

use super::reference::{differences, log_softmax, wide};
use super::*;
use crate::pool::Pool;

/// The loss in f64. A row of zeros stays one.
fn loss(relations: &Relations<'_>, student: &[f64], teacher: &[f64]) -> f64 {
    let tokens: usize = relations.sequence_lengths.iter().sum();
    let (mut first, mut sum) = (0, 0.0);
    for length in relations.sequence_lengths {
        for head in 0..relations.heads {
            let parts = [student, teacher]
                .map(|values| unit_rows(values, tokens, first, *length, head, relations.heads));
            for i in 0..*length {
                let [p, q] = parts.each_ref().map(|rows| {
                    let cosine = |j: usize| rows[i].iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                    let cosines: Vec<f64> = (0..*length).map(cosine).collect();
                    log_softmax(&cosines, f64::from(relations.temperature))
                });
                sum += p.iter().zip(&q).map(|(p, q)| q.exp() * (q - p)).sum::<f64>();
            }
        }
        first += length;
    }
    sum / (tokens * relations.heads) as f64
}

/// One head's rows of one sequence, at unit length.
fn unit_rows(
    values: &[f64],
    tokens: usize,
    first: usize,
    length: usize,
    head: usize,
    heads: usize,
) -> Vec<Vec<f64>> {
    let width = values.len() / tokens;
    let part = width / heads;
    let unit = |token: usize| {
        let row = &values[(first + token) * width + head * part..][..part];
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter().map(|x| if norm == 0.0 { 0.0 } else { x / norm }).collect()
    };
    (0..length).map(unit).collect()
}

/// Loss, and gradient over zeros.
fn run(relations: &Relations<'_>, student: &[f32], teacher: &[f32], scale: f32) -> (f64, Vec<f32>) {
    let mut grad = vec![0.0; student.len()];
    let loss = relation_loss(relations, student, teacher, scale, &mut grad);
    (loss, grad)
}

#[test]
fn relations_have_the_derivatives_of_the_formula() {
    let mut r = random(60);
    // Sequences of one token and of none, and one of more than a block; heads of one value, where all cosines are ±1.
    let cases: [(&[usize], usize, [usize; 2]); 5] = [
        (&[2], 1, [3, 3]),
        (&[1, 5, 0, 3], 2, [6, 10]),
        (&[4, 6], 4, [8, 4]),
        (&[70], 3, [6, 9]),
        (&[3], 5, [20, 25]),
    ];
    for (sequence_lengths, heads, widths) in cases {
        let tokens: usize = sequence_lengths.iter().sum();
        let [student, teacher] = widths.map(|width| r.values(tokens * width));
        for temperature in [1.0, 0.3, 4.0] {
            let relations = Relations { heads, temperature, sequence_lengths };
            let start = r.values(student.len());
            let mut grad = start.clone();
            // Large enough beside what it is added to.
            let found = relation_loss(&relations, &student, &teacher, 1e4, &mut grad);
            let expected = loss(&relations, &wide(&student), &wide(&teacher));
            assert!((found - expected).abs() < 2e-7 * (1.0 + expected), "{found} {expected}");
            let of_student = differences(&student, |x| 1e4 * loss(&relations, x, &wide(&teacher)));
            let sum: Vec<f32> = start.iter().zip(&of_student).map(|(a, b)| a + b).collect();
            // Probabilities are rounded to 2^-24 of themselves, and the gradient is of their differences: some `√loss`.
            assert_close("relations", &grad, &sum, 2e-6 + 2e-7 / expected.sqrt());
        }
    }
}

#[test]
fn rows_of_zeros_have_no_gradient_and_disturb_no_other() {
    let mut r = random(61);
    let relations = Relations { heads: 2, temperature: 1.0, sequence_lengths: &[6] };
    let (mut student, mut teacher) = (r.values(6 * 8), r.values(6 * 4));
    // Both heads of token 2, the second one of token 4, and a teacher's.
    student[16..24].fill(0.0);
    student[36..40].fill(0.0);
    teacher[10..12].fill(0.0);
    let (found, grad) = run(&relations, &student, &teacher, 1.0);
    assert!((found - loss(&relations, &wide(&student), &wide(&teacher))).abs() < 2e-7);
    let mut expected = differences(&student, |x| loss(&relations, x, &wide(&teacher)));
    for range in [16..24, 36..40] {
        assert!(grad[range.clone()].iter().all(|g| *g == 0.0), "{range:?}");
        // The formula jumps there.
        expected[range].fill(0.0);
    }
    assert_close("others", &grad, &expected, 5e-6);
    let zeros = vec![0.0; 48];
    assert_eq!(run(&relations, &zeros, &zeros, 1.0), (0.0, zeros.clone()));
}

#[test]
fn relations_like_the_teachers_have_no_loss_and_no_gradient() {
    let mut r = random(62);
    let relations = Relations { heads: 3, temperature: 0.5, sequence_lengths: &[90, 7] };
    let student = r.values(97 * 12);
    // Lengths do not count: a power of two changes no digit.
    let teacher: Vec<f32> = student.iter().map(|x| 8.0 * x).collect();
    assert_eq!(run(&relations, &student, &teacher, 1.0), (0.0, vec![0.0; student.len()]));
}

#[test]
fn sequences_and_heads_do_not_see_each_other() {
    let mut r = random(63);
    let (student, teacher) = (r.values(12 * 6), r.values(12 * 9));
    let whole = Relations { heads: 3, temperature: 1.0, sequence_lengths: &[5, 7] };
    let (all, grad) = run(&whole, &student, &teacher, 12.0);
    let [first, second] = [(0..5, &[5]), (5..12, &[7])].map(|(tokens, sequence_lengths)| {
        let relations = Relations { sequence_lengths, ..whole };
        let (of_student, of_teacher) = (tokens.start * 6..tokens.end * 6, tokens.start * 9..tokens.end * 9);
        run(&relations, &student[of_student], &teacher[of_teacher], tokens.len() as f32)
    });
    assert!((all - (5.0 * first.0 + 7.0 * second.0) / 12.0).abs() < 1e-9);
    assert_close("parts", &grad, &[first.1, second.1].concat(), 1e-6);
}

#[test]
fn relations_do_not_depend_on_the_number_of_threads() {
    let mut r = random(64);
    let relations = Relations { heads: 4, temperature: 1.0, sequence_lengths: &[150, 3, 64] };
    let (student, teacher) = (r.values(217 * 32), r.values(217 * 48));
    let [one, two, three] = [1, 2, 3].map(|threads| {
        Arc::new(Pool::new(threads).unwrap()).install(|| run(&relations, &student, &teacher, 1.0))
    });
    assert!(one == two && one == three);
}

proptest! {
    #[test]
    fn gradients_of_relations_turn_rows_and_do_not_stretch_them(
        lengths in prop::collection::vec(0usize..9, 1..4),
        (heads, part, teacher_part) in (1usize..4, 1usize..5, 1usize..5),
        temperature in 0.1f32..10.0,
        (seed, exponent) in (0u64..1000, -20i32..20),
    ) {
        let tokens = lengths.iter().sum::<usize>();
        let relations = Relations { heads, temperature, sequence_lengths: &lengths };
        let mut r = random(seed);
        let size = 2f32.powi(exponent);
        let student: Vec<f32> = r.values(tokens * heads * part).iter().map(|x| x * size).collect();
        let teacher = r.values(tokens * heads * teacher_part);
        if tokens > 0 {
            let (found, grad) = run(&relations, &student, &teacher, 1.0);
            let expected = loss(&relations, &wide(&student), &wide(&teacher));
            prop_assert!((found - expected).abs() < 2e-6 * (1.0 + expected), "{found} {expected}");
            for (row, grad) in student.chunks_exact(part).zip(grad.chunks_exact(part)) {
                let along: f64 = row.iter().zip(grad).map(|(x, g)| f64::from(x * g)).sum();
                // Of slopes that are at most `2 / (temperature tokens)` in sum.
                prop_assert!(along.abs() < 1e-6 / f64::from(temperature), "{along}");
            }
        }
    }
}
