//! An administrator's desk: a token with the key of an organisation, the organisation's server, and devices of members.

use std::{fmt::Write as _, fs, sync::Arc};

use aws_lc_rs::{
    digest,
    encoding::{AsDer as _, Pkcs8V1Der, PublicKeyX509Der},
    rsa::{KeySize, PrivateDecryptingKey},
};
use keybroker_bitwarden::{EncString, FingerprintPhrase, PrivateKey, PublicKey};
use serde_json::Value;

use crate::{
    bitwarden::{Answer, Bitwarden, CLIENT_ID, CLIENT_SECRET, Decision, Member},
    site::{Finished, Options, Site},
    softhsm::write_private,
};

pub(crate) const ORGANIZATION: &str = "4e9ee8ba-0b7a-4f5a-8dd1-5f9cbb7d2d0e";
/// The identifier of every device that requests.
pub(crate) const DEVICE: &str = "0f7a6a3c-7c0a-4d6b-8c5e-2f5f0b1e7a11";

/// An RSA-2048 key pair in DER.
pub(crate) struct KeyPair {
    pub(crate) pkcs8: Vec<u8>,
    pub(crate) spki: Vec<u8>,
}

impl KeyPair {
    pub(crate) fn new(size: KeySize) -> Self {
        let key = PrivateDecryptingKey::generate(size).unwrap();
        let pkcs8: Pkcs8V1Der<'_> = key.as_der().unwrap();
        let spki: PublicKeyX509Der<'_> = key.public_key().as_der().unwrap();
        Self {
            pkcs8: pkcs8.as_ref().to_vec(),
            spki: spki.as_ref().to_vec(),
        }
    }

    /// Encrypts a user key as type 4.
    pub(crate) fn wrap(&self, user_key: &[u8]) -> String {
        PublicKey::from_spki(&self.spki)
            .unwrap()
            .encrypt(user_key)
            .unwrap()
            .to_string()
    }
}

/// The new device of a member.
pub(crate) struct Device(pub(crate) KeyPair);

impl Device {
    pub(crate) fn new() -> Self {
        Self(KeyPair::new(KeySize::Rsa2048))
    }

    pub(crate) fn phrase(&self, email: &str) -> String {
        FingerprintPhrase::new(email, &self.0.spki).to_string()
    }

    pub(crate) fn fingerprint(&self) -> String {
        sha256(&self.0.spki)
    }

    /// What the device finds in an approval.
    pub(crate) fn open(&self, decision: &Decision) -> Vec<u8> {
        let key = EncString::parse(decision.key.as_ref().unwrap()).unwrap();
        let private = PrivateKey::from_pkcs8(&self.0.pkcs8).unwrap();
        private.decrypt(&key).unwrap().to_vec()
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

pub(crate) struct Desk {
    pub(crate) site: Arc<Site>,
    pub(crate) server: Bitwarden,
    pub(crate) organization: KeyPair,
}

impl Desk {
    /// A SoftHSM token that has the organisation's key, and a server without members.
    pub(crate) fn new() -> Self {
        let site = Site::without_keys(Options::default());
        site.expect_ok(&["store", "migrate"]);
        Self::on(Arc::new(site))
    }

    /// On an installation that exists.
    pub(crate) fn on(site: Arc<Site>) -> Self {
        let pki = &site.pki;
        let server = Bitwarden::start(
            ORGANIZATION,
            &pki.certificate_file("server"),
            &pki.key_file("server"),
        );
        let desk = Self {
            server,
            organization: KeyPair::new(KeySize::Rsa2048),
            site,
        };
        write_private(&desk.site.folder().join("client-secret"), CLIENT_SECRET);
        let imported = desk.import(&desk.organization.pkcs8);
        assert_eq!(imported.code, Some(0), "{imported:#?}");
        desk.append("");
        desk
    }

    /// Imports a private key for the organisation.
    pub(crate) fn import(&self, pkcs8: &[u8]) -> Finished {
        let file = self.site.folder().join("organization.der");
        write_private(&file, "");
        fs::write(&file, pkcs8).unwrap();
        let arguments = ["key", "import", "--purpose", "organization", "-o", "json"];
        let file = file.to_str().unwrap().to_owned();
        let more = ["--organization", ORGANIZATION, "--key-file", &file];
        self.site.run(&[&arguments[..], &more].concat())
    }

    /// Adds the section of the organisation with more settings.
    pub(crate) fn append(&self, settings: &str) {
        let path = self.site.configuration_file();
        let text = fs::read_to_string(&path).unwrap();
        let (text, _) = text
            .split_once("\n[[bitwarden_organization]]")
            .unwrap_or((&text, ""));
        let section = format!(
            "{text}\n[[bitwarden_organization]]\nid = \"{ORGANIZATION}\"\napi_url = \"{}\"\nidentity_url = \"{}\"\n\
             client_id = \"{CLIENT_ID}\"\nclient_secret_file = \"{}\"\nca_file = \"{}\"\npublic_key_sha256 = \"{}\"\n\
             {settings}",
            self.server.api_url(),
            self.server.identity_url(),
            self.site.folder().join("client-secret").display(),
            self.site.pki.ca_file().display(),
            sha256(&self.organization.spki),
        );
        fs::write(path, section).unwrap();
    }

    /// Removes the file with the PIN.
    pub(crate) fn without_pin(&self) {
        fs::remove_file(self.site.token.pin_file()).unwrap();
    }

    /// A member who has enrolled in account recovery, and the user key.
    pub(crate) fn member(&self, email: &str) -> (Member, Vec<u8>) {
        let mut user_key = vec![0; 64];
        aws_lc_rs::rand::fill(&mut user_key).unwrap();
        let wrapped = self.organization.wrap(&user_key);
        (self.server.add_member(email, Some(&wrapped)), user_key)
    }

    /// The request of a new device.
    pub(crate) fn request(&self, member: &Member, device: &Device) -> String {
        self.server.add_request(member, DEVICE, &device.0.spki)
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Finished {
        self.site
            .run(&[&["bitwarden", "approvals"], arguments].concat())
    }

    /// Runs a command that must succeed, and returns its JSON.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> Value {
        let finished = self.run(&[arguments, &["-o", "json"]].concat());
        assert_eq!(finished.code, Some(0), "{arguments:?}: {finished:#?}");
        serde_json::from_str(&finished.stdout).unwrap()
    }

    pub(crate) fn answer(&self, path: &str, status: u16, body: &str) {
        let answer = Answer {
            status,
            body: body.to_owned(),
            ..Answer::default()
        };
        self.server.answer(path, Some(answer));
    }

    /// The audit entries of an action in the order in which they were written.
    pub(crate) fn entries(&self, action: &str) -> Vec<Value> {
        let mut entries = self.site.entries(action);
        entries.sort_by_key(|entry| (entry["time_us"].as_u64(), entry["sequence"].as_u64()));
        entries
    }

    /// Neither the audit log nor the database has a user key or the credential.
    pub(crate) fn assert_no_key(&self, user_key: &[u8]) {
        let hex = hexadecimal(user_key);
        let audit = self.site.audit();
        assert!(!audit.contains(&hex) && !audit.contains(CLIENT_SECRET));
        let database = fs::read(self.site.database()).unwrap();
        let has = |part: &[u8]| database.windows(part.len()).any(|window| window == part);
        assert!(!has(&user_key[..16]) && !has(CLIENT_SECRET.as_bytes()));
        // The database does have the member's key as a digest.
        assert_ne!(
            self.site
                .sql("SELECT count(*) FROM bitwarden_member_keys")
                .trim(),
            "0"
        );
    }
}
