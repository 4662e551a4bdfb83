//! From grammar to text: each story from a random stream of its own, drawn with integers only.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::grammar::{Bound, Grammar, MAX_VARIABLES, Node, NodeId, UNBOUND, total};

/// Sets these streams apart from others that start from the same seed.
const DOMAIN: &[u8; 24] = b"corpus of stories, v1   ";

impl Grammar {
    /// Story number `index` of the stream `seed`: a single line, its sentences separated by one space.
    ///
    /// The same text on every platform, and independent of all other stories: ChaCha8 with the seed as key and the index as
    /// stream number, and integer draws without bias.
    pub fn story(&self, seed: u64, index: u64) -> String {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..].copy_from_slice(DOMAIN);
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index);
        let mut story = Vec::new();
        let mut bound = [UNBOUND; MAX_VARIABLES];
        self.expand(self.root, &mut rng, &mut bound, &mut story);
        // Whole strings were appended and only ASCII letters changed, so nothing is lost here.
        String::from_utf8_lossy(&story).into_owned()
    }

    /// The stories of the stream `seed` from number 0 on, until they have `bytes` bytes together.
    ///
    /// The last one is kept whole, so the total is the first to reach `bytes`; separators between stories are not counted.
    pub fn stories(&self, seed: u64, bytes: usize) -> Vec<String> {
        let mut stories = Vec::new();
        let mut size = 0;
        for index in 0.. {
            if size >= bytes {
                break;
            }
            let story = self.story(seed, index);
            size += story.len(); // at least 1: a story has a sentence, and a sentence says something
            stories.push(story);
        }
        stories
    }

    fn expand(&self, node: NodeId, rng: &mut ChaCha8Rng, bound: &mut Bound, out: &mut Vec<u8>) {
        match &self.nodes[node] {
            Node::Text(text) => out.extend(text.bytes()),
            &Node::Cell { variable, column } => {
                let row = &self.variables[variable].rows[usize::from(bound[variable])];
                out.extend(row.cells[column].bytes());
            }
            &Node::Draw(variable) => {
                let weights = self.variables[variable].rows.iter().map(|row| row.weight);
                let row = pick(rng, self.variables[variable].total(), weights);
                bound[variable] = row as u8; // fewer than 255 rows, checked by the parser
            }
            Node::Seq(items) => {
                for &item in items {
                    self.expand(item, rng, bound, out);
                }
            }
            Node::Choice(branches) => {
                let weights = branches.iter().map(|branch| branch.weight);
                let branch = pick(rng, total(branches), weights);
                self.expand(branches[branch].node, rng, bound, out);
            }
            &Node::Sentence(body) => {
                if !out.is_empty() {
                    out.push(b' ');
                }
                let start = out.len();
                self.expand(body, rng, bound, out);
                if let Some(first) = out.get_mut(start) {
                    first.make_ascii_uppercase();
                }
            }
        }
    }
}

/// An index with probability weight / total, exactly.
fn pick(rng: &mut ChaCha8Rng, total: u64, weights: impl Iterator<Item = u64>) -> usize {
    let mut left = below(rng, total);
    for (index, weight) in weights.enumerate() {
        if left < weight {
            return index;
        }
        left -= weight;
    }
    unreachable!("the draw is below the sum of the weights")
}

/// A number below `n`, all equally likely: draws that would favour the small ones are drawn again.
fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    let unfair = (u64::MAX % n + 1) % n; // how many of the 2^64 draws are left over
    loop {
        let draw = rng.next_u64();
        if draw <= u64::MAX - unfair {
            return draw % n;
        }
    }
}
