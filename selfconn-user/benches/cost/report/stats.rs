//! Medians with confidence intervals by the bootstrap. The random generator has a fixed seed, so that the
//! same numbers give the same interval.

/// A value with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Estimate {
    pub(crate) value: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Estimate {
    /// A value without an interval.
    pub(crate) fn exact(value: f64) -> Self {
        Self { value, low: value, high: value }
    }
}

/// The median.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The interpolated quantile.
pub(crate) fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = share * (sorted.len().checked_sub(1)?) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

/// The median and its interval.
pub(crate) fn of(values: &[f64]) -> Option<Estimate> {
    bootstrap(values, median)
}

/// A quantile and its interval.
pub(crate) fn of_quantile(values: &[f64], share: f64) -> Option<Estimate> {
    bootstrap(values, |sample| quantile(sample, share))
}

/// The median of the ratios of pairs. What changes both values of a pair cancels out.
pub(crate) fn of_ratios(above: &[f64], below: &[f64]) -> Option<Estimate> {
    let ratios: Vec<f64> = above.iter().zip(below).map(|(above, below)| above / below).collect();
    of(&ratios)
}

pub(crate) fn bootstrap(values: &[f64], statistic: impl Fn(&[f64]) -> Option<f64>) -> Option<Estimate> {
    pub(crate) const RESAMPLES: usize = 1_000;
    let value = statistic(values)?;
    let mut random = Random(0x5e1f_c022);
    let mut sample = vec![0.0; values.len()];
    let mut found = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        sample.fill_with(|| values[random.below(values.len())]);
        found.extend(statistic(&sample));
    }
    Some(Estimate { value, low: quantile(&found, 0.025)?, high: quantile(&found, 0.975)? })
}

/// xorshift64*, by Vigna.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        ((number * limit as u64) >> 32) as usize
    }
}
