//! Writing a model into a folder.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bitlinear::packed::TernaryWeight;
use safetensors::Dtype;
use safetensors::tensor::View;

use super::super::{CheckpointError, io_error, packing, write_atomic};
use super::{CONFIG, WEIGHTS};
use crate::model::{Model, Projection, Table};

/// A tensor to be written.
enum Out<'a> {
    F32(Vec<usize>, &'a [f32]),
    Table(Vec<usize>, &'a Table),
    /// A bias, as stored.
    Bias(Vec<usize>, Vec<f32>),
    Scale([u8; 4]),
    Packed([usize; 2], &'a TernaryWeight),
}

impl View for Out<'_> {
    fn dtype(&self) -> Dtype {
        if matches!(self, Self::Packed(..)) { Dtype::U8 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::F32(shape, _) | Self::Bias(shape, _) | Self::Table(shape, _) => shape,
            Self::Scale(_) => &[1],
            Self::Packed(shape, _) => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::F32(_, values) => little_endian(values),
            Self::Bias(_, values) => little_endian(values),
            Self::Table(_, Table::F32(values)) => little_endian(values),
            Self::Table(_, halves) => little_endian(&halves.to_f32()).into_owned().into(),
            Self::Scale(bytes) => bytes.as_slice().into(),
            Self::Packed(_, weight) => packing::pack(&weight.unpack(), weight.in_features()).into(),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::F32(_, values) => size_of_val(*values),
            Self::Bias(_, values) => size_of_val(values.as_slice()),
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
/// A ternary weight's rows are not a multiple of 4, a bias is too large beside its scale, or the file system refuses.
pub fn write(
    folder: &Path,
    model: &Model,
    metadata: &BTreeMap<String, String>,
) -> Result<(), CheckpointError> {
    std::fs::create_dir_all(folder).map_err(io_error("make", folder))?;
    let path = folder.join(WEIGHTS);
    let mut entries: HashMap<String, String> = metadata.clone().into_iter().collect();
    entries.insert("format".into(), "pt".into());
    let bytes = safetensors::serialize(outputs(model, &path)?, Some(entries))
        .map_err(|source| CheckpointError::Container { path: path.clone(), source })?;
    write_atomic(&path, &bytes)?;
    let mut config = format!("{:#}", model.config().to_json());
    config.push('\n');
    write_atomic(&folder.join(CONFIG), config.as_bytes())
}

/// All tensors of a model, for a file at `path`.
fn outputs<'a>(model: &'a Model, path: &Path) -> Result<Vec<(String, Out<'a>)>, CheckpointError> {
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
        for (name, bias, projection) in layer.biases() {
            let (tensor, width) = (at(name), vec![bias.len()]);
            out.push((tensor.clone(), Out::Bias(width, stored_bias(&tensor, bias, projection, path)?)));
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

/// A bias as its tensor holds it: beside a packed weight what gives the bias when multiplied by the scale.
fn stored_bias(
    tensor: &str,
    bias: &[f32],
    projection: &Projection,
    path: &Path,
) -> Result<Vec<f32>, CheckpointError> {
    let Projection::Ternary(weight) = projection else { return Ok(bias.to_vec()) };
    let scale = weight.weight_scale();
    let stored: Vec<f32> = bias.iter().map(|value| quotient(*value, scale)).collect();
    match stored.iter().position(|value| !value.is_finite()) {
        Some(at) => {
            let (tensor, value, path) = (tensor.to_owned(), stored[at], path.to_owned());
            Err(CheckpointError::NotFinite { tensor, at, value, path })
        }
        None => Ok(stored),
    }
}

/// The number that times `b` is `a` to the last bit, where there is one; else the nearest to `a / b`.
fn quotient(a: f32, b: f32) -> f32 {
    let nearest = a / b;
    let exact = [nearest, nearest.next_down(), nearest.next_up()].into_iter().find(|q| q * b == a);
    exact.unwrap_or(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bias_from_a_file_is_stored_as_it_was_read(stored in -1e3f32..1e3, scale in 1e-5f32..10.0) {
            let bias = stored * scale;
            prop_assert_eq!((quotient(bias, scale) * scale).to_bits(), bias.to_bits());
        }

        #[test]
        fn any_bias_comes_back_to_the_last_place(bias in -1e3f32..1e3, scale in 1e-5f32..10.0) {
            let back = quotient(bias, scale) * scale;
            prop_assert!(back == bias || back == bias.next_up() || back == bias.next_down(), "{} {}", back, bias);
        }
    }
}
