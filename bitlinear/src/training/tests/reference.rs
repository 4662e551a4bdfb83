//! What formulas are written in for comparison: f64, and slopes as central differences.

/// Step of a central difference in f64: its own error is some 1e-10 of the loss's third derivative.
const STEP: f64 = 1e-5;

/// The same values as f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// Logarithms of the softmax of `logits / temperature`.
pub fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let max = logits.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let sum: f64 = logits.iter().map(|x| ((x - max) / temperature).exp()).sum();
    logits.iter().map(|x| (x - max) / temperature - sum.ln()).collect()
}

/// Central differences of `f` in every value.
pub fn differences(values: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f32> {
    let (mut values, count) = (wide(values), values.len());
    let slope = |at: usize| {
        let value = values[at];
        let [above, below] = [STEP, -STEP].map(|step| {
            values[at] = value + step;
            f(&values)
        });
        values[at] = value;
        ((above - below) / (2.0 * STEP)) as f32
    };
    (0..count).map(slope).collect()
}
