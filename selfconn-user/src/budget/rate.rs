//! A rate with a burst. Pure: the caller has the clock.

const SECOND_NS: u64 = 1_000_000_000;

/// Token bucket: `rate` tokens a second. `full_ns` is the time at which the bucket is full again. Taking a token
/// moves it one interval ahead, and it may be at most the burst ahead of now.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    interval_ns: u64,
    burst_ns: u64,
    full_ns: u64,
}

/// The longest debt. A burst may be that of many minutes.
const MAX_DEBT_NS: u64 = 10 * SECOND_NS;

impl RateLimiter {
    /// The bucket holds the tokens of `burst_seconds`.
    #[must_use]
    pub fn new(rate: u32, burst_seconds: u32) -> Self {
        Self {
            interval_ns: SECOND_NS / u64::from(rate.max(1)),
            burst_ns: u64::from(burst_seconds) * SECOND_NS,
            full_ns: 0,
        }
    }

    /// The bucket holds this many tokens.
    #[must_use]
    pub fn with_burst(rate: u32, burst: u32) -> Self {
        let empty = Self::new(rate, 0);
        Self { burst_ns: empty.interval_ns * u64::from(burst), ..empty }
    }

    /// Time from which a token is available.
    #[must_use]
    pub fn available_ns(&self) -> u64 {
        self.full_ns.saturating_add(self.interval_ns).saturating_sub(self.burst_ns)
    }

    #[must_use]
    pub fn try_take(&mut self, now_ns: u64) -> bool {
        let is_available = self.has(1, now_ns);
        if is_available {
            self.take(1, now_ns);
        }
        is_available
    }

    /// True if this many tokens are available.
    #[must_use]
    pub fn has(&self, count: u64, now_ns: u64) -> bool {
        let taken_ns = self.interval_ns.saturating_mul(count);
        self.full_ns.saturating_add(taken_ns).saturating_sub(self.burst_ns) <= now_ns
    }

    /// Takes tokens also if they are not available. The debt is at most one burst, and that of ten seconds.
    pub fn take(&mut self, count: u64, now_ns: u64) {
        let full_ns = self.full_ns.max(now_ns).saturating_add(self.interval_ns.saturating_mul(count));
        let max_ns = self.burst_ns.saturating_add(self.burst_ns.min(MAX_DEBT_NS));
        self.full_ns = full_ns.min(now_ns.saturating_add(max_ns));
    }

    /// True if at least half of the burst is there.
    #[must_use]
    pub fn is_half_full(&self, now_ns: u64) -> bool {
        self.full_ns.saturating_sub(now_ns) <= self.burst_ns / 2
    }

    #[must_use]
    pub fn is_full(&self, now_ns: u64) -> bool {
        self.full_ns <= now_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_limiter_allows_its_rate_per_second() {
        for rate in [1, 3, 10, 1_000_000] {
            let mut limiter = RateLimiter::new(rate, 1);
            let start = 77 * SECOND_NS;
            let tokens = |limiter: &mut RateLimiter, at| (0..20).filter(|_| limiter.try_take(at)).count();
            let burst = (rate as usize).min(20);
            assert_eq!(tokens(&mut limiter, start), burst, "{rate}");
            if rate < 20 {
                assert_eq!(tokens(&mut limiter, start), 0);
                assert!(!limiter.try_take(limiter.available_ns() - 1));
                assert!(limiter.try_take(limiter.available_ns()));
            }
        }
    }

    #[test]
    fn a_debt_is_paid_before_a_token_is_available_and_is_bounded() {
        let mut limiter = RateLimiter::new(10, 2);
        limiter.take(25, 0);
        assert!(!limiter.has(1, SECOND_NS / 2) && limiter.has(1, SECOND_NS * 6 / 10));
        limiter.take(u64::MAX, 0);
        assert!(!limiter.has(1, 2 * SECOND_NS) && limiter.has(20, 4 * SECOND_NS));
        assert!(!limiter.is_half_full(2 * SECOND_NS) && limiter.is_half_full(3 * SECOND_NS));
        let mut large = RateLimiter::with_burst(10, 1_000);
        assert!(large.has(1_000, 0) && !large.has(1_001, 0));
        large.take(u64::MAX, 0);
        assert!(!large.has(1, 10 * SECOND_NS) && large.has(1, 11 * SECOND_NS));
        let mut unlimited = RateLimiter::new(u32::MAX, 1);
        unlimited.take(1 << 40, u64::MAX);
        assert!(unlimited.has(u64::MAX, u64::MAX));
    }
}
