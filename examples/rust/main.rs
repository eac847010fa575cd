//! Enrols a user's key and releases it again, plain or sealed to a key pair, with the `keybroker-client` library.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line program prints"
)]

use std::{env, error::Error, process::ExitCode, time::Duration};

use keybroker_client::{Client, KeyMaterial, Reason, RecipientKeyPair, UserKeyRef, new_request_id};

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The message of each layer: the last one is the cause.
            let mut cause: Option<&dyn Error> = Some(&*error);
            while let Some(error) = cause {
                eprintln!("error: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let client = Client::builder(variable("KEYBROKER_ENDPOINT")?)
        .ca_file(variable("KEYBROKER_CA")?)
        .identity_files(variable("KEYBROKER_CERT")?, variable("KEYBROKER_KEY")?)
        .deadline(Duration::from_secs(5))
        .build()?;
    let mut arguments = env::args().skip(1);
    let (Some(command), Some(user)) = (arguments.next(), arguments.next()) else {
        return Err("usage: enrol-and-unwrap enrol|unwrap|unwrap-sealed USER".into());
    };
    let key = UserKeyRef::parse(&user, "example")?;
    match command.as_str() {
        "enrol" => enrol(&client, &key).await,
        "unwrap" => unwrap(&client, &key).await,
        "unwrap-sealed" => unwrap_sealed(&client, &key).await,
        other => Err(format!("unknown command {other:?}").into()),
    }
}

/// Enrols a key. A service stores the request id with the planned change, so that it can finish the change
/// after a restart.
async fn enrol(client: &Client, key: &UserKeyRef) -> Result<(), Box<dyn Error>> {
    // A real program generates the key with a cryptographic random number generator.
    let material = KeyMaterial::new((0..32).collect())?;
    let id = new_request_id();
    match client.create_user_key(key, &material).request_id(id).await {
        Ok(record) => println!("{}: stored as revision {}", key.user, record.revision),
        Err(error) if error.reason() == Some(Reason::KeyExists) => {
            println!("{}: has a key already", key.user);
        }
        Err(error) if error.outcome_unknown() => {
            eprintln!("hint: repeat the call with request id {id} to learn the outcome");
            return Err(error.into());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

async fn unwrap(client: &Client, key: &UserKeyRef) -> Result<(), Box<dyn Error>> {
    let released = client.unwrap_user_key(key).await?;
    // A real program uses the key here. It is overwritten when `released` is dropped.
    let length = released.key_material.expose().len();
    println!(
        "{}: revision {}, {length} bytes",
        key.user, released.revision
    );
    Ok(())
}

/// The token encrypts the key to a key pair of this process, so the broker never has the key.
async fn unwrap_sealed(client: &Client, key: &UserKeyRef) -> Result<(), Box<dyn Error>> {
    let recipient = RecipientKeyPair::generate()?;
    let sealed = client
        .unwrap_user_key_for(key, recipient.public_key())
        .await?;
    let material = recipient.open(&sealed)?;
    println!(
        "{}: revision {}, {} bytes, {}",
        key.user,
        sealed.revision,
        material.expose().len(),
        sealed.algorithm.as_str()
    );
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|_| format!("{name} is not set"))
}
