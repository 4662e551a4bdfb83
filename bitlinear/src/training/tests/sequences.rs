//! Sequences of different lengths in one call.
use std::sync::Arc;

use super::*;
use crate::pool::Pool;

/// Less than a block of queries, one, and a token more; and single tokens.
const LENGTHS: [usize; 6] = [5, 1, 17, 64, 65, 3];

fn heads(lengths: &[usize]) -> Heads {
    let rope = Arc::new(RopeTable::new(10, 65, 1e4));
    Heads { sequences: lengths.to_vec(), heads: 6, kv_heads: 2, head_dim: 10, rope }
}

/// Queries, keys, values and the outputs' gradient, of widths 60, 20, 20 and 60.
type Operands = [Vec<f32>; 4];

const WIDTHS: [usize; 4] = [60, 20, 20, 60];

fn operands(seed: u64, tokens: usize) -> Operands {
    let mut r = random(seed);
    WIDTHS.map(|width| r.values(tokens * width))
}

/// Outputs and the gradients of queries, keys and values.
type Results = [Vec<f32>; 4];

fn by_slices(heads: &Heads, [q, k, v, grad]: &Operands) -> Results {
    let (mut log_sums, mut out) = (Vec::new(), vec![f32::NAN; q.len()]);
    attention(heads, q, k, v, &mut log_sums, &mut Vec::new(), &mut out);
    let mut grads = [q, k, v].map(|values| vec![f32::NAN; values.len()]);
    let borrowed = grads.each_mut().map(Vec::as_mut_slice);
    attention_backward(heads, [q, k, v], &log_sums, grad, &mut Default::default(), borrowed);
    let [grad_q, grad_k, grad_v] = grads;
    [out, grad_q, grad_k, grad_v]
}

fn by_graph(heads: &Heads, [q, k, v, grad]: &Operands) -> Results {
    let vars = [var(q, 60), var(k, 20), var(v, 20)];
    let y = autograd::attention(&vars[0], &vars[1], &vars[2], heads).unwrap();
    let mut results = vec![flat(&y)];
    results.extend(gradients(&y, grad, &vars.each_ref()));
    results.try_into().unwrap()
}

const BOTH: [fn(&Heads, &Operands) -> Results; 2] = [by_slices, by_graph];

#[test]
fn packed_sequences_are_the_sequences_one_by_one() {
    let operands = operands(8, LENGTHS.iter().sum());
    for attend in BOTH {
        let packed = attend(&heads(&LENGTHS), &operands);
        let mut joined: Results = Default::default();
        let mut start = 0;
        for length in LENGTHS {
            let part = |at: usize| operands[at][start * WIDTHS[at]..][..length * WIDTHS[at]].to_vec();
            let one = attend(&heads(&[length]), &[0, 1, 2, 3].map(part));
            joined.iter_mut().zip(one).for_each(|(joined, one)| joined.extend(one));
            start += length;
        }
        assert_eq!(packed, joined);
    }
}

#[test]
fn packed_sequences_have_the_gradients_of_the_graph() {
    let operands = operands(9, LENGTHS.iter().sum());
    let [found, expected] = BOTH.map(|attend| attend(&heads(&LENGTHS), &operands));
    assert_close("attention", &found[0], &expected[0], ROUNDING);
    for (at, name) in ["q", "k", "v"].into_iter().enumerate() {
        assert_close(name, &found[at + 1], &expected[at + 1], COARSE);
    }
}

#[test]
fn the_number_of_threads_changes_no_bit_of_packed_sequences() {
    let operands = operands(10, LENGTHS.iter().sum());
    let with = |threads: usize| {
        Arc::new(Pool::new(threads).unwrap()).install(|| by_slices(&heads(&LENGTHS), &operands))
    };
    let one = with(1);
    assert_eq!(one, with(2));
    assert_eq!(one, with(5));
}

#[test]
fn no_gradient_crosses_a_boundary() {
    let operands = operands(11, LENGTHS.iter().sum());
    for attend in BOTH {
        let mut start = 0;
        for length in LENGTHS {
            let mut only = operands.clone();
            // The gradient of this sequence's outputs alone.
            only[3][..start * 60].fill(0.0);
            only[3][(start + length) * 60..].fill(0.0);
            let [_, grads @ ..] = attend(&heads(&LENGTHS), &only);
            for (grads, width) in grads.iter().zip(WIDTHS) {
                let here = start * width..(start + length) * width;
                let crossed = |(at, g): (usize, &f32)| *g != 0.0 && !here.contains(&at);
                assert!(!grads.iter().enumerate().any(crossed), "from the sequence at {start}");
                // A token alone has no slope.
                assert!(length == 1 || grads[here.clone()].iter().any(|g| *g != 0.0));
            }
            start += length;
        }
    }
}

#[test]
fn sequences_that_are_not_the_rows_are_refused() {
    // By name, not by whatever comes of them.
    let assert_refused = |lengths: &[usize], operands: &Operands| {
        let panic = std::panic::catch_unwind(|| by_slices(&heads(lengths), operands)).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.contains("rows, or one that is empty or too long"), "{lengths:?}: {message}");
    };
    let short = operands(12, 6);
    let refused: [&[usize]; 6] = [&[], &[5], &[3, 4], &[3, 0, 3], &[0, 6], &[usize::MAX, 7]];
    for lengths in refused {
        assert_refused(lengths, &short);
    }
    // One position more than the rotary embedding has.
    let long = operands(13, 66);
    assert_refused(&[66], &long);
    by_slices(&heads(&[65, 1]), &long);
}
