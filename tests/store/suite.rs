//! The parts of the suite, and the engines that they run on.

use std::{fs, os::unix::fs::MetadataExt as _, path::Path, sync::Arc, time::Instant};

use futures_util::future::BoxFuture;

use super::{
    Engine,
    approvals::*,
    clients::*,
    conformance::*,
    contention::*,
    copy::*,
    damage::*,
    devices::*,
    filling::*,
    identity::*,
    member_keys::*,
    purge::*,
    rewrap::*,
    schema::*,
    servers::{Kind, Server},
};

type Part = for<'e> fn(&'e Engine) -> BoxFuture<'e, ()>;

/// On SQLite each part is a test; on a server all share one server, each with a separate database.
macro_rules! on_every_engine {
    ($($part:ident),* $(,)?) => {
        mod on_sqlite {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $part() {
                    super::$part(&super::Engine::sqlite().await).await;
                }
            )*
        }

        const PARTS: &[(&str, Part)] = &[$((stringify!($part), |engine| Box::pin($part(engine)))),*];
    };
}

on_every_engine!(
    a_record_is_read_as_it_was_written,
    many_are_created_at_once_or_none,
    create_never_overwrites,
    of_concurrent_creates_one_wins,
    of_concurrent_replaces_one_wins,
    a_deleted_record_keeps_its_name,
    superseded_revisions_stay_readable,
    names_are_compared_bytewise,
    tenants_are_apart,
    pages_are_ordered_and_complete,
    pages_are_stable_under_writes,
    a_request_id_is_taken_once,
    a_failed_change_leaves_no_request_id,
    committed_changes_are_known_by_their_call,
    the_registry_is_compare_and_swap,
    rows_of_the_registry_change_together,
    places_are_compare_and_swap,
    places_change_with_the_registry,
    destructions_are_scheduled_held_and_ended,
    approvals_are_compare_and_swap,
    of_concurrent_decisions_one_wins,
    a_change_uses_its_approval_or_is_not_made,
    requests_that_are_over_do_not_hide_open_requests,
    a_changed_request_is_not_removed,
    approvals_that_do_not_decode_are_named_and_removed,
    a_wrapped_key_belongs_to_one_member,
    pins_are_compare_and_swap,
    pins_that_do_not_decode_are_corrupt,
    pins_are_copied,
    devices_are_compare_and_swap,
    a_change_of_devices_needs_the_revision_and_the_trusted_devices,
    of_concurrent_decisions_about_access_one_wins,
    pages_of_requests_are_filtered_and_complete,
    a_limit_on_requests_holds_at_one_moment,
    the_end_of_all_trust_misses_no_device,
    the_mac_of_a_device_is_compared_and_swapped,
    devices_that_do_not_decode_are_named,
    a_change_of_the_registry_waits_for_the_rows_of_a_key,
    cancelled_calls_poison_nothing,
    reads_change_nothing,
    keys_and_revisions_are_counted,
    rows_that_do_not_decode_are_corrupt_by_name,
    damaged_records_do_not_end_a_page,
    damaged_clients_do_not_end_a_page,
    lookups_at_once_each_get_their_own,
    a_record_that_was_set_back_is_damaged,
    a_truncated_envelope_is_handed_on_as_it_is,
    the_longest_values_fit,
    an_identity_is_written_once,
    the_marks_of_changes_are_counted,
    the_audit_logs_of_an_instance_are_known,
    an_interrupted_migration_starts_again,
    a_copy_gets_the_identity_of_its_source,
    last_uses_are_apart_from_the_records,
    a_client_is_read_as_it_was_written,
    of_concurrent_changes_of_a_client_one_wins,
    pages_of_clients_are_ordered_and_complete,
    uses_of_secrets_are_apart_from_the_documents,
    clients_that_do_not_decode_are_corrupt_by_name,
    what_is_old_is_purged_and_nothing_else,
    a_purge_can_be_stopped_and_begun_again,
    a_record_that_is_wanted_back_meanwhile_is_not_purged,
    a_purge_leaves_alone_what_it_cannot_read,
    marks_of_old_changes_are_forgotten,
    rows_under_a_key_are_paged_and_counted,
    a_swap_changes_the_envelope_and_nothing_else,
    a_row_that_is_not_as_it_was_read_is_not_swapped,
    no_row_is_swapped_against_the_state_of_a_key,
    of_concurrent_swaps_one_wins,
    a_swap_is_not_in_the_way_of_changes,
    a_request_id_is_kept_although_its_record_was_moved,
    the_mac_of_a_client_is_compared_and_swapped,
    damaged_rows_under_a_key_do_not_end_a_page,
    a_run_has_one_holder_and_one_successor,
    a_run_is_paused_and_ended_by_its_holder,
    of_concurrent_starts_of_a_run_one_wins,
    a_copy_there_and_back_is_the_same,
    a_copy_goes_on_where_it_was_cut_short,
    a_target_with_anything_else_is_refused,
    a_change_during_a_copy_is_found,
    a_change_during_the_comparison_is_found,
    a_client_that_changes_during_the_comparison_is_found,
    a_migration_leads_back,
    a_step_back_keeps_the_records,
    a_dry_run_changes_no_database,
    a_schema_that_is_too_new_is_refused,
    an_interrupted_migration_of_a_later_release_is_refused,
    an_open_store_goes_on_when_the_schema_becomes_newer,
    a_newer_schema_serves_if_each_of_its_migrations_says_so,
);

/// What only several processes or connections can do to each other.
const PARTS_ON_SERVERS: &[(&str, Part)] = &[
    (
        "instances_that_race_to_migrate_end_with_one_schema",
        |engine| Box::pin(instances_that_race_to_migrate_end_with_one_schema(engine)),
    ),
    ("every_column_has_prose", |engine| {
        Box::pin(async {
            every_column_has_prose(engine);
        })
    }),
    (
        "a_lock_that_is_held_is_waited_for_and_tried_again",
        |engine| Box::pin(a_lock_that_is_held_is_waited_for_and_tried_again(engine)),
    ),
    ("a_query_that_was_cut_off_is_not_repeated", |engine| {
        Box::pin(a_query_that_was_cut_off_is_not_repeated(engine))
    }),
    (
        "a_lock_that_is_never_given_back_ends_in_an_error",
        |engine| Box::pin(a_lock_that_is_never_given_back_ends_in_an_error(engine)),
    ),
    ("a_deadlock_is_tried_again", |engine| {
        Box::pin(a_deadlock_is_tried_again(engine))
    }),
    ("a_call_in_flight_is_not_said_to_have_failed", |engine| {
        Box::pin(a_call_in_flight_is_not_said_to_have_failed(engine))
    }),
    ("two_stores_on_one_database_agree", |engine| {
        Box::pin(two_stores_on_one_database_agree(engine))
    }),
];

async fn run_on(kind: Kind) {
    let server = Arc::new(Server::start(kind));
    let only = std::env::var("KEYBROKER_TEST_STORE_PART").unwrap_or_default();
    let parts = PARTS.iter().chain(PARTS_ON_SERVERS);
    let parts = parts.filter(|(name, _)| name.contains(&only));
    let mut failed = Vec::new();
    for (name, part) in parts {
        let begun = Instant::now();
        let engine = Engine::on(&server).await;
        if tokio::spawn(async move { part(&engine).await })
            .await
            .is_err()
        {
            eprintln!("--- that was {name} on {kind:?}");
            failed.push(*name);
        }
        println!("{name} on {kind:?}: {} ms", begun.elapsed().as_millis());
    }
    assert!(failed.is_empty(), "on {kind:?}: {failed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgresql() {
    run_on(Kind::PostgreSql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_mariadb() {
    run_on(Kind::MariaDb).await;
}

/// The servers do not run as root even when the tests do.
#[test]
fn a_server_runs_unprivileged_and_ends_with_its_test() {
    for kind in [Kind::PostgreSql, Kind::MariaDb] {
        let server = Server::start(kind);
        let pid = server.pid().as_raw_nonzero();
        let owner = fs::metadata(format!("/proc/{pid}")).unwrap().uid();
        assert_ne!(owner, 0, "{kind:?}");
        let folder = server.folder().to_owned();
        drop(server);
        assert!(!folder.exists());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
