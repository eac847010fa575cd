//! Reads the TLS files of a listener, compares them with the files in use, and builds the TLS configuration of new
//! connections.

use std::{fmt, path::Path, sync::Arc};

use aws_lc_rs::digest;
use rustls::{
    InconsistentKeys, RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use keybroker_core::{
    error::chain,
    pem,
    trusted_file::{self, Purpose},
};

use super::{
    super::{ClientCertificates, TlsSettings},
    Accepting,
    client_verifier::ClientVerifier,
    contents::{Contents, is_in_order},
    error::{Error, shown},
    now,
    revocation::{LISTS_BYTES_MAX, Lists, ListsFile, Memory},
    server_certificate::{Validity, check_validity, key_place, life_of},
    to_array,
};

/// Maximum length of a file with a certificate chain, a key or CA certificates, in bytes.
const PEM_BYTES_MAX: u64 = 4 * 1024 * 1024;

const CHAIN: Purpose =
    Purpose::trust("other users could replace the certificate that clients receive");

const KEY: Purpose = Purpose::secret("private key");

const AUTHORITIES: Purpose =
    Purpose::trust("other users could add a CA and impersonate any client");

const LISTS: Purpose = Purpose::trust("other users could hide a revocation");

const LIST_ISSUERS: Purpose =
    Purpose::trust("other users could choose whose revocation lists are accepted");

/// The contents of the files with the server's certificate chain and key.
#[derive(Clone)]
pub(super) struct Shown {
    chain: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shown(…)")
    }
}

/// The contents of the files that determine which clients are accepted.
pub(super) struct Trust {
    client_ca: Vec<u8>,
    client_crl: Option<ListsFile>,
    /// Certificates of further CAs that sign revocation lists.
    crl_issuers: Option<Vec<u8>>,
}

pub(super) struct Files {
    pub(super) shown: Shown,
    pub(super) trust: Trust,
}

/// The files for the server's certificate, and the files for client certificates. If the files of
/// one group cannot be read, the broker can still use the files of the other group.
pub(super) struct Found {
    pub(super) shown: Result<Shown, Error>,
    pub(super) trust: Result<Trust, Error>,
}

/// The accepted revocation lists. New revocation lists must not be older than the accepted lists.
pub(super) struct Follows<'a> {
    pub(super) memory: &'a mut Memory,
    /// The lists that are currently in use.
    pub(super) in_use: Option<&'a Lists>,
}

impl Shown {
    fn update(&self, context: &mut digest::Context) {
        update(context, &self.chain);
        update(context, &self.key);
    }

    fn read(settings: &TlsSettings) -> Result<Self, Error> {
        let chain = &settings.certificate_file;
        Ok(Self {
            chain: read("certificate_file", chain, PEM_BYTES_MAX, CHAIN)?.to_vec(),
            key: read("key_file", &settings.key_file, PEM_BYTES_MAX, KEY)?,
        })
    }
}

impl Trust {
    fn read(settings: &TlsSettings, clients: ClientCertificates) -> Result<Self, Error> {
        let mut trust = Self {
            client_ca: Vec::new(),
            client_crl: None,
            crl_issuers: None,
        };
        if clients == ClientCertificates::None {
            return Ok(trust);
        }
        let path = settings.client_ca_file.as_deref();
        let path = path.ok_or(Error::NoAuthorities)?;
        trust.client_ca = read("client_ca_file", path, PEM_BYTES_MAX, AUTHORITIES)?.to_vec();
        if let Some(path) = &settings.client_crl_file {
            trust.client_crl = Some(read_lists(path)?);
            if let Some(path) = &settings.client_crl_issuers_file {
                let setting = "client_crl_issuers_file";
                let issuers = read(setting, path, PEM_BYTES_MAX, LIST_ISSUERS)?;
                trust.crl_issuers = Some(issuers.to_vec());
            }
        }
        Ok(trust)
    }

    fn update(&self, context: &mut digest::Context) {
        update(context, &self.client_ca);
        match &self.client_crl {
            None => update(context, b""),
            Some(ListsFile::Content(bytes)) => update(context, bytes),
            Some(ListsFile::TooLong) => update(context, b"too long"),
        }
        update(context, self.crl_issuers.as_deref().unwrap_or_default());
    }
}

/// Adds the length of a byte string and the byte string to a digest, so that different inputs
/// cannot have the same encoding.
fn update(context: &mut digest::Context, part: &[u8]) {
    context.update(&u64::try_from(part.len()).unwrap_or(0).to_be_bytes());
    context.update(part);
}

/// Reads the file of revocation lists. A file that is too long counts as damaged, so that the
/// accepted lists remain in use, even after a restart.
fn read_lists(path: &Path) -> Result<ListsFile, Error> {
    match trusted_file::read(path, LISTS_BYTES_MAX, LISTS) {
        Ok(bytes) => Ok(ListsFile::Content(bytes.to_vec())),
        Err(error) if error.is_too_long() => Ok(ListsFile::TooLong),
        Err(source) => Err(Error::File {
            setting: "client_crl_file",
            source: Box::new(source),
        }),
    }
}

impl Found {
    pub(super) fn read(settings: &TlsSettings, clients: ClientCertificates) -> Self {
        Self {
            shown: Shown::read(settings),
            trust: Trust::read(settings, clients),
        }
    }

    /// Digest of the files, like [`Files::digest`]. If the files of a group cannot be read, the
    /// digest includes the error instead.
    pub(super) fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        match &self.shown {
            Ok(shown) => shown.update(&mut context),
            Err(error) => update(&mut context, chain(error).as_bytes()),
        }
        match &self.trust {
            Ok(trust) => trust.update(&mut context),
            Err(error) => update(&mut context, chain(error).as_bytes()),
        }
        to_array(context.finish().as_ref())
    }
}

impl Files {
    pub(super) fn read(settings: &TlsSettings, clients: ClientCertificates) -> Result<Self, Error> {
        let Found { shown, trust } = Found::read(settings, clients);
        Ok(Self {
            shown: shown?,
            trust: trust?,
        })
    }

    fn digest(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        self.shown.update(&mut context);
        self.trust.update(&mut context);
        to_array(context.finish().as_ref())
    }

    pub(super) fn build(
        &self,
        settings: &TlsSettings,
        clients: ClientCertificates,
        protocols: &[Vec<u8>],
        validity: Validity,
        follows: &mut Follows<'_>,
    ) -> Result<Accepting, Error> {
        let path = &settings.certificate_file;
        let chain = pem::chain(&self.shown.chain).map_err(of_pem("certificate_file", path))?;
        let leaf = chain
            .first()
            .ok_or_else(|| Error::NoCertificate { path: shown(path) })?;
        let until = match validity {
            Validity::Checked => check_validity(leaf, path)?,
            Validity::Unchecked => life_of(leaf, path)?.until,
        };
        let key =
            pem::private_key(&self.shown.key).map_err(of_pem("key_file", &settings.key_file))?;
        let lists = self.lists(settings, follows)?;
        let trust = self.trust(lists.as_ref());
        let contents = Contents {
            certificates: chain.len(),
            authorities: match clients {
                ClientCertificates::None => 0,
                ClientCertificates::Optional | ClientCertificates::Required => {
                    self.authorities(settings)?.len()
                }
            },
            revocation_lists: lists.as_ref().map_or(0, Lists::count),
            is_chain_in_order: is_in_order(&chain),
        };
        let place = key_place(&chain, &key);
        let builder = ServerConfig::builder();
        let builder = match self.verifier(settings, clients, lists.as_ref())? {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            let (path, key_path) = (shown(path), shown(&settings.key_file));
            match place {
                Some(number) if number > 1 => Error::ChainOrder {
                    path,
                    key_path,
                    number,
                    count: contents.certificates,
                },
                None if error == rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                    Error::OtherKey { path, key_path }
                }
                _ => Error::Unusable {
                    path,
                    key_path,
                    source: error,
                },
            }
        })?;
        config.alpn_protocols = protocols.to_vec();
        // Resumption is disabled, because a resumed session would reuse the client certificate without verifying it again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Accepting {
            config: Arc::new(config),
            outdated: CancellationToken::new(),
            until,
            files: self.digest(),
            trust,
            lists,
            contents,
        })
    }

    /// The revocation lists; `None` if no revocation lists are configured.
    fn lists(
        &self,
        settings: &TlsSettings,
        follows: &mut Follows<'_>,
    ) -> Result<Option<Lists>, Error> {
        let (Some(file), Some(path)) = (&self.trust.client_crl, &settings.client_crl_file) else {
            return Ok(None);
        };
        let now = now();
        let mut authorities = self.authorities(settings)?;
        authorities.extend(self.list_issuers(settings)?);
        let lists = Lists::read(file, &authorities, now)
            .map_err(|error| Error::lists(Some(path), error))?;
        follows.memory.load(&authorities)?;
        let lists = lists.follow(follows.memory, follows.in_use, now);
        lists
            .map(Some)
            .map_err(|error| Error::lists(Some(path), error))
    }

    /// Certificates that verify the revocation lists of further CAs, but are not trust anchors for client certificates.
    fn list_issuers(&self, settings: &TlsSettings) -> Result<Vec<CertificateDer<'static>>, Error> {
        let (Some(bytes), Some(path)) =
            (&self.trust.crl_issuers, &settings.client_crl_issuers_file)
        else {
            return Ok(Vec::new());
        };
        pem::certificates(bytes).map_err(of_pem("client_crl_issuers_file", path))
    }

    fn trust(&self, lists: Option<&Lists>) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(digest::digest(&digest::SHA256, &self.trust.client_ca).as_ref());
        if let Some(lists) = lists {
            context.update(&lists.revoked());
        }
        to_array(context.finish().as_ref())
    }

    fn authorities(&self, settings: &TlsSettings) -> Result<Vec<CertificateDer<'static>>, Error> {
        let path = settings.client_ca_file.as_deref().unwrap_or(Path::new(""));
        pem::certificates(&self.trust.client_ca).map_err(of_pem("client_ca_file", path))
    }

    pub(super) fn verifier(
        &self,
        settings: &TlsSettings,
        clients: ClientCertificates,
        lists: Option<&Lists>,
    ) -> Result<Option<Arc<dyn ClientCertVerifier>>, Error> {
        if clients == ClientCertificates::None {
            return Ok(None);
        }
        let path = settings.client_ca_file.as_deref().unwrap_or(Path::new(""));
        let mut roots = RootCertStore::empty();
        for certificate in self.authorities(settings)? {
            roots.add(certificate).map_err(|source| Error::Authority {
                path: shown(path),
                source,
            })?;
        }
        let roots = Arc::new(roots);
        let build = |ders: Option<Vec<_>>| {
            let mut builder = WebPkiClientVerifier::builder(Arc::clone(&roots));
            if clients == ClientCertificates::Optional {
                builder = builder.allow_unauthenticated();
            }
            if let Some(ders) = ders {
                // By default, the library checks all certificates of the chain and rejects
                // certificates that no list covers.
                builder = builder.with_crls(ders).enforce_revocation_expiration();
            }
            builder.build().map_err(|source| Error::Verifier {
                path: shown(path),
                source,
            })
        };
        let mut lists = lists
            .map(Lists::by_verifier)
            .unwrap_or_default()
            .into_iter();
        let first = build(lists.next())?;
        let others = lists.map(|ders| build(Some(ders)));
        Ok(Some(Arc::new(ClientVerifier {
            first,
            others: others.collect::<Result<_, _>>()?,
            usage_required: settings.client_auth_usage_required,
        })))
    }
}

fn read(
    setting: &'static str,
    path: &Path,
    bytes_max: u64,
    purpose: Purpose,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    trusted_file::read(path, bytes_max, purpose).map_err(|source| Error::File {
        setting,
        source: Box::new(source),
    })
}

/// Converts a PEM problem to an error with the setting and the file.
fn of_pem(setting: &'static str, path: &Path) -> impl Fn(pem::Error) -> Error {
    move |source| Error::Pem {
        setting,
        path: shown(path),
        source,
    }
}
