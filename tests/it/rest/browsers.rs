//! Pages of web vaults: those that are configured may ask, and others may not.

use reqwest::Method;

use super::site::{ADA, Answer, RestSite, VAULT};

/// A preflight as a browser makes it.
async fn preflight(rest: &RestSite, origin: &str, method: &str, headers: &str) -> Answer {
    let request = rest
        .request(Method::OPTIONS, "/user-keys")
        .header("origin", origin)
        .header("access-control-request-method", method)
        .header("access-control-request-headers", headers);
    Answer::of(request.send().await.unwrap()).await
}

fn list(answer: &Answer, name: &str) -> Vec<String> {
    let Some(value) = answer.headers.get(name) else {
        return Vec::new();
    };
    let value = value.to_str().unwrap().to_ascii_lowercase();
    value
        .split(',')
        .map(|part| part.trim().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn preflights_are_answered_for_the_configured_origin() {
    let rest = RestSite::open();
    let headers = "accept,authorization,bitwarden-client-name,bitwarden-client-version,\
                   bitwarden-package-type,cache-control,content-type,device-identifier,device-type,pragma";
    for method in ["GET", "POST", "PUT"] {
        let answer = preflight(&rest, VAULT, method, headers).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.headers["access-control-allow-origin"], VAULT);
        let methods = list(&answer, "access-control-allow-methods");
        assert!(methods.contains(&method.to_lowercase()), "{answer:?}");
        let allowed = list(&answer, "access-control-allow-headers");
        for header in headers.split(',') {
            assert!(allowed.contains(&header.to_owned()), "{header}: {answer:?}");
        }
        assert!(
            !answer
                .headers
                .contains_key("access-control-allow-credentials")
        );
        assert!(list(&answer, "vary").contains(&"origin".to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_get_no_answer() {
    let rest = RestSite::open();
    for origin in [
        "https://evil.example.org",
        "https://vault.example.org.evil.example",
        "https://vault.example.org:8443",
        "http://vault.example.org",
        "null",
    ] {
        let answer = preflight(&rest, origin, "GET", "authorization").await;
        assert!(
            !answer.headers.contains_key("access-control-allow-origin"),
            "{origin}: {answer:?}"
        );
    }
    let methods = preflight(&rest, VAULT, "DELETE", "authorization").await;
    let methods = list(&methods, "access-control-allow-methods");
    assert_eq!(methods, ["get", "post", "put"]);
}

/// Also errors: the page must be able to read why.
#[tokio::test(flavor = "multi_thread")]
async fn answers_to_the_page_are_marked() {
    let rest = RestSite::open();
    let from = |origin: &'static str| rest.as_user(Method::GET, ADA).header("origin", origin);
    let answer = Answer::of(from(VAULT).send().await.unwrap()).await;
    answer.expect_refused(404, "KEY_NOT_FOUND");
    assert_eq!(answer.headers["access-control-allow-origin"], VAULT);
    let other = from("https://evil.example.org").send().await.unwrap();
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    let alive = rest.request(Method::GET, "/alive").header("origin", VAULT);
    let alive = alive.send().await.unwrap();
    assert_eq!(alive.headers()["access-control-allow-origin"], VAULT);
    // Nobody asked from a page.
    let plain = rest.get(ADA).await;
    assert!(!plain.headers.contains_key("access-control-allow-origin"));
}

/// Apps whose pages come from no server send origins of their own: each only where it is configured.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_apps_are_answered_when_they_are_configured() {
    let apps = ["bw-desktop-file://bundle", "file://"];
    let listed = format!(r#""{}", "{}""#, apps[0], apps[1]);
    let rest = RestSite::open_for_pages(&listed);
    for origin in apps {
        let answer = preflight(&rest, origin, "GET", "authorization").await;
        assert_eq!(answer.headers["access-control-allow-origin"], origin);
    }
    for origin in [
        "bw-desktop-file://other",
        "file:///",
        "file:///home/ada/x.html",
    ] {
        let answer = preflight(&rest, origin, "GET", "authorization").await;
        assert!(
            !answer.headers.contains_key("access-control-allow-origin"),
            "{origin}: {answer:?}"
        );
    }
    let rest = RestSite::open();
    for origin in apps {
        let answer = preflight(&rest, origin, "GET", "authorization").await;
        assert!(!answer.headers.contains_key("access-control-allow-origin"));
    }
}
