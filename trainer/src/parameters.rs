//! The trainable tensors of a model, under their Hugging Face names and in the order of those names.
//!
//! Everything is f32: in bf16 a step of the usual size leaves most latent weights where they are.
use std::collections::BTreeMap;

use candle_core::{Device, Layout, Storage, StorageRef, Tensor, Var, bail};
use infer::config::ModelConfig;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use safetensors::SafeTensors;

/// What a tensor is for, which decides how it starts and whether it decays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Token embedding, or an untied head.
    Embedding,
    /// Latent weight of a projection.
    Projection,
    /// Latent weight of a projection that writes to the residual stream (`o_proj`, `down_proj`).
    ResidualProjection,
    /// Gain of a norm.
    Norm,
    /// Bias of a projection.
    Bias,
}

impl Role {
    /// Whether this is one of the seven projections, which are ternary in a BitNet.
    pub fn is_projection(self) -> bool {
        matches!(self, Self::Projection | Self::ResidualProjection)
    }
}

/// A trainable tensor.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// What it is for.
    pub role: Role,
    /// Its value, which the optimizer changes in place.
    pub value: Var,
}

/// Name, role, shape and values of a tensor, copied out.
pub type Copied<'a> = (&'a str, Role, Vec<usize>, Vec<f32>);

/// The trainable tensors of a model by name; iteration is in the order of names.
#[derive(Debug, Clone)]
pub struct Parameters(BTreeMap<String, Parameter>);

/// Why stored parameters cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ParameterError {
    /// The file is not a safetensors file.
    #[error("the stored parameters cannot be read; checkpoint; a file of it is damaged, use another")]
    Format(#[from] safetensors::SafeTensorError),
    /// A tensor is missing.
    #[error("tensor '{0}' is missing; checkpoint; the file belongs to a model of another shape")]
    Missing(String),
    /// A tensor that the model does not have.
    #[error(
        "tensor '{0}' is not part of this model; checkpoint; the file belongs to a model of another shape"
    )]
    Unexpected(String),
    /// A tensor of another shape or type.
    #[error(
        "tensor '{name}' is {found}, expected F32 {expected:?}; checkpoint; the file belongs to a model of another shape"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// Its shape in the model.
        expected: Vec<usize>,
        /// Its type and shape in the file.
        found: String,
    },
    /// candle refused.
    #[error("a tensor cannot be made; {0}")]
    Candle(#[from] candle_core::Error),
}

/// Names, roles and shapes of a model's tensors, in the order of names.
fn layout(config: &ModelConfig) -> BTreeMap<String, (Role, Vec<usize>)> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let mut tensors = BTreeMap::new();
    let mut add = |name: String, role, shape: &[usize]| tensors.insert(name, (role, shape.to_vec()));
    add("model.embed_tokens.weight".into(), Role::Embedding, &[config.vocab_size, hidden]);
    if !config.tie_word_embeddings {
        add("lm_head.weight".into(), Role::Embedding, &[config.vocab_size, hidden]);
    }
    add("model.norm.weight".into(), Role::Norm, &[hidden]);
    for layer in 0..config.num_hidden_layers {
        if config.qkv_bias {
            for (part, width) in [("q", queries), ("k", keys), ("v", keys)] {
                add(format!("model.layers.{layer}.self_attn.{part}_proj.bias"), Role::Bias, &[width]);
            }
        }
        let mut add = |name: &str, role, shape: &[usize]| {
            add(format!("model.layers.{layer}.{name}.weight"), role, shape);
        };
        add("input_layernorm", Role::Norm, &[hidden]);
        add("post_attention_layernorm", Role::Norm, &[hidden]);
        add("self_attn.q_proj", Role::Projection, &[queries, hidden]);
        add("self_attn.k_proj", Role::Projection, &[keys, hidden]);
        add("self_attn.v_proj", Role::Projection, &[keys, hidden]);
        add("self_attn.o_proj", Role::ResidualProjection, &[hidden, queries]);
        add("mlp.gate_proj", Role::Projection, &[ffn, hidden]);
        add("mlp.up_proj", Role::Projection, &[ffn, hidden]);
        add("mlp.down_proj", Role::ResidualProjection, &[hidden, ffn]);
        if config.sub_norm {
            add("self_attn.attn_sub_norm", Role::Norm, &[queries]);
            add("mlp.ffn_sub_norm", Role::Norm, &[ffn]);
        }
        if config.qk_norm {
            add("self_attn.q_norm", Role::Norm, &[config.head_dim]);
            add("self_attn.k_norm", Role::Norm, &[config.head_dim]);
        }
    }
    tensors
}

impl Parameters {
    /// Fresh parameters: norms 1, biases 0, matrices normal with standard deviation `initializer_range`, those that write to the
    /// residual stream divided by `sqrt(2 * layers)` (GPT-2).
    ///
    /// # Errors
    /// candle cannot make a tensor.
    pub fn init(config: &ModelConfig, initializer_range: f64, seed: u64) -> candle_core::Result<Self> {
        let residual = initializer_range / (2.0 * config.num_hidden_layers as f64).sqrt();
        let mut parameters = BTreeMap::new();
        for (stream, (name, (role, shape))) in layout(config).into_iter().enumerate() {
            let count = shape.iter().product();
            let std = match role {
                Role::Norm | Role::Bias => None,
                Role::ResidualProjection => Some(residual as f32),
                Role::Embedding | Role::Projection => Some(initializer_range as f32),
            };
            let values: Vec<f32> = match std {
                None if role == Role::Bias => vec![0.0; count],
                None => vec![1.0; count],
                Some(std) => {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    rng.set_stream(stream as u64);
                    (0..count).map(|_| std * rng.sample::<f32, _>(StandardNormal)).collect()
                }
            };
            let value = Var::from_vec(values, shape, &Device::Cpu)?;
            parameters.insert(name, Parameter { role, value });
        }
        Ok(Self(parameters))
    }

    /// Parameters with these values, by name; what is not there (the gain of a norm that is put in) is 1.
    ///
    /// # Errors
    /// A tensor has no place in the model, or another shape.
    pub fn from_values(
        config: &ModelConfig,
        mut values: BTreeMap<String, Vec<f32>>,
    ) -> Result<Self, ParameterError> {
        let mut parameters = BTreeMap::new();
        for (name, (role, shape)) in layout(config) {
            let count: usize = shape.iter().product();
            let found = values.remove(&name).unwrap_or_else(|| vec![1.0; count]);
            if found.len() != count {
                let found = format!("F32 [{}]", found.len());
                return Err(ParameterError::Shape { name, expected: shape, found });
            }
            parameters.insert(name, Parameter { role, value: Var::from_vec(found, shape, &Device::Cpu)? });
        }
        match values.into_keys().next() {
            Some(name) => Err(ParameterError::Unexpected(name)),
            None => Ok(Self(parameters)),
        }
    }

    /// Parameters out of the bytes of a safetensors file that a checkpoint wrote.
    ///
    /// # Errors
    /// The file is damaged, or its tensors are not exactly those of `config`.
    pub fn from_safetensors(config: &ModelConfig, bytes: &[u8]) -> Result<Self, ParameterError> {
        let file = SafeTensors::deserialize(bytes)?;
        let layout = layout(config);
        if let Some(name) = file.names().into_iter().find(|n| !layout.contains_key(*n)) {
            return Err(ParameterError::Unexpected(name.into()));
        }
        let mut parameters = BTreeMap::new();
        for (name, (role, shape)) in layout {
            let values = tensor_values(&file, &name, &shape)?;
            let value = Var::from_vec(values, shape, &Device::Cpu)?;
            parameters.insert(name, Parameter { role, value });
        }
        Ok(Self(parameters))
    }

    /// All tensors by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Parameter)> {
        self.0.iter().map(|(name, parameter)| (name.as_str(), parameter))
    }

    /// The value of a tensor of the model that these parameters were made for.
    ///
    /// # Panics
    /// If the model has no such tensor.
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.0[name].value.as_tensor()
    }

    /// Gives a tensor other values.
    ///
    /// # Errors
    /// They have another shape.
    ///
    /// # Panics
    /// As [`Parameters::tensor`].
    pub fn set(&self, name: &str, values: &Tensor) -> candle_core::Result<()> {
        self.0[name].value.set(values)
    }

    /// All values as slices, which cannot change meanwhile.
    ///
    /// # Errors
    /// A tensor is not contiguous f32 on the CPU.
    pub fn values(&self) -> candle_core::Result<Values<'_>> {
        let mut values = BTreeMap::new();
        for (name, parameter) in &self.0 {
            let (storage, layout) = parameter.value.storage_and_layout();
            let fits = matches!(&*storage, Storage::Cpu(cpu) if cpu.as_slice::<f32>().is_ok());
            if !fits || layout.contiguous_offsets().is_none() {
                bail!("parameter '{name}' is not contiguous f32 on the CPU");
            }
            values.insert(name.as_str(), (storage, layout));
        }
        Ok(Values(values))
    }

    /// Number of trainable values.
    pub fn count(&self) -> usize {
        self.0.values().map(|p| p.value.elem_count()).sum()
    }

    /// All values by name, copied out.
    ///
    /// # Errors
    /// candle cannot read a tensor.
    pub fn to_vecs(&self) -> candle_core::Result<Vec<Copied<'_>>> {
        self.iter()
            .map(|(name, p)| {
                Ok((name, p.role, p.value.dims().to_vec(), p.value.flatten_all()?.to_vec1::<f32>()?))
            })
            .collect()
    }
}

/// The values of parameters, borrowed.
pub struct Values<'a>(BTreeMap<&'a str, (StorageRef<'a>, &'a Layout)>);

impl Values<'_> {
    /// The values of a tensor, row after row.
    ///
    /// # Panics
    /// If the model that the parameters were made for has no such tensor.
    pub fn get(&self, name: &str) -> &[f32] {
        let (storage, layout) = &self.0[name];
        let values = match (&**storage, layout.contiguous_offsets()) {
            (Storage::Cpu(cpu), Some((start, end))) => cpu.as_slice::<f32>().map(|all| &all[start..end]),
            _ => Ok(&[][..]),
        };
        values.expect("`Parameters::values` has looked")
    }
}

/// The values of one f32 tensor of a safetensors file.
///
/// # Errors
/// The tensor is missing, or of another shape or type.
pub fn tensor_values(
    file: &SafeTensors<'_>,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>, ParameterError> {
    let view = file.tensor(name).map_err(|_| ParameterError::Missing(name.into()))?;
    if view.dtype() != safetensors::Dtype::F32 || view.shape() != shape {
        return Err(ParameterError::Shape {
            name: name.into(),
            expected: shape.to_vec(),
            found: format!("{:?} {:?}", view.dtype(), view.shape()),
        });
    }
    Ok(view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}
