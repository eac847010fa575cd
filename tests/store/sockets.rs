//! Local sockets: a socket of another user gets no connection, and so no password.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use keybroker_store as store;
use keybroker_store::Settings;
use keybroker_test_support::skip::is_root;

use super::{
    Server, revision,
    servers::{Kind, socket_settings},
    stamp, user,
};

/// Another user than the one the servers run as.
const OTHER_USER: u32 = 65_533;

fn url(kind: Kind, socket: &Path) -> String {
    let scheme = match kind {
        Kind::PostgreSql => "postgres",
        Kind::MariaDb => "mysql",
    };
    format!(
        "{scheme}://keybroker@/keybroker?socket={}",
        socket.display()
    )
}

/// A socket that an attacker created.
struct Planted {
    listener: UnixListener,
}

impl Planted {
    fn at(path: &Path, owner: u32) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        chown(path, Some(owner), Some(owner)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self { listener }
    }

    fn assert_not_connected(&self) {
        let accepted = self.listener.accept().map(drop);
        let error = accepted.expect_err("the socket of another user got a connection");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}

/// What each way of opening a database says of a socket.
async fn refusals(settings: &Settings) -> [String; 3] {
    [
        store::status(settings).await.map(drop),
        store::open(settings).await.map(drop),
        store::migrate(settings, false).await.map(drop),
    ]
    .map(|refused| refused.unwrap_err().to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_of_another_user_gets_no_connection() {
    if !is_root("a socket of another user") {
        return;
    }
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let (folder, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = folder.path().join(".s.PGSQL.5432");
        let planted = Planted::at(&path, OTHER_USER);
        let password = own.path().join("password");
        fs::write(&password, "hunter2").unwrap();
        fs::set_permissions(&password, Permissions::from_mode(0o600)).unwrap();
        let settings = Settings {
            password_file: Some(password),
            ..Settings::new(url(kind, &path))
        };
        // The socket, then its directory belong to the other user.
        for at_fault in [path.as_path(), folder.path()] {
            chown(at_fault, Some(OTHER_USER), None).unwrap();
            for refused in refusals(&settings)
                .await
                .iter()
                .chain(&settings.file_problems())
            {
                for words in [at_fault.to_str().unwrap(), "65533", "store.socket_users"] {
                    assert!(refused.contains(words), "{words}: {refused}");
                }
            }
        }
        chown(folder.path(), Some(0), None).unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o777)).unwrap();
        for refused in refusals(&settings).await {
            assert!(refused.contains("chmod go-w"), "{refused}");
        }
        planted.assert_not_connected();
    }
}

/// The owner of a socket does not say which process listens.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_runs_as_another_user_is_refused_until_it_is_named() {
    if !is_root("a server of another user") {
        return;
    }
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let server = Server::start(kind);
        let settings = server.settings(&server.database());
        store::migrate(&settings, false).await.unwrap();
        let unnamed = Settings {
            socket_users: None,
            ..settings.clone()
        };
        for refused in refusals(&unnamed).await {
            assert!(refused.contains("store.socket_users"), "{refused}");
        }
        // As if root had created the socket: the path is accepted now, and the user of the process decides.
        for path in [server.folder(), &server.socket()] {
            chown(path, Some(0), None).unwrap();
        }
        assert_eq!(unnamed.file_problems(), Vec::<String>::new());
        for refused in refusals(&unnamed).await {
            assert!(refused.contains("runs as user 65534"), "{refused}");
        }
        store::status(&settings).await.unwrap();
    }
}

/// In a sticky directory another user can create the socket as soon as the server is stopped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_another_user_makes_while_the_server_is_stopped_gets_no_connection() {
    if !is_root("a socket of another user") {
        return;
    }
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let mut server = Server::start(kind);
        // The tests' servers are below `/dev/shm` or `/tmp`, which are sticky.
        let settings = server.settings(&server.database());
        store::migrate(&settings, false).await.unwrap();
        let store = store::open(&settings).await.unwrap();
        let ada = user("ada");
        store.create(revision(&ada, 1, 1), stamp()).await.unwrap();
        let path: PathBuf = server.socket();
        server.stop();
        fs::remove_file(&path).ok();
        let planted = Planted::at(&path, OTHER_USER);
        let refused = store.record(&ada).await.unwrap_err().to_string();
        assert!(refused.contains("65533"), "{refused}");
        planted.assert_not_connected();
        fs::remove_file(&path).unwrap();
        server.run();
        super::eventually(|| path.exists());
        assert!(store.record(&ada).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn a_user_of_the_server_who_does_not_exist_is_named() {
    let settings = Settings {
        socket_users: Some(vec!["no-such-user".to_owned()]),
        ..socket_settings("mysql://me@/keys?socket=/run/keybroker-no-such/socket".to_owned())
    };
    let problems = settings.file_problems();
    assert!(problems[0].contains("no-such-user"), "{problems:?}");
    let missing = Settings {
        socket_users: None,
        ..settings
    };
    assert_eq!(missing.file_problems(), Vec::<String>::new());
    let refused = store::status(&missing).await.unwrap_err().to_string();
    assert!(
        refused.contains("whether the database server runs"),
        "{refused}"
    );
}
