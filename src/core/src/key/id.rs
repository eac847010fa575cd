//! The ids of records, wrapping keys, API clients, devices and requests.

use std::fmt;

/// Length of the id of a record, an API client or a wrapping key, in bytes.
pub const ID_BYTES: usize = 16;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; ID_BYTES]);

        impl $name {
            /// Creates an id from exactly 16 bytes.
            pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
                Self(bytes)
            }

            /// Returns the id in a slice, or `None` if the slice does not have exactly 16 bytes.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// Parses 32 hexadecimal digits.
            pub fn from_hex(text: &str) -> Option<Self> {
                let mut bytes = [0; ID_BYTES];
                hex::decode_to_slice(text, &mut bytes).ok()?;
                Some(Self(bytes))
            }

            /// The 16 bytes.
            pub const fn as_bytes(&self) -> &[u8; ID_BYTES] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

id!(
    /// The id of one record. A record id is new at every create, so that a purged record and its successor have different ids.
    RecordId
);
id!(
    /// The id of an API client, which the client sends with its secret.
    ClientId
);
impl ClientId {
    /// The name of the principal of this client.
    pub fn principal_name(self) -> String {
        format!("client:{self}")
    }
}

id!(
    /// The id of a request for approval. An API client that is created with an approval has the same 16 bytes as its id.
    ApprovalId
);

id!(
    /// The id of a device of a member. The device chooses the id when its trust is established. Ids of devices of different
    /// members are independent of each other.
    DeviceId
);

id!(
    /// The id of a request for access of a new device.
    AccessRequestId
);

id!(
    /// The id of a wrapping key and its integrity key. The RSA key and the integrity key on the token have this id as `CKA_ID`,
    /// unless [`ObjectIds`](super::ObjectIds) contains other values.
    WrappingKeyId
);
