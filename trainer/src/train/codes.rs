//! The ternary codes of all projections, to see whether a BitNet is learning: a flip rate near 0 is a dead run, a share
//! of zeros outside 0.2 to 0.5 an unhealthy layer.
use std::collections::BTreeMap;

use bitlinear::quant;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::Serialize;

use crate::parameters::{ParameterError, Parameters};

/// The codes of each projection at one moment, by the name of its latent weight.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Codes(BTreeMap<String, Vec<i8>>);

/// What the metrics say of one projection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CodeShares {
    /// Share of -1.
    pub minus: f64,
    /// Share of 0.
    pub zero: f64,
    /// Share of +1.
    pub plus: f64,
    /// Share of codes that differ from the last evaluation's (at the first: from the initial ones).
    pub flipped: f64,
}

/// Shares of each code of the projections, and of codes that differ from those of `before`.
///
/// # Errors
/// Parameters cannot be read.
pub fn code_shares(
    now: &Parameters,
    before: &Parameters,
) -> candle_core::Result<BTreeMap<String, CodeShares>> {
    let shares = Codes::of(now)?;
    let shares = shares.shares(&Codes::of(before)?).into_iter();
    Ok(shares.map(|(name, shares)| (name.to_owned(), shares)).collect())
}

impl Codes {
    /// The codes of latent weights as they are now.
    pub(super) fn of(parameters: &Parameters) -> candle_core::Result<Self> {
        let values = parameters.values()?;
        let latent: Vec<_> = parameters.iter().filter(|(_, p)| p.role.is_projection()).collect();
        let codes = latent.into_par_iter().map(|(name, _)| {
            let values = values.get(name);
            let mut codes = vec![0; values.len()];
            quant::ternarize(values, quant::absmean(values), &mut codes);
            (name.to_owned(), codes)
        });
        Ok(Self(codes.collect()))
    }

    /// Shares of each code, and of codes that are not as in `before`.
    pub(super) fn shares(&self, before: &Codes) -> BTreeMap<&str, CodeShares> {
        let shares = self.0.par_iter().map(|(name, codes)| {
            let share = |count: usize| count as f64 / codes.len() as f64;
            let of = |code: i8| share(codes.iter().filter(|c| **c == code).count());
            let flipped = match before.0.get(name) {
                Some(before) => share(codes.iter().zip(before).filter(|(a, b)| a != b).count()),
                None => 0.0,
            };
            (name.as_str(), CodeShares { minus: of(-1), zero: of(0), plus: of(1), flipped })
        });
        shares.collect()
    }

    /// As safetensors of i8.
    pub(super) fn to_safetensors(&self) -> Result<Vec<u8>, ParameterError> {
        let views = self.0.iter().map(|(name, codes)| {
            let bytes: Vec<u8> = codes.iter().map(|c| c.cast_unsigned()).collect();
            (name, bytes)
        });
        let bytes: Vec<_> = views.collect();
        let views: Result<Vec<_>, _> = bytes
            .iter()
            .map(|(name, bytes)| Ok((name.as_str(), TensorView::new(Dtype::I8, vec![bytes.len()], bytes)?)))
            .collect::<Result<_, safetensors::SafeTensorError>>();
        Ok(safetensors::serialize(views?, None)?)
    }

    /// The inverse of [`Codes::to_safetensors`].
    pub(super) fn from_safetensors(bytes: &[u8]) -> Result<Self, ParameterError> {
        let file = SafeTensors::deserialize(bytes)?;
        let codes = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, view.data().iter().map(|b| b.cast_signed()).collect()));
        Ok(Self(codes.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_flips_are_counted() {
        let codes = |values: &[i8]| Codes(BTreeMap::from([("w".to_owned(), values.to_vec())]));
        let (before, after) = (codes(&[-1, 0, 1, 1]), codes(&[-1, 1, 1, 0]));
        let shares = &after.shares(&before)["w"];
        assert_eq!(*shares, CodeShares { minus: 0.25, zero: 0.25, plus: 0.5, flipped: 0.5 });
        assert_eq!(Codes::from_safetensors(&after.to_safetensors().unwrap()).unwrap(), after);
    }
}
