//! The divergence of two softmaxes: what distillation of logits and of relations have in common.
use crate::math;

/// `KL(q ‖ p) = Σ q_i ln(q_i / p_i)`, in nats, of `q = softmax(teacher / temperature)` and
/// `p = softmax(student / temperature)`; `teacher` becomes `q`, and `p` is written.
///
/// The largest value is taken from each row first: large values cost no digits, and equal rows give exactly 0. A share `q_i`
/// of 0 adds nothing, whatever `p_i` is. Rounding leaves some 1e-7 of either sign.
#[inline(always)]
pub(super) fn divergence(student: &[f32], teacher: &mut [f32], temperature: f32, p: &mut [f32]) -> f32 {
    let inverse = 1.0 / temperature;
    let (max_student, max_teacher) = (math::maximum(student), math::maximum(teacher));
    for ((p, student), teacher) in p.iter_mut().zip(student).zip(teacher.iter_mut()) {
        *teacher = (*teacher - max_teacher) * inverse;
        *p = *teacher - (student - max_student) * inverse;
    }
    let log_sum = math::softmax(teacher);
    // `p` holds what the exponents differ by.
    for (p, q) in p.iter_mut().zip(teacher.iter()) {
        *p = if *q == 0.0 { 0.0 } else { *p };
    }
    let difference = math::dot(p, teacher);
    for (p, student) in p.iter_mut().zip(student) {
        *p = (student - max_student) * inverse;
    }
    difference + (math::softmax(p) - log_sum)
}
