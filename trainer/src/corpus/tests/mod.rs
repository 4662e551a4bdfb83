//! What the embedded language promises, and what any grammar does. The recognizer is the judge of models later, so it is
//! judged here: against generation, against listing everything, against mutations, against a grammar solved by hand.

mod judge;
mod language;
mod parsing;
mod unique;

use proptest::test_runner::Config;

use super::Grammar;

/// Two words, two names: small enough to solve by hand.
const SMALL: &str = "
variable hero: name | she
    3 Ann | she
    1 Bob | he
phrase mood
    glad
    2 sad
    1 (calm|still)
sentence one
    {hero} is <mood>.
sentence two
    {hero.she} sings.
    3 {hero.she} (runs|walks).
plot story
    3 +hero <one>
    1 +hero <one> <two>
";

fn small() -> Grammar {
    Grammar::parse(SMALL).unwrap()
}

/// Property tests that leave no files behind.
fn quiet() -> Config {
    Config { failure_persistence: None, ..Config::default() }
}
