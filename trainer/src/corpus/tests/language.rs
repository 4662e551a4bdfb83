//! The stories themselves: stable, consistent, well formed.

use std::collections::BTreeSet;

use super::super::grammar::{Variable, words_of};
use super::super::recognize::sentences;
use super::super::{Grammar, Recognition};

const STORIES: u64 = 3000;

fn variable(name: &str) -> &'static Variable {
    let mut variables = Grammar::embedded().variables.iter();
    variables.find(|v| v.name == name).unwrap()
}

/// The values in a column of a variable that a text has as a word.
fn mentioned(text: &str, name: &str) -> BTreeSet<String> {
    let words: BTreeSet<String> = words_of(text).collect();
    let rows = variable(name).rows.iter();
    let values = rows.map(|row| row.cells[0].to_lowercase());
    values.filter(|value| words.contains(value)).collect()
}

#[test]
fn the_first_stories_do_not_change() {
    let mut hash = blake3::Hasher::new();
    for story in Grammar::embedded().stories(7, 100_000) {
        hash.update(story.as_bytes());
        hash.update(b"\n");
    }
    // Changes with every edit of the grammar; that it changes unasked would break resumed runs.
    assert_eq!(&hash.finalize().to_hex()[..16], "09677e9514a3bf49");
}

#[test]
fn a_story_depends_on_seed_and_index_only() {
    let grammar = Grammar::embedded();
    let stories = grammar.stories(3, 5_000);
    for (index, story) in (0..).zip(&stories) {
        assert_eq!(*story, grammar.story(3, index));
    }
    let total: usize = stories.iter().map(String::len).sum();
    let last = stories.last().unwrap().len();
    assert!(total >= 5_000 && total - last < 5_000);
    assert_eq!(grammar.stories(3, 50_000)[..stories.len()], stories);
    assert!(grammar.stories(3, 0).is_empty());
    assert_ne!(grammar.story(3, 0), grammar.story(4, 0));
    let distinct: BTreeSet<_> = (0..1000).map(|index| grammar.story(3, index)).collect();
    assert_eq!(distinct.len(), 1000);
}

#[test]
fn hero_pronouns_and_things_stay_the_same() {
    for index in 0..STORIES {
        let story = Grammar::embedded().story(11, index);
        let heroes = mentioned(&story, "hero");
        assert_eq!(heroes.len(), 1, "{story}");
        let mut rows = variable("hero").rows.iter();
        let hero = rows.find(|row| heroes.contains(&row.cells[0].to_lowercase())).unwrap();
        let words: BTreeSet<String> = words_of(&story).collect();
        assert!(words.contains(&hero.cells[4]), "{story}");
        if hero.cells[1] == "she" {
            assert!(!words.contains("he") && !words.contains("his"), "{story}");
        } else {
            let relatives = ["mother", "sister", "grandmother", "aunt"];
            let she = relatives.iter().any(|&relative| words.contains(relative));
            assert!(!words.contains("she") && (she || !words.contains("her")), "{story}");
        }
        assert_eq!(mentioned(&story, "place").len(), 1, "{story}");
        assert_eq!(mentioned(&story, "animal").len(), 1, "{story}");
        for name in ["toy", "dish", "skill"] {
            assert!(mentioned(&story, name).len() <= 1, "{name}: {story}");
        }
    }
}

#[test]
fn stories_and_sentences_are_well_formed() {
    for index in 0..STORIES {
        let story = Grammar::embedded().story(12, index);
        let parts: Vec<&str> = sentences(&story).collect();
        assert!((5..=10).contains(&parts.len()), "{story}");
        assert_eq!(parts.join(" "), story);
        for sentence in parts {
            let words = sentence.split(' ').count();
            assert!((5..=12).contains(&words), "{words} words: {sentence}");
            let first = sentence.trim_start_matches('"').chars().next().unwrap();
            assert!(first.is_ascii_uppercase(), "{sentence}");
            assert!(!sentence.contains("  ") && !sentence.contains(" ,") && !sentence.contains(" ."));
            assert_eq!(sentence.matches('"').count() % 2, 0, "{sentence}");
            let words: Vec<String> = words_of(sentence).collect();
            for pair in words.windows(2) {
                assert_ne!(pair[0], pair[1], "{sentence}");
                let vowel = pair[1].starts_with(['a', 'e', 'i', 'o', 'u']);
                assert!(!(pair[0] == "a" && vowel || pair[0] == "an" && !vowel), "{sentence}");
            }
        }
    }
}

#[test]
fn every_word_of_the_language_occurs_often() {
    let grammar = Grammar::embedded();
    let words = grammar.words();
    assert!(words.len() >= 300, "{}", words.len());
    let mut seen = std::collections::BTreeMap::new();
    for index in 0..STORIES {
        for word in words_of(&grammar.story(13, index)).collect::<BTreeSet<_>>() {
            *seen.entry(word).or_insert(0_u64) += 1;
        }
    }
    assert_eq!(words, seen.keys().cloned().collect());
    let (word, rarest) = seen.iter().min_by_key(|(_, count)| **count).unwrap();
    println!("rarest word: {word}, in {rarest} of {STORIES} stories");
    assert!(rarest * 250 >= STORIES, "{word}: {rarest} of {STORIES} stories");
}

#[test]
fn the_entropy_is_what_sampling_finds() {
    let grammar = Grammar::embedded();
    let entropy = grammar.entropy();
    let n = 20_000;
    let stories: Vec<String> = (0..n).map(|index| grammar.story(14, index)).collect();
    let figures: [(f64, Vec<f64>); 3] = [
        (entropy.bits_per_story, stories.iter().map(|s| -grammar.log2_probability(s).unwrap()).collect()),
        (entropy.mean_bytes_per_story, stories.iter().map(|s| s.len() as f64).collect()),
        (entropy.mean_sentences, stories.iter().map(|s| sentences(s).count() as f64).collect()),
    ];
    for (expected, sample) in figures {
        let mean = sample.iter().sum::<f64>() / n as f64;
        let variance = sample.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
        let error = (variance / n as f64).sqrt();
        println!("expected {expected:.4}, mean {mean:.4} +- {error:.4}");
        assert!((mean - expected).abs() < 4.0 * error);
        assert!(error < expected / 500.0, "the sample says too little");
    }
    assert!((35.0..60.0).contains(&entropy.bits_per_story));
    assert_eq!(entropy.bits_per_byte, entropy.bits_per_story / entropy.mean_bytes_per_story);
}

#[test]
fn the_readme_has_the_figures() {
    let entropy = Grammar::embedded().entropy();
    let figures = format!(
        "{:.3} bits, {:.2} bytes, {:.2} sentences a story; {:.5} bits per byte; {} words",
        entropy.bits_per_story,
        entropy.mean_bytes_per_story,
        entropy.mean_sentences,
        entropy.bits_per_byte,
        Grammar::embedded().words().len(),
    );
    let readme = include_str!("../../../../data/README.md");
    assert!(readme.contains(&figures), "data/README.md should say: {figures}");
}

#[test]
fn everything_generated_is_recognized_with_one_derivation() {
    let grammar = Grammar::embedded();
    for index in 0..STORIES {
        let story = grammar.story(15, index);
        let count = sentences(&story).count();
        let expected =
            Recognition { sentences: count, sentences_in_language: count, story_in_language: true };
        assert_eq!(grammar.recognize(&story), expected, "{story}");
        assert_eq!(grammar.read_story(&story).unwrap().derivations, 1, "{story}");
    }
}
