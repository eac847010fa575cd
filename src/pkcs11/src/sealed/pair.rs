//! The key pairs of recipients that this process makes itself, to open sealed releases of known values.

use std::sync::OnceLock;

use aws_lc_rs::{
    encoding::AsDer as _,
    rsa::{
        KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey,
        PrivateDecryptingKey,
    },
};
use keybroker_core::envelope::Algorithm;
use keybroker_worker_protocol::recipient::RecipientKey;
use zeroize::Zeroizing;

use crate::classify::{Class, Fault};

/// The key pair of a recipient. The private key is in the memory of this process, so only known values are released to it.
pub(crate) struct RecipientPair {
    pub(crate) public: RecipientKey,
    private: OaepPrivateDecryptingKey,
}

impl RecipientPair {
    pub(crate) fn generate(size: KeySize) -> Result<Self, Fault> {
        let failed = |_| Fault::new(Class::Configuration, "cannot make the key of a recipient");
        let private = PrivateDecryptingKey::generate(size).map_err(failed)?;
        let spki = private.public_key().as_der().map_err(failed)?;
        Ok(Self {
            public: RecipientKey::from_spki(spki.as_ref())
                .map_err(|error| Fault::new(Class::Configuration, error.to_string()))?,
            private: OaepPrivateDecryptingKey::new(private).map_err(failed)?,
        })
    }

    /// Returns the key pair for the self-tests of this process. The first call makes the key pair.
    pub(crate) fn of_process() -> Result<&'static Self, Fault> {
        static PAIR: OnceLock<RecipientPair> = OnceLock::new();
        if let Some(pair) = PAIR.get() {
            return Ok(pair);
        }
        let pair = Self::generate(KeySize::Rsa2048)?;
        Ok(PAIR.get_or_init(|| pair))
    }

    /// Decrypts the answer of the token in software.
    pub(crate) fn open(
        &self,
        sealed: &[u8],
        algorithm: Algorithm,
    ) -> Result<Zeroizing<Vec<u8>>, Fault> {
        let parameters = match algorithm {
            Algorithm::RsaOaepSha256 => &OAEP_SHA256_MGF1SHA256,
            Algorithm::RsaOaepSha1 => &OAEP_SHA1_MGF1SHA1,
        };
        let mut plaintext = Zeroizing::new(vec![0; self.private.min_output_size()]);
        let opened = self
            .private
            .decrypt(parameters, sealed, &mut plaintext, None)
            .map_err(|_| Fault::new(Class::Untrusted, "the recipient cannot decrypt the answer"))?;
        let length = opened.len();
        plaintext.truncate(length);
        Ok(plaintext)
    }
}
