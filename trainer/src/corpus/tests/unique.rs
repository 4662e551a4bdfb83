//! The proof that every text of the embedded language has one derivation: the points of the module's documentation, by listing
//! all sentences with all their choices and values, and all plots.

use std::collections::{HashMap, HashSet};

use super::super::Grammar;
use super::super::grammar::{Bound, MAX_VARIABLES, Node, NodeId, UNBOUND};
use super::super::recognize::sentences;

/// One way to write a sentence.
#[derive(Clone)]
struct Expansion {
    text: String,
    choices: Vec<u8>,
    bound: Bound,
}

/// Every way to go on from each of `from` through a node within a sentence.
fn expand(grammar: &Grammar, node: NodeId, from: Vec<Expansion>) -> Vec<Expansion> {
    match &grammar.nodes[node] {
        Node::Text(text) => from
            .into_iter()
            .map(|mut e| {
                e.text += text;
                e
            })
            .collect(),
        &Node::Cell { variable, column } => {
            let mut all = Vec::new();
            for e in from {
                for (row, index) in grammar.variables[variable].rows.iter().zip(0..) {
                    if e.bound[variable] == UNBOUND || e.bound[variable] == index {
                        let mut e = e.clone();
                        e.bound[variable] = index;
                        e.text += &row.cells[column];
                        all.push(e);
                    }
                }
            }
            all
        }
        Node::Seq(items) => items.iter().fold(from, |from, &item| expand(grammar, item, from)),
        Node::Choice(branches) => {
            let mut all = Vec::new();
            for (branch, index) in branches.iter().zip(0..) {
                let mut from = from.clone();
                from.iter_mut().for_each(|e| e.choices.push(index));
                all.append(&mut expand(grammar, branch.node, from));
            }
            all
        }
        Node::Draw(_) | Node::Sentence(_) => unreachable!("these stand in plots only"),
    }
}

/// Every sequence of sentences that a plot can have, once for each way through its choices.
fn plots(grammar: &Grammar, node: NodeId) -> Vec<Vec<NodeId>> {
    match &grammar.nodes[node] {
        Node::Sentence(_) => vec![vec![node]],
        Node::Seq(items) => items.iter().fold(vec![vec![]], |before, &item| {
            let after = plots(grammar, item);
            let join = |b: &Vec<NodeId>| after.iter().map(|a| [&b[..], a].concat()).collect::<Vec<_>>();
            before.iter().flat_map(join).collect()
        }),
        Node::Choice(branches) => branches.iter().flat_map(|b| plots(grammar, b.node)).collect(),
        _ => vec![vec![]],
    }
}

/// The first violation of points 2 to 4, in words.
fn ambiguity(grammar: &Grammar) -> Option<String> {
    let mut seen: HashMap<String, (NodeId, Vec<u8>, Bound)> = HashMap::new();
    for &rule in &grammar.sentences {
        let Node::Sentence(body) = grammar.nodes[rule] else { unreachable!() };
        let empty = Expansion { text: String::new(), choices: Vec::new(), bound: [UNBOUND; MAX_VARIABLES] };
        for mut e in expand(grammar, body, vec![empty]) {
            e.text[..1].make_ascii_uppercase();
            if !e.text.ends_with(['.', '!', '?']) || sentences(&e.text).count() != 1 {
                return Some(format!("not one sentence: {}", e.text));
            }
            for (variable, value) in e.bound.iter_mut().enumerate() {
                if grammar.facts[body].names >> variable & 1 == 0 {
                    *value = UNBOUND;
                }
            }
            let derivation = (rule, e.choices, e.bound);
            match seen.get(&e.text) {
                Some(before) if *before != derivation => {
                    return Some(format!("two derivations: {}", e.text));
                }
                Some(_) => {}
                None => {
                    seen.insert(e.text, derivation);
                }
            }
        }
    }
    println!("{} sentences", seen.len());
    let all = plots(grammar, grammar.root);
    let distinct: HashSet<_> = all.iter().collect();
    println!("{} plots", all.len());
    (distinct.len() != all.len()).then(|| "two plots with the same sentences".to_owned())
}

#[test]
fn every_text_has_one_derivation() {
    assert_eq!(ambiguity(Grammar::embedded()), None);
    assert_eq!(ambiguity(&super::small()), None);
}

#[test]
fn the_proof_sees_ambiguity() {
    let find = |text: &str| ambiguity(&Grammar::parse(text).unwrap()).unwrap_or_default();
    assert!(find("sentence s\n (a|b) b.\n a (b|c).\nplot story\n <s>\n").contains("two derivations: A b."));
    assert!(
        find("sentence s\n a.\nsentence t\n a.\nplot story\n <s>\n <t>\n").contains("two derivations: A.")
    );
    assert!(
        find("variable v: a\n x\n x y\nsentence s\n {v} (z|y z).\nplot story\n +v <s>\n")
            .contains("two derivations")
    );
    assert!(find("sentence s\n a.\nplot story\n <s> (<s>|)\n <s> <s> <s>\n <s>\n").contains("two plots"));
    assert!(find("sentence s\n a. b.\nplot story\n <s>\n").contains("not one sentence"));
    assert!(find("sentence s\n a\nplot story\n <s>\n").contains("not one sentence"));
}
