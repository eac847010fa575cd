//! An acknowledged write survives SIGKILL, and none is half done.

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    time::Duration,
};

use keybroker::{key::RecordId, store::Settings};

use super::{Engine, record_id, revision, stamp, user};

const CHILD: &str = "KEYBROKER_TEST_STORE_URL";
const ROUNDS: u64 = 20;

/// As a child: creates records one after another, and says each once it is acknowledged.
async fn write_until_killed(url: String) {
    let settings = Settings {
        url,
        migrate_at_start: false,
    };
    let store = keybroker::store::open(&settings).await.unwrap();
    let pid = std::process::id();
    for number in 0..100_000_u64 {
        let name = format!("{pid}-{number}");
        let mut new = revision(&user(&name), 0, 1);
        let mut id = [0; 16];
        id[..4].copy_from_slice(&pid.to_be_bytes());
        id[8..].copy_from_slice(&number.to_be_bytes());
        new.record = RecordId::from_bytes(id);
        store.create(new, stamp()).await.unwrap();
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "acknowledged {name}").unwrap();
        stdout.flush().unwrap();
    }
}

#[tokio::test]
async fn acknowledged_writes_survive_sigkill() {
    if let Ok(url) = env::var(CHILD) {
        return write_until_killed(url).await;
    }
    let engine = Engine::sqlite().await;
    let mut acknowledged = Vec::new();
    for round in 0..ROUNDS {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([
                "survival::acknowledged_writes_survive_sigkill",
                "--exact",
                "--nocapture",
            ])
            .env(CHILD, &engine.settings.url)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Another moment each round, between a few writes and a few hundred.
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(60 + round * 7));
            child.kill().unwrap();
            child.wait().unwrap();
        });
        for line in lines.map_while(Result::ok) {
            if let Some((_, name)) = line.split_once("acknowledged ") {
                acknowledged.push(name.to_owned());
            }
        }
        killer.join().unwrap();
    }
    assert!(
        acknowledged.len() > 50,
        "only {} writes",
        acknowledged.len()
    );
    let store = engine.open().await;
    for name in &acknowledged {
        let record = store.record(&user(name)).await.unwrap();
        let record = record.unwrap_or_else(|| panic!("{name} was acknowledged and is lost"));
        assert_eq!(record.envelope, format!("{name} 1").into_bytes());
        assert_ne!(record.info.id, record_id(0));
    }
    assert!(fs::metadata(engine.folder.path()).is_ok());
}
