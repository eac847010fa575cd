//! The mechanism of RSA-OAEP.

use cryptoki::mechanism::{
    Mechanism, MechanismType,
    rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
};

use keybroker_core::envelope::Algorithm;

/// Returns RSA-OAEP with the hash of this algorithm and an empty label.
pub(crate) fn mechanism(algorithm: Algorithm) -> Mechanism<'static> {
    let (hash, mgf) = match algorithm {
        Algorithm::RsaOaepSha256 => (MechanismType::SHA256, PkcsMgfType::MGF1_SHA256),
        Algorithm::RsaOaepSha1 => (MechanismType::SHA1, PkcsMgfType::MGF1_SHA1),
    };
    Mechanism::RsaPkcsOaep(PkcsOaepParams::new(hash, mgf, PkcsOaepSource::empty()))
}
