use super::*;
use crate::tables::Row;

fn at(micros: i64) -> Timestamp {
    Timestamp::from_micros(micros)
}

fn address() -> KeyAddress {
    KeyAddress {
        tenant: Tenant::parse("tenant").unwrap(),
        user: UserId::parse("user").unwrap(),
        name: KeyName::parse("key").unwrap(),
    }
}

fn new() -> NewRevision {
    NewRevision {
        address: address(),
        record: RecordId::from_bytes([1; 16]),
        revision: Revision::new(2).unwrap(),
        envelope: vec![3; 40],
        wrapping_key: WrappingKeyId::from_bytes([4; 16]),
    }
}

/// All fields of a type have different values, so a wrong order of columns is detected.
#[test]
fn a_row_that_is_written_is_read_as_the_same() {
    let row = Row::new(Table::Records, new_record(&new(), at(5)));
    let head = head(&row).unwrap();
    assert_eq!((head.address, head.created), (address(), at(5)));

    let row = Row::new(Table::Revisions, new_revision(&new(), at(5)));
    let revision = revision(&row).unwrap();
    assert_eq!(
        (revision.record, revision.envelope, revision.wrapping_key),
        (new().record, new().envelope, new().wrapping_key)
    );

    let call = CallId::fresh();
    let row = Row::new(Table::Changes, new_change(call, new().record, at(6)));
    assert_eq!(change(&row).unwrap(), (call, at(6)));

    let scope = RequestScope {
        tenant: address().tenant,
        principal: "principal".to_owned(),
        id: RequestId::from_slice(&[7; 16]).unwrap(),
    };
    let request_record = RequestRecord {
        content: [8; 32],
        key: WrappingKeyId::from_bytes([9; 16]),
        result_mac: Some([10; 32]),
        result: RecordInfo {
            address: address(),
            id: RecordId::from_bytes([11; 16]),
            state: RecordState::Deleted,
            revision: Revision::new(12).unwrap(),
            wrapping_key: WrappingKeyId::from_bytes([13; 16]),
            created: at(14),
            updated: at(15),
            deleted: Some(at(16)),
        },
    };
    let row = Row::new(
        Table::Requests,
        new_request(&scope, &request_record, at(17)),
    );
    assert_eq!(request(&row).unwrap(), (scope, request_record));

    let use_ = (new().record, at(18));
    let row = Row::new(Table::LastUses, new_last_use(&use_));
    assert_eq!(last_use(&row).unwrap(), use_);

    let client_id = ClientId::from_bytes([19; 16]);
    let row = Row::new(Table::ClientUses, new_client_use(client_id, 20, at(21)));
    assert_eq!(client_use(&row).unwrap(), (20, at(21)));

    let client_row = ClientRow {
        id: client_id,
        revision: 28,
        document: vec![29; 50],
        mac: [30; 32],
        key: WrappingKeyId::from_bytes([31; 16]),
        created: at(32),
        updated: at(33),
    };
    let row = Row::new(Table::Clients, new_client(&client_row));
    assert_eq!(client(&row).unwrap(), client_row);
}

/// The same test for the registry of wrapping keys and the places of wrapping keys on further
/// tokens.
#[test]
fn rows_of_the_registry_come_back_as_they_were() {
    let registry_row = RegistryRow {
        id: WrappingKeyId::from_bytes([22; 16]),
        objects: ObjectIds::from_slices(&[1, 0, 255], &[7; 255]).unwrap(),
        fingerprint: Fingerprint([23; 32]),
        purpose: Purpose::Sealed,
        state: WrappingKeyState::Compromised,
        token_serial: "serial".to_owned(),
        sequence: 24,
        registered: at(25),
        backup_confirmed: Some(at(26)),
        mac: [27; 32],
    };
    let row = Row::new(Table::WrappingKeys, new_registry(&registry_row));
    assert_eq!(registry(&row).unwrap(), registry_row);

    let place_row = PlaceRow {
        key: WrappingKeyId::from_bytes([34; 16]),
        token: "b".to_owned(),
        token_serial: "serial".to_owned(),
        objects: ObjectIds::from_slices(&[1, 0, 255], &[7; 255]).unwrap(),
        registered: at(35),
        backup_confirmed: Some(at(36)),
        mac: [37; 32],
    };
    let row = Row::new(Table::Places, new_place(&place_row));
    assert_eq!(place(&row).unwrap(), place_row);

    let scheduled = DestructionRow {
        key: WrappingKeyId::from_bytes([41; 16]),
        signer: WrappingKeyId::from_bytes([42; 16]),
        sequence: 43,
        requested: at(44),
        due: at(45),
        requested_by: "x".repeat(REQUESTED_BY_BYTES_MAX),
        mac: [46; 32],
    };
    let row = Row::new(Table::Destructions, new_destruction(&scheduled));
    assert_eq!(destruction(&row).unwrap(), scheduled);
    let long = DestructionRow {
        requested_by: "x".repeat(REQUESTED_BY_BYTES_MAX + 1),
        ..scheduled
    };
    let row = Row::new(Table::Destructions, new_destruction(&long));
    assert!(matches!(destruction(&row), Err(Error::Corrupt(_))));
}
