//! The embedded corpus: children's stories out of a small probabilistic grammar of ours.
//!
//! Why a grammar and not a text: the first command a user runs needs no network, the corpus is a few kilobytes of source
//! that expands to as many megabytes as asked, and, because every text has exactly one derivation, the entropy of the
//! corpus is known *exactly*: the loss of a model can be compared with the limit, and a recognizer can say which of a
//! model's sentences and stories belong to the language. What it trades away: it is not natural text, and a model that
//! speaks it perfectly still knows only its few hundred words.
//!
//! # How the language is made
//! `data/README.md` describes the syntax. A grammar has *variables* (the hero, the place: a table whose rows are drawn with
//! weights and whose columns hold what the text needs of them), *sentences* and *phrases* (weighted options of literal text,
//! cells of variables and other phrases) and *plots* (weighted options of sequences of sentences, which also say when a
//! variable is drawn). A story is the expansion of the plot `story`; its sentences are separated by one space and the first
//! letter of each is made a capital. A rule refers only to rules above it, so there is no recursion, the language is
//! finite, and one pass over the nodes in order computes any property of them from their children's.
//!
//! Choices do not depend on variables or on each other, so expectations add up: that is what makes the entropy exact, see
//! [`Grammar::entropy`].
//!
//! # Why every text has one derivation
//! [`Grammar::parse`] sees to these, for any grammar:
//! 1. A variable is drawn at most once in a story, before it is mentioned, and the first sentence that mentions it *names*
//!    it: it always contains a cell of a column whose values are all different. No variable is drawn and left unnamed.
//!
//! The tests show these for the embedded grammar, by listing everything that it can write:
//!
//! 2. Every sentence ends in `.`, `!` or `?`, and none of these is followed by a space within a sentence; so the text alone
//!    says where its sentences end.
//! 3. Over all sentence rules, all their choices and all values of the variables, equal texts come from the same rule,
//!    the same choices, and the same values of the variables that the sentence names.
//! 4. Different choices in the plots give different sequences of sentence rules.
//!
//! Take a text with two derivations. By 2 they agree on the sentences, by 3 on the rule and the choices of each sentence, by
//! 1 and 3 on the value of every variable drawn, by 4 on the choices in the plots: they are the same derivation.

mod check;
mod entropy;
mod generate;
mod grammar;
mod parse;
mod recognize;
#[cfg(test)]
mod tests;

pub use entropy::Entropy;
pub use grammar::{Grammar, GrammarError};
pub use recognize::Recognition;
