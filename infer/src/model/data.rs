//! Weights that are owned or lie in a memory-mapped file: a large embedding need not be read to be used.

use std::ops::{Deref, Range};
use std::sync::Arc;

use bitlinear::math::Widen;
use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;

/// Values in memory of their own or in a memory-mapped file. Dereferences to a slice.
#[derive(Clone)]
pub struct Data<T>(Values<T>);

/// f32 values.
pub type F32Data = Data<f32>;

#[derive(Clone)]
enum Values<T> {
    Owned(Vec<T>),
    /// A range of bytes that [`Data::mapped`] found to be whole, aligned values.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl<T: Pod> Data<T> {
    /// Little-endian values in a range of a memory map: used in place where they are aligned, else copied.
    ///
    /// # Panics
    /// If the range is not in the map or not whole values.
    pub fn mapped(map: &Arc<Mmap>, bytes: Range<usize>) -> Self {
        let values = &map[bytes.clone()];
        assert!(values.len().is_multiple_of(size_of::<T>()), "{} bytes are not whole values", values.len());
        if cfg!(target_endian = "little") && bytemuck::try_cast_slice::<u8, T>(values).is_ok() {
            return Self(Values::Mapped(map.clone(), bytes));
        }
        let value = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            if cfg!(target_endian = "big") {
                bytes.reverse();
            }
            bytemuck::pod_read_unaligned(&bytes)
        };
        Self(Values::Owned(values.chunks_exact(size_of::<T>()).map(value).collect()))
    }
}

impl<T> From<Vec<T>> for Data<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Values::Owned(values))
    }
}

impl<T: Pod> Deref for Data<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Values::Owned(values) => values,
            Values::Mapped(map, bytes) => bytemuck::cast_slice(&map[bytes.clone()]),
        }
    }
}

impl<T: Pod> std::fmt::Debug for Data<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = if matches!(self.0, Values::Owned(_)) { "owned" } else { "mapped" };
        write!(f, "Data {{ {} values, {place} }}", self.len())
    }
}

/// The embedding or the head, `[vocab_size, hidden_size]`, in the precision of its file: what is computed with is always
/// the exact f32 value.
#[derive(Debug, Clone)]
pub enum Table {
    /// 32 bits a weight.
    F32(Data<f32>),
    /// 16 bits a weight, 8 of them significant.
    Bf16(Data<bf16>),
    /// 16 bits a weight, 11 of them significant.
    F16(Data<f16>),
}

/// Evaluates an expression with `$data` bound to the values of a table, whatever their type.
macro_rules! with_table {
    ($table:expr, $data:ident => $body:expr) => {
        match $table {
            $crate::model::Table::F32($data) => $body,
            $crate::model::Table::Bf16($data) => $body,
            $crate::model::Table::F16($data) => $body,
        }
    };
}
pub(crate) use with_table;

impl Table {
    /// Number of values.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether it is empty")]
    pub fn len(&self) -> usize {
        with_table!(self, data => data.len())
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> usize {
        with_table!(self, data => size_of_val(&**data))
    }

    /// The type of the values: `f32`, `bf16` or `f16`.
    pub fn precision(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::Bf16(_) => "bf16",
            Self::F16(_) => "f16",
        }
    }

    /// The values of one row of `out.len()`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let width = out.len();
        with_table!(self, data => {
            for (out, value) in out.iter_mut().zip(&data[row * width..][..width]) {
                *out = value.widen();
            }
        });
    }

    /// Its values as f32, in their own place where they are that.
    pub(crate) fn into_f32(self) -> F32Data {
        match self {
            Self::F32(data) => data,
            halves => halves.to_f32().into(),
        }
    }

    /// All values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        with_table!(self, data => data.iter().map(|value| value.widen()).collect())
    }
}

impl From<Vec<f32>> for Table {
    fn from(values: Vec<f32>) -> Self {
        Self::F32(values.into())
    }
}

impl From<F32Data> for Table {
    fn from(values: F32Data) -> Self {
        Self::F32(values)
    }
}
