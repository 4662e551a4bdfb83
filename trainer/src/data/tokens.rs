//! A stream of token ids in a memory map or in memory, stored as little-endian u16 or u32.
//!
//! Ids are decoded at each read instead of casting the map to a slice: it costs nothing beside a training step, asks for
//! no alignment, and reads the same on a big-endian machine.

use super::error::DataError;
use super::source::Width;
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// A stream of token ids; cloning shares the memory.
#[derive(Debug, Clone)]
pub struct Tokens {
    store: Arc<Store>,
    width: Width,
    /// Which tokens of the store belong to this stream.
    range: Range<usize>,
}

#[derive(Debug)]
enum Store {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Tokens {
    /// Tokens held in memory.
    pub fn from_ids(ids: &[u32]) -> Self {
        let bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        Self { store: Arc::new(Store::Owned(bytes)), width: Width::U32, range: 0..ids.len() }
    }

    /// The tokens of a map, a trailing part of a token left out.
    pub(super) fn mapped(map: Mmap, width: Width) -> Self {
        let range = 0..map.len() / width.bytes();
        Self { store: Arc::new(Store::Mapped(map)), width, range }
    }

    /// Opens a token file, `width` bytes a token.
    ///
    /// # Errors
    /// `Io`, `Empty`, or `TokenFileLength` when the file does not hold whole tokens.
    pub fn open(path: &Path, width: Width) -> Result<Self, DataError> {
        let map = map(path)?;
        if map.is_empty() {
            return Err(DataError::Empty { place: path.display().to_string() });
        }
        if map.len() % width.bytes() != 0 {
            let (path, length) = (path.to_path_buf(), map.len() as u64);
            return Err(DataError::TokenFileLength { path, length, width: width.bytes() });
        }
        Ok(Self::mapped(map, width))
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The first `at` tokens and the rest.
    ///
    /// # Panics
    /// When `at > len`.
    pub fn split_at(&self, at: usize) -> (Self, Self) {
        assert!(at <= self.len(), "cut {at} of {} tokens", self.len());
        let cut = self.range.start + at;
        let part = |range| Self { range, ..self.clone() };
        (part(self.range.start..cut), part(cut..self.range.end))
    }

    /// The tokens of `range`.
    ///
    /// # Panics
    /// When the range does not lie within `0..len`.
    pub fn get(&self, range: Range<usize>) -> Vec<u32> {
        assert!(range.start <= range.end && range.end <= self.len(), "tokens {range:?} of {}", self.len());
        self.ids(range).collect()
    }

    /// The highest id, or none of an empty stream.
    pub fn max_id(&self) -> Option<u32> {
        self.ids(0..self.len()).max()
    }

    /// Checks every id against the vocabulary.
    ///
    /// # Errors
    /// `TokenOutOfRange` with the first token that is not below `vocab_size`.
    pub fn check(&self, vocab_size: usize, split: &'static str) -> Result<(), DataError> {
        match self.ids(0..self.len()).enumerate().find(|&(_, id)| id as usize >= vocab_size) {
            None => Ok(()),
            Some((position, id)) => {
                Err(DataError::TokenOutOfRange { id, position: position as u64, vocab_size, split })
            }
        }
    }

    /// Bytes of text that the tokens stand for: the sum of `table[id]`, ids beyond the table counting 0.
    pub fn text_bytes(&self, table: &[u32]) -> u64 {
        self.ids(0..self.len()).map(|id| table.get(id as usize).map_or(0, |&bytes| u64::from(bytes))).sum()
    }

    /// Feeds width and tokens to a hash.
    pub(super) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&(self.width.bytes() as u64).to_le_bytes()).update(&(self.len() as u64).to_le_bytes());
        hasher.update(self.bytes(0..self.len()));
    }

    fn bytes(&self, range: Range<usize>) -> &[u8] {
        let store: &[u8] = match &*self.store {
            Store::Mapped(map) => map,
            Store::Owned(bytes) => bytes,
        };
        let (start, width) = (self.range.start, self.width.bytes());
        &store[(start + range.start) * width..(start + range.end) * width]
    }

    pub(super) fn ids(&self, range: Range<usize>) -> impl Iterator<Item = u32> + '_ {
        let width = self.width;
        self.bytes(range).chunks_exact(width.bytes()).map(move |bytes| match *bytes {
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("chunks are {width:?} wide"),
        })
    }
}

/// Writes ids as `width` asks; the caller has checked that they fit.
pub(super) fn to_bytes(ids: &[u32], width: Width) -> Vec<u8> {
    match width {
        Width::U16 => ids.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect(),
        Width::U32 => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
    }
}

/// Maps a file for reading.
pub(super) fn map(path: &Path) -> Result<Mmap, DataError> {
    let file = File::open(path).map_err(DataError::io("open", path))?;
    // SAFETY: the map is read-only and every access goes through the slice of its length taken here. That nobody else
    // shortens or rewrites the file meanwhile cannot be checked: our own cache files are only ever replaced by rename,
    // which leaves this map's file as it is, and a user's token file is documented as not to be changed during a run.
    unsafe { Mmap::map(&file) }.map_err(DataError::io("map", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_give_the_ids_that_they_hold() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        for (width, ids) in [(Width::U16, [0, 1, 258, 65_535]), (Width::U32, [0, 65_536, 7, u32::MAX])] {
            std::fs::write(&path, to_bytes(&ids, width)).unwrap();
            let tokens = Tokens::open(&path, width).unwrap();
            assert_eq!(tokens.get(0..4), ids);
            assert_eq!(tokens.get(2..3), ids[2..3]);
            let (head, tail) = tokens.split_at(1);
            assert_eq!((head.get(0..1), tail.get(0..3)), (ids[..1].to_vec(), ids[1..].to_vec()));
            assert_eq!(tail.split_at(1).1.get(1..2), ids[3..]);
            assert_eq!((tokens.max_id(), head.max_id()), (ids.iter().copied().max(), Some(0)));
            assert_eq!(tokens.split_at(4).1.max_id(), None);
        }
        assert_eq!(to_bytes(&[0x0102], Width::U16), [2, 1]);
    }

    #[test]
    fn files_of_another_length_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        for (width, length) in [(Width::U16, 1), (Width::U16, 7), (Width::U32, 2), (Width::U32, 9)] {
            std::fs::write(&path, vec![0; length]).unwrap();
            match Tokens::open(&path, width) {
                Err(DataError::TokenFileLength { length: found, .. }) => {
                    assert_eq!(found, length as u64)
                }
                other => panic!("{other:?}"),
            }
        }
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(Tokens::open(&path, Width::U16), Err(DataError::Empty { .. })));
    }

    #[test]
    fn the_first_id_outside_the_vocabulary_is_named() {
        let tokens = Tokens::from_ids(&[1, 2, 9, 10, 11]);
        tokens.check(12, "training").unwrap();
        match tokens.check(10, "training") {
            Err(DataError::TokenOutOfRange { id: 10, position: 3, vocab_size: 10, split: "training" }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(tokens.text_bytes(&[5, 1, 2]), 3);
    }

    #[test]
    #[should_panic(expected = "tokens 3..6 of 5")]
    fn reading_outside_panics() {
        Tokens::from_ids(&[0; 8]).split_at(5).0.get(3..6);
    }
}
