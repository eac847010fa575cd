//! Checks before a measurement whether the limits of this machine and of the configuration permit
//! the measurement's connections.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    cli::exit::{Exit, Failure},
    config::Config,
};

use super::{Arguments, Scenario, connections, fairness, or_default, session, storm};

/// File descriptors of this program that are not used for connections.
const RESERVE: u64 = 64;

/// Rejects a measurement whose connections exceed a limit, and reports the limit that must be
/// raised.
pub(super) fn check(arguments: &Arguments, config: &Config) -> Result<(), Failure> {
    let wanted = wanted(arguments);
    descriptors(wanted.at_once)?;
    // With `--attach`, the configuration of the running broker is unknown.
    if arguments.attach.is_some() {
        return Ok(());
    }
    let limits = [
        (
            "connections_per_principal_max",
            config.limits.connections_per_principal_max,
            wanted.of_one_principal,
        ),
        (
            "connections_max",
            config.limits.connections_max,
            wanted.in_configuration,
        ),
    ];
    for (name, limit, wanted) in limits {
        if limit < usize::try_from(wanted).unwrap_or(usize::MAX) {
            let what = format!(
                "this measurement needs {wanted} concurrent connections, but `limits.{name}` of the configuration is {limit}"
            );
            return Err(Failure::new(Exit::Configuration, what).hint(format!(
                "set `{name} = {wanted}` or more in [limits], or measure with fewer connections"
            )));
        }
    }
    Ok(())
}

/// Numbers of connections.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    /// Number of connections that are open at the same time.
    at_once: u64,
    /// Number of connections that the configuration has to permit.
    in_configuration: u64,
    /// Maximum number of connections of one principal that the configuration has to permit.
    of_one_principal: u64,
}

fn wanted(arguments: &Arguments) -> Wanted {
    let shared = u64::from(arguments.connections().min(session::CONNECTIONS_MAX));
    let all = |at_once: u64| Wanted {
        at_once,
        in_configuration: at_once,
        of_one_principal: at_once,
    };
    match arguments.scenario {
        Scenario::Connections => {
            let active = or_default(&arguments.connections, &connections::ACTIVE);
            let active = active.into_iter().max().unwrap_or_default();
            let idle = arguments.idle.unwrap_or(connections::IDLE);
            // One more connection is used to enrol the users.
            all(u64::from(active.max(idle)) + 1)
        }
        // One connection belongs to the principal that makes few calls.
        Scenario::Fairness => Wanted {
            of_one_principal: shared,
            ..all(shared + u64::from(fairness::LIGHT_CONNECTIONS))
        },
        // For a storm, the configured limits are not checked, because the results show whether the
        // broker closed connections.
        Scenario::Storm => Wanted {
            in_configuration: 1,
            of_one_principal: 1,
            ..all(storm::at_once(arguments))
        },
        Scenario::Steady | Scenario::Open | Scenario::Overload | Scenario::Restart => all(shared),
    }
}

/// Raises this process's limit of file descriptors if necessary, and fails if the hard limit is too
/// low.
fn descriptors(connections: u64) -> Result<(), Failure> {
    let needed = connections + RESERVE;
    let limit = getrlimit(Resource::Nofile);
    // `None` means that there is no limit.
    let suffices = |limit: Option<u64>| limit.is_none_or(|limit| limit >= needed);
    if suffices(limit.current) {
        return Ok(());
    }
    let raised = Rlimit {
        current: Some(needed),
        maximum: limit.maximum,
    };
    if suffices(limit.maximum) && setrlimit(Resource::Nofile, raised).is_ok() {
        return Ok(());
    }
    let maximum = limit.maximum.unwrap_or_default();
    let what = format!(
        "this measurement opens {connections} concurrent connections and needs {needed} file descriptors, but the \
         limit is {maximum}"
    );
    Err(Failure::new(Exit::Usage, what).hint(format!(
        "raise the hard limit (`ulimit -Hn {needed}` as root), or measure with fewer connections"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_descriptors_than_the_limit_are_refused_with_the_number_that_is_needed() {
        descriptors(1).unwrap();
        let Some(maximum) = getrlimit(Resource::Nofile).maximum else {
            return;
        };
        let refused = descriptors(maximum).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert!(
            refused.message.contains(&(maximum + RESERVE).to_string()),
            "{refused}"
        );
    }
}
