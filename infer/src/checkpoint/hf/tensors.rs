//! The tensors of a folder's safetensors files, checked one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitlinear::packed::{Layout, PackError, TernaryWeight};
use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::super::{CheckpointError, io_error, packing};
use super::{INDEX, WEIGHTS, read_json};
use crate::model::{Data, F32Data, Table};

/// A tensor in one of the files; the safetensors reader has checked that its bytes are there and fit its shape.
struct Tensor {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// All tensors of a folder's files, by name.
pub(super) struct Tensors {
    folder: PathBuf,
    files: Vec<(PathBuf, Arc<Mmap>)>,
    entries: BTreeMap<String, Tensor>,
    /// What ternary weights become.
    layout: Layout,
}

impl Tensors {
    pub(super) fn open(folder: &Path, layout: Layout) -> Result<Self, CheckpointError> {
        let mut tensors =
            Self { folder: folder.to_owned(), files: Vec::new(), entries: BTreeMap::new(), layout };
        let index = folder.join(INDEX);
        if folder.join(WEIGHTS).exists() || !index.exists() {
            tensors.add(folder.join(WEIGHTS))?;
        } else {
            for name in shard_names(&index)? {
                tensors.add(folder.join(name))?;
            }
        }
        Ok(tensors)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let file = File::open(&path).map_err(io_error("read", &path))?;
        // SAFETY: the map is only read, and the folder is the user's own; a file that another program cuts short
        // while it is mapped ends this process (SIGBUS), as with every memory-mapped file.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error("map", &path))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|source| CheckpointError::Container { path: path.clone(), source })?;
        let data = header + size_of::<u64>();
        let file = self.files.len();
        for (name, info) in metadata.tensors() {
            // Tables of the rotary embedding, in old checkpoints: computed here.
            if name.ends_with("rotary_emb.inv_freq") {
                continue;
            }
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let tensor = Tensor { file, dtype: info.dtype, shape: info.shape.clone(), bytes };
            if self.entries.insert(name.clone(), tensor).is_some() {
                return Err(CheckpointError::Unexpected { tensor: name, path });
            }
        }
        self.files.push((path, Arc::new(map)));
        Ok(())
    }

    /// Refuses tensors under other names.
    pub(super) fn no_others(&self, names: &BTreeSet<String>) -> Result<(), CheckpointError> {
        match self.entries.iter().find(|(name, _)| !names.contains(*name)) {
            Some((name, tensor)) => {
                let path = self.files[tensor.file].0.clone();
                Err(CheckpointError::Unexpected { tensor: name.clone(), path })
            }
            None => Ok(()),
        }
    }

    fn get(&self, name: &str) -> Result<(&Tensor, &Path, &Arc<Mmap>), CheckpointError> {
        let Some(tensor) = self.entries.get(name) else {
            return Err(CheckpointError::Missing { tensor: name.to_owned(), path: self.folder.clone() });
        };
        let (path, map) = &self.files[tensor.file];
        Ok((tensor, path, map))
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> Result<(&Tensor, &Path, &Arc<Mmap>), CheckpointError> {
        let found = self.get(name)?;
        if found.0.shape == shape {
            return Ok(found);
        }
        Err(CheckpointError::Shape {
            tensor: name.to_owned(),
            found: found.0.shape.clone(),
            expected: shape.to_vec(),
            path: found.1.to_owned(),
        })
    }

    /// A tensor of finite numbers, as f32.
    pub(super) fn dense(&self, name: &str, shape: &[usize]) -> Result<F32Data, CheckpointError> {
        Ok(self.table(name, shape)?.into_f32())
    }

    /// A tensor of finite numbers, in its own precision and, where it is aligned, in its own place.
    pub(super) fn table(&self, name: &str, shape: &[usize]) -> Result<Table, CheckpointError> {
        let (tensor, path, map) = self.shaped(name, shape)?;
        let bytes = tensor.bytes.clone();
        let table = match tensor.dtype {
            Dtype::F32 => Table::F32(Data::mapped(map, bytes)),
            Dtype::BF16 => Table::Bf16(Data::mapped(map, bytes)),
            Dtype::F16 => Table::F16(Data::mapped(map, bytes)),
            found => {
                let (tensor, path) = (name.to_owned(), path.to_owned());
                return Err(CheckpointError::Type { tensor, found, expected: "F32, BF16 or F16", path });
            }
        };
        self.check_finite(name, table)
    }

    /// The values of a tensor, or what was made of them, if all are finite.
    pub(super) fn check_finite(&self, name: &str, table: Table) -> Result<Table, CheckpointError> {
        let bad = match &table {
            Table::F32(data) => not_finite(data, |x: f32| (x.is_finite(), x)),
            Table::Bf16(data) => not_finite(data, |x: bf16| (x.is_finite(), x.to_f32())),
            Table::F16(data) => not_finite(data, |x: f16| (x.is_finite(), x.to_f32())),
        };
        match bad {
            Some((at, value)) => {
                let (tensor, path) = (name.to_owned(), self.get(name)?.1.to_owned());
                Err(CheckpointError::NotFinite { tensor, at, value, path })
            }
            None => Ok(table),
        }
    }

    /// Latent weights, ternarized.
    pub(super) fn ternarized(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<TernaryWeight, CheckpointError> {
        let latent = self.dense(name, &[rows, columns])?;
        match TernaryWeight::from_latent(&latent, rows, columns) {
            Ok(weight) => Ok(weight.with_layout(self.layout)),
            Err(source) => {
                let (tensor, path) = (name.to_owned(), self.get(name)?.1.to_owned());
                Err(CheckpointError::Pack { tensor, path, source })
            }
        }
    }

    /// Packed codes with what they are multiplied by.
    pub(super) fn packed(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
        scale: f32,
    ) -> Result<TernaryWeight, CheckpointError> {
        let (bytes, path) = self.packed_bytes(name, rows, columns)?;
        let fill = |row: usize, codes: &mut [u8]| packing::unpack_row(bytes, rows, row, codes);
        TernaryWeight::from_rows(rows, columns, scale, self.layout, fill).map_err(|source| {
            let (tensor, path) = (name.to_owned(), path.to_owned());
            match source {
                PackError::Code { row, column, .. } => CheckpointError::Code { tensor, row, column, path },
                source => CheckpointError::Pack { tensor, path, source },
            }
        })
    }

    /// The bytes of a packed weight, and its file.
    fn packed_bytes(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<(&[u8], &Path), CheckpointError> {
        if !rows.is_multiple_of(4) {
            return Err(CheckpointError::Rows { tensor: name.to_owned(), rows });
        }
        let (tensor, path, map) = self.get(name)?;
        if tensor.dtype != Dtype::U8 {
            let (tensor, found, path) = (name.to_owned(), tensor.dtype, path.to_owned());
            return Err(CheckpointError::Type { tensor, found, expected: "U8 (packed)", path });
        }
        self.shaped(name, &[rows / 4, columns])?;
        Ok((&map[tensor.bytes.clone()], path))
    }

    /// The one value of a tensor.
    pub(super) fn scalar(&self, name: &str) -> Result<f32, CheckpointError> {
        let shape: &[usize] = if self.get(name)?.0.shape.is_empty() { &[] } else { &[1] };
        Ok(self.dense(name, shape)?[0])
    }
}

/// The first value that is not finite, and its place.
fn not_finite<T: Pod + Sync>(data: &[T], look: impl Fn(T) -> (bool, f32) + Sync) -> Option<(usize, f32)> {
    // A chunk at a time: whether all are finite is found faster than which one is not.
    const CHUNK: usize = 1 << 16;
    let bad = |chunk: &[T]| !chunk.iter().fold(true, |finite, x| finite & look(*x).0);
    let chunk = data.par_chunks(CHUNK).position_first(bad)?;
    let at = data[chunk * CHUNK..].iter().position(|x| !look(*x).0)? + chunk * CHUNK;
    Some((at, look(data[at]).1))
}

/// File names of an index, each once. They come from the file, so they may not lead out of the folder.
fn shard_names(index: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let problem = |problem: String| CheckpointError::Index { path: index.to_owned(), problem };
    let value: serde_json::Value =
        serde_json::from_slice(&read_json(index)?).map_err(|e| problem(format!("not valid JSON: {e}")))?;
    let map = value.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| problem("no object 'weight_map'".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let name = file.as_str().ok_or_else(|| problem(format!("the file of '{tensor}' is not a string")))?;
        if !name.ends_with(".safetensors") || name.contains(['/', '\\', ':', '\0']) {
            return Err(problem(format!("file name {name:?} of '{tensor}' is not a plain safetensors name")));
        }
        names.insert(name.to_owned());
    }
    Ok(names)
}
