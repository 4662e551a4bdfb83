//! Hugging Face checkpoints: a folder with `config.json` and safetensors files.
//!
//! Reads dense models and the three dialects of BitNet ([`Storage`]); writes packed codes with a multiplying f32 scale,
//! the one dialect in which a model loses nothing, or dense f32. Embedding and head are used where they lie in the
//! memory-mapped file, in their own precision; norms and dense projections are widened to f32.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitlinear::kernels::Kernel;
use bitlinear::packed::{Layout, PackError, TernaryWeight};
use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};

use super::{CheckpointError, io_error, packing, write_atomic};
use crate::config::{ModelConfig, Storage};
use crate::model::{Data, F32Data, Layer, Model, ModelError, Projection, Table, Weights};

/// Sizes and options.
pub const CONFIG: &str = "config.json";
/// Special tokens for generation, which come before those of [`CONFIG`].
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The weights, if in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// Where the weights are, if in several files.
pub const INDEX: &str = "model.safetensors.index.json";

/// Longest JSON file that is read: a hundred times what any model has.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Reads the model in a folder.
///
/// # Errors
/// A file is missing or damaged, the config asks for what is not supported, or a tensor is missing, extra, ill-shaped,
/// ill-typed, not finite or not ternary; the error names it.
pub fn read(folder: &Path) -> Result<Model, CheckpointError> {
    read_with(folder, None)
}

/// [`read`] with the ternary weights in a layout of choice; without one, in the faster one here ([`Kernel::layout_for`]).
///
/// # Errors
/// As [`read`]; or without a layout, `BITLINEAR_KERNEL` names a kernel that cannot run.
pub fn read_with(folder: &Path, layout: Option<Layout>) -> Result<Model, CheckpointError> {
    let (config, storage) = read_config(folder)?;
    let layout = match layout {
        Some(layout) => layout,
        None => Kernel::active().map_err(ModelError::from)?.layout_for(config.ternary_parameters()),
    };
    let tensors = Tensors::open(folder, layout)?;
    let dense = |name: &str, shape: &[usize]| tensors.dense(name, shape);
    let table = [config.vocab_size, config.hidden_size];
    let layers: Result<Vec<Layer>, CheckpointError> =
        (0..config.num_hidden_layers).map(|index| read_layer(&tensors, &config, storage, index)).collect();
    let weights = Weights {
        embed_tokens: tensors.table("model.embed_tokens.weight", &table)?,
        layers: layers?,
        norm: dense("model.norm.weight", &[config.hidden_size])?,
        lm_head: if config.tie_word_embeddings {
            None
        } else {
            Some(tensors.table("lm_head.weight", &table)?)
        },
    };
    let expected = tensor_names(&config, storage);
    if let Some((name, tensor)) = tensors.entries.iter().find(|(name, _)| !expected.contains(*name)) {
        let path = tensors.files[tensor.file].0.clone();
        return Err(CheckpointError::Unexpected { tensor: name.clone(), path });
    }
    Ok(Model::new(config, weights)?)
}

/// Reads the config in a folder, with the special tokens of its generation config.
///
/// # Errors
/// The file is missing, damaged, or asks for what is not supported.
pub fn read_config(folder: &Path) -> Result<(ModelConfig, Storage), CheckpointError> {
    let refused = |path: PathBuf| move |source| CheckpointError::Config { path, source };
    let path = folder.join(CONFIG);
    let (mut config, storage) = ModelConfig::from_json(&read_json(&path)?).map_err(refused(path))?;
    let path = folder.join(GENERATION_CONFIG);
    if path.exists() {
        config.apply_generation_config(&read_json(&path)?).map_err(refused(path))?;
    }
    Ok((config, storage))
}

fn read_json(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let file = File::open(path).map_err(io_error("read", path))?;
    let mut bytes = Vec::new();
    // One byte more than allowed: a longer file is cut and so no longer JSON.
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(io_error("read", path))?;
    Ok(bytes)
}

fn read_layer(
    tensors: &Tensors,
    config: &ModelConfig,
    storage: Storage,
    index: usize,
) -> Result<Layer, CheckpointError> {
    let at = |name: &str| format!("model.layers.{index}.{name}");
    let norm = |name: &str, width: usize| tensors.dense(&at(&format!("{name}.weight")), &[width]);
    let sub_norm = |name, width| if config.sub_norm { norm(name, width).map(Some) } else { Ok(None) };
    let projection =
        |(name, rows, columns): (&str, usize, usize)| tensors.projection(&at(name), rows, columns, storage);
    let [q, k, v, o, gate, up, down] = config.projections();
    Ok(Layer {
        input_layernorm: norm("input_layernorm", config.hidden_size)?,
        qkv_bias: None,
        qk_norm: None,
        q_proj: projection(q)?,
        k_proj: projection(k)?,
        v_proj: projection(v)?,
        o_proj: projection(o)?,
        attn_sub_norm: sub_norm("self_attn.attn_sub_norm", config.hidden_size)?,
        post_attention_layernorm: norm("post_attention_layernorm", config.hidden_size)?,
        gate_proj: projection(gate)?,
        up_proj: projection(up)?,
        down_proj: projection(down)?,
        ffn_sub_norm: sub_norm("mlp.ffn_sub_norm", config.intermediate_size)?,
    })
}

/// Names of all tensors of a checkpoint.
fn tensor_names(config: &ModelConfig, storage: Storage) -> BTreeSet<String> {
    let packed = matches!(storage, Storage::PackedMultiply | Storage::PackedDivide);
    let mut names = BTreeSet::from(["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()]);
    if !config.tie_word_embeddings {
        names.insert("lm_head.weight".to_owned());
    }
    let mut kinds = vec!["input_layernorm.weight", "post_attention_layernorm.weight"];
    if config.sub_norm {
        kinds.extend(["self_attn.attn_sub_norm.weight", "mlp.ffn_sub_norm.weight"]);
    }
    for index in 0..config.num_hidden_layers {
        names.extend(kinds.iter().map(|name| format!("model.layers.{index}.{name}")));
        for (name, _, _) in config.projections() {
            names.insert(format!("model.layers.{index}.{name}.weight"));
            if packed {
                names.insert(format!("model.layers.{index}.{name}.weight_scale"));
            }
        }
    }
    names
}

/// A tensor in one of the files; the safetensors reader has checked that its bytes are there and fit its shape.
struct Tensor {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// All tensors of a folder's files, by name.
struct Tensors {
    folder: PathBuf,
    files: Vec<(PathBuf, Arc<Mmap>)>,
    entries: BTreeMap<String, Tensor>,
    /// What ternary weights become.
    layout: Layout,
}

impl Tensors {
    fn open(folder: &Path, layout: Layout) -> Result<Self, CheckpointError> {
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
    fn dense(&self, name: &str, shape: &[usize]) -> Result<F32Data, CheckpointError> {
        Ok(match self.table(name, shape)? {
            Table::F32(data) => data,
            halves => halves.to_f32().into(),
        })
    }

    /// A tensor of finite numbers, in its own precision and, where it is aligned, in its own place.
    fn table(&self, name: &str, shape: &[usize]) -> Result<Table, CheckpointError> {
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
        let bad = match &table {
            Table::F32(data) => not_finite(data, |x: f32| (x.is_finite(), x)),
            Table::Bf16(data) => not_finite(data, |x: bf16| (x.is_finite(), x.to_f32())),
            Table::F16(data) => not_finite(data, |x: f16| (x.is_finite(), x.to_f32())),
        };
        match bad {
            Some((at, value)) => {
                let (tensor, path) = (name.to_owned(), path.to_owned());
                Err(CheckpointError::NotFinite { tensor, at, value, path })
            }
            None => Ok(table),
        }
    }

    fn projection(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
        storage: Storage,
    ) -> Result<Projection, CheckpointError> {
        let weight_name = format!("{name}.weight");
        let refused = |path: &Path| {
            let path = path.to_owned();
            let tensor = weight_name.clone();
            move |source| CheckpointError::Pack { tensor, path, source }
        };
        match storage {
            Storage::Dense => Ok(Projection::Dense(self.dense(&weight_name, &[rows, columns])?)),
            Storage::Latent => {
                let latent = self.dense(&weight_name, &[rows, columns])?;
                let path = self.get(&weight_name)?.1;
                let weight = TernaryWeight::from_latent(&latent, rows, columns).map_err(refused(path))?;
                Ok(Projection::Ternary(weight.with_layout(self.layout)))
            }
            Storage::PackedMultiply | Storage::PackedDivide => {
                let (stored, path) = self.scale(&format!("{name}.weight_scale"))?;
                let scale = if storage == Storage::PackedDivide { 1.0 / stored } else { stored };
                let bytes = self.packed(&weight_name, rows, columns)?;
                let fill = |row: usize, codes: &mut [u8]| packing::unpack_row(bytes, rows, row, codes);
                match TernaryWeight::from_rows(rows, columns, scale, self.layout, fill) {
                    Ok(weight) => Ok(Projection::Ternary(weight)),
                    Err(PackError::Code { row, column, .. }) => {
                        let path = self.get(&weight_name)?.1.to_owned();
                        Err(CheckpointError::Code { tensor: weight_name, row, column, path })
                    }
                    Err(source) => Err(refused(path)(source)),
                }
            }
        }
    }

    /// The bytes of a packed weight.
    fn packed(&self, name: &str, rows: usize, columns: usize) -> Result<&[u8], CheckpointError> {
        if !rows.is_multiple_of(4) {
            return Err(CheckpointError::Rows { tensor: name.to_owned(), rows });
        }
        let (tensor, path, map) = self.get(name)?;
        if tensor.dtype != Dtype::U8 {
            let (tensor, found, path) = (name.to_owned(), tensor.dtype, path.to_owned());
            return Err(CheckpointError::Type { tensor, found, expected: "U8 (packed)", path });
        }
        self.shaped(name, &[rows / 4, columns])?;
        Ok(&map[tensor.bytes.clone()])
    }

    /// The one value of a scale tensor, and its file.
    fn scale(&self, name: &str) -> Result<(f32, &Path), CheckpointError> {
        let (tensor, path, _) = self.get(name)?;
        let shape: &[usize] = if tensor.shape.is_empty() { &[] } else { &[1] };
        let value = self.dense(name, shape)?[0];
        Ok((value, path))
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

/// A tensor to be written.
enum Out<'a> {
    F32(Vec<usize>, &'a [f32]),
    Table(Vec<usize>, &'a Table),
    Scale([u8; 4]),
    Packed([usize; 2], &'a TernaryWeight),
}

impl View for Out<'_> {
    fn dtype(&self) -> Dtype {
        if matches!(self, Self::Packed(..)) { Dtype::U8 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::F32(shape, _) | Self::Table(shape, _) => shape,
            Self::Scale(_) => &[1],
            Self::Packed(shape, _) => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::F32(_, values) => little_endian(values),
            Self::Table(_, Table::F32(values)) => little_endian(values),
            Self::Table(_, halves) => little_endian(&halves.to_f32()).into_owned().into(),
            Self::Scale(bytes) => bytes.as_slice().into(),
            Self::Packed(_, weight) => packing::pack(&weight.unpack(), weight.in_features()).into(),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::F32(_, values) => size_of_val(*values),
            Self::Table(_, table) => table.len() * size_of::<f32>(),
            Self::Scale(bytes) => bytes.len(),
            Self::Packed(shape, _) => shape[0] * shape[1],
        }
    }
}

fn little_endian(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return bytemuck::cast_slice(values).into();
    }
    values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
}

/// Writes a model into a folder, making it where it is missing: `model.safetensors`, then `config.json`.
///
/// `metadata` goes into the safetensors header beside `{"format": "pt"}`. Each file is written whole or not at all.
///
/// # Errors
/// A ternary weight's rows are not a multiple of 4, or the file system refuses.
pub fn write(
    folder: &Path,
    model: &Model,
    metadata: &BTreeMap<String, String>,
) -> Result<(), CheckpointError> {
    std::fs::create_dir_all(folder).map_err(io_error("make", folder))?;
    let path = folder.join(WEIGHTS);
    let mut entries: HashMap<String, String> = metadata.clone().into_iter().collect();
    entries.insert("format".into(), "pt".into());
    let bytes = safetensors::serialize(outputs(model)?, Some(entries))
        .map_err(|source| CheckpointError::Container { path: path.clone(), source })?;
    write_atomic(&path, &bytes)?;
    let mut config = format!("{:#}", model.config().to_json());
    config.push('\n');
    write_atomic(&folder.join(CONFIG), config.as_bytes())
}

fn outputs(model: &Model) -> Result<Vec<(String, Out<'_>)>, CheckpointError> {
    let (config, weights) = (model.config(), model.weights());
    let shape = vec![config.vocab_size, config.hidden_size];
    let mut out = vec![
        ("model.embed_tokens.weight".to_owned(), Out::Table(shape.clone(), &weights.embed_tokens)),
        ("model.norm.weight".to_owned(), Out::F32(vec![config.hidden_size], &weights.norm)),
    ];
    out.extend(
        weights.lm_head.iter().map(|head| ("lm_head.weight".to_owned(), Out::Table(shape.clone(), head))),
    );
    for (index, layer) in weights.layers.iter().enumerate() {
        let at = |name: &str| format!("model.layers.{index}.{name}");
        for (name, norm, width) in layer.norms(config) {
            out.extend(norm.map(|norm| (at(&format!("{name}.weight")), Out::F32(vec![width], norm))));
        }
        for ((name, rows, columns), projection) in config.projections().into_iter().zip(layer.projections()) {
            let tensor = at(&format!("{name}.weight"));
            match projection {
                Projection::Dense(weight) => out.push((tensor, Out::F32(vec![rows, columns], weight))),
                Projection::Ternary(_) if !rows.is_multiple_of(4) => {
                    return Err(CheckpointError::Rows { tensor, rows });
                }
                Projection::Ternary(weight) => {
                    out.push((tensor, Out::Packed([rows / 4, columns], weight)));
                    let scale = weight.weight_scale().to_le_bytes();
                    out.push((at(&format!("{name}.weight_scale")), Out::Scale(scale)));
                }
            }
        }
    }
    Ok(out)
}
