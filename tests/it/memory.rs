//! What is left of user keys in the memory of the broker's processes. The processes make no core dumps, so the test reads their
//! memory through `/proc`, as root can.

use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    net::TcpStream,
    os::unix::fs::FileExt as _,
    thread,
    time::{Duration, Instant},
};

use base64ct::{Base64, Encoding as _};
use reqwest::Method;
use uuid::Uuid;

use crate::{
    client::Caller,
    process::{Broker, WAIT_MAX, until},
    rest::site::{Answer, RestSite, body},
    site::Options,
    wire::get,
};

const PAGE_BYTES: u64 = 4_096;
const ZEROS: [u8; 4_096] = [0; 4_096];
/// Keys of each API.
const KEYS: usize = 100;

/// The first and the second half of each form of a key: what was overwritten in part is found as well.
pub(crate) struct Search {
    /// By the first eight bytes, so that most of a memory is passed by quickly.
    halves: HashMap<[u8; 8], Vec<(usize, Vec<u8>)>>,
    begins: Vec<bool>,
}

impl Search {
    fn new(keys: &[[u8; 32]]) -> Self {
        let mut halves: HashMap<[u8; 8], Vec<_>> = HashMap::new();
        let mut begins = vec![false; 65_536];
        for (number, key) in keys.iter().enumerate() {
            for form in [
                key.to_vec(),
                hex::encode(key).into_bytes(),
                hex::encode_upper(key).into_bytes(),
                Base64::encode_string(key).trim_end_matches('=').into(),
            ] {
                let (first, second) = form.split_at(form.len() / 2);
                for half in [first, second] {
                    begins[usize::from(u16::from_le_bytes([half[0], half[1]]))] = true;
                    let begin = half[..8].try_into().unwrap();
                    let known = halves.entry(begin).or_default();
                    known.push((number, half.to_vec()));
                }
            }
        }
        Self { halves, begins }
    }

    /// Searches for every window of 16 bytes of each key, also in hexadecimal and in base64. No byte of a key may be 0.
    pub(crate) fn thorough(keys: &[[u8; 32]]) -> Self {
        let mut search = Self::new(&[]);
        for (number, key) in keys.iter().enumerate() {
            for window in key.windows(16) {
                search.add(number, window.to_vec());
                search.add(number, hex::encode(window).into_bytes());
                search.add(number, hex::encode_upper(window).into_bytes());
                // Five groups of three bytes, for each position in a text of base64.
                search.add(number, Base64::encode_string(&window[..15]).into_bytes());
            }
        }
        search
    }

    fn add(&mut self, number: usize, form: Vec<u8>) {
        self.begins[usize::from(u16::from_le_bytes([form[0], form[1]]))] = true;
        let begin = form[..8].try_into().unwrap();
        self.halves.entry(begin).or_default().push((number, form));
    }

    /// The numbers of the keys in these bytes.
    fn find(&self, bytes: &[u8], found: &mut Vec<usize>) {
        // Most of a memory is zeros, and no half begins with one.
        let pages = (0..bytes.len().saturating_sub(8)).step_by(ZEROS.len());
        let used = pages.filter(|page| !ZEROS.starts_with(page_of(bytes, *page)));
        for at in used.flat_map(|page| page..(page + ZEROS.len()).min(bytes.len() - 8)) {
            if bytes[at] == 0 {
                continue;
            }
            if !self.begins[usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))] {
                continue;
            }
            let begin: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
            let known = self.halves.get(&begin).into_iter().flatten();
            let whole = known.filter(|(_, half)| bytes[at..].starts_with(half));
            found.extend(whole.map(|(number, _)| *number));
        }
    }

    /// The numbers of the keys in the memory of a process.
    pub(crate) fn in_process(&self, pid: u32) -> Vec<usize> {
        let open = |name: &str| {
            fs::File::open(format!("/proc/{pid}/{name}")).unwrap_or_else(|error| {
                panic!("{name} of a process that is not dumpable: {error}; run as root")
            })
        };
        let (memory, pages) = (open("mem"), open("pagemap"));
        let mut found = Vec::new();
        for line in fs::read_to_string(format!("/proc/{pid}/maps"))
            .unwrap()
            .lines()
        {
            let mut words = line.split_whitespace();
            let (range, mode) = (words.next().unwrap(), words.next().unwrap());
            if !mode.starts_with("rw") {
                continue;
            }
            let (start, end) = range.split_once('-').unwrap();
            let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
            let count = usize::try_from((end - start) / PAGE_BYTES).unwrap();
            let mut entries = vec![0; count * 8];
            if pages
                .read_exact_at(&mut entries, start / PAGE_BYTES * 8)
                .is_err()
            {
                continue;
            }
            // Present, or swapped out.
            let used = entries.chunks(8).map(|entry| entry[7] & 0xc0 != 0);
            let mut run = Vec::new();
            for (page, is_used) in (0_u64..).zip(used.chain([false])) {
                if is_used {
                    let begin = run.len();
                    run.resize(begin + usize::try_from(PAGE_BYTES).unwrap(), 0);
                    // A page that went away meanwhile reads as zeros.
                    memory
                        .read_exact_at(&mut run[begin..], start + page * PAGE_BYTES)
                        .ok();
                } else if !run.is_empty() {
                    self.find(&run, &mut found);
                    run.clear();
                }
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// The same for front and workers.
    fn in_broker(&self, broker: &Broker) -> Vec<usize> {
        let workers = broker.workers();
        let pids = workers.into_iter().chain([broker.pid()]);
        let mut found: Vec<usize> = pids.flat_map(|pid| self.in_process(pid)).collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

fn page_of(bytes: &[u8], page: usize) -> &[u8] {
    &bytes[page..(page + ZEROS.len()).min(bytes.len())]
}

pub(crate) fn fresh_key() -> [u8; 32] {
    let mut key = [0; 32];
    key[..16].copy_from_slice(Uuid::new_v4().as_bytes());
    key[16..].copy_from_slice(Uuid::new_v4().as_bytes());
    key[0] |= 1;
    key[16] |= 1;
    key
}

/// Waits until no key is in memory: what libraries hold of the last calls takes a moment to be freed and overwritten.
fn until_none(search: &Search, broker: &Broker) {
    let mut last = Vec::new();
    // One search of all memory takes seconds in a debug build on a busy machine.
    let deadline = Instant::now() + 4 * WAIT_MAX;
    while Instant::now() < deadline {
        last = search.in_broker(broker);
        if last.is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("keys {last:?} are still in memory");
}

/// Keys are created and unwrapped over gRPC, over REST with TLS and over REST without. Nothing of them stays in the memory of front and
/// workers: neither in the buffers of connections that are still open, nor after these have ended.
#[tokio::test(flavor = "multi_thread")]
async fn no_key_stays_in_memory_after_its_call() {
    let rest = RestSite::open_with(Options::default(), "", "");
    let broker = &rest.broker;
    let keys: Vec<[u8; 32]> = (0..3 * KEYS).map(|_| fresh_key()).collect();
    let search = Search::new(&keys);
    {
        let enroller = Caller::of(broker, "enroller");
        let releaser = Caller::of(broker, "releaser");
        for (number, key) in keys[..KEYS].iter().enumerate() {
            let user = format!("user-{number}");
            enroller.create(&user, key).await.unwrap();
            assert_eq!(releaser.unwrap(&user).await.unwrap().key_material, key);
        }
        for key in &keys[KEYS..2 * KEYS] {
            let user = Uuid::new_v4().to_string();
            rest.store(Method::POST, &user, key).await.expect_stored();
            rest.get(&user).await.expect_key(key);
        }
        let plain = reqwest::Client::builder().no_proxy().build().unwrap();
        let url = format!("http://{}/user-keys", rest.plain);
        for key in &keys[2 * KEYS..] {
            let token = rest.token(&Uuid::new_v4().to_string());
            let post = plain.post(&url).bearer_auth(&token).body(body(key));
            let post = post.header("content-type", "application/json");
            Answer::of(post.send().await.unwrap()).await.expect_stored();
            let get = plain.get(&url).bearer_auth(&token);
            Answer::of(get.send().await.unwrap()).await.expect_key(key);
        }
        until_none(&search, broker);
        let metrics = get(broker.status, "/metrics");
        let open = metrics
            .lines()
            .find_map(|line| line.strip_prefix("keybroker_connections "))
            .unwrap();
        assert!(open.parse::<u32>().unwrap() >= 4, "{metrics}");
    }
    let rest = rest.without_connections();
    let broker = &rest.broker;
    until("connections to end", || {
        let metrics = get(broker.status, "/metrics");
        metrics.contains("keybroker_connections 0").then_some(())
    });
    until_none(&search, broker);

    // What is in memory is found: a key in a request that is not complete.
    let mut half = TcpStream::connect(rest.plain).unwrap();
    let user = Uuid::new_v4().to_string();
    let partial = format!(r#"{{"key":"{}""#, Base64::encode_string(&keys[0]));
    write!(
        half,
        "POST /user-keys HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{partial}",
        rest.token(&user),
        partial.len() + 1,
    )
    .unwrap();
    until("the key to be found", || {
        (search.in_broker(broker) == [0]).then_some(())
    });
}
