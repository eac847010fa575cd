//! The messages that an integrity key authenticates: different contents have different messages.
//!
//! An input is a list of fields, separated by bytes 0xFF. Beside what it says, its neighbours are tried: those that have a byte on the
//! other side of the border between two fields.

use keybroker_core::{
    envelope::{
        Algorithm, ClientContext, Context, Unsealed, WRAPPED_BYTES_MIN,
        mac::{MESSAGE_BYTES_MAX, MacMessage, RegistryFields},
    },
    key::{
        ClientId, Fingerprint, KeyAddress, KeyName, ObjectIds, Purpose, RecordId, Revision, Tenant,
        UserId, WrappingKeyId, WrappingKeyState,
    },
};

pub(crate) const WORDS: &[&str] = &["\0", "\0\x01", "\0\x02", "a", "b", "active", "plain"];

const SEPARATOR: u8 = 0xff;
/// Fields of one kind of message at most: a longer one is refused, as its writer refuses it.
const FIELDS_MAX: usize = 8;
const FIELD_BYTES_MAX: usize = 64;

/// The content of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Record {
        tenant: Tenant,
        user: UserId,
        name: KeyName,
    },
    Client {
        tenant: Tenant,
        context: Vec<u8>,
    },
    Registry {
        private: Vec<u8>,
        integrity: Vec<u8>,
        serial: String,
    },
    Credential {
        id: [u8; 16],
        revision: u64,
        document: [u8; 32],
    },
    Request(Vec<Vec<u8>>),
    RequestResult(Vec<Vec<u8>>),
}

impl Content {
    /// Everything that the fields can be.
    fn all(fields: &[Vec<u8>]) -> Vec<Self> {
        let text = |at: usize| String::from_utf8(fields.get(at)?.clone()).ok();
        let tenant = || Tenant::parse(&text(0)?).ok();
        let record = || {
            Some(Self::Record {
                tenant: tenant()?,
                user: UserId::parse(&text(1)?).ok()?,
                name: KeyName::parse(&text(2)?).ok()?,
            })
        };
        let client = || {
            let context = fields.get(1)?.clone();
            ClientContext::new(context.clone())?;
            Some(Self::Client {
                tenant: tenant()?,
                context,
            })
        };
        let registry = || {
            let (private, integrity) = (fields.first()?.clone(), fields.get(1)?.clone());
            ObjectIds::from_slices(&private, &integrity)?;
            Some(Self::Registry {
                private,
                integrity,
                serial: text(2)?,
            })
        };
        let credential = || {
            Some(Self::Credential {
                id: padded(fields.first()?)?,
                revision: u64::try_from(fields.get(1)?.len()).ok()?,
                document: padded(fields.get(2)?)?,
            })
        };
        [record(), client(), registry(), credential()]
            .into_iter()
            .flatten()
            .chain([
                Self::Request(fields.to_vec()),
                Self::RequestResult(fields.to_vec()),
            ])
            .collect()
    }

    fn message(&self) -> MacMessage {
        let key = WrappingKeyId::from_bytes([7; 16]);
        let unsealed =
            Unsealed::new(Algorithm::RsaOaepSha256, key, vec![9; WRAPPED_BYTES_MIN]).unwrap();
        match self {
            Self::Record { tenant, user, name } => unsealed.mac_message(&Context::Record {
                address: &KeyAddress {
                    tenant: tenant.clone(),
                    user: user.clone(),
                    name: name.clone(),
                },
                record_id: RecordId::from_bytes([1; 16]),
                revision: Revision::new(1).unwrap(),
            }),
            Self::Client { tenant, context } => {
                let context = ClientContext::new(context.clone()).unwrap();
                unsealed.mac_message(&Context::Client {
                    tenant,
                    context: &context,
                })
            }
            Self::Registry {
                private,
                integrity,
                serial,
            } => MacMessage::registry(&RegistryFields {
                id: key,
                objects: &ObjectIds::from_slices(private, integrity).unwrap(),
                fingerprint: Fingerprint([2; 32]),
                purpose: Purpose::Plain,
                state: WrappingKeyState::Active,
                token_serial: serial,
                sequence: 3,
                registered_us: 4,
                backup_confirmed_us: None,
            }),
            Self::Credential {
                id,
                revision,
                document,
            } => MacMessage::client_credential(ClientId::from_bytes(*id), *revision, document),
            Self::Request(parts) => MacMessage::request(&slices(parts)),
            Self::RequestResult(parts) => MacMessage::request_result(&slices(parts)),
        }
    }
}

fn slices(parts: &[Vec<u8>]) -> Vec<&[u8]> {
    parts.iter().map(Vec::as_slice).collect()
}

fn padded<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    let mut padded = [0; N];
    padded.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(padded)
}

/// Makes the messages of some fields and of their neighbours.
///
/// # Panics
/// If two different contents have the same message, or one content has two.
pub fn mac_context(input: &[u8]) -> bool {
    let fields: Vec<Vec<u8>> = input
        .split(|byte| *byte == SEPARATOR)
        .map(<[u8]>::to_vec)
        .collect();
    if fields.len() > FIELDS_MAX || fields.iter().any(|field| field.len() > FIELD_BYTES_MAX) {
        return false;
    }
    let mut contents = Content::all(&fields);
    for border in 1..fields.len() {
        let mut left = fields.clone();
        if let Some(byte) = left[border - 1].pop() {
            left[border].insert(0, byte);
            contents.extend(Content::all(&left));
        }
        let mut merged = fields.clone();
        let right = merged.remove(border);
        merged[border - 1].extend(right);
        contents.extend(Content::all(&merged));
    }
    let messages: Vec<MacMessage> = contents.iter().map(Content::message).collect();
    for (at, (content, message)) in contents.iter().zip(&messages).enumerate() {
        assert!(message.as_bytes().len() <= MESSAGE_BYTES_MAX);
        for (other, its) in contents.iter().zip(&messages).skip(at) {
            assert_eq!(
                content == other,
                message == its,
                "{content:?} and {other:?}"
            );
        }
    }
    true
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [
        &b"default\xffada\xffvault"[..],
        b"t\xffu\xffk",
        b"ab\xffc\xffabc\xffd",
        b"\x01\x02\xff\x03\xff0123456789abcdef",
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}
