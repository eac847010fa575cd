use keybroker_core::{
    client_credential::{DOCUMENT_BYTES_MAX, Document, PlainSecret},
    error::Reason,
    key::{KeyName, Tenant, UserId},
};

use keybroker_broker::PageRow;
use prost::Message as _;

use super::*;

const NOW: Timestamp = Timestamp::from_micros(1_000_000);

fn request() -> proto::CreateClientCredentialRequest {
    let all = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
    proto::CreateClientCredentialRequest {
        label: "backup service".to_owned(),
        roles: all(&["release", "enrol"]),
        users: all(&["ada", "Zoë 🔑"]),
        key_names: all(&["*"]),
        expire_time: Some(WireTimestamp {
            seconds: 253_402_300_799,
            nanos: 1_000,
        }),
    }
}

fn view(number: u8) -> ClientView {
    let mut document = Document {
        label: "backup service".to_owned(),
        tenant: Tenant::default(),
        roles: BTreeSet::from([Role::Release]),
        users: None,
        key_names: Some(Reach::Only(BTreeSet::from([
            KeyName::parse("vault").unwrap()
        ]))),
        created: NOW,
        revoked: None,
        secrets: Vec::new(),
    };
    document.add_secret("$argon2id$hash".to_owned(), NOW, None);
    document.add_secret(
        "$argon2id$hash".to_owned(),
        NOW,
        Some(Timestamp::from_micros(2_500_000)),
    );
    ClientView {
        id: ClientId::from_bytes([number; 16]),
        document,
        uses: vec![(2, Timestamp::from_micros(3_000_000))],
        is_verified: true,
    }
}

#[test]
fn a_request_becomes_what_the_broker_is_asked() {
    let new = new_client(&request()).unwrap();
    assert_eq!(new.label, "backup service");
    assert_eq!(new.roles, BTreeSet::from([Role::Release, Role::Enrol]));
    let users = ["ada", "Zoë 🔑"].map(|user| UserId::parse(user).unwrap());
    assert_eq!(new.users, Some(Reach::Only(BTreeSet::from(users))));
    assert_eq!(new.key_names, Some(Reach::All));
    let expires = Timestamp::from_micros(253_402_300_799_000_001);
    assert_eq!(new.expires, Some(expires));
    let nothing_said = proto::CreateClientCredentialRequest {
        users: Vec::new(),
        key_names: Vec::new(),
        expire_time: None,
        ..request()
    };
    let new = new_client(&nothing_said).unwrap();
    assert!(new.users.is_none() && new.key_names.is_none() && new.expires.is_none());
}

type Damage = fn(&mut proto::CreateClientCredentialRequest);

#[test]
fn each_field_that_breaks_its_limits_is_named() {
    let broken: [(&str, Damage); 17] = [
        ("label", |r| r.label.clear()),
        ("label", |r| r.label = "x".repeat(129)),
        ("label", |r| r.label = "a\nb".to_owned()),
        ("roles", |r| r.roles.clear()),
        ("roles", |r| r.roles.push("Release".to_owned())),
        ("roles", |r| r.roles = vec!["enrol".to_owned(); 7]),
        ("users", |r| r.users.push("*".to_owned())),
        ("users", |r| r.users.push(String::new())),
        ("users", |r| r.users.push("a\u{7f}".to_owned())),
        ("users", |r| {
            r.users = (0..1_001).map(|n| n.to_string()).collect();
        }),
        ("key_names", |r| r.key_names.push("vault".to_owned())),
        ("key_names", |r| r.key_names = vec!["VAULT".to_owned()]),
        ("key_names", |r| {
            r.key_names = (0..101).map(|n| n.to_string()).collect();
        }),
        ("expire_time", |r| {
            r.expire_time = Some(WireTimestamp::default());
        }),
        ("expire_time", |r| {
            r.expire_time = Some(WireTimestamp {
                seconds: 253_402_300_800,
                nanos: 0,
            });
        }),
        ("expire_time", |r| {
            r.expire_time = Some(WireTimestamp {
                seconds: 253_402_300_799,
                nanos: -1,
            });
        }),
        ("expire_time", |r| {
            r.expire_time = Some(convert::timestamp(Timestamp::now()));
        }),
    ];
    for (number, (field, damage)) in broken.into_iter().enumerate() {
        let mut request = request();
        damage(&mut request);
        let Err(error) = new_client(&request) else {
            panic!("case {number} ({field}) is not refused");
        };
        assert_eq!(error.reason(), Reason::Request);
        let fields: Vec<_> = error.violations().iter().map(|v| v.field).collect();
        assert_eq!(fields, [field], "case {number}");
    }
}

#[test]
fn the_longest_requests_are_read() {
    let mut longest = request();
    longest.label = "ä".repeat(64);
    longest.users = (0..1_000).map(|n| n.to_string()).collect();
    longest.key_names = (0..100).map(|n| n.to_string()).collect();
    assert!(new_client(&longest).is_ok());
}

#[test]
fn ids_and_sizes_keep_their_limits() {
    assert!(client_id(&"0a".repeat(16)).is_ok());
    for bad in ["", "0a", &"0g".repeat(16), &"0a".repeat(17), "ada"] {
        assert!(client_id(bad).is_err(), "{bad}");
    }
    assert_eq!(page_size(0).unwrap(), 100);
    assert_eq!(page_size(1_000).unwrap(), 1_000);
    assert!(page_size(1_001).is_err());
}

#[test]
fn a_client_is_shown_without_its_hashes() {
    let message = client(&view(7));
    assert_eq!(message.id, "07".repeat(16));
    assert_eq!(
        (&message.roles[..], &message.key_names[..]),
        (&["release".to_owned()][..], &["vault".to_owned()][..])
    );
    assert!(message.users.is_empty() && message.revoke_time.is_none());
    let [first, second] = &message.secrets[..] else {
        panic!("{message:?}");
    };
    assert_eq!((first.number, second.number), (1, 2));
    assert!(first.expire_time.is_none() && first.last_use_time.is_none());
    assert_eq!(second.expire_time.as_ref().unwrap().nanos, 500_000_000);
    assert_eq!(second.last_use_time.as_ref().unwrap().seconds, 3);
    let bytes = message.encode_to_vec();
    assert!(!String::from_utf8_lossy(&bytes).contains("argon2id"));
}

#[test]
fn the_message_with_a_secret_does_not_print_it() {
    let created = CreatedSecret {
        client: view(7),
        number: 2,
        secret: PlainSecret::fresh().unwrap(),
    };
    let (client_credential, secret_number, secret) = with_secret(&created);
    assert_eq!(
        (secret.as_str(), secret_number),
        (created.secret.expose(), 2)
    );
    let message = proto::CreateClientCredentialResponse {
        client_credential,
        secret_number,
        secret,
    };
    assert!(!format!("{message:?}").contains(created.secret.expose()));
    let message = proto::AddClientSecretResponse {
        client_credential: message.client_credential,
        secret_number,
        secret: message.secret,
    };
    assert!(!format!("{message:?}").contains(created.secret.expose()));
}

#[test]
fn a_page_token_comes_back_as_it_went_and_others_are_refused() {
    let id = ClientId::from_bytes([9; 16]);
    for from in [
        Some(id).into(),
        Position {
            after: Some(id),
            skip: 3,
        },
        Position {
            after: None,
            skip: SKIPPED_MAX,
        },
    ] {
        assert_eq!(position(&token(Some(&from))).unwrap(), from);
    }
    assert_eq!(position(&token(None)).unwrap(), Position::default());
    let other_kind = Base64UrlUnpadded::encode_string("1ada\u{1f}vault".as_bytes());
    let short = Base64UrlUnpadded::encode_string("c109".as_bytes());
    let skips_all = Base64UrlUnpadded::encode_string("c2100001.".as_bytes());
    let skips_none = Base64UrlUnpadded::encode_string("c20.".as_bytes());
    for bad in [
        "!",
        "YQ",
        &other_kind,
        &short,
        &skips_all,
        &skips_none,
        &"A".repeat(1_025),
    ] {
        assert!(position(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_page_ends_before_its_message_is_too_long() {
    let mut longest = view(1);
    let name = |n: usize| UserId::parse(&format!("{n:0>200}")).unwrap();
    let users = (0..155).map(name).collect();
    longest.document.users = Some(Reach::Only(users));
    assert!(longest.document.to_bytes().unwrap().len() > DOCUMENT_BYTES_MAX - 2_000);
    let rows = (1..=4)
        .map(|number| {
            let id = ClientId::from_bytes([number; 16]);
            PageRow {
                content: Ok(ClientView {
                    id,
                    document: longest.document.clone(),
                    uses: Vec::new(),
                    is_verified: true,
                }),
                end: Some(id).into(),
            }
        })
        .collect();
    let answer = message(ClientPage { rows, next: None }, MESSAGE_BYTES_MAX);
    assert!(answer.encoded_len() <= MESSAGE_BYTES_MAX);
    let shown = u8::try_from(answer.client_credentials.len()).unwrap();
    assert!((1..4).contains(&shown), "{shown}");
    let next = position(&answer.next_page_token).unwrap();
    assert_eq!(next, Some(ClientId::from_bytes([shown; 16])).into());
}
