//! Model folders to be changed by tests.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use infer::checkpoint::{hf, write_atomic};
use infer::{KvCache, Logits, Model, ModelConfig};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use tempfile::TempDir;

use super::{bits, ids, model};

/// A folder with a model of [`common::model`](super::model).
pub fn folder(config: &ModelConfig, seed: u64) -> (TempDir, Model) {
    let (folder, model) = (TempDir::new().unwrap(), model(config, seed));
    hf::write(folder.path(), &model, &BTreeMap::new()).unwrap();
    (folder, model)
}

/// The bits of the logits of some tokens.
pub fn logits(model: &Model) -> Vec<u32> {
    let ids = ids(model.config(), 12, 1);
    bits(&model.forward(&ids, &mut KvCache::new(model, 12).unwrap(), Logits::All).unwrap())
}

/// The tensors of a safetensors file, to be changed and written back.
pub struct Raw(pub BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Raw {
    /// The tensors of a folder.
    pub fn read(folder: &Path) -> Self {
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        Self(file.tensors().into_iter().map(|(name, view)| (name, tensor(view))).collect())
    }

    /// Writes them into a file.
    pub fn write(&self, path: &Path) {
        let views = self.0.iter().map(|(name, (dtype, shape, data))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        // A new file: models that are in use keep the mapped old one.
        write_atomic(path, &safetensors::serialize(views, None).unwrap()).unwrap();
    }

    /// Adds a tensor or replaces it.
    pub fn set_f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.0.insert(name.to_owned(), (Dtype::F32, shape.to_vec(), bytes));
    }

    /// The values of a tensor.
    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.0[name].2.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

/// Changes the tensors of a folder.
pub fn edit(folder: &Path, change: impl FnOnce(&mut Raw)) {
    let mut raw = Raw::read(folder);
    change(&mut raw);
    raw.write(&folder.join("model.safetensors"));
}

/// Changes the config of a folder.
pub fn edit_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Names of all scales.
pub fn scales(raw: &Raw) -> Vec<String> {
    raw.0.keys().filter(|name| name.ends_with("weight_scale")).cloned().collect()
}
