//! f32 weights that are owned or lie in a memory-mapped file: a large embedding need not be read to be used.

use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// f32 values, in memory of their own or in a memory-mapped file. Dereferences to `[f32]`.
#[derive(Clone)]
pub struct F32Data(Values);

#[derive(Clone)]
enum Values {
    Owned(Vec<f32>),
    /// A range of bytes that [`F32Data::mapped`] found to be whole, aligned f32 values.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl F32Data {
    /// Little-endian f32 values in a range of a memory map: used in place where they are aligned, else copied.
    ///
    /// # Panics
    /// If the range is not in the map or not whole values.
    pub fn mapped(map: &Arc<Mmap>, bytes: Range<usize>) -> Self {
        let values = &map[bytes.clone()];
        if cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, f32>(values).is_ok() {
            return Self(Values::Mapped(map.clone(), bytes));
        }
        let (values, rest) = values.as_chunks::<4>();
        assert!(rest.is_empty(), "{} bytes beyond whole values", rest.len());
        Self(Values::Owned(values.iter().map(|v| f32::from_le_bytes(*v)).collect()))
    }
}

impl From<Vec<f32>> for F32Data {
    fn from(values: Vec<f32>) -> Self {
        Self(Values::Owned(values))
    }
}

impl Deref for F32Data {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.0 {
            Values::Owned(values) => values,
            Values::Mapped(map, bytes) => bytemuck::cast_slice(&map[bytes.clone()]),
        }
    }
}

impl std::fmt::Debug for F32Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = if matches!(self.0, Values::Owned(_)) { "owned" } else { "mapped" };
        write!(f, "F32Data {{ {} values, {place} }}", self.len())
    }
}
