//! What must hold of a grammar before it is used: bounds on what it may cost, and that its variables are drawn and named.
//!
//! Every fact of a node follows from those of its children, so each is computed once, when the node is made; a rule that
//! many refer to is not walked again.

use super::grammar::{Branch, GrammarError, Node, NodeId, Variable};

/// A set of variables, one bit each.
type Set = u16;

/// The largest expansion of a rule, counted in nodes with every option: bounds the work of generating and of matching.
const MAX_SIZE: u64 = 1 << 20;

/// The longest story, in bytes.
const MAX_BYTES: u64 = 1 << 16;

/// The deepest nesting of rules: bounds the recursion.
const MAX_DEPTH: u64 = 128;

/// The most combinations of values that the variables of one sentence may have: bounds the states of the recognizer.
const MAX_COMBINATIONS: u64 = 1 << 18;

/// What is known of every text that a node can write.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Facts {
    /// Nodes in the full expansion.
    size: u64,
    depth: u64,
    /// The shortest text in bytes.
    pub min_bytes: u64,
    /// The longest text in bytes, with a space for each sentence.
    pub max_bytes: u64,
    min_sentences: u64,
    /// Variables that need a value from outside.
    pub needs: Set,
    /// Variables that may, and that surely do, get a value inside.
    may_draw: Set,
    must_draw: Set,
    /// Variables that every text names by a cell that tells the row.
    pub names: Set,
    /// Variables whose first mention may be here without naming them.
    vague: Set,
    /// Variables drawn here that may not be named afterwards.
    unnamed: Set,
}

/// The facts of a node whose children have theirs.
pub(super) fn facts(
    node: &Node,
    known: &[Facts],
    variables: &[Variable],
    line: usize,
) -> Result<Facts, GrammarError> {
    let facts = match node {
        Node::Text(text) => {
            Facts { min_bytes: text.len() as u64, max_bytes: text.len() as u64, ..Facts::default() }
        }
        &Node::Cell { variable, column } => cell(variables, variable, column),
        &Node::Draw(variable) => Facts {
            may_draw: 1 << variable,
            must_draw: 1 << variable,
            unnamed: 1 << variable,
            ..Facts::default()
        },
        Node::Seq(items) => sequence(items, known, variables, line)?,
        Node::Choice(branches) => choice(branches, known),
        &Node::Sentence(body) => Facts {
            max_bytes: known[body].max_bytes.saturating_add(1),
            min_sentences: 1,
            vague: known[body].needs & !known[body].names,
            ..known[body]
        },
    };
    let facts = Facts { size: facts.size.saturating_add(1), depth: facts.depth + 1, ..facts };
    for (what, value, limit) in [
        ("the full expansion in nodes", facts.size, MAX_SIZE),
        ("the longest text in bytes", facts.max_bytes, MAX_BYTES),
        ("the nesting of rules", facts.depth, MAX_DEPTH),
    ] {
        if value > limit {
            return Err(GrammarError::TooLarge { line, what, limit });
        }
    }
    Ok(facts)
}

fn cell(variables: &[Variable], variable: usize, column: usize) -> Facts {
    let table = &variables[variable];
    let lengths = || table.rows.iter().map(|row| row.cells[column].len() as u64);
    Facts {
        min_bytes: lengths().min().unwrap_or(0),
        max_bytes: lengths().max().unwrap_or(0),
        needs: 1 << variable,
        names: if table.names(column) { 1 << variable } else { 0 },
        ..Facts::default()
    }
}

fn sequence(
    items: &[NodeId],
    known: &[Facts],
    variables: &[Variable],
    line: usize,
) -> Result<Facts, GrammarError> {
    let mut all = Facts::default();
    for item in items.iter().map(|&item| known[item]) {
        let twice = all.may_draw & item.may_draw;
        if let Some(variable) = first(twice, variables) {
            return Err(GrammarError::DrawnTwice { line, variable });
        }
        all = Facts {
            size: all.size.saturating_add(item.size),
            depth: all.depth.max(item.depth),
            min_bytes: all.min_bytes.saturating_add(item.min_bytes),
            max_bytes: all.max_bytes.saturating_add(item.max_bytes),
            min_sentences: all.min_sentences.saturating_add(item.min_sentences),
            needs: all.needs | (item.needs & !all.must_draw),
            may_draw: all.may_draw | item.may_draw,
            must_draw: all.must_draw | item.must_draw,
            vague: all.vague | (item.vague & !all.names),
            unnamed: (all.unnamed & !item.names) | item.unnamed,
            names: all.names | item.names,
        };
    }
    Ok(all)
}

fn choice(branches: &[Branch], known: &[Facts]) -> Facts {
    let branches = branches.iter().map(|branch| known[branch.node]);
    branches
        .reduce(|all, branch| Facts {
            size: all.size.saturating_add(branch.size),
            depth: all.depth.max(branch.depth),
            min_bytes: all.min_bytes.min(branch.min_bytes),
            max_bytes: all.max_bytes.max(branch.max_bytes),
            min_sentences: all.min_sentences.min(branch.min_sentences),
            needs: all.needs | branch.needs,
            may_draw: all.may_draw | branch.may_draw,
            must_draw: all.must_draw & branch.must_draw,
            vague: all.vague | branch.vague,
            unnamed: all.unnamed | branch.unnamed,
            names: all.names & branch.names,
        })
        .unwrap_or_default()
}

/// What must hold of the body of a sentence.
pub(super) fn sentence(
    body: &Facts,
    variables: &[Variable],
    name: &str,
    line: usize,
) -> Result<(), GrammarError> {
    if body.min_bytes == 0 {
        let name = name.to_owned();
        return Err(GrammarError::Silent { line, name });
    }
    let combinations = members(body.needs, variables)
        .map(|variable| variable.rows.len() as u64)
        .fold(1, u64::saturating_mul);
    if combinations > MAX_COMBINATIONS {
        return Err(GrammarError::TooLarge {
            line,
            what: "the combinations of values in the sentence",
            limit: MAX_COMBINATIONS,
        });
    }
    Ok(())
}

/// What must hold of the whole story.
pub(super) fn story(story: &Facts, variables: &[Variable], line: usize) -> Result<(), GrammarError> {
    if story.min_sentences == 0 {
        let name = "story".to_owned();
        return Err(GrammarError::Silent { line, name });
    }
    if let Some(variable) = first(story.needs, variables) {
        return Err(GrammarError::NotDrawn { line, variable });
    }
    if let Some(variable) = first(story.vague | story.unnamed, variables) {
        return Err(GrammarError::NotNamed { line, variable });
    }
    Ok(())
}

/// The variables of a set.
pub(super) fn members(set: Set, variables: &[Variable]) -> impl Iterator<Item = &Variable> {
    let bits = (0..variables.len()).filter(move |bit| set >> bit & 1 == 1);
    bits.map(|bit| &variables[bit])
}

fn first(set: Set, variables: &[Variable]) -> Option<String> {
    members(set, variables).next().map(|v| v.name.clone())
}
