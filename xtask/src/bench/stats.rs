//! Medians, and how far they can be trusted: intervals by the bootstrap, with a generator of its own and a fixed seed,
//! so that the same numbers give the same interval.

/// A number, and where it lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(super) struct Estimate {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Estimate {
    /// A number that is no estimate.
    pub(super) fn exact(value: f64) -> Self {
        Self { value, low: value, high: value }
    }
}

/// The number in the middle. None of nothing.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The number that this share of all does not exceed, interpolated. None of nothing.
pub(super) fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = share * (sorted.len().checked_sub(1)?) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

/// The median of numbers.
pub(super) fn of(values: &[f64]) -> Option<Estimate> {
    bootstrap(values, median)
}

/// A share of numbers, as [`quantile`].
pub(super) fn of_quantile(values: &[f64], share: f64) -> Option<Estimate> {
    bootstrap(values, |sample| quantile(sample, share))
}

/// The median of the ratios of pairs: what changes both of a pair cancels out.
pub(super) fn of_ratios(above: &[f64], below: &[f64]) -> Option<Estimate> {
    let ratios: Vec<f64> = above.iter().zip(below).map(|(above, below)| above / below).collect();
    of(&ratios)
}

fn bootstrap(values: &[f64], statistic: impl Fn(&[f64]) -> Option<f64>) -> Option<Estimate> {
    const RESAMPLES: usize = 1_000;
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
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        ((number * limit as u64) >> 32) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        for (values, share, expected) in [
            (&[][..], 0.5, None),
            (&[7.0], 0.99, Some(7.0)),
            (&[3.0, 1.0, 2.0], 0.5, Some(2.0)),
            (&[4.0, 1.0, 2.0, 3.0], 0.5, Some(2.5)),
            (&[0.0, 10.0], 0.25, Some(2.5)),
            (&[1.0, 2.0, 3.0], 1.0, Some(3.0)),
        ] {
            assert_eq!(quantile(values, share), expected, "{values:?} at {share}");
        }
    }

    #[test]
    fn an_interval_holds_the_median_and_narrows_with_more_numbers() {
        let numbers = |count: usize| -> Vec<f64> { (0..count).map(|n| (n * 7_919 % 1_000) as f64).collect() };
        let mut widths = Vec::new();
        for count in [10, 100, 1_000] {
            let estimate = of(&numbers(count)).unwrap();
            assert!(estimate.low <= estimate.value && estimate.value <= estimate.high, "{estimate:?}");
            widths.push(estimate.high - estimate.low);
        }
        assert!(widths[0] > widths[1] && widths[1] > widths[2], "{widths:?}");
        assert_eq!(of(&[5.0; 20]), Some(Estimate::exact(5.0)));
        assert_eq!(of(&[]), None);
    }

    #[test]
    fn what_changes_both_of_a_pair_cancels_out() {
        let below: Vec<f64> = (1..50).map(f64::from).collect();
        let above: Vec<f64> = below.iter().map(|value| value * 1.5).collect();
        let ratio = of_ratios(&above, &below).unwrap();
        assert!((ratio.value - 1.5).abs() < 1e-9 && ratio.high - ratio.low < 1e-9, "{ratio:?}");
    }

    #[test]
    fn every_number_is_drawn() {
        let mut random = Random(0x5e1f_c022);
        let mut drawn = [0_u32; 7];
        for _ in 0..7_000 {
            drawn[random.below(7)] += 1;
        }
        assert!(drawn.iter().all(|count| (800..1_200).contains(count)), "{drawn:?}");
    }
}
