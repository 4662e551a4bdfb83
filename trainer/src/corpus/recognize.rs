//! From text back to derivations: which sentences and which whole stories belong to the language, and how probable.
//!
//! All readings of a text are followed side by side, merged where they meet. Rules do not recurse and texts longer than the
//! longest sentence or story are turned away at once, so a sentence costs at most a constant of the grammar, and a text
//! costs time linear in its length.

use super::grammar::{Bound, Grammar, MAX_VARIABLES, Node, NodeId, UNBOUND, total};

/// What of a text belongs to the language.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recognition {
    /// Sentences in the text; a last one that is cut off counts.
    pub sentences: usize,
    /// Those that, for some values of the variables, are a sentence of some story.
    pub sentences_in_language: usize,
    /// Whether the text, without white space around it, is a story of the language, from its first to its last byte.
    pub story_in_language: bool,
}

/// One reading of the text so far.
#[derive(Clone, Copy)]
pub(super) struct Reading {
    /// Bytes read.
    at: usize,
    bound: Bound,
    /// log2 of the summed probability of the derivations that lead here.
    log2_probability: f64,
    /// How many those are.
    pub derivations: u64,
}

impl Grammar {
    /// Says which sentences of a text belong to the language, and whether it is one of the language's stories.
    ///
    /// Takes any text; time is linear in its length, memory constant.
    pub fn recognize(&self, text: &str) -> Recognition {
        let mut recognition = Recognition {
            sentences: 0,
            sentences_in_language: 0,
            story_in_language: self.read_story(text.trim()).is_some(),
        };
        for sentence in sentences(text) {
            recognition.sentences += 1;
            recognition.sentences_in_language += usize::from(self.is_sentence(sentence));
        }
        recognition
    }

    /// log2 of the probability of a story, without white space around it; `None` if it is not in the language.
    pub fn log2_probability(&self, text: &str) -> Option<f64> {
        self.read_story(text.trim()).map(|reading| reading.log2_probability)
    }

    /// All readings of the text as a whole story, merged into one.
    pub(super) fn read_story(&self, text: &str) -> Option<Reading> {
        let mut whole = self.read_whole(self.root, text);
        for reading in &mut whole {
            reading.bound = [UNBOUND; MAX_VARIABLES]; // at the end it does not matter who it was about
        }
        merge(&mut whole);
        whole.first().copied()
    }

    fn is_sentence(&self, text: &str) -> bool {
        let mut rules = self.sentences.iter();
        rules.any(|&rule| !self.read_whole(rule, text).is_empty())
    }

    /// The readings of a node that end where the text does.
    fn read_whole(&self, node: NodeId, text: &str) -> Vec<Reading> {
        let facts = &self.facts[node];
        if !(facts.min_bytes..=facts.max_bytes).contains(&(text.len() as u64)) {
            return Vec::new();
        }
        let start = Reading { at: 0, bound: [UNBOUND; MAX_VARIABLES], log2_probability: 0.0, derivations: 1 };
        let mut readings = self.read(node, vec![start], text.as_bytes(), 0);
        readings.retain(|reading| reading.at == text.len());
        readings
    }

    /// The readings of a node after those given; `start` is where the sentence began.
    ///
    /// A variable gets its value, and the probability of it, at its first mention: where it is drawn it is not yet visible.
    fn read(&self, node: NodeId, from: Vec<Reading>, text: &[u8], start: usize) -> Vec<Reading> {
        if from.is_empty() {
            return from;
        }
        match &self.nodes[node] {
            Node::Draw(_) => from,
            Node::Text(literal) => {
                let step = |reading| accept(reading, literal, text, start);
                from.into_iter().filter_map(step).collect()
            }
            &Node::Cell { variable, column } => self.read_cell(variable, column, &from, text, start),
            Node::Seq(items) => items.iter().fold(from, |from, &item| self.read(item, from, text, start)),
            Node::Choice(branches) => {
                let total = total(branches) as f64;
                let mut all = Vec::new();
                for branch in branches {
                    let mut to = self.read(branch.node, from.clone(), text, start);
                    for reading in &mut to {
                        reading.log2_probability += (branch.weight as f64 / total).log2();
                    }
                    all.append(&mut to);
                }
                merge(&mut all);
                all
            }
            &Node::Sentence(body) => {
                let mut all = Vec::new();
                for mut reading in from {
                    if reading.at > 0 {
                        if text.get(reading.at) != Some(&b' ') {
                            continue;
                        }
                        reading.at += 1;
                    }
                    all.append(&mut self.read(body, vec![reading], text, reading.at));
                }
                merge(&mut all);
                all
            }
        }
    }

    fn read_cell(
        &self,
        variable: usize,
        column: usize,
        from: &[Reading],
        text: &[u8],
        start: usize,
    ) -> Vec<Reading> {
        let table = &self.variables[variable];
        let total = table.total() as f64;
        let mut all = Vec::new();
        for reading in from {
            for (row, index) in table.rows.iter().zip(0_u8..) {
                let mut reading = *reading;
                if reading.bound[variable] == UNBOUND {
                    reading.bound[variable] = index;
                    reading.log2_probability += (row.weight as f64 / total).log2();
                }
                if reading.bound[variable] == index {
                    all.extend(accept(reading, &row.cells[column], text, start));
                }
            }
        }
        all
    }
}

/// The reading after a literal, which has a capital where the sentence starts.
fn accept(mut reading: Reading, literal: &str, text: &[u8], start: usize) -> Option<Reading> {
    let rest = text.get(reading.at..)?;
    let literal = literal.as_bytes();
    let Some((first, others)) = literal.split_first() else {
        return Some(reading);
    };
    let first = if reading.at == start { first.to_ascii_uppercase() } else { *first };
    let (found, rest) = rest.split_first()?;
    if *found != first || !rest.starts_with(others) {
        return None;
    }
    reading.at += literal.len();
    Some(reading)
}

/// Makes one of the readings that are at the same place with the same values.
fn merge(readings: &mut Vec<Reading>) {
    readings.sort_by_key(|reading| (reading.at, reading.bound));
    readings.dedup_by(|next, kept| {
        let same = (next.at, next.bound) == (kept.at, kept.bound);
        if same {
            let (a, b) = (kept.log2_probability, next.log2_probability);
            kept.log2_probability = a.max(b) + (-(a - b).abs()).exp2().ln_1p() / std::f64::consts::LN_2;
            kept.derivations = kept.derivations.saturating_add(next.derivations);
        }
        same
    });
}

/// Cuts a text into sentences: each ends in `.`, `!` or `?` before white space or the end; the rest is one more.
///
/// Speech within a sentence does not end it: `"Who is there?" asked Tom.` has a quotation mark after its question mark.
pub(super) fn sentences(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text.trim();
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut chars = rest.char_indices().peekable();
        let mut end = rest.len();
        while let Some((at, c)) = chars.next() {
            if ".!?".contains(c) && chars.peek().is_some_and(|(_, next)| next.is_whitespace()) {
                end = at + 1;
                break;
            }
        }
        let (sentence, others) = rest.split_at(end);
        rest = others.trim_start();
        Some(sentence)
    })
}
