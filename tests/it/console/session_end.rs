//! The end of a session at the real broker.

use std::time::{Duration, Instant};

use keybroker_proto::AccessRequestState;
use tokio::time::sleep;

use super::site::{ConsoleSite, Visitor, Wanted, path_of, token_of};

/// The shortest lifetime that the configuration permits.
const LIFETIME: Duration = Duration::from_mins(1);
/// Time by which the end of the session may be seen late on a busy machine.
const LATE_MAX: Duration = Duration::from_secs(45);
const PAUSE: Duration = Duration::from_secs(3);

/// Activity does not prolong a session, and the form of an ended session changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_used_ends_after_its_lifetime() {
    let site = ConsoleSite::open_with(&Wanted {
        console: "session_minutes = 1\nidle_minutes = 1",
        ..Wanted::default()
    });
    let (ada, _) = site.ada().await;
    let asked = site.request(&ada, 2).await;
    let before = Instant::now();
    let carol = Visitor::signed_in(&site, "carol").await;
    let signed_in = Instant::now();
    let deny = format!("{}/deny", path_of(&asked));
    let token = token_of(&carol.get(&deny).await.html, &deny);
    loop {
        let asked_at = Instant::now();
        let home = carol.get("/").await.html;
        if home.contains("href=\"/sign-in\"") {
            break;
        }
        assert!(asked_at < signed_in + LIFETIME + LATE_MAX, "{home}");
        sleep(PAUSE).await;
    }
    assert!(before.elapsed() >= LIFETIME, "{:?}", before.elapsed());
    let denied = carol.post(&deny, &[("token", &token)]).await;
    assert!(!denied.status.is_redirection(), "{}", denied.html);
    assert_eq!(ada.requests().await[0].state(), AccessRequestState::Pending);
    let again = Visitor::signed_in(&site, "carol").await;
    assert!(again.get("/").await.html.contains(&path_of(&asked)));
}
