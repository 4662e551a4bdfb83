//! What a batch teaches besides the tokens of its text.
use bitlinear::training;

/// Terms of the loss and their coefficients.
#[derive(Clone, Copy)]
pub struct Lesson<'a> {
    /// Coefficient of the cross-entropy.
    pub cross_entropy: f32,
    /// A teacher of distributions of the next token.
    pub logits: Option<training::Teacher<'a>>,
    /// A teacher of relations within a layer.
    pub relations: Option<RelationLesson<'a>>,
}

impl Lesson<'_> {
    /// The text alone.
    pub const TEXT: Self = Self { cross_entropy: 1.0, logits: None, relations: None };
}

/// Relations to learn: of all pairs of tokens in a sequence, by their queries, by their keys and by their values.
#[derive(Clone, Copy)]
pub struct RelationLesson<'a> {
    /// The student's layer.
    pub layer: usize,
    /// Relation heads, as in [`training::Relations`].
    pub heads: usize,
    /// Divides their scores.
    pub temperature: f32,
    /// The teacher's queries, keys and values, `[tokens, width]`, before the rotary embedding.
    pub teacher: [&'a [f32]; 3],
    /// Coefficient of their divergence, summed over the three.
    pub coefficient: f32,
}

/// What a step's losses came to: means over its learnt tokens, nats.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepLoss {
    /// All terms with their coefficients: what is minimized.
    pub total: f64,
    /// Cross-entropy of the text.
    pub cross_entropy: f64,
    /// Divergence of the student's distributions from the teacher's, at the lesson's temperature.
    pub divergence: f64,
    /// Divergence of relations, summed over queries, keys and values.
    pub relations: f64,
}

impl std::ops::AddAssign for StepLoss {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.cross_entropy += other.cross_entropy;
        self.divergence += other.divergence;
        self.relations += other.relations;
    }
}
