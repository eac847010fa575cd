//! Contains the connection of a client, and decides when to replace the connection.
//!
//! When a peer stops answering or its host disappears, all later calls would wait until an HTTP/2 ping or TCP times
//! out. Therefore a new channel replaces the old channel if a call reached its deadline and the old channel carried no
//! answer during the call.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use tonic::transport::{Channel, Endpoint, Error};

use crate::pace::PacedConnector;

/// A channel, and the settings for making a new channel.
#[derive(Debug)]
pub(crate) struct Link {
    /// `None` for a channel that the caller made.
    endpoint: Option<Endpoint>,
    /// The connector that all channels of the client share.
    connector: PacedConnector,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    channel: Channel,
    made: Instant,
    answered: Option<Instant>,
}

impl Link {
    pub(crate) fn to(endpoint: Endpoint) -> Self {
        let connector = PacedConnector::default();
        let channel = endpoint.connect_with_connector_lazy(connector.clone());
        Self::new(Some(endpoint), connector, channel)
    }

    pub(crate) fn over(channel: Channel) -> Self {
        Self::new(None, PacedConnector::default(), channel)
    }

    fn new(endpoint: Option<Endpoint>, connector: PacedConnector, channel: Channel) -> Self {
        let state = State {
            channel,
            made: Instant::now(),
            answered: None,
        };
        Self {
            endpoint,
            connector,
            state: Mutex::new(state),
        }
    }

    /// Returns a link to the same endpoint with another connection. If the caller made the channel, both links share
    /// the channel.
    pub(crate) fn separate(&self) -> Self {
        match &self.endpoint {
            Some(endpoint) => Self::to(endpoint.clone()),
            None => Self::over(self.channel()),
        }
    }

    /// Opens a connection immediately.
    pub(crate) async fn connect(&self) -> Result<(), Error> {
        let Some(endpoint) = &self.endpoint else {
            return Ok(());
        };
        let connector = self.connector.clone();
        let channel = endpoint.connect_with_connector(connector).await?;
        let mut state = self.state();
        state.channel = channel;
        state.made = Instant::now();
        Ok(())
    }

    pub(crate) fn channel(&self) -> Channel {
        self.state().channel.clone()
    }

    /// Records that an attempt was answered; a refusal is an answer, too.
    pub(crate) fn answered(&self) {
        self.state().answered = Some(Instant::now());
    }

    /// Records that an attempt, which began at `began`, got no answer before its deadline. When many attempts time out
    /// together, only the first of them replaces the channel.
    pub(crate) fn timed_out(&self, began: Instant) {
        let Some(endpoint) = &self.endpoint else {
            return;
        };
        let mut state = self.state();
        if state.is_silent_since(began) {
            state.channel = endpoint.connect_with_connector_lazy(self.connector.clone());
            state.made = Instant::now();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No panic can occur inside a change of the state, so a poisoned lock still protects a consistent state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_silent_since(&self, began: Instant) -> bool {
        self.made <= began && self.answered.is_none_or(|answered| answered < began)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_channel_is_silent_when_it_is_older_than_the_call_and_answered_nothing_since() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        for (made, answered, began, expected) in [
            (0, None, 0, true),
            (0, Some(5), 10, true),
            (0, Some(15), 10, false),
            (20, None, 10, false),
        ] {
            let state = State {
                channel: Endpoint::from_static("http://127.0.0.1:1").connect_lazy(),
                made: at(made),
                answered: answered.map(at),
            };
            assert_eq!(
                state.is_silent_since(at(began)),
                expected,
                "{made} {answered:?} {began}"
            );
        }
    }
}
