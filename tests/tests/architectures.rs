//! Logits of each architecture against transformers: golden/architectures.py wrote the file, golden/README.md says with what.
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use infer::checkpoint::hf;
use infer::{KvCache, Logits, Model};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Largest difference of a logit, where the largest logits are about 6.
///
/// Both sides round every operation to f32 (2^-24) and add in different orders; through two layers that comes to some 1e-5.
/// The script chose models in which no int8 code is near a tie, so quantized ones are the same function, too.
const LOGIT: f32 = 1e-4;

/// The golden file: of each case a config, types and shapes of tensors, ids and logits.
struct Golden {
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
}

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/architectures.safetensors");
        let bytes = fs::read(path).unwrap();
        let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap();
        Self { bytes, metadata }
    }

    fn tensor(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn logits(&self, case: &str) -> Vec<f32> {
        floats(&self.tensor(&format!("{case}.logits")))
    }

    fn ids(&self, case: &str) -> Vec<u32> {
        let bytes = self.tensor(&format!("{case}.ids"));
        bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b).try_into().unwrap()).collect()
    }

    /// The tensors of a case, by the script's formula.
    fn tensors(&self, case: &str) -> Tensors {
        let seed: u64 = self.metadata[&format!("{case}.seed")].parse().unwrap();
        let kinds: BTreeMap<String, (String, Vec<usize>)> =
            serde_json::from_str(&self.metadata[&format!("{case}.tensors")]).unwrap();
        let make = |(stream, (name, (dtype, shape))): (usize, (String, (String, Vec<usize>)))| {
            let count = shape.iter().product::<usize>() as u64;
            let (dtype, data) = match dtype.as_str() {
                "U8" => (Dtype::U8, packed(seed, stream as u64, count)),
                _ => (Dtype::F32, values(seed, stream as u64, count, &name, shape.len())),
            };
            (name, (dtype, shape, data))
        };
        kinds.into_iter().enumerate().map(make).collect()
    }

    /// The folder of a case, as transformers loaded it.
    fn folder(&self, case: &str) -> TempDir {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("config.json"), &self.metadata[&format!("{case}.config")]).unwrap();
        write(folder.path(), &self.tensors(case));
        folder
    }
}

/// Type, shape and bytes of tensors, by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn write(folder: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// SplitMix64 in counter mode.
fn integer(seed: u64, stream: u64, at: u64) -> u64 {
    let z = (seed << 40 | stream << 32).wrapping_add(at).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

fn packed(seed: u64, stream: u64, count: u64) -> Vec<u8> {
    let code = |at| (integer(seed, stream, at) % 3) as u8;
    (0..count).map(|at| (0..4).map(|i| code(i * count + at) << (2 * i)).sum()).collect()
}

fn values(seed: u64, stream: u64, count: u64, name: &str, dimensions: usize) -> Vec<u8> {
    let scale = |u: f32| match dimensions {
        _ if name.ends_with("weight_scale") => 0.125 + u * 0.125,
        1 if name.ends_with("weight") => 1.0 + u * 0.5,
        _ => u,
    };
    let uniform = |at| (integer(seed, stream, at) >> 40) as f32 / 16_777_216.0 - 0.5;
    (0..count).flat_map(|at| scale(uniform(at)).to_le_bytes()).collect()
}

fn logits(model: &Model, ids: &[u32]) -> Vec<f32> {
    model.forward(ids, &mut KvCache::new(model, ids.len()).unwrap(), Logits::All).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The largest difference; infinite for NaN and for another length.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    if found.len() != expected.len() || found.iter().chain(expected).any(|v| v.is_nan()) {
        return f32::INFINITY;
    }
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max)
}

/// Reads a case, compares its logits, and reads again what it then writes.
fn computes_as_in_transformers(case: &str) {
    let golden = Golden::open();
    let folder = golden.folder(case);
    let model = hf::read(folder.path()).unwrap();
    let (ids, expected) = (golden.ids(case), golden.logits(case));
    let found = logits(&model, &ids);
    let difference = difference(&found, &expected);
    println!("{case}: transformers {}, difference {difference:.1e}", golden.metadata["transformers"]);
    assert!(difference < LOGIT, "{case}: logits differ by {difference:.1e}");
    let written = TempDir::new().unwrap();
    hf::write(written.path(), &model, &BTreeMap::new()).unwrap();
    let read = hf::read(written.path()).unwrap();
    assert_eq!(read.config(), model.config());
    let again = logits(&read, &ids);
    if case == "qwen2_divide" {
        // Written with scales that multiply, and biases divided by these: they come back to the last place.
        assert!(self::difference(&again, &found) < LOGIT);
    } else {
        assert_eq!(bits(&again), bits(&found), "{case}");
    }
}

#[test]
fn llama_with_grouped_heads_and_its_own_head() {
    computes_as_in_transformers("llama");
}

#[test]
fn qwen2_with_biases() {
    computes_as_in_transformers("qwen2");
}

#[test]
fn qwen3_with_norms_and_wide_heads() {
    computes_as_in_transformers("qwen3");
}

#[test]
fn a_packed_llama_with_some_dense_modules() {
    computes_as_in_transformers("llama_mixed");
}

#[test]
fn a_packed_qwen2_with_some_dense_modules() {
    computes_as_in_transformers("qwen2_multiply");
}

#[test]
fn a_packed_qwen2_with_scales_that_divide() {
    computes_as_in_transformers("qwen2_divide");
}

#[test]
fn a_packed_qwen3() {
    computes_as_in_transformers("qwen3_multiply");
}

#[test]
fn a_bitnet_with_master_weights_and_silu() {
    computes_as_in_transformers("bitnet_online");
}

/// 1bitLLM's model is that BitNet under other names of the sub-norms.
#[test]
fn the_names_of_1bitllm() {
    let golden = Golden::open();
    let (case, folder) = ("bitnet_online", golden.folder("bitnet_online"));
    let renamed = |name: String| {
        name.replace("self_attn.attn_sub_norm", "self_attn.inner_attn_ln")
            .replace("mlp.ffn_sub_norm", "mlp.ffn_layernorm")
    };
    let tensors = golden.tensors(case).into_iter().map(|(name, tensor)| (renamed(name), tensor));
    write(folder.path(), &tensors.collect());
    let mut config: Value = serde_json::from_str(&golden.metadata[&format!("{case}.config")]).unwrap();
    config["architectures"] = json!(["BitnetForCausalLM"]);
    config["quantization_config"] = Value::Null;
    (config["weight_bits"], config["input_bits"]) = (json!(1), json!(8));
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let found = logits(&hf::read(folder.path()).unwrap(), &golden.ids(case));
    let difference = difference(&found, &golden.logits(case));
    assert!(difference < LOGIT, "logits differ by {difference:.1e}");
}

/// What a slightly different reading of a folder would give is told apart.
#[test]
fn a_slightly_different_model_is_told_apart() {
    let golden = Golden::open();
    let zeroed = |tensors: &mut Tensors, end: &str| {
        let (_, (_, _, data)) = tensors.iter_mut().find(|(name, _)| name.ends_with(end)).unwrap();
        data.fill(0);
    };
    for (case, end) in [
        ("qwen2", "k_proj.bias"),
        ("qwen3", "q_norm.weight"),
        ("qwen2_multiply", "v_proj.bias"),
        ("qwen2_divide", "q_proj.bias"),
    ] {
        let (folder, mut tensors) = (golden.folder(case), golden.tensors(case));
        zeroed(&mut tensors, end);
        write(folder.path(), &tensors);
        let found = logits(&hf::read(folder.path()).unwrap(), &golden.ids(case));
        assert!(difference(&found, &golden.logits(case)) > 100.0 * LOGIT, "{case}");
    }
}
