//! Integration tests: the real binary, a real token, a real database, TLS over loopback.
//!
//! [`softhsm::Token`], [`pki::Pki`] and [`site::Site`] give each test parts of its own; nothing is shared, no port is
//! fixed, and every loop that waits is bounded.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that meets a surprise stops there and says where"
)]

mod adopted;
mod approvals;
mod assurance;
mod audit_log;
mod bad_inputs;
mod batch_rates;
mod bench;
mod bench_scenarios;
mod capacity;
mod ceremony;
mod client;
mod client_commands;
mod client_credentials;
mod client_library;
mod commands;
mod conformance;
mod console;
mod copy;
mod cut_short;
mod databases;
mod destruction;
mod device_approvals;
mod devices;
mod end_to_end;
mod examples;
mod expected;
mod faults;
mod faulty_token;
mod file_messages;
mod hang;
mod hanging_calls;
mod json;
mod keys;
mod last_uses;
mod listeners;
mod logins;
mod mappings;
mod memory;
mod messages;
mod module_failures;
mod modules;
mod overload;
mod overload_costs;
mod pki;
mod policy;
mod process;
mod profiles;
mod purge;
mod rates;
mod recovery;
mod registry_memory;
mod reports;
mod rest;
mod restored;
mod retries;
mod return_codes;
mod revocation;
mod rewrap;
mod rolling_restart;
mod rows;
mod schedules;
mod sealed;
mod sealed_memory;
mod service_manager;
mod several_tokens;
mod shared_label;
mod site;
mod soak;
mod spans;
mod start_refused;
mod stopping;
mod store_check;
mod stored_clients;
mod stored_columns;
mod tls;
mod token_messages;
mod token_states;
mod tokens;
mod trusted_files;
mod wire;
mod worker_key;

use keybroker_test_support::{bitwarden, faulty, https, identity, ports, servers, softhsm};
