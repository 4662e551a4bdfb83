//! The losses of distillation against PyTorch in f64: golden/distill.py wrote the file, golden/README.md says with what.
use std::path::Path;

use bitlinear::products::Precision;
use bitlinear::training::{HeadLoss, Relations, Teacher, head_loss, relation_loss};
use safetensors::tensor::{Dtype, SafeTensors};

/// Largest difference of a loss's mean, in nats: ours rounds those of tokens to some 1e-7, of either sign.
const LOSS: f64 = 2e-7;

/// Largest difference of a gradient's value, in units of the tensor's largest. Relations differ by the differences of
/// probabilities, which lose a digit.
const GRADIENT: f64 = 2e-6;

/// The golden file in memory.
struct Golden(Vec<u8>);

impl Golden {
    fn open() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/distill.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn values(&self, name: &str) -> Vec<f64> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        let data = tensor.data();
        match tensor.dtype() {
            Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
            Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
            Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// Numbers of the header, one or several.
    fn setting(&self, key: &str) -> Vec<usize> {
        let (_, header) = SafeTensors::read_metadata(&self.0).unwrap();
        let metadata = header.metadata().clone().unwrap();
        metadata[key].split(' ').map(|number| number.parse().unwrap()).collect()
    }

    /// What distill.py makes by the same integer arithmetic.
    fn operand(&self, stream: u64, count: usize, size: f32) -> Vec<f32> {
        let seed = self.setting("seed")[0] as u64;
        (0..count as u64).map(|at| uniform(seed, stream, at) * size).collect()
    }
}

/// SplitMix64 in counter mode, between -1/2 and 1/2.
fn uniform(seed: u64, stream: u64, at: u64) -> f32 {
    let z = (seed << 40 | stream << 32).wrapping_add(at).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ z >> 31) >> 40) as f32 / 16_777_216.0 - 0.5
}

/// The largest difference in units of the largest magnitude expected; infinite for NaN and for another length.
fn difference(found: &[f32], expected: &[f64]) -> f64 {
    if found.len() != expected.len() || found.iter().any(|v| v.is_nan()) {
        return f64::INFINITY;
    }
    let largest = expected.iter().fold(0f64, |max, e| max.max(e.abs()));
    found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).abs()).fold(0.0, f64::max) / largest
}

/// Operands of the head.
struct Operands {
    hidden: Vec<f32>,
    head: Vec<f32>,
    teacher_hidden: Vec<f32>,
    teacher_head: Vec<f32>,
    weights: Vec<f32>,
    targets: Vec<u32>,
}

impl Operands {
    fn new(golden: &Golden) -> Self {
        let [tokens, features, wide, vocab] =
            ["tokens", "features", "teacher_features", "vocab"].map(|key| golden.setting(key)[0]);
        let mut weights: Vec<f32> = golden.operand(5, tokens, 1.0).iter().map(|u| 1.0 + u).collect();
        weights.iter_mut().skip(3).step_by(4).for_each(|weight| *weight = 0.0);
        Self {
            hidden: golden.operand(0, tokens * features, 4.0),
            head: golden.operand(1, vocab * features, 4.0),
            teacher_hidden: golden.operand(2, tokens * wide, 4.0),
            teacher_head: golden.operand(3, vocab * wide, 4.0),
            weights,
            targets: golden.values("head.targets").into_iter().map(|target| target as u32).collect(),
        }
    }

    /// Differences of both losses, a token, and relative ones of both gradients.
    fn differences(
        &self,
        golden: &Golden,
        name: &str,
        [temperature, cross_entropy, coefficient]: [f32; 3],
    ) -> [f64; 4] {
        let teacher =
            Teacher { hidden: &self.teacher_hidden, head: &self.teacher_head, temperature, coefficient };
        let loss = HeadLoss {
            targets: &self.targets,
            weights: Some(&self.weights),
            cross_entropy,
            teacher: Some(teacher),
        };
        let (mut grad_hidden, mut grad_head) = (vec![0.0; self.hidden.len()], vec![0.0; self.head.len()]);
        let room = &mut Default::default();
        let operands = [&self.hidden[..], &self.head];
        let losses =
            head_loss(Precision::F32, operands, &loss, 1.0, 0.0, room, &mut grad_hidden, &mut grad_head);
        let (expected, tokens) = (golden.values(&format!("{name}.losses")), self.targets.len() as f64);
        [
            (losses.cross_entropy - expected[0]).abs() / tokens,
            (losses.divergence - expected[1]).abs() / tokens,
            difference(&grad_hidden, &golden.values(&format!("{name}.hidden"))),
            difference(&grad_head, &golden.values(&format!("{name}.head"))),
        ]
    }
}

#[test]
fn a_head_with_weights_and_a_teacher_is_that_of_pytorch() {
    let golden = Golden::open();
    let operands = Operands::new(&golden);
    for name in ["head.2", "head.5"] {
        let settings = golden.values(&format!("{name}.settings"));
        let settings = [0, 1, 2].map(|i| settings[i] as f32);
        let found = operands.differences(&golden, name, settings);
        println!("{name}: {found:?}");
        assert!(
            found[0] < LOSS && found[1] < LOSS && found[2] < GRADIENT && found[3] < GRADIENT,
            "{name}: {found:?}"
        );
        // And is told apart from one whose temperature or coefficient is another.
        let [temperature, cross_entropy, coefficient] = settings;
        let other = operands.differences(&golden, name, [1.001 * temperature, cross_entropy, coefficient]);
        assert!(other[1] > LOSS && other[2] > GRADIENT && other[3] > GRADIENT, "{name}: {other:?}");
        let other = operands.differences(&golden, name, [temperature, cross_entropy, 1.001 * coefficient]);
        assert!(other[2] > GRADIENT && other[3] > GRADIENT, "{name}: {other:?}");
    }
}

#[test]
fn relations_are_those_of_pytorch() {
    let golden = Golden::open();
    let sequence_lengths = golden.setting("lengths");
    let tokens: usize = sequence_lengths.iter().sum();
    for name in ["same", "wider", "grouped_keys", "one_head"] {
        let settings = golden.values(&format!("relations.{name}.settings"));
        let [stream, heads, width, teacher_width] = [0, 1, 2, 3].map(|i| settings[i] as usize);
        let student = golden.operand(10 + 2 * stream as u64, tokens * width, 2.0);
        let teacher = golden.operand(11 + 2 * stream as u64, tokens * teacher_width, 2.0);
        let (loss, gradient) = (
            golden.values(&format!("relations.{name}.loss"))[0],
            golden.values(&format!("relations.{name}.grad")),
        );
        let differences = |temperature: f32| {
            let relations = Relations { heads, temperature, sequence_lengths: &sequence_lengths };
            let mut grad = vec![0.0; student.len()];
            let found = relation_loss(&relations, &student, &teacher, 1.0, &mut grad);
            [(found - loss).abs(), difference(&grad, &gradient)]
        };
        let found = differences(settings[4] as f32);
        println!("{name}: loss {loss:.3e}, {found:?}");
        assert!(found[0] < LOSS && found[1] < GRADIENT, "{name}: {found:?}");
        let other = differences(settings[4] as f32 * 1.001);
        assert!(other[0] > LOSS && other[1] > GRADIENT, "{name}: {other:?}");
    }
}
