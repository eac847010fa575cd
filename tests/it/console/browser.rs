//! Headless Chromium, driven through the W3C protocol of `chromedriver`.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use base64ct::{Base64, Encoding as _};
use reqwest::{Client, Method};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use keybroker_test_support::skip::skip_outside_ci;

use crate::process::WAIT_MAX;

use super::site::ConsoleSite;

/// The member of an element in an answer (section 11 of the protocol).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// The Tab and the Enter key (section 15.4.2 of the protocol).
pub(crate) const TAB: &str = "\u{e004}";
const ENTER: &str = "\u{e007}";
pub(crate) const SPACE: &str = " ";

/// How often chromedriver is started at most.
const STARTS_MAX: u32 = 5;
/// Pause between two looks at the browser.
const PAUSE: Duration = Duration::from_millis(50);

/// How the browser is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scripts {
    Run,
    Disabled,
}

/// A browser with a new profile. It ends when it is dropped.
pub(crate) struct Browser {
    driver: Child,
    client: Client,
    session: String,
    origin: String,
    profile: TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        // chromedriver ends the browser when the session ends, but not when it is killed.
        self.end_session().ok();
        self.driver.kill().ok();
        self.driver.wait().ok();
        let profile = self.profile.path().to_str().unwrap().to_owned();
        let deadline = Instant::now() + Duration::from_secs(5);
        while !processes_with(&profile).is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        for pid in processes_with(&profile) {
            // A process that has ended meanwhile needs no signal.
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                kill_process(pid, Signal::KILL).ok();
            }
        }
    }
}

/// The processes whose command line has this text: those of the browser with this profile.
fn processes_with(text: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has_text = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    };
    pids.filter(has_text).collect()
}

/// Whether this machine has the browser. If not, the test is skipped, except in CI.
pub(crate) fn is_installed() -> bool {
    let is_there = |program| Command::new(program).arg("--version").output().is_ok();
    let is_installed = is_there("chromium") && is_there("chromedriver");
    if !is_installed {
        skip_outside_ci("chromium and chromedriver are not installed: run scripts/install.sh");
    }
    is_installed
}

/// The digest of the public key of the server, which Chromium accepts without a known CA.
fn key_digest(site: &ConsoleSite) -> String {
    let pem = fs::read(site.broker.site.pki.certificate_file("server")).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let (_, certificate) = X509Certificate::from_der(&pem.contents).unwrap();
    let digest = digest::digest(&digest::SHA256, certificate.public_key().raw);
    Base64::encode_string(digest.as_ref())
}

/// Starts chromedriver. Returns the process and the port on which it listens. chromedriver selects a free IPv4 port, and ends if
/// another process has the IPv6 port of the same number, so it is started again.
async fn started(home: &Path) -> (Child, u16) {
    for _ in 0..STARTS_MAX {
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .env("HOME", home)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        if let Some(port) = port_in(driver.stdout.take().unwrap()).await {
            return (driver, port);
        }
        let ended = driver.wait().unwrap();
        eprintln!("chromedriver ended before it showed a port: {ended}");
    }
    panic!("chromedriver ended {STARTS_MAX} times");
}

/// The port on which chromedriver listens, from its output; `None` if the output ends before.
async fn port_in(output: ChildStdout) -> Option<u16> {
    let (sender, port) = oneshot::channel();
    thread::spawn(move || {
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        let port = lines.find_map(|line| {
            let (_, port) = line.split_once("started successfully on port ")?;
            port.trim_end_matches('.').parse::<u16>().ok()
        });
        if let Some(port) = port {
            sender.send(port).ok();
        }
        // chromedriver would stop at a full pipe.
        lines.for_each(drop);
    });
    let port = tokio::time::timeout(WAIT_MAX, port).await;
    port.expect("chromedriver starts in time").ok()
}

/// A folder in memory, because a new profile writes so much that other tests would wait for the disk.
fn in_memory() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() {
        memory
    } else {
        env::temp_dir()
    }
}

impl Browser {
    pub(crate) async fn open(site: &ConsoleSite) -> Self {
        Self::open_with(site, Scripts::Run).await
    }

    /// A browser in which a person has signed in.
    pub(crate) async fn signed_in(site: &ConsoleSite, person: &str) -> Self {
        let browser = Self::open(site).await;
        browser.sign_in(person).await;
        browser
    }

    pub(crate) async fn open_with(site: &ConsoleSite, scripts: Scripts) -> Self {
        let profile = tempfile::Builder::new()
            .prefix("keybroker-chromium-")
            .tempdir_in(in_memory())
            .unwrap();
        let (driver, port) = started(profile.path()).await;
        let mut browser = Self {
            driver,
            client: Client::builder()
                .no_proxy()
                .timeout(Duration::from_mins(1))
                .build()
                .unwrap(),
            session: format!("http://127.0.0.1:{port}/session"),
            origin: site.origin.clone(),
            profile,
        };
        browser.begin(site, scripts).await;
        browser
    }

    async fn begin(&mut self, site: &ConsoleSite, scripts: Scripts) {
        let arguments = [
            "--headless".to_owned(),
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--disable-background-networking".to_owned(),
            "--disable-component-update".to_owned(),
            "--disable-sync".to_owned(),
            "--no-first-run".to_owned(),
            "--no-proxy-server".to_owned(),
            "--window-size=1000,820".to_owned(),
            format!(
                "--user-data-dir={}",
                self.profile.path().join("profile").display()
            ),
            format!("--ignore-certificate-errors-spki-list={}", key_digest(site)),
        ];
        let mut options = json!({ "args": arguments });
        if scripts == Scripts::Disabled {
            options["prefs"] = json!({"profile.managed_default_content_settings.javascript": 2});
        }
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": options,
        }}});
        let made = self.call(Method::POST, "", wanted).await;
        let id = made["sessionId"].as_str().unwrap();
        self.session = format!("{}/{id}", self.session);
    }

    /// Ends the session and its browser. Dropping cannot wait for an asynchronous request.
    fn end_session(&self) -> io::Result<()> {
        let url = self.session.trim_start_matches("http://");
        let Some((address, path)) = url.split_once('/') else {
            // chromedriver has not started.
            return Ok(());
        };
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(WAIT_MAX))?;
        write!(
            stream,
            "DELETE /{path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )?;
        // chromedriver answers when the browser has ended, and leaves the connection open.
        stream.read(&mut [0]).map(drop)
    }

    /// A command that must succeed.
    async fn call(&self, method: Method, path: &str, body: Value) -> Value {
        match self.attempt(method, path, body).await {
            Ok(value) => value,
            Err(error) => panic!("{path}: {error}"),
        }
    }

    async fn attempt(&self, method: Method, path: &str, body: Value) -> Result<Value, Value> {
        let url = format!("{}{path}", self.session);
        let mut request = self.client.request(method.clone(), url);
        if method == Method::POST {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        let is_good = response.status().is_success();
        let answer: Value = response.json().await.unwrap();
        let value = answer["value"].clone();
        if is_good { Ok(value) } else { Err(value) }
    }

    /// Opens a path of the page.
    pub(crate) async fn go(&self, path: &str) {
        let url = format!("{}{path}", self.origin);
        self.call(Method::POST, "/url", json!({ "url": url })).await;
    }

    pub(crate) async fn title(&self) -> String {
        let title = self.call(Method::GET, "/title", Value::Null).await;
        title.as_str().unwrap().to_owned()
    }

    pub(crate) async fn url(&self) -> String {
        let url = self.call(Method::GET, "/url", Value::Null).await;
        url.as_str().unwrap().to_owned()
    }

    pub(crate) async fn html(&self) -> String {
        let html = self.call(Method::GET, "/source", Value::Null).await;
        html.as_str().unwrap().to_owned()
    }

    /// The text of an element as a person sees it.
    pub(crate) async fn text(&self, css: &str) -> String {
        let id = self.element(css).await;
        let path = format!("/element/{id}/text");
        let text = self.call(Method::GET, &path, Value::Null).await;
        text.as_str().unwrap().to_owned()
    }

    /// Waits until an element is there.
    pub(crate) async fn waits_for(&self, css: &str) {
        self.element(css).await;
    }

    /// Waits for an element, and returns its id.
    async fn element(&self, css: &str) -> String {
        let wanted = json!({"using": "css selector", "value": css});
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            match self.attempt(Method::POST, "/element", wanted.clone()).await {
                Ok(found) => return found[ELEMENT].as_str().unwrap().to_owned(),
                Err(error) if Instant::now() > deadline => {
                    panic!("{css}: {error}: {}", self.html().await)
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    /// Whether an element is there now.
    pub(crate) async fn has(&self, css: &str) -> bool {
        let wanted = json!({"using": "css selector", "value": css});
        self.attempt(Method::POST, "/element", wanted).await.is_ok()
    }

    pub(crate) async fn click(&self, css: &str) {
        let id = self.element(css).await;
        let path = format!("/element/{id}/click");
        self.call(Method::POST, &path, json!({})).await;
    }

    /// The id of the root element. Each document has another one.
    async fn document(&self) -> String {
        self.element("html").await
    }

    /// Waits until another document has replaced the old one. Otherwise, the next command could still read the old document.
    async fn is_replaced(&self, old: &str) {
        let deadline = Instant::now() + WAIT_MAX;
        while self.document().await == old {
            let is_early = Instant::now() < deadline;
            assert!(is_early, "no other document: {}", self.html().await);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Clicks on a link or a button that opens another document, and waits for this document.
    pub(crate) async fn follow(&self, css: &str) {
        let old = self.document().await;
        self.click(css).await;
        self.is_replaced(&old).await;
    }

    /// Presses Enter where it opens another document, and waits for this document.
    pub(crate) async fn press_enter(&self) {
        let old = self.document().await;
        self.press(ENTER).await;
        self.is_replaced(&old).await;
    }

    pub(crate) async fn enter(&self, css: &str, text: &str) {
        let id = self.element(css).await;
        let path = format!("/element/{id}/value");
        self.call(Method::POST, &path, json!({ "text": text }))
            .await;
    }

    pub(crate) async fn is_enabled(&self, css: &str) -> bool {
        let id = self.element(css).await;
        let path = format!("/element/{id}/enabled");
        self.call(Method::GET, &path, Value::Null).await == true
    }

    /// Presses keys one after another, wherever the focus is.
    pub(crate) async fn press(&self, keys: &str) {
        let keys = keys.chars().flat_map(|key| {
            ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key.to_string()}))
        });
        let actions = json!({"actions": [{
            "type": "key",
            "id": "keyboard",
            "actions": keys.collect::<Vec<_>>(),
        }]});
        self.call(Method::POST, "/actions", actions).await;
    }

    /// The id, or else the text, of the element that has the focus.
    pub(crate) async fn focus(&self) -> String {
        let active = self.call(Method::GET, "/element/active", Value::Null).await;
        let element = active[ELEMENT].as_str().unwrap();
        let path = format!("/element/{element}/attribute/id");
        let id = self.call(Method::GET, &path, Value::Null).await;
        if let Some(id) = id.as_str().filter(|id| !id.is_empty()) {
            return id.to_owned();
        }
        let path = format!("/element/{element}/text");
        let text = self.call(Method::GET, &path, Value::Null).await;
        text.as_str().unwrap_or_default().to_owned()
    }

    /// Moves the focus with the Tab key until it is on an element.
    pub(crate) async fn tab_to(&self, wanted: &str) {
        for _ in 0..40 {
            if self.focus().await == wanted {
                return;
            }
            self.press(TAB).await;
        }
        panic!("the Tab key does not reach {wanted}");
    }

    /// Runs a script and returns its result.
    pub(crate) async fn script(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []});
        self.call(Method::POST, "/execute/sync", body).await
    }

    /// Changes the height of the window, in pixels.
    pub(crate) async fn resize(&self, height: u32) {
        let size = json!({"width": 1_000, "height": height});
        self.call(Method::POST, "/window/rect", size).await;
    }

    /// The page as a PNG.
    pub(crate) async fn screenshot(&self) -> Vec<u8> {
        let png = self.call(Method::GET, "/screenshot", Value::Null).await;
        Base64::decode_vec(png.as_str().unwrap()).unwrap()
    }

    /// Waits until the page has an address. An earlier document must have had another address, or be replaced already.
    pub(crate) async fn arrives_at(&self, path: &str) {
        let wanted = format!("{}{path}", self.origin);
        let deadline = Instant::now() + WAIT_MAX;
        while self.url().await != wanted {
            let is_early = Instant::now() < deadline;
            assert!(is_early, "not at {wanted}: {}", self.html().await);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Signs in at the provider, which asks for a user name.
    pub(crate) async fn sign_in(&self, person: &str) {
        self.go("/").await;
        self.follow("#sign-in").await;
        self.enter("#username", person).await;
        self.follow("#enter").await;
        // A page after the sign-in leads on to this address.
        self.arrives_at("/").await;
        self.waits_for("nav").await;
    }
}
