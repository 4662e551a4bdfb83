//! The exact entropy of the language: the limit below which no model's loss can go.

use super::grammar::{Grammar, Node, total};

/// What is expected of a story, exactly up to the rounding of f64.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entropy {
    /// Entropy of a story, in bits.
    pub bits_per_story: f64,
    /// Expected length of a story, in bytes, without any separator or end mark between stories.
    pub mean_bytes_per_story: f64,
    /// `bits_per_story / mean_bytes_per_story`: the least bits per byte a model can reach on a long text of stories.
    pub bits_per_byte: f64,
    /// Expected number of sentences in a story.
    pub mean_sentences: f64,
}

/// What is expected of one node.
#[derive(Clone, Copy, Default)]
struct Expected {
    bits: f64,
    bytes: f64,
    sentences: f64,
}

impl Grammar {
    /// The entropy and the mean sizes of a story.
    ///
    /// A derivation is a sequence of independent draws. With `p` the probabilities of the options of a choice,
    ///
    /// ```text
    /// H(choice) = sum_i p_i (H(option_i) - log2 p_i)      H(sequence) = sum of its items
    /// H(draw)   = sum over rows of -p log2 p              H(text) = H(cell) = 0
    /// ```
    ///
    /// and in the same way for bytes and sentences, where a cell counts the mean length of its column: no choice depends on
    /// a variable, so a variable's distribution at any cell is the one it was drawn from. The entropy of derivations is
    /// the entropy of texts because every text has one derivation (see the [module](super)).
    pub fn entropy(&self) -> Entropy {
        let mut known: Vec<Expected> = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let expected = self.expected(node, &known);
            known.push(expected);
        }
        let story = known[self.root];
        let bytes = story.bytes - 1.0; // each sentence counted a space, but the first has none
        Entropy {
            bits_per_story: story.bits,
            mean_bytes_per_story: bytes,
            bits_per_byte: story.bits / bytes,
            mean_sentences: story.sentences,
        }
    }

    fn expected(&self, node: &Node, known: &[Expected]) -> Expected {
        let mut all = Expected::default();
        match node {
            Node::Text(text) => all.bytes = text.len() as f64,
            &Node::Cell { variable, column } => {
                let table = &self.variables[variable];
                for row in &table.rows {
                    let p = row.weight as f64 / table.total() as f64;
                    all.bytes += p * row.cells[column].len() as f64;
                }
            }
            &Node::Draw(variable) => {
                let table = &self.variables[variable];
                for row in &table.rows {
                    let p = row.weight as f64 / table.total() as f64;
                    all.bits -= p * p.log2();
                }
            }
            Node::Seq(items) => {
                for item in items.iter().map(|&item| known[item]) {
                    all.bits += item.bits;
                    all.bytes += item.bytes;
                    all.sentences += item.sentences;
                }
            }
            Node::Choice(branches) => {
                for branch in branches {
                    let p = branch.weight as f64 / total(branches) as f64;
                    let option = known[branch.node];
                    all.bits += p * (option.bits - p.log2());
                    all.bytes += p * option.bytes;
                    all.sentences += p * option.sentences;
                }
            }
            &Node::Sentence(body) => {
                all = known[body];
                all.bytes += 1.0;
                all.sentences = 1.0;
            }
        }
        all
    }
}
