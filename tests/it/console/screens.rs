//! The pictures in docs/approvers.md. With `KEYBROKER_WRITE_SCREENSHOTS=1`, the test writes them.

use std::{env, fs, path::Path};

use keybroker_proto::AccessApprover;

use crate::devices::member::App;

use super::{
    browser::{Browser, is_installed},
    site::{ConsoleSite, path_of},
};

/// Longest picture, in bytes.
const BYTES_MAX: usize = 150_000;

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_have_pictures() {
    if !is_installed() {
        return;
    }
    let site = ConsoleSite::open();
    let (ada, first) = site.ada().await;
    let mut phone = App::new(2);
    phone.name = "Ada's new phone".to_owned();
    let mut laptop = App::new(3);
    laptop.name = "Ada's laptop".to_owned();
    ada.trusts(&laptop, &first).await.unwrap();
    let asked = ada
        .asks(&phone, AccessApprover::Administrator)
        .await
        .unwrap();
    let browser = Browser::signed_in(&site, "carol").await;
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/approvers"));
    for (name, path, title, height) in [
        ("requests", "/".to_owned(), "Requests", 600),
        ("request", path_of(&asked), "Request of", 1_340),
        (
            "devices",
            format!("/devices?user={}", ada.user),
            "Devices",
            700,
        ),
    ] {
        browser.resize(height).await;
        browser.go(&path).await;
        browser.waits_for("nav").await;
        let shown = browser.title().await;
        assert!(shown.starts_with(title), "{name}: {shown}");
        let png = browser.screenshot().await;
        assert!(
            png.starts_with(b"\x89PNG") && png.len() < BYTES_MAX,
            "{name}: {} bytes",
            png.len()
        );
        let file = folder.join(format!("{name}.png"));
        if env::var_os("KEYBROKER_WRITE_SCREENSHOTS").is_some() {
            fs::create_dir_all(folder).unwrap();
            fs::write(file, png).unwrap();
        } else {
            assert!(file.exists(), "{}", file.display());
        }
    }
}
