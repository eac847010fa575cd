//! Alerts about many requests of one member, and many approvals of one person. The counts are those of the database.

use keybroker_proto::AccessApprover;

use crate::{
    identity::{Identity, Options},
    process::Broker,
    tokens::{ADA, BOB, start_on, start_sealed_with},
    wire::get,
};

use super::{
    approvers::{CAROL, approver, mappings},
    for_members::{DAVE, asks, dave, heard},
    member::{App, Member},
};

fn raised(broker: &Broker, alert: &str) -> usize {
    let log = broker.site.log();
    log.matches(&format!("\"alert\":\"{alert}\"")).count()
}

/// Makes a request for access and denies it, so that no limit is reached.
async fn requests(member: &Member, device: u8) {
    let asked = member
        .asks(&App::new(device), AccessApprover::Administrator)
        .await
        .unwrap();
    member.denies(&asked).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_of_one_member_raise_one_alert_also_after_a_restart() {
    const ALERT: &str = "frequent-access-requests";
    let service = Identity::start(Options::default());
    let broker = start_sealed_with(&service, "access_requests_per_hour = 3", &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let (bob, _) = Member::with_first_device(&broker, &service, BOB).await;
    for device in 2..5 {
        requests(&ada, device).await;
        requests(&bob, device).await;
    }
    assert_eq!(raised(&broker, ALERT), 0);
    drop((ada, bob));
    let (site, _) = broker.stop();
    // The requests of Bob were made before the last hour.
    let hour = 3_600 * 1_000_000_u64;
    site.sql(&format!(
        "UPDATE access_requests SET requested_us = requested_us - {hour} WHERE user = '{BOB}'"
    ));
    let broker = start_on(site);
    let ada = Member::of(&broker, &service, ADA);
    let bob = Member::of(&broker, &service, BOB);
    requests(&bob, 5).await;
    assert_eq!(raised(&broker, ALERT), 0);
    // The alert refuses nothing, and is raised once an hour.
    for device in 5..8 {
        requests(&ada, device).await;
    }
    assert_eq!(raised(&broker, ALERT), 1);
    let metrics = get(broker.status, "/metrics");
    let series = format!("keybroker_alerts_total{{alert=\"{ALERT}\"}} 1");
    assert!(metrics.contains(&series), "{metrics}");
    let audit = broker.site.audit();
    let entries: Vec<_> = audit
        .lines()
        .filter(|line| line.contains("alarm.frequent_access_requests"))
        .collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert!(
        entries[0].contains(&format!("token:vault:{ADA}")),
        "{entries:?}"
    );
}

/// A request of the same device replaces its pending one, so the database has only the last request.
#[tokio::test(flavor = "multi_thread")]
async fn requests_that_replace_each_other_raise_the_alert() {
    let service = Identity::start(Options::default());
    let broker = start_sealed_with(&service, "access_requests_per_hour = 3", &mappings());
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let app = App::new(2);
    for number in 1..=5 {
        let asked = ada.asks(&app, AccessApprover::Administrator);
        asked.await.unwrap();
        let expected = usize::from(number > 3);
        assert_eq!(
            raised(&broker, "frequent-access-requests"),
            expected,
            "{number}"
        );
    }
    assert_eq!(ada.requests().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_approvals_of_one_person_raise_one_alert() {
    const ALERT: &str = "frequent-approvals";
    let service = Identity::start(Options::default());
    let persons = format!(
        "\n[[approvals.person]]\nname = \"Carol\"\nprincipals = [\"token:vault:{CAROL}\", \"token:vault:{DAVE}\"]\n\
         \n[[approvals.person]]\nname = \"Erin\"\nprincipals = [\"token:vault:erin\"]\n"
    );
    let lines = [mappings(), persons].concat();
    let broker = start_sealed_with(&service, "approvals_per_hour = 2", &lines);
    let (ada, _) = Member::with_first_device(&broker, &service, ADA).await;
    let carol = approver(&broker, &service, "approvers");
    let other = dave(&broker, &service);
    for (number, approver) in [(2, &carol), (3, &other), (4, &carol), (5, &other)] {
        // Denials do not count.
        let (asked, _) = asks(&ada, &App::new(100 + number)).await;
        approver.denies(&asked).await.unwrap();
        let (asked, _) = asks(&ada, &App::new(number)).await;
        let right = heard(approver, &asked).await;
        approver.approve_for_member(right).await.unwrap();
        let expected = usize::from(number >= 4);
        assert_eq!(raised(&broker, ALERT), expected, "{number}");
    }
    let log = broker.site.log();
    let line = log.lines().find(|line| line.contains(ALERT)).unwrap();
    assert!(
        line.contains(r#""person":"Carol""#) && line.contains(r#""count":3"#),
        "{line}"
    );
    let audit = broker.site.audit();
    let entries: Vec<_> = audit
        .lines()
        .filter(|line| line.contains("alarm.frequent_approvals"))
        .collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert!(
        entries[0].contains(&format!("token:vault:{CAROL}")),
        "{entries:?}"
    );
}
