//! Encrypted strings in Bitwarden's format: a type, a dot, and base64 parts that are separated by
//! vertical bars.

use std::fmt;

use base64ct::{Base64, Encoding as _};

use super::{
    Error,
    cipher::{BLOCK_BYTES, Iv, Mac},
};

/// Length of an RSA modulus, and therefore of a type 4 cipher text, in bytes.
pub(super) const RSA_BYTES: usize = 256;

/// Longest accepted encrypted string, in bytes. The longest text that clients encrypt is a note,
/// which has at most a tenth of this length.
pub const ENC_STRING_BYTES_MAX: usize = 512 * 1_024;

/// An encrypted string, well-formed but not yet verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EncString {
    /// Type 0: AES-256-CBC without a MAC. Old accounts contain encrypted strings of this type, but
    /// this crate never writes texts of this type.
    Aes256Cbc {
        /// 16 bytes.
        iv: Iv,
        /// The length is a multiple of 16 bytes.
        ciphertext: Vec<u8>,
    },
    /// Type 2: AES-256-CBC, then HMAC-SHA256 over IV and cipher text.
    Aes256CbcHmac {
        /// 16 bytes.
        iv: Iv,
        /// The length is a multiple of 16 bytes.
        ciphertext: Vec<u8>,
        /// 32 bytes.
        mac: Mac,
    },
    /// Type 4: RSA-2048-OAEP with SHA-1.
    RsaOaepSha1 {
        /// 256 bytes.
        ciphertext: Vec<u8>,
    },
}

impl EncString {
    /// Parses an encrypted string strictly: the text must be canonical base64 with padding, with
    /// nothing before or after. Therefore, each encrypted value has exactly one accepted text form.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.len() > ENC_STRING_BYTES_MAX {
            return Err(Error::Form("longer than 512 KiB"));
        }
        let (number, rest) = text.split_once('.').ok_or(Error::Form(
            "the text does not begin with a type number and a dot",
        ))?;
        let parts: Vec<&str> = rest.splitn(4, '|').collect();
        match (number, parts.as_slice()) {
            ("0", [iv, ciphertext]) => Ok(Self::Aes256Cbc {
                iv: fixed(iv, "the IV does not have 16 bytes")?,
                ciphertext: blocks(ciphertext)?,
            }),
            ("2", [iv, ciphertext, mac]) => Ok(Self::Aes256CbcHmac {
                iv: fixed(iv, "the IV does not have 16 bytes")?,
                ciphertext: blocks(ciphertext)?,
                mac: fixed(mac, "the MAC does not have 32 bytes")?,
            }),
            ("4", [ciphertext]) => {
                let ciphertext = decode(ciphertext)?;
                if ciphertext.len() != RSA_BYTES {
                    return Err(Error::Form("the RSA ciphertext does not have 256 bytes"));
                }
                Ok(Self::RsaOaepSha1 { ciphertext })
            }
            ("0" | "2" | "4", _) => Err(Error::Form(
                "the text does not have the number of parts that its type requires",
            )),
            ("1" | "3" | "5" | "6" | "7", _) => Err(Error::Type(number.parse().unwrap_or(0))),
            _ => Err(Error::Form("the type is unknown")),
        }
    }

    pub(super) fn authenticated(iv: Iv, ciphertext: Vec<u8>, mac: Mac) -> Result<Self, Error> {
        let made = Self::Aes256CbcHmac {
            iv,
            ciphertext,
            mac,
        };
        // If the text is longer, `parse` refuses it.
        if made.to_string().len() > ENC_STRING_BYTES_MAX {
            return Err(Error::TooLong);
        }
        Ok(made)
    }

    /// The number of the type.
    pub fn number(&self) -> u8 {
        match self {
            Self::Aes256Cbc { .. } => 0,
            Self::Aes256CbcHmac { .. } => 2,
            Self::RsaOaepSha1 { .. } => 4,
        }
    }
}

impl fmt::Display for EncString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let base64 = Base64::encode_string;
        match self {
            Self::Aes256Cbc { iv, ciphertext } => {
                write!(f, "0.{}|{}", base64(iv), base64(ciphertext))
            }
            Self::Aes256CbcHmac {
                iv,
                ciphertext,
                mac,
            } => {
                let (iv, ciphertext, mac) = (base64(iv), base64(ciphertext), base64(mac));
                write!(f, "2.{iv}|{ciphertext}|{mac}")
            }
            Self::RsaOaepSha1 { ciphertext } => write!(f, "4.{}", base64(ciphertext)),
        }
    }
}

fn decode(part: &str) -> Result<Vec<u8>, Error> {
    Base64::decode_vec(part).map_err(|_| Error::Form("a part of the text is not canonical base64"))
}

fn fixed<const LENGTH: usize>(part: &str, what: &'static str) -> Result<[u8; LENGTH], Error> {
    decode(part)?.try_into().map_err(|_| Error::Form(what))
}

fn blocks(part: &str) -> Result<Vec<u8>, Error> {
    let ciphertext = decode(part)?;
    if ciphertext.is_empty() || !ciphertext.len().is_multiple_of(BLOCK_BYTES) {
        return Err(Error::Form(
            "the length of the ciphertext is not a multiple of 16 bytes",
        ));
    }
    Ok(ciphertext)
}
