//! From text to [`Grammar`]: one pass over the lines, in which a rule may refer only to rules above it.
//!
//! That order is what keeps everything total: no cycle can be written, and nothing here recurses but nested brackets, whose
//! depth is bounded.

use std::collections::HashMap;

use super::check::{self, Facts};
use super::grammar::{Branch, Grammar, GrammarError, MAX_ROWS, MAX_VARIABLES, Node, NodeId, Row, Variable};

/// The largest weight; sums of weights then cannot overflow.
pub(super) const MAX_WEIGHT: u64 = 1_000_000;

/// The largest grammar file, in bytes.
const MAX_FILE: usize = 1 << 20;

/// The most brackets inside one another.
const MAX_NESTING: usize = 8;

/// What a block defines.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Phrase,
    Sentence,
    Plot,
}

/// What a name stands for.
#[derive(Clone, Copy)]
enum Meaning {
    Variable(usize),
    Rule(Kind, NodeId),
}

/// A defined name: its meaning, where, and whether something refers to it.
struct Definition {
    line: usize,
    meaning: Meaning,
    used: bool,
}

/// A header and its options, each with its line number.
struct Block<'a> {
    line: usize,
    header: &'a str,
    options: Vec<(usize, &'a str)>,
}

impl Grammar {
    /// Parses and checks a grammar; `data/README.md` describes the syntax.
    ///
    /// Total: any text gives a grammar or an error, in time proportional to its size, and what is accepted is bounded in
    /// everything that generation and recognition spend.
    ///
    /// # Errors
    /// [`GrammarError`], with the line, for anything malformed, unknown, unused, too large, or ambiguous by construction
    /// (a variable whose first mention does not name it).
    pub fn parse(text: &str) -> Result<Grammar, GrammarError> {
        if text.len() > MAX_FILE {
            return Err(GrammarError::TooLarge {
                line: 1,
                what: "the file in bytes",
                limit: MAX_FILE as u64,
            });
        }
        let mut parser = Parser::default();
        for block in blocks(text)? {
            parser.block(&block)?;
        }
        parser.finish(text.lines().count().max(1))
    }
}

/// Cuts the text into blocks; comments and blank lines fall away.
fn blocks(text: &str) -> Result<Vec<Block<'_>>, GrammarError> {
    let mut blocks: Vec<Block<'_>> = Vec::new();
    for (line, whole) in (1..).zip(text.lines()) {
        let content = whole.trim();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        if whole.starts_with([' ', '\t']) {
            let block = blocks.last_mut().ok_or(GrammarError::Orphan { line })?;
            block.options.push((line, content));
        } else {
            blocks.push(Block { line, header: content, options: Vec::new() });
        }
    }
    Ok(blocks)
}

/// The state of the pass: what is defined so far.
#[derive(Default)]
struct Parser {
    variables: Vec<Variable>,
    nodes: Vec<Node>,
    facts: Vec<Facts>,
    sentences: Vec<NodeId>,
    names: HashMap<String, Definition>,
}

impl Parser {
    fn block(&mut self, block: &Block<'_>) -> Result<(), GrammarError> {
        let line = block.line;
        let malformed = || GrammarError::Header { line, text: excerpt(block.header) };
        let (keyword, rest) = block.header.split_once(' ').ok_or_else(malformed)?;
        let (name, columns) = match rest.split_once(':') {
            Some((name, columns)) => (name.trim(), Some(columns)),
            None => (rest.trim(), None),
        };
        if block.options.is_empty() {
            return Err(GrammarError::Empty { line, name: excerpt(name) });
        }
        let meaning = match (keyword, columns) {
            ("variable", Some(columns)) => Meaning::Variable(self.variable(name, columns, block)?),
            ("phrase", None) => Meaning::Rule(Kind::Phrase, self.rule(Kind::Phrase, block)?),
            ("plot", None) => Meaning::Rule(Kind::Plot, self.rule(Kind::Plot, block)?),
            ("sentence", None) => {
                let body = self.rule(Kind::Sentence, block)?;
                let node = self.add(Node::Sentence(body), line)?;
                check::sentence(&self.facts[body], &self.variables, name, line)?;
                self.sentences.push(node);
                Meaning::Rule(Kind::Sentence, node)
            }
            _ => return Err(malformed()),
        };
        let definition = Definition { line, meaning, used: false };
        if !is_name(name) || self.names.contains_key(name) {
            return Err(GrammarError::Name { line, name: excerpt(name) });
        }
        self.names.insert(name.to_owned(), definition);
        Ok(())
    }

    fn variable(&mut self, name: &str, columns: &str, block: &Block<'_>) -> Result<usize, GrammarError> {
        let too_large = |line, what, limit: usize| GrammarError::TooLarge { line, what, limit: limit as u64 };
        if self.variables.len() == MAX_VARIABLES {
            return Err(too_large(block.line, "the number of variables", MAX_VARIABLES));
        }
        let columns: Vec<String> = columns.split('|').map(|c| c.trim().to_owned()).collect();
        for (index, column) in columns.iter().enumerate() {
            if !is_name(column) || columns[..index].contains(column) {
                return Err(GrammarError::Name { line: block.line, name: excerpt(column) });
            }
        }
        let mut rows = Vec::new();
        for &(line, option) in &block.options {
            if rows.len() == MAX_ROWS {
                return Err(too_large(line, "the number of rows", MAX_ROWS));
            }
            let (weight, text) = weight(option, line)?;
            let cells: Vec<String> = text.split('|').map(|c| c.trim().to_owned()).collect();
            if cells.len() != columns.len() {
                return Err(GrammarError::Columns { line, expected: columns.len(), found: cells.len() });
            }
            rows.push(Row { weight, cells });
        }
        self.variables.push(Variable { name: name.to_owned(), columns, rows });
        Ok(self.variables.len() - 1)
    }

    /// The options of a phrase, sentence or plot, as one node.
    fn rule(&mut self, kind: Kind, block: &Block<'_>) -> Result<NodeId, GrammarError> {
        let mut branches = Vec::new();
        for &(line, option) in &block.options {
            let (weight, text) = weight(option, line)?;
            let mut cursor = Cursor { rest: text, line };
            let node = self.sequence(&mut cursor, kind, 0)?;
            branches.push(Branch { weight, node });
        }
        self.add(Node::Choice(branches), block.line)
    }

    /// Pieces up to the end of the line or, inside of brackets, up to `|` or `)`.
    fn sequence(
        &mut self,
        cursor: &mut Cursor<'_>,
        kind: Kind,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        let line = cursor.line;
        let mut items = Vec::new();
        while let Some(next) = cursor.peek() {
            let item = match next {
                '|' | ')' if depth > 0 => break,
                '(' => self.brackets(cursor, kind, depth + 1)?,
                '<' => self.reference(cursor.enclosed('>')?, kind, line)?,
                '{' if kind != Kind::Plot => {
                    let node = self.cell(cursor.enclosed('}')?, line)?;
                    self.add(node, line)?
                }
                '+' if kind == Kind::Plot => {
                    cursor.skip();
                    let word = cursor.take(|c| c.is_ascii_alphanumeric() || c == '_');
                    let variable = self.lookup_variable(word, line)?;
                    self.add(Node::Draw(variable), line)?
                }
                c if kind == Kind::Plot && c.is_whitespace() => {
                    cursor.skip();
                    continue;
                }
                c if kind == Kind::Plot || "|)>}".contains(c) => return Err(cursor.unexpected()),
                _ => {
                    let text = cursor.take(|c| !"()<>{}|".contains(c)).to_owned();
                    self.add(Node::Text(text), line)?
                }
            };
            items.push(item);
        }
        self.add(Node::Seq(items), line)
    }

    /// `(option|option)`, each with an optional weight.
    fn brackets(
        &mut self,
        cursor: &mut Cursor<'_>,
        kind: Kind,
        depth: usize,
    ) -> Result<NodeId, GrammarError> {
        let line = cursor.line;
        if depth > MAX_NESTING {
            return Err(GrammarError::TooLarge {
                line,
                what: "the nesting of brackets",
                limit: MAX_NESTING as u64,
            });
        }
        let mut branches = Vec::new();
        loop {
            cursor.skip(); // the bracket, or the bar of the option before
            let (weight, rest) = weight(cursor.rest, line)?;
            cursor.rest = rest;
            let node = self.sequence(cursor, kind, depth)?;
            branches.push(Branch { weight, node });
            match cursor.peek() {
                Some('|') => {}
                Some(')') => break,
                _ => return Err(cursor.unexpected()),
            }
        }
        cursor.skip();
        self.add(Node::Choice(branches), line)
    }

    /// `<rule>`: the node of the rule itself, shared by all who refer to it.
    fn reference(&mut self, name: &str, from: Kind, line: usize) -> Result<NodeId, GrammarError> {
        let definition = self.lookup(name, line)?;
        let Meaning::Rule(kind, node) = definition.meaning else {
            return Err(GrammarError::Kind { line, name: excerpt(name) });
        };
        if (from == Kind::Plot) == (kind == Kind::Phrase) || (from != Kind::Plot && kind != Kind::Phrase) {
            return Err(GrammarError::Kind { line, name: excerpt(name) });
        }
        Ok(node)
    }

    /// `{variable}`, its first column, or `{variable.column}`.
    fn cell(&mut self, name: &str, line: usize) -> Result<Node, GrammarError> {
        let (name, column) = match name.split_once('.') {
            Some((name, column)) => (name, Some(column)),
            None => (name, None),
        };
        let variable = self.lookup_variable(name, line)?;
        let columns = &self.variables[variable].columns;
        let column = match column {
            None => 0,
            Some(wanted) => columns
                .iter()
                .position(|c| c == wanted)
                .ok_or_else(|| GrammarError::Unknown { line, name: excerpt(&format!("{name}.{wanted}")) })?,
        };
        Ok(Node::Cell { variable, column })
    }

    fn lookup(&mut self, name: &str, line: usize) -> Result<&Definition, GrammarError> {
        match self.names.get_mut(name) {
            Some(definition) => {
                definition.used = true;
                Ok(definition)
            }
            None => Err(GrammarError::Unknown { line, name: excerpt(name) }),
        }
    }

    fn lookup_variable(&mut self, name: &str, line: usize) -> Result<usize, GrammarError> {
        match self.lookup(name, line)?.meaning {
            Meaning::Variable(variable) => Ok(variable),
            Meaning::Rule(..) => Err(GrammarError::Unknown { line, name: excerpt(name) }),
        }
    }

    /// Adds a node after its children, with its facts.
    fn add(&mut self, node: Node, line: usize) -> Result<NodeId, GrammarError> {
        let facts = check::facts(&node, &self.facts, &self.variables, line)?;
        self.nodes.push(node);
        self.facts.push(facts);
        Ok(self.nodes.len() - 1)
    }

    /// Checks the whole and hands it over.
    fn finish(mut self, last_line: usize) -> Result<Grammar, GrammarError> {
        let story = self.names.remove("story");
        let Some(Definition { line, meaning: Meaning::Rule(Kind::Plot, root), .. }) = story else {
            return Err(GrammarError::NoStory { line: last_line });
        };
        let unused = self.names.iter().filter(|(_, d)| !d.used);
        if let Some((name, definition)) = unused.min_by_key(|(_, d)| d.line) {
            return Err(GrammarError::Unused { line: definition.line, name: name.clone() });
        }
        check::story(&self.facts[root], &self.variables, line)?;
        Ok(Grammar {
            variables: self.variables,
            nodes: self.nodes,
            facts: self.facts,
            sentences: self.sentences,
            root,
        })
    }
}

/// The rest of one option.
struct Cursor<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn skip(&mut self) {
        let mut chars = self.rest.chars();
        chars.next();
        self.rest = chars.as_str();
    }

    /// The longest start of the rest whose characters all pass.
    fn take(&mut self, pass: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !pass(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    /// What stands between the bracket here and the closing one.
    fn enclosed(&mut self, close: char) -> Result<&'a str, GrammarError> {
        self.skip();
        let name = self.take(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        if self.peek() != Some(close) {
            return Err(self.unexpected());
        }
        self.skip();
        Ok(name)
    }

    fn unexpected(&self) -> GrammarError {
        GrammarError::Syntax {
            line: self.line,
            found: self.peek().map_or_else(|| "end of line".to_owned(), |c| format!("`{c}`")),
        }
    }
}

/// Splits off a leading `WEIGHT `; without one the weight is 1.
fn weight(option: &str, line: usize) -> Result<(u64, &str), GrammarError> {
    let end = option.find(|c: char| !c.is_ascii_digit()).unwrap_or(option.len());
    let (digits, rest) = option.split_at(end);
    if digits.is_empty() {
        return Ok((1, option));
    }
    match digits.parse() {
        Ok(weight @ 1..=MAX_WEIGHT) => Ok((weight, rest.strip_prefix(' ').unwrap_or(rest))),
        _ => Err(GrammarError::Weight { line, weight: excerpt(digits) }),
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    !name.is_empty() && name.chars().all(allowed)
}

/// The start of a text, short enough for a message.
fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}
