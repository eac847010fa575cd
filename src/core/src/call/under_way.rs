//! The number of calls under way, over all APIs.

const GAUGE: &str = "keybroker_calls_under_way";

/// One call, counted until this is dropped, also when it panics.
#[derive(Debug)]
pub struct UnderWay(());

impl UnderWay {
    /// A call that begins now.
    #[expect(
        clippy::new_without_default,
        reason = "a default that counts would surprise"
    )]
    pub fn new() -> Self {
        metrics::gauge!(GAUGE).increment(1.0);
        Self(())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        metrics::gauge!(GAUGE).decrement(1.0);
    }
}
