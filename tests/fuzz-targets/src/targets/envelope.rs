//! Envelopes: what is stored of a key.

use keybroker_core::{
    envelope::{
        Algorithm, ClientContext, Context, ENVELOPE_BYTES_MAX, Envelope, Unsealed,
        WRAPPED_BYTES_MAX, WRAPPED_BYTES_MIN,
    },
    key::{Tenant, WrappingKeyId},
};

pub(crate) const WORDS: &[&str] = &["\x01", "\x02", "\x01\0", "\x02\0", "\0"];

/// Reads an envelope.
///
/// # Panics
/// If an accepted one is not written as it was read.
pub fn envelope(bytes: &[u8]) -> bool {
    let Ok(envelope) = Envelope::parse(bytes) else {
        return false;
    };
    assert_eq!(envelope.to_bytes(), bytes);
    assert!(bytes.len() <= ENVELOPE_BYTES_MAX);
    assert!((WRAPPED_BYTES_MIN..=WRAPPED_BYTES_MAX).contains(&envelope.wrapped().len()));
    let (tenant, context) = (Tenant::default(), ClientContext::new(Vec::new()).unwrap());
    let context = Context::Client {
        tenant: &tenant,
        context: &context,
    };
    let again = envelope.to_unsealed().seal(&context, *envelope.mac());
    assert_eq!(again.wrapped(), envelope.wrapped());
    assert_eq!(again.mac_message(&context), envelope.mac_message(&context));
    assert_eq!(again == envelope, again.kind() == envelope.kind());
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let (tenant, context) = (Tenant::default(), ClientContext::new(Vec::new()).unwrap());
    let context = Context::Client {
        tenant: &tenant,
        context: &context,
    };
    let lengths = [WRAPPED_BYTES_MIN, 384, WRAPPED_BYTES_MAX];
    let algorithms = [Algorithm::RsaOaepSha256, Algorithm::RsaOaepSha1];
    let client =
        lengths
            .into_iter()
            .zip(algorithms.into_iter().cycle())
            .map(|(length, algorithm)| {
                let key = WrappingKeyId::from_bytes([7; 16]);
                let unsealed = Unsealed::new(algorithm, key, vec![9; length]).unwrap();
                unsealed.seal(&context, [3; 32]).to_bytes()
            });
    let mut seeds: Vec<Vec<u8>> = client.collect();
    let mut record = seeds[0].clone();
    record[1] = 1;
    seeds.push(record);
    seeds
}
