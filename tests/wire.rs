//! The wire format against that of the last release: what was there stays, with its number and its type.

#![allow(
    clippy::unwrap_used,
    reason = "a test that meets a surprise stops there"
)]

use prost_reflect::{DescriptorPool, FieldDescriptor, MessageDescriptor};

/// Descriptors as last released. Replaced by `scripts/release-wire.sh` when a release is made, never otherwise.
const RELEASED: &[u8] = include_bytes!("wire/keybroker_v1.binpb");

fn pool(bytes: &[u8]) -> DescriptorPool {
    DescriptorPool::decode(bytes).unwrap()
}

/// What of the old that the new breaks.
fn breaks(old: &DescriptorPool, new: &DescriptorPool) -> Vec<String> {
    let mut broken = Vec::new();
    for message in old.all_messages().filter(ours) {
        match new.get_message_by_name(message.full_name()) {
            None => broken.push(format!("{} is gone", message.full_name())),
            Some(current) => broken.extend(message.fields().filter_map(|f| field(&f, &current))),
        }
    }
    for one in old
        .all_enums()
        .filter(|e| e.package_name() == "keybroker.v1")
    {
        let current = new.get_enum_by_name(one.full_name());
        broken.extend(one.values().filter_map(|value| {
            let same = current.as_ref()?.get_value(value.number());
            (same.map(|v| v.name().to_owned()) != Some(value.name().to_owned()))
                .then(|| format!("{} changed", value.full_name()))
        }));
    }
    for service in old.services() {
        let current = new.get_service_by_name(service.full_name());
        for method in service.methods() {
            let found = current
                .as_ref()
                .and_then(|s| s.methods().find(|m| m.name() == method.name()));
            let same = found.is_some_and(|m| {
                m.input().full_name() == method.input().full_name()
                    && m.output().full_name() == method.output().full_name()
                    && m.is_server_streaming() == method.is_server_streaming()
            });
            if !same {
                broken.push(format!("{} changed", method.full_name()));
            }
        }
    }
    broken
}

fn ours(message: &MessageDescriptor) -> bool {
    message.package_name() == "keybroker.v1"
}

fn field(old: &FieldDescriptor, message: &MessageDescriptor) -> Option<String> {
    let same = message.get_field(old.number()).is_some_and(|new| {
        new.name() == old.name()
            && new.cardinality() == old.cardinality()
            && format!("{:?}", new.kind()) == format!("{:?}", old.kind())
    });
    (!same).then(|| format!("{} changed", old.full_name()))
}

#[test]
fn nothing_released_is_broken() {
    let current = pool(keybroker_proto::FILE_DESCRIPTOR_SET);
    assert_eq!(breaks(&pool(RELEASED), &current), Vec::<String>::new());
}

/// The check finds what it is for: a field that changed its number, and one that is gone.
#[test]
fn breaking_changes_are_found() {
    use prost_reflect::prost::Message as _;
    use prost_reflect::prost_types::{FieldDescriptorProto, FileDescriptorSet};
    let change = |edit: fn(&mut Vec<FieldDescriptorProto>)| {
        let mut set = FileDescriptorSet::decode(RELEASED).unwrap();
        let file = set
            .file
            .iter_mut()
            .find(|file| file.name().ends_with("user_key.proto"))
            .unwrap();
        let message = file
            .message_type
            .iter_mut()
            .find(|message| message.name() == "UnwrapUserKeyResponse")
            .unwrap();
        edit(&mut message.field);
        breaks(&pool(RELEASED), &pool(&set.encode_to_vec()))
    };
    let renumbered = change(|fields| fields[1].number = Some(9));
    assert_eq!(
        renumbered,
        ["keybroker.v1.UnwrapUserKeyResponse.revision changed"]
    );
    let removed = change(|fields| fields.truncate(1));
    assert_eq!(
        removed,
        ["keybroker.v1.UnwrapUserKeyResponse.revision changed"]
    );
}
