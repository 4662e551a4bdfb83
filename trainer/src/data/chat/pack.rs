//! Examples packed whole into rows of one length.

use super::super::windows::epoch_order;

/// Examples that are packed together: enough for rows to be filled well, few enough that a large set takes no time.
const BUFFER: usize = 1024;

/// Packs examples of `lengths` tokens into rows of `capacity`; returns which examples each row holds.
///
/// Each example is in one row, and the sum of a row's lengths is at most `capacity`. The examples are taken in an order
/// drawn from `seed`, so that a sorted file does not give rows of one kind, 1024 at a time; of these the longest goes
/// first, each into the first row of the 1024 that has room for it (first-fit decreasing). Equal lengths keep their
/// order.
///
/// # Panics
/// When an example is longer than a row.
pub(super) fn pack(lengths: &[usize], capacity: usize, seed: u64) -> Vec<Vec<usize>> {
    let mut rows = Vec::new();
    for buffer in epoch_order(seed, 0, lengths.len() as u64).chunks(BUFFER) {
        let mut examples: Vec<usize> = buffer.iter().map(|&example| example as usize).collect();
        examples.sort_by_key(|&example| std::cmp::Reverse(lengths[example]));
        // Rows of this buffer with the room that each has left.
        let mut open: Vec<(usize, Vec<usize>)> = Vec::new();
        for example in examples {
            let length = lengths[example];
            assert!(length <= capacity, "an example of {length} tokens in rows of {capacity}");
            match open.iter_mut().find(|(room, _)| *room >= length) {
                Some((room, row)) => {
                    *room -= length;
                    row.push(example);
                }
                None => open.push((capacity - length, vec![example])),
            }
        }
        rows.extend(open.into_iter().map(|(_, row)| row));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_example_is_in_one_row_that_holds_it(
            lengths in prop::collection::vec(1usize..50, 0..3000), extra in 0usize..60, seed: u64
        ) {
            let capacity = 49 + extra;
            let rows = pack(&lengths, capacity, seed);
            prop_assert_eq!(&rows, &pack(&lengths, capacity, seed));
            let mut all: Vec<_> = rows.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len()).collect::<Vec<_>>());
            let total = |row: &Vec<usize>| row.iter().map(|&example| lengths[example]).sum::<usize>();
            prop_assert!(rows.iter().all(|row| total(row) <= capacity));
            // First fit: within a buffer no two rows could have been one.
            let halves = rows.iter().filter(|row| 2 * total(row) <= capacity).count();
            prop_assert!(halves <= lengths.len().div_ceil(BUFFER), "{} half-empty rows", halves);
        }
    }

    #[test]
    fn rows_are_filled() {
        let rows = pack(&[5, 1, 4, 3, 3, 2], 6, 0);
        let mut filled: Vec<Vec<usize>> =
            rows.iter().map(|row| row.iter().map(|&example| [5, 1, 4, 3, 3, 2][example]).collect()).collect();
        filled.sort();
        assert_eq!(filled, [vec![3, 3], vec![4, 2], vec![5, 1]]);
        assert_ne!(pack(&[1; 64], 2, 1), pack(&[1; 64], 2, 2));
        assert!(pack(&[], 6, 0).is_empty());
    }

    #[test]
    #[should_panic(expected = "an example of 7 tokens in rows of 6")]
    fn longer_examples_are_a_fault_of_the_caller() {
        pack(&[7], 6, 0);
    }
}
