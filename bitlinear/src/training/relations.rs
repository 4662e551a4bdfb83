//! Distillation of attention relations: how alike the tokens of a sequence are, head by head, in queries, keys or values.
use super::divergence::divergence;
use crate::products::{Matrix, Precision, multiply};
use crate::{math, pool, simd_fn};

/// Rows whose relations exist at once, in each task.
const ROW_BLOCK: usize = 64;

/// Rows that are not longer count as zeros.
const EPS: f32 = 1e-12;

/// How rows of queries, keys or values divide into sequences and relation heads.
#[derive(Debug, Clone, Copy)]
pub struct Relations<'a> {
    /// Relation heads: each row, of student and of teacher, is cut into as many parts of one width. They need not be the
    /// heads of attention, so models with different heads and widths can be compared.
    pub heads: usize,
    /// Divides the cosines, above 0.
    pub temperature: f32,
    /// Tokens of each sequence; rows are sequences, one after the other.
    pub sequence_lengths: &'a [usize],
}

impl Relations<'_> {
    /// Tokens of all sequences.
    fn tokens(&self) -> usize {
        self.sequence_lengths.iter().sum()
    }

    /// First token and length of the sequence, and the head, of each pair of both.
    fn pairs(&self) -> Vec<Pair> {
        let mut first = 0;
        let mut pairs = Vec::with_capacity(self.sequence_lengths.len() * self.heads);
        for length in self.sequence_lengths {
            pairs.extend((0..self.heads).map(|head| Pair {
                first,
                length: *length,
                head,
                heads: self.heads,
            }));
            first += length;
        }
        pairs
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
struct Pair {
    first: usize,
    length: usize,
    head: usize,
    heads: usize,
}

impl Pair {
    /// Its part of rows of `width`, one slice a token.
    fn rows(self, values: &[f32], width: usize) -> impl Iterator<Item = &[f32]> {
        let part = width / self.heads;
        let rows = values[self.first * width..][..self.length * width].chunks_exact(width);
        rows.map(move |row| &row[self.head * part..][..part])
    }
}

/// The mean over tokens and relation heads of `KL(R_teacher ‖ R_student)`, in nats, and its gradient times `scale`, added to
/// `grad`.
///
/// For each sequence and relation head, with `x̂_i = x_i / |x_i|` the normalized rows of one of queries, keys and values,
/// `R_i = softmax_j(x̂_i · x̂_j / temperature)` over all tokens `j` of the sequence, those after `i` included. With
/// `S_ij = scale (R_student - R_teacher)_ij / (temperature tokens heads)`: `dx̂ = S x̂ + S^T x̂`, since every row stands on both
/// sides, and `dx_i = (dx̂_i - x̂_i (x̂_i · dx̂_i)) / |x_i|`. A row of zeros stays one and has no gradient.
///
/// # Against BitDistill
/// The loss is that of the paper (arXiv 2510.13998, its `1 / (A_r |x|) ΣΣ KL`, after MiniLMv2, arXiv 2012.15828) for one of
/// queries, keys and values in one layer: the paper's `γ` multiplies the sum of the three. The published code takes this mean,
/// then divides by the number of relation heads a second time: its `γ` of 1e5 with 32 heads is one of 3125 here.
///
/// # Shapes
/// `student, grad [tokens, width], teacher [tokens, teacher_width]`, where `tokens` are those of all sequences and `heads`
/// divides both widths.
///
/// # Panics
/// If the shapes do not fit, there are no heads or no tokens, or the temperature is not above 0.
pub fn relation_loss(
    relations: &Relations<'_>,
    student: &[f32],
    teacher: &[f32],
    scale: f32,
    grad: &mut [f32],
) -> f64 {
    let (tokens, heads) = (relations.tokens(), relations.heads);
    let [width, teacher_width] = [student, teacher].map(|values| width(values, tokens, heads));
    assert_eq!(grad.len(), student.len(), "a gradient like the student");
    assert!(relations.temperature > 0.0, "a temperature of {}", relations.temperature);
    let rows = tokens as f64 * heads as f64;
    let scale = (f64::from(scale) / (rows * f64::from(relations.temperature))) as f32;
    let pairs = relations.pairs();
    let parts = pool::map(&pairs, |_, pair| {
        let student = Unit::new(pair.rows(student, width), width / heads);
        let teacher = Unit::new(pair.rows(teacher, teacher_width), teacher_width / heads);
        compare(&student, &teacher, relations.temperature, scale)
    });
    for (pair, (_, slopes)) in pairs.iter().zip(&parts) {
        add(*pair, slopes, width, grad);
    }
    parts.iter().map(|(loss, _)| loss).sum::<f64>() / rows
}

/// Width of rows.
fn width(values: &[f32], tokens: usize, heads: usize) -> usize {
    assert!(tokens > 0 && values.len().is_multiple_of(tokens), "{} values of {tokens} tokens", values.len());
    let width = values.len() / tokens;
    assert!(
        heads > 0 && width > 0 && width.is_multiple_of(heads),
        "rows of {width} in {heads} relation heads"
    );
    width
}

/// Rows of one head of one sequence at unit length.
struct Unit {
    width: usize,
    /// `[length, width]`
    rows: Vec<f32>,
    /// What each row was multiplied with, 0 for one of zeros.
    factors: Vec<f32>,
}

impl Unit {
    fn new<'a>(rows: impl Iterator<Item = &'a [f32]>, width: usize) -> Self {
        let mut rows: Vec<f32> = rows.flatten().copied().collect();
        let mut factors = vec![0f32; rows.len() / width];
        normalize(&mut rows, width, &mut factors);
        Self { width, rows, factors }
    }

    /// Some of the rows with all, `[rows, length]`.
    fn cosines(&self, rows: &[f32], out: &mut Vec<f32>) {
        let rows = Matrix::new(rows, self.width);
        out.resize(rows.rows() * self.factors.len(), 0.0);
        multiply(Precision::F32, rows, Matrix::new(&self.rows, self.width).t(), 0.0, out);
    }
}

/// The sum of the divergences of all rows, and the gradient of the scaled loss in the student's rows, a block of rows at a
/// time.
fn compare(student: &Unit, teacher: &Unit, temperature: f32, scale: f32) -> (f64, Vec<f32>) {
    let (width, length) = (student.width, student.factors.len());
    let (mut scores, mut teacher_scores, mut room) = (Vec::new(), Vec::new(), vec![0f32; length]);
    let (mut loss, mut slopes) = (0f64, vec![0f32; student.rows.len()]);
    let blocks = student.rows.chunks(ROW_BLOCK * width);
    let blocks = blocks.zip(teacher.rows.chunks(ROW_BLOCK * teacher.width));
    for (block, (rows, teacher_rows)) in blocks.enumerate() {
        student.cosines(rows, &mut scores);
        teacher.cosines(teacher_rows, &mut teacher_scores);
        loss += score_slopes(&mut scores, &mut teacher_scores, temperature, scale, &mut room);
        let scores = Matrix::new(&scores, length);
        let of_block = &mut slopes[block * ROW_BLOCK * width..][..rows.len()];
        multiply(Precision::F32, scores, Matrix::new(&student.rows, width), 1.0, of_block);
        multiply(Precision::F32, scores.t(), Matrix::new(rows, width), 1.0, &mut slopes);
    }
    unit_backward(&student.rows, width, &student.factors, &mut slopes);
    (loss, slopes)
}

/// Adds the gradient of a pair to that of all.
fn add(pair: Pair, slopes: &[f32], width: usize, grad: &mut [f32]) {
    let part = width / pair.heads;
    let rows = grad[pair.first * width..][..pair.length * width].chunks_exact_mut(width);
    for (row, slopes) in rows.zip(slopes.chunks_exact(part)) {
        math::axpy(1.0, slopes, &mut row[pair.head * part..][..part]);
    }
}

simd_fn! {
    /// Rows come to unit length.
    fn normalize(rows: &mut [f32], width: usize, factors: &mut [f32]) {
        for (row, factor) in rows.chunks_exact_mut(width).zip(factors) {
            let length = math::dot(row, row).sqrt();
            *factor = if length <= EPS { 0.0 } else { 1.0 / length };
            row.iter_mut().for_each(|value| *value *= *factor);
        }
    }
}

simd_fn! {
    /// The gradient in the rows at unit length becomes that in the rows before.
    fn unit_backward(rows: &[f32], width: usize, factors: &[f32], slopes: &mut [f32]) {
        let rows = rows.chunks_exact(width).zip(slopes.chunks_exact_mut(width));
        for ((row, slopes), factor) in rows.zip(factors) {
            let along = math::dot(row, slopes);
            for (slope, value) in slopes.iter_mut().zip(row) {
                *slope = (*slope - value * along) * factor;
            }
        }
    }
}

simd_fn! {
    /// The student's scores become the gradient of the scaled loss; returns the sum of divergences.
    fn score_slopes(
        scores: &mut [f32],
        teacher_scores: &mut [f32],
        temperature: f32,
        scale: f32,
        room: &mut [f32],
    ) -> f64 {
        let rows = scores.chunks_exact_mut(room.len()).zip(teacher_scores.chunks_exact_mut(room.len()));
        let mut loss = 0f64;
        for (scores, teacher_scores) in rows {
            loss += f64::from(divergence(scores, teacher_scores, temperature, room));
            for ((slope, p), q) in scores.iter_mut().zip(room.iter()).zip(teacher_scores.iter()) {
                *slope = scale * (p - q);
            }
        }
        loss
    }
}
