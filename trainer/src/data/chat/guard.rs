//! Keeps a template from overflowing the stack, which would end the process with no error.
//!
//! The template engine bounds work, memory and nested calls, but it compiles expressions and prints, compares and drops
//! values by recursion. A template could nest either as deep as it likes: `1+1+1...`, or a variable that is put into
//! itself again and again. Here expressions are limited in length before they are compiled, and every value that is
//! assigned is copied, which fails where it is too deep.

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value};

/// Tokens of one tag; each may nest an expression by one. The stack of a thread holds some thousand.
const MAX_TOKENS: usize = 1000;
/// `elif` of a template: each is nested in the one before.
const MAX_ELIF: usize = 200;
/// Levels of a value: messages have three.
const MAX_DEPTH: usize = 32;
/// Parts of a value: a thousand messages have five thousand.
const MAX_PARTS: usize = 1 << 17;
/// Parts that are copied for one unit of fuel.
const PARTS_A_UNIT: usize = 16;
/// Filters put behind what is assigned; templates can neither replace filters nor write these names by chance.
const VARIABLE: &str = "__checked_variable";
const ATTRIBUTE: &str = "__checked_attribute";
/// A key by which a namespace is known. A namespace is the one value that can be changed and so come to hold itself.
const NAMESPACE: &str = "__namespace";

/// Adds what [`guarded`] sources call.
pub(super) fn add(environment: &mut Environment) {
    environment.add_filter(VARIABLE, |state: &State, value: Value| match is_namespace(&value) {
        true => Ok(value),
        false => checked(state, &value),
    });
    environment.add_filter(ATTRIBUTE, |state: &State, value: Value| checked(state, &value));
    environment.add_function("namespace", |state: &State, defaults: Option<ValueOrKwargs>| {
        let mut pairs = vec![(Value::from(NAMESPACE), Value::from(true))];
        if let Some(defaults) = defaults {
            for key in defaults.try_iter()? {
                let value = checked(state, &defaults.get_item(&key)?)?;
                pairs.push((key, value));
            }
        }
        minijinja::functions::namespace(Some(Value::from_pairs(pairs).into()))
    });
}

/// The source with checks behind its assignments.
///
/// `{% generation %}` and `{% endgeneration %}`, with which `transformers` marks what the assistant says, become a block
/// that does nothing: few templates have them.
///
/// # Errors
/// It is not Jinja, or an expression is too long.
pub(super) fn guarded(source: &str, syntax: &SyntaxConfig) -> Result<String, Error> {
    let mut out = String::with_capacity(source.len() + 1024);
    let (mut tag, mut copied, mut elifs) = (Vec::new(), 0, 0);
    for token in tokenize(source, false, syntax.clone()) {
        let (token, span) = token?;
        let ends = matches!(token, Token::BlockEnd | Token::VariableEnd);
        tag.push((token, span.start_offset as usize..span.end_offset as usize));
        if tag.len() > MAX_TOKENS {
            return Err(refused(format!(
                "more than {MAX_TOKENS} words in a tag of line {}",
                span.start_line
            )));
        }
        if let [(Token::TemplateData(_), _)] = tag[..] {
            tag.clear();
        }
        if ends {
            elifs += usize::from(matches!(tag.get(1), Some((Token::Ident("elif"), _))));
            for (at, end, text) in edits(&tag)? {
                out.push_str(source.get(copied..at).unwrap_or_default());
                out.push_str(&text);
                copied = end;
            }
            tag.clear();
        }
    }
    if elifs > MAX_ELIF {
        return Err(refused(format!("more than {MAX_ELIF} elif")));
    }
    out.push_str(source.get(copied..).unwrap_or_default());
    Ok(out)
}

fn refused(what: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// What to replace in a tag: from, to, and the new text.
fn edits(tag: &[(Token, std::ops::Range<usize>)]) -> Result<Vec<(usize, usize, String)>, Error> {
    let [(Token::BlockStart, _), (Token::Ident(name), word), rest @ .., (_, end)] = tag else {
        return Ok(Vec::new());
    };
    match *name {
        "generation" => return Ok(vec![(word.start, word.end, "with".into())]),
        "endgeneration" => return Ok(vec![(word.start, word.end, "endwith".into())]),
        "set" => {}
        _ => return Ok(Vec::new()),
    }
    // A block between `set` and `endset` has no sign, and is text.
    let Some(sign) = rest.iter().position(|(token, _)| matches!(token, Token::Assign)) else {
        return Ok(Vec::new());
    };
    let (target, value) = (&rest[..sign], &rest[sign + 1..]);
    let mut open = 0i32;
    for (token, _) in value {
        open += match token {
            Token::ParenOpen => 1,
            Token::ParenClose => -1,
            _ => 0,
        };
        // The parentheses that are put around it would end too early.
        if open < 0 {
            return Err(Error::new(ErrorKind::SyntaxError, "unexpected `)` in an assignment"));
        }
    }
    let plain = target.iter().all(|(token, _)| matches!(token, Token::Ident(_)));
    let (from, filter) = (rest[sign].1.end, if plain { VARIABLE } else { ATTRIBUTE });
    Ok(vec![(from, from, " (".into()), (end.start, end.start, format!(") | {filter} "))])
}

fn is_namespace(value: &Value) -> bool {
    value.kind() == ValueKind::Map && value.get_attr(NAMESPACE).is_ok_and(|mark| mark.is_true())
}

/// A copy in which nothing is put off: slices and other views of a list are lists of their own.
fn checked(state: &State, value: &Value) -> Result<Value, Error> {
    let mut parts = 0;
    let copied = copy(value, MAX_DEPTH, &mut parts)?;
    state.consume_fuel((parts / PARTS_A_UNIT) as u64)?;
    Ok(copied)
}

fn copy(value: &Value, depth: usize, parts: &mut usize) -> Result<Value, Error> {
    *parts += 1;
    if *parts > MAX_PARTS {
        return Err(refused("a value has too many parts".into()));
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::Iterable) {
        return Ok(value.clone());
    }
    if depth == 0 || is_namespace(value) {
        return Err(refused("a value is nested too deep, or holds a namespace".into()));
    }
    let items = value.try_iter()?;
    if value.kind() == ValueKind::Map {
        let pair = |key: Value| {
            let value = copy(&value.get_item(&key)?, depth - 1, parts)?;
            Ok((key, value))
        };
        return Ok(Value::from_pairs(items.map(pair).collect::<Result<Vec<_>, Error>>()?));
    }
    items.map(|item| copy(&item, depth - 1, parts)).collect::<Result<Vec<_>, _>>().map(Value::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(source: &str) -> Result<String, Error> {
        guarded(source, &SyntaxConfig::default())
    }

    fn render(source: &str) -> Result<String, Error> {
        let mut environment = Environment::new();
        add(&mut environment);
        environment.render_str(&guard(source)?, ())
    }

    #[test]
    fn only_assignments_and_generation_are_changed() {
        let same = "a {%- if x == 'set y = {% 1' -%} {# {% set x = 1 %} #}{% set x %}=({% endset %}\n{% raw %}{% set x = 1 %}\
            {% generation %}{% endraw %}{{ set }}{% endif %} é\n\n";
        assert_eq!(guard(same).unwrap(), same);
        assert_eq!(guard("{%-set x='%}'-%}b").unwrap(), "{%-set x= ('%}') | __checked_variable -%}b");
        assert_eq!(
            guard("{% set n . x = (1), 2 %}").unwrap(),
            "{% set n . x = ( (1), 2 ) | __checked_attribute %}"
        );
        assert_eq!(guard("{%- generation +%}a{% endgeneration %}").unwrap(), "{%- with +%}a{% endwith %}");
        assert_eq!(guard("").unwrap(), "");
    }

    #[test]
    fn values_stay_what_they_were() {
        let source = "{% set ns = namespace(a=[1], b='x') %}{% set same = ns %}{% set ns.c = {'k': (1, 2)} %}\
            {% set a, b = 1 if true else 2, [ns.a[0:]] %}{% for i in range(40) %}{% set ns.a = ns.a + [i] %}{% endfor %}\
            {{ same.a | length }} {{ same.b }} {{ ns.c.k[1] }} {{ a }} {{ b }}";
        assert_eq!(render(source).unwrap(), "41 x 2 1 [[1]]");
    }

    #[test]
    fn parentheses_that_would_evade_are_refused() {
        for source in ["{% set x = 1) or (2 %}", "{% set n.x = n) ~ (1 %}"] {
            assert!(guard(source).is_err(), "{source}");
        }
    }
}
