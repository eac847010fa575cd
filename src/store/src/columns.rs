//! The tables with their columns. All statements are built from this list, and the code that reads
//! rows uses the names of the columns.

use super::slow::Named;

/// The type of the values of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bytes,
    Text,
    Integer,
    OptionalInteger,
}

/// One column of a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
}

/// Defines the tables. The columns before the `;` are the primary key.
macro_rules! tables {
    ($($(#[$doc:meta])* $table:ident = $name:ident {
        $($key:ident: $key_kind:ident),+; $($column:ident: $kind:ident),+ $(,)?
    })+) => {
        /// The tables.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Table {
            $($(#[$doc])* $table,)+
        }

        impl Table {
            /// All tables, in the order in which a copy fills them. Each table comes after the
            /// tables to which its rows refer. The registry is last, because a broker does not
            /// serve from a database without a registry.
            pub const ALL: [Self; [$(Self::$table),+].len()] = [$(Self::$table),+];

            /// The name of the table in the database.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$table => stringify!($name),)+
                }
            }

            /// All columns, beginning with the columns of the primary key.
            pub(super) const fn columns(self) -> &'static [Column] {
                match self {
                    $(Self::$table => &[
                        $(Column { name: stringify!($key), kind: Kind::$key_kind },)+
                        $(Column { name: stringify!($column), kind: Kind::$kind },)+
                    ],)+
                }
            }

            /// The columns of the primary key.
            pub(super) fn key(self) -> &'static [Column] {
                let columns = match self {
                    $(Self::$table => [$(stringify!($key)),+].len(),)+
                };
                &self.columns()[..columns]
            }
        }

        /// A struct with one value for each table.
        #[derive(Debug)]
        pub(super) struct PerTable<T> {
            $($name: T,)+
        }

        impl<T> PerTable<T> {
            pub(super) fn from_fn(make: impl Fn(Table) -> T) -> Self {
                Self { $($name: make(Table::$table),)+ }
            }

            pub(super) const fn of(&self, table: Table) -> &T {
                match table {
                    $(Table::$table => &self.$name,)+
                }
            }
        }
    };
}

tables! {
    /// Records.
    Records = records {
        record_id: Bytes;
        tenant: Text, user: Text, key_name: Text, state: Text, revision: Integer,
        created_us: Integer, updated_us: Integer, deleted_us: OptionalInteger,
    }
    /// Their revisions.
    Revisions = revisions {
        record_id: Bytes, revision: Integer;
        envelope: Bytes, wrapping_key_id: Bytes, created_us: Integer,
    }
    /// The marks of changes. After a crash, a mark shows that a mutation was committed.
    Changes = changes {
        call_id: Bytes;
        record_id: Bytes, changed_us: Integer,
    }
    /// The request ids of mutations, each with the state of the record immediately after the
    /// mutation.
    Requests = requests {
        tenant: Text, principal: Text, request_id: Bytes;
        content_mac: Bytes, key_id: Bytes, record_id: Bytes, user: Text, key_name: Text, state: Text,
        revision: Integer, wrapping_key_id: Bytes, created_us: Integer, updated_us: Integer,
        deleted_us: OptionalInteger, used_us: Integer, result_mac: Bytes,
    }
    /// The time of the last release of each record.
    LastUses = last_uses {
        record_id: Bytes;
        used_us: Integer,
    }
    /// API clients.
    Clients = clients {
        client_id: Bytes;
        revision: Integer, document: Bytes, mac: Bytes, key_id: Bytes, created_us: Integer,
        updated_us: Integer,
    }
    /// The time at which each secret of an API client was last accepted.
    ClientUses = client_uses {
        client_id: Bytes, secret_number: Integer;
        used_us: Integer,
    }
    /// The objects of wrapping keys on further tokens, if the configuration has several tokens.
    Places = wrapping_key_places {
        key_id: Bytes, token: Text;
        token_serial: Text, private_cka_id: Bytes, integrity_cka_id: Bytes, registered_us: Integer,
        backup_confirmed_us: OptionalInteger, mac: Bytes,
    }
    /// The scheduled destructions of wrapping keys.
    Destructions = key_destructions {
        key_id: Bytes;
        signer_key_id: Bytes, sequence: Integer, requested_us: Integer, due_us: Integer,
        requested_by: Text, mac: Bytes, holder: Text, lease_us: Integer,
    }
    /// The changes that a second person must approve.
    Approvals = approvals {
        approval_id: Bytes;
        signer_key_id: Bytes, state: Text, action: Text, document: Bytes, digest: Bytes,
        requested_by: Text, requested_person: Text, requested_us: Integer, expires_us: Integer,
        decided_by: Text, decided_person: Text, decided_us: OptionalInteger,
        used_us: OptionalInteger, mac: Bytes,
    }
    /// The wrapped keys of the members of Bitwarden organisations.
    MemberKeys = bitwarden_member_keys {
        organization_id: Bytes, digest: Bytes;
        member_id: Bytes, email_digest: Bytes, pinned_us: Integer, mac: Bytes,
    }
    /// Devices of members.
    Devices = devices {
        tenant: Text, user: Text, device_id: Bytes;
        signer_key_id: Bytes, state: Text, name: Text, kind: Text, verification_key: Bytes,
        key_name: Text, revision: Integer, sealed_user_key: Bytes, sealed_public_key: Bytes,
        sealed_private_key: Bytes, trusted_us: Integer, changed_us: Integer, signed_us: Integer,
        lost_us: OptionalInteger, used_us: OptionalInteger, mac: Bytes,
    }
    /// Requests for access of new devices.
    AccessRequests = access_requests {
        request_id: Bytes;
        signer_key_id: Bytes, state: Text, road: Text, tenant: Text, user: Text, key_name: Text,
        device_id: Bytes, device_name: Text, device_kind: Text, verification_key: Bytes,
        public_key: Bytes, code_mac: Bytes, code_key_id: Bytes, requested_by: Text, peer: Text,
        requested_us: Integer, expires_us: Integer, tries: Integer, first_approved_by: Text, decided_by: Text,
        decided_device: Bytes, decided_us: OptionalInteger, answer: Bytes, answer_form: Text,
        fetched_us: OptionalInteger, closed_us: OptionalInteger, answer_revision: OptionalInteger, wrong_words: Integer,
        mac: Bytes,
    }
    /// The registry of wrapping keys.
    WrappingKeys = wrapping_keys {
        key_id: Bytes;
        fingerprint: Bytes, purpose: Text, state: Text, token_serial: Text, sequence: Integer,
        registered_us: Integer, backup_confirmed_us: OptionalInteger, mac: Bytes,
        private_cka_id: Bytes, integrity_cka_id: Bytes,
    }
}

impl Table {
    /// All columns except the columns of the primary key.
    pub(super) fn values(self) -> &'static [Column] {
        &self.columns()[self.key().len()..]
    }
}

/// The name of each statement begins with the name of its table.
impl<T: Named> Named for PerTable<T> {
    fn names_below(&self, _name: &str, names: &mut Vec<(&'static str, String)>) {
        for table in Table::ALL {
            self.of(table).names_below(table.name(), names);
        }
    }
}
