//! The two key derivation functions that derive a master key from a password.

use argon2::{Algorithm, ParamsBuilder, Version};
use aws_lc_rs::digest;
use zeroize::Zeroizing;

use super::{Error, MASTER_KEY_BYTES, MasterKey, Password, keys::pbkdf2_sha256};

/// The largest values that clients offer for new accounts: iterations of PBKDF2, and iterations, memory in MiB and
/// parallelism of Argon2id.
const OFFERED_ITERATIONS_MAX: u32 = 2_000_000;
const OFFERED_ARGON2ID_MAX: [u32; 3] = [10, 1_024, 16];
/// The largest values that this crate accepts for existing accounts. With the largest values, a
/// derivation takes about a minute (PBKDF2) or 4 GiB of memory (Argon2id).
const ITERATIONS_MAX: u32 = 100_000_000;
const ARGON2ID_MAX: [u32; 3] = [100, 4_096, 255];

/// A key derivation function with the parameters that the server stores for an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kdf {
    /// `kdf` 0: PBKDF2-HMAC-SHA256.
    Pbkdf2 {
        /// `kdfIterations`.
        iterations: u32,
    },
    /// `kdf` 1: Argon2id, version 1.3.
    Argon2id {
        /// `kdfIterations`.
        iterations: u32,
        /// `kdfMemory`, in MiB.
        memory_mib: u32,
        /// `kdfParallelism`.
        parallelism: u32,
    },
}

impl Kdf {
    /// The default for new accounts until 2026, which is also the minimum that OWASP recommends.
    pub const PBKDF2_RECOMMENDED: Self = Self::Pbkdf2 {
        iterations: 600_000,
    };
    /// The default parameters of Argon2id in Bitwarden's documentation.
    pub const ARGON2ID_RECOMMENDED: Self = Self::Argon2id {
        iterations: 3,
        memory_mib: 64,
        parallelism: 4,
    };

    /// Checks the parameters of an existing account. Parameters that clients would refuse as too
    /// weak are refused, because a server that sends weak parameters may want to guess the
    /// password. Parameters above the values that clients offer are accepted up to a limit, because
    /// clients can open such accounts.
    pub fn check(self) -> Result<(), Error> {
        self.check_up_to(ITERATIONS_MAX, ARGON2ID_MAX)
    }

    /// Checks the parameters for a new account. Only parameters that clients offer are accepted.
    pub fn check_new(self) -> Result<(), Error> {
        self.check_up_to(OFFERED_ITERATIONS_MAX, OFFERED_ARGON2ID_MAX)
    }

    fn check_up_to(self, pbkdf2_max: u32, argon2id_max: [u32; 3]) -> Result<(), Error> {
        let range = |name, value, min, max| {
            if (min..=max).contains(&value) {
                Ok(())
            } else {
                Err(Error::Kdf {
                    name,
                    value,
                    min,
                    max,
                })
            }
        };
        match self {
            Self::Pbkdf2 { iterations } => {
                range("the number of iterations", iterations, 5_000, pbkdf2_max)
            }
            Self::Argon2id {
                iterations,
                memory_mib,
                parallelism,
            } => {
                let [iterations_max, memory_max, parallelism_max] = argon2id_max;
                range("the number of iterations", iterations, 2, iterations_max)?;
                range("the memory in MiB", memory_mib, 16, memory_max)?;
                range("the parallelism", parallelism, 1, parallelism_max)
            }
        }
    }

    /// Returns a warning if the parameters are weak or above the values that clients offer. The
    /// Argon2id default of Bitwarden clients in 2026 (32 MiB, 6 iterations) causes no warning,
    /// because it requires as much work as 64 MiB and 3 iterations.
    pub fn warning(self) -> Option<&'static str> {
        if self.check().is_ok() && self.check_new().is_err() {
            return Some(match self {
                Self::Pbkdf2 { .. } => {
                    "PBKDF2 has more than the 2,000,000 iterations that Bitwarden clients offer"
                }
                Self::Argon2id { .. } => {
                    "a parameter of Argon2id is more than the maximum that Bitwarden clients offer: 10 iterations, 1,024 MiB and parallelism 16"
                }
            });
        }
        match self {
            Self::Pbkdf2 { iterations } => (iterations < 600_000)
                .then_some("PBKDF2 has fewer than the recommended 600,000 iterations"),
            Self::Argon2id {
                iterations,
                memory_mib,
                parallelism,
            } => {
                let enough =
                    (memory_mib >= 64 && iterations >= 3) || (memory_mib >= 32 && iterations >= 6);
                (!enough || parallelism < 4).then_some(
                    "the parameters of Argon2id are weaker than the recommended 64 MiB, 3 iterations and parallelism 4",
                )
            }
        }
    }

    /// Derives the master key of an account. The salt is the e-mail address, unless the server sends another salt.
    pub fn master_key(
        self,
        password: &Password,
        salt: &impl AsRef<str>,
    ) -> Result<MasterKey, Error> {
        self.check()?;
        let mut key = Zeroizing::new(vec![0; MASTER_KEY_BYTES]);
        match self {
            Self::Pbkdf2 { iterations } => {
                let salt = salt.as_ref().as_bytes();
                pbkdf2_sha256(iterations, salt, password.expose(), &mut key);
            }
            Self::Argon2id {
                iterations,
                memory_mib,
                parallelism,
            } => {
                // The hash of the e-mail address is the salt, because the address itself may be shorter than Argon2
                // permits.
                let salt = digest::digest(&digest::SHA256, salt.as_ref().as_bytes());
                let mut params = ParamsBuilder::new();
                params
                    .m_cost(memory_mib * 1_024)
                    .t_cost(iterations)
                    .p_cost(parallelism)
                    .output_len(MASTER_KEY_BYTES);
                let argon2 = params
                    .context(Algorithm::Argon2id, Version::V0x13)
                    .expect("checked against limits that are stricter than those of Argon2");
                argon2
                    .hash_password_into(password.expose(), salt.as_ref(), &mut key)
                    .map_err(|_| Error::System("memory"))?;
            }
        }
        MasterKey::from_bytes(key)
    }
}
