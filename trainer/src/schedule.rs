//! Learning rate, weight decay and share of quantization as pure functions of the step.
use crate::config::{Config, QuantizationWarmup, ScheduleKind, SubNormStart};

/// The learning rate of a step, counted from 0. Formulas: [`ScheduleConfig`](crate::config::ScheduleConfig) and
/// [`ScheduleKind`].
///
/// Two-stage is the recipe of "The Era of 1-bit LLMs: Training Tips, Code and FAQ", cosine that of most others.
pub fn learning_rate(config: &Config, step: u64) -> f64 {
    let (schedule, peak) = (&config.schedule, config.optimizer.learning_rate);
    if step < schedule.warmup_steps {
        return peak * (step + 1) as f64 / schedule.warmup_steps as f64;
    }
    let rest = (config.train.steps - schedule.warmup_steps).max(1);
    let progress = (step - schedule.warmup_steps) as f64 / rest as f64;
    match schedule.kind {
        ScheduleKind::Constant => peak,
        ScheduleKind::Cosine => {
            let half_wave = (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0;
            peak * (schedule.final_fraction + (1.0 - schedule.final_fraction) * half_wave)
        }
        ScheduleKind::TwoStage => {
            let stage = if in_stage_two(config, step) { schedule.stage_two_learning_rate } else { 1.0 };
            peak * stage * (1.0 - progress)
        }
    }
}

/// The weight decay of a step, counted from 0.
pub fn weight_decay(config: &Config, step: u64) -> f64 {
    if config.schedule.kind == ScheduleKind::TwoStage && in_stage_two(config, step) {
        config.schedule.stage_two_weight_decay
    } else {
        config.optimizer.weight_decay
    }
}

/// How much of what turns a model into a BitNet is blended in at a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    /// Share of quantization, lambda: `x + lambda (quantize(x) - x)` for weights and activations.
    pub quantization: f32,
    /// Share of the sub-norms: `x + share (norm(x) - x)`.
    pub sub_norm: f32,
}

impl Shares {
    /// As a model is evaluated and exported.
    pub const FULL: Self = Self { quantization: 1.0, sub_norm: 1.0 };
}

/// The shares of a step, counted from 0: sub-norms that are blended into an imported model grow as quantization does, those
/// of a fresh one are whole.
pub fn shares(config: &Config, step: u64) -> Shares {
    let quantization = lambda(config, step);
    let blended = config.init.from.is_some() && config.init.sub_norm == SubNormStart::Blend;
    Shares { quantization, sub_norm: if blended { quantization } else { 1.0 } }
}

/// The share of quantization of a step, counted from 0: 1 from `warmup_fraction` of all steps on.
pub fn lambda(config: &Config, step: u64) -> f32 {
    let end = config.quantization.warmup_fraction * config.train.steps as f64;
    let progress = if end > 0.0 { step as f64 / end } else { 1.0 };
    match config.quantization.warmup {
        QuantizationWarmup::None => 1.0,
        QuantizationWarmup::Linear => progress.min(1.0) as f32,
        QuantizationWarmup::Step => f32::from(progress >= 1.0),
        QuantizationWarmup::Cubic => (1.0 - (1.0 - progress.min(1.0)).powi(3)) as f32,
    }
}

fn in_stage_two(config: &Config, step: u64) -> bool {
    step as f64 >= config.schedule.stage_two_start * config.train.steps as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(kind: ScheduleKind) -> Config {
        let mut config = Config::default();
        (config.train.steps, config.optimizer.learning_rate, config.optimizer.weight_decay) =
            (1000, 1e-3, 0.1);
        (config.schedule.kind, config.schedule.warmup_steps) = (kind, 100);
        config
    }

    #[test]
    fn every_schedule_warms_up_linearly_to_its_peak() {
        for kind in [ScheduleKind::Cosine, ScheduleKind::TwoStage, ScheduleKind::Constant] {
            let config = config(kind);
            assert_eq!(learning_rate(&config, 0), 1e-5);
            assert_eq!(learning_rate(&config, 49), 5e-4);
            assert_eq!(learning_rate(&config, 99), 1e-3);
            assert_eq!(learning_rate(&config, 100), 1e-3);
        }
    }

    #[test]
    fn cosine_falls_to_its_floor() {
        let config = config(ScheduleKind::Cosine);
        assert!((learning_rate(&config, 550) - 0.55e-3).abs() < 1e-12);
        assert!((learning_rate(&config, 1000) - 1e-4).abs() < 1e-12);
        assert_eq!(weight_decay(&config, 999), 0.1);
    }

    #[test]
    fn two_stages_drop_rate_and_decay_half_way() {
        let config = config(ScheduleKind::TwoStage);
        let (before, after) = (learning_rate(&config, 499), learning_rate(&config, 500));
        assert!((before - 1e-3 * (1.0 - 399.0 / 900.0)).abs() < 1e-12);
        assert!((after - 0.66e-3 * (1.0 - 400.0 / 900.0)).abs() < 1e-12);
        assert_eq!((weight_decay(&config, 499), weight_decay(&config, 500)), (0.1, 0.0));
        assert!(learning_rate(&config, 999) > 0.0);
    }

    #[test]
    fn quantization_grows_to_one() {
        let mut config = config(ScheduleKind::Constant);
        assert_eq!(lambda(&config, 0), 1.0);
        config.quantization.warmup = QuantizationWarmup::Linear;
        assert_eq!([0, 250, 500, 999].map(|s| lambda(&config, s)), [0.0, 0.5, 1.0, 1.0]);
        config.quantization.warmup = QuantizationWarmup::Step;
        assert_eq!([0, 499, 500].map(|s| lambda(&config, s)), [0.0, 0.0, 1.0]);
        config.quantization.warmup = QuantizationWarmup::Cubic;
        assert_eq!([0, 250, 500, 999].map(|s| lambda(&config, s)), [0.0, 0.875, 1.0, 1.0]);
        let all: Vec<f32> = (0..500).map(|s| lambda(&config, s)).collect();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "{all:?}");
    }

    #[test]
    fn sub_norms_are_blended_into_an_imported_model_only() {
        let mut config = config(ScheduleKind::Constant);
        config.quantization.warmup = QuantizationWarmup::Linear;
        let shares = |config: &Config| [0, 250, 500].map(|s| shares(config, s).sub_norm);
        // A fresh model has them from the start.
        assert_eq!((config.init.sub_norm, shares(&config)), (SubNormStart::Blend, [1.0; 3]));
        config.init.from = Some("model".into());
        assert_eq!(shares(&config), [0.0, 0.5, 1.0]);
        for start in [SubNormStart::Calibrate, SubNormStart::One] {
            config.init.sub_norm = start;
            assert_eq!(shares(&config), [1.0; 3]);
            assert_eq!(super::shares(&config, 250).quantization, 0.5);
        }
        // Without a warm-up everything is whole at once.
        config.init.sub_norm = SubNormStart::Blend;
        config.quantization.warmup = QuantizationWarmup::None;
        assert_eq!(super::shares(&config, 0), Shares::FULL);
    }
}
