//! Unwraps integrity keys: the token decrypts the file of an integrity key, and this process keeps
//! the integrity key in its memory.
//!
//! Mitigation: M10 of `THREAT_MODEL.md`.

use keybroker_core::envelope::Algorithm;
use keybroker_pkcs11_ffi::Session;
use keybroker_worker_protocol::{Settings, integrity_file::IntegrityFiles};

use crate::{
    classify::{Class, Fault},
    keys::KeyPair,
    mac_key::WorkerKey,
    operation,
};

/// If the configuration contains the digest of an integrity key's file, reads the file and unwraps the integrity key on
/// the token.
pub(super) fn integrity_key(
    session: &Session,
    pair: &KeyPair,
    settings: &Settings,
) -> Result<WorkerKey, Fault> {
    let wrapped = IntegrityFiles::of(settings, pair.id).and_then(|files| files.load(pair.id))?;
    if wrapped.algorithm == Algorithm::RsaOaepSha1 && !settings.allow_oaep_sha1 {
        return Err(Fault::new(
            Class::Configuration,
            format!(
                "the integrity key of {} is wrapped by RSA-OAEP with SHA-1; to accept SHA-1, set `allow_oaep_sha1 = \
                 true` in [token]",
                pair.id
            ),
        ));
    }
    let plaintext = operation::decrypt(session, pair, wrapped.algorithm, &wrapped.ciphertext)
        .map_err(|fault| {
            fault.about(&format!(
                "the token does not unwrap the integrity key of {} from its file",
                pair.id
            ))
        })?;
    WorkerKey::from_plaintext(&plaintext, pair.id).ok_or_else(|| {
        Fault::new(
            Class::Untrusted,
            format!(
                "the file of wrapping key {} does not contain the integrity key of this wrapping key",
                pair.id
            ),
        )
    })
}
