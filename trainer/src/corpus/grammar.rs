//! What a grammar is, once parsed: tables of variables and one arena of nodes in which children stand before parents.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use super::check::Facts;

/// The most variables a grammar may have: bindings are small arrays, and sets of variables are bit masks.
pub(super) const MAX_VARIABLES: usize = 16;

/// The most rows a variable may have; row numbers fit a `u8` beside [`UNBOUND`].
pub(super) const MAX_ROWS: usize = 255;

/// The value of a variable without one.
pub(super) const UNBOUND: u8 = u8::MAX;

/// The row of each variable, or [`UNBOUND`].
pub(super) type Bound = [u8; MAX_VARIABLES];

/// The index of a node in [`Grammar::nodes`].
pub(super) type NodeId = usize;

/// A probabilistic grammar of stories: parsed, checked, ready to generate and to recognize.
#[derive(Debug)]
pub struct Grammar {
    pub(super) variables: Vec<Variable>,
    /// Children stand before parents, so a pass in order computes a property of every node without recursion.
    pub(super) nodes: Vec<Node>,
    /// The facts of each node, by the same index.
    pub(super) facts: Vec<Facts>,
    /// The nodes that are a sentence, one for each sentence rule.
    pub(super) sentences: Vec<NodeId>,
    /// The plot `story`.
    pub(super) root: NodeId,
}

/// A variable of the story, drawn once: a table with one row for each value and one column for each form of it.
#[derive(Debug)]
pub(super) struct Variable {
    pub name: String,
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
}

/// One value of a variable.
#[derive(Debug)]
pub(super) struct Row {
    pub weight: u64,
    pub cells: Vec<String>,
}

impl Variable {
    /// The sum of the rows' weights; the probability of a row is its weight over this.
    pub fn total(&self) -> u64 {
        self.rows.iter().map(|row| row.weight).sum()
    }

    /// Whether the cells of a column are all different and not empty, so that writing one of them names the row.
    pub fn names(&self, column: usize) -> bool {
        let cells: BTreeSet<&str> = self.rows.iter().map(|row| row.cells[column].as_str()).collect();
        cells.len() == self.rows.len() && !cells.contains("")
    }
}

/// A piece of the grammar.
#[derive(Debug)]
pub(super) enum Node {
    /// Literal text.
    Text(String),
    /// The form of a variable that stands in a column.
    Cell { variable: usize, column: usize },
    /// The point where a variable gets its value; writes nothing.
    Draw(usize),
    /// One after the other.
    Seq(Vec<NodeId>),
    /// One of several, by weight.
    Choice(Vec<Branch>),
    /// A whole sentence: a space before it unless it is the first, and a capital.
    Sentence(NodeId),
}

/// One option of a choice.
#[derive(Debug)]
pub(super) struct Branch {
    pub weight: u64,
    pub node: NodeId,
}

/// The sum of the weights of a choice.
pub(super) fn total(branches: &[Branch]) -> u64 {
    branches.iter().map(|branch| branch.weight).sum()
}

impl Grammar {
    /// The grammar in `data/stories.grammar`, parsed at the first call.
    ///
    /// # Panics
    /// Never: a test parses the same bytes.
    pub fn embedded() -> &'static Grammar {
        static EMBEDDED: OnceLock<Grammar> = OnceLock::new();
        EMBEDDED.get_or_init(|| {
            Grammar::parse(include_str!("../../../data/stories.grammar"))
                .expect("the embedded grammar parses, as a test shows")
        })
    }

    /// The distinct words that the language has, in lower case.
    ///
    /// A word is a run of ASCII letters and apostrophes; words do not span two pieces of the grammar in the embedded one.
    pub fn words(&self) -> BTreeSet<String> {
        let mut words = BTreeSet::new();
        let mut add = |text: &str| words.extend(words_of(text));
        for node in &self.nodes {
            match node {
                Node::Text(text) => add(text),
                Node::Cell { variable, column } => {
                    for row in &self.variables[*variable].rows {
                        add(&row.cells[*column]);
                    }
                }
                Node::Draw(_) | Node::Seq(_) | Node::Choice(_) | Node::Sentence(_) => {}
            }
        }
        words
    }
}

/// The words of a text, in lower case and in order.
pub(super) fn words_of(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_ascii_alphabetic() && c != '\'')
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
}

/// Why a text is not a grammar. Lines count from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// An unindented line that opens nothing.
    #[error(
        "`{text}` opens no block; line {line} of the grammar; write `variable NAME: COLUMNS`, `phrase NAME`, \
         `sentence NAME` or `plot NAME`, and indent options"
    )]
    Header {
        /// The line.
        line: usize,
        /// What stands there.
        text: String,
    },
    /// An option before any block.
    #[error(
        "an option outside of a block; line {line} of the grammar; put a header such as `phrase NAME` above it"
    )]
    Orphan {
        /// The line.
        line: usize,
    },
    /// A name that is taken or not a name.
    #[error(
        "the name `{name}` is taken or malformed; line {line} of the grammar; use a new one of a-z, 0-9 and _"
    )]
    Name {
        /// The line.
        line: usize,
        /// The name.
        name: String,
    },
    /// A name that no block above defines.
    #[error("no `{name}` is defined above; line {line} of the grammar; define it above or fix the name")]
    Unknown {
        /// The line.
        line: usize,
        /// The name.
        name: String,
    },
    /// A phrase in a plot, a plot in a sentence, and the like.
    #[error(
        "`{name}` cannot stand here; line {line} of the grammar; plots hold plots and sentences, sentences and \
         phrases hold phrases"
    )]
    Kind {
        /// The line.
        line: usize,
        /// The rule referred to.
        name: String,
    },
    /// A row with too few or too many cells.
    #[error(
        "the row has {found} cells instead of {expected}; line {line} of the grammar; give one for each column"
    )]
    Columns {
        /// The line.
        line: usize,
        /// The columns of the variable.
        expected: usize,
        /// The cells of the row.
        found: usize,
    },
    /// A weight out of range.
    #[error("the weight `{weight}` is out of range; line {line} of the grammar; use 1 to {max}", max = super::parse::MAX_WEIGHT)]
    Weight {
        /// The line.
        line: usize,
        /// The weight.
        weight: String,
    },
    /// A character that does not belong, or a bracket that is not closed.
    #[error(
        "unexpected {found}; line {line} of the grammar; close or remove the bracket, or spell it out in words"
    )]
    Syntax {
        /// The line.
        line: usize,
        /// What was found: a quoted character or `end of line`.
        found: String,
    },
    /// A block without options.
    #[error(
        "`{name}` has no options; line {line} of the grammar; add at least one, indented, below the header"
    )]
    Empty {
        /// The line.
        line: usize,
        /// The block.
        name: String,
    },
    /// Something that exceeds what generation and recognition are ready to spend.
    #[error("{what} exceeds {limit}; line {line} of the grammar; make the grammar smaller")]
    TooLarge {
        /// The line.
        line: usize,
        /// What is too large.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// A sentence that may come out empty, or a story that may have no sentence.
    #[error("`{name}` may come out empty; line {line} of the grammar; give every option something to say")]
    Silent {
        /// The line.
        line: usize,
        /// The rule.
        name: String,
    },
    /// A variable drawn twice on one way through the story.
    #[error(
        "the variable `{variable}` may be drawn twice; line {line} of the grammar; draw it once in a story"
    )]
    DrawnTwice {
        /// The line.
        line: usize,
        /// The variable.
        variable: String,
    },
    /// A variable mentioned where it may have no value.
    #[error(
        "the variable `{variable}` may be mentioned before it is drawn; line {line} of the grammar; put `+{variable}` before it"
    )]
    NotDrawn {
        /// The line of the plot `story`.
        line: usize,
        /// The variable.
        variable: String,
    },
    /// A variable whose first mention does not tell its value, or that is never mentioned.
    #[error(
        "the first sentence with the variable `{variable}` may not name it, or none follows; line {line} of the \
         grammar; let that sentence always write a column whose cells all differ"
    )]
    NotNamed {
        /// The line of the plot `story`.
        line: usize,
        /// The variable.
        variable: String,
    },
    /// A rule or variable that no story uses.
    #[error("`{name}` is never used; line {line} of the grammar; use it or remove it")]
    Unused {
        /// The line.
        line: usize,
        /// The name.
        name: String,
    },
    /// No plot `story`.
    #[error("there is no plot `story`; line {line} of the grammar, its last; end with `plot story`")]
    NoStory {
        /// The last line.
        line: usize,
    },
}
