//! The pages about the devices of a member.
//!
//! Mitigations: M27, M30 of `THREAT_MODEL.md`.

use axum::http::StatusCode;

use keybroker_broker::{DeviceList, Untrusted, Which};
use keybroker_core::{
    error::Error,
    key::{DeviceId, UserId},
};

use super::{
    Context, answer,
    answer::Failure,
    pages, sign_in,
    views::Device,
    visit::{Answer, Visit},
};

/// Asks for a member, and lists the member's devices.
pub(super) async fn list(context: &Context, visit: &Visit) -> Answer {
    let member = visit.fields.value("user").trim();
    let mut page = pages::Devices {
        frame: visit.frame("/devices"),
        member: member.to_owned(),
        member_in_address: in_address(member),
        devices: Vec::new(),
        damaged: 0,
        refused: None,
    };
    if member.is_empty() {
        return Ok(answer::page(StatusCode::OK, &page));
    }
    let user = match UserId::parse(member) {
        Ok(user) => user,
        Err(error) => {
            page.refused = Some(format!("A member id has {}.", error.detail()));
            page.member_in_address = String::new();
            return Ok(answer::page(StatusCode::BAD_REQUEST, &page));
        }
    };
    let found = devices(context, visit, &user).await?;
    page.devices = found.devices.iter().map(Device::from).collect();
    page.damaged = found.damaged.len();
    Ok(answer::page(StatusCode::OK, &page))
}

async fn devices(
    context: &Context,
    visit: &Visit,
    user: &UserId,
) -> Result<DeviceList, Box<Failure>> {
    let broker = &context.broker;
    let listed = broker.list_devices(visit.principal(), &visit.call, Some(user));
    listed.await.map_err(|error| visit.failure(&error))
}

/// A member as a part of an address.
fn in_address(member: &str) -> String {
    form_urlencoded::byte_serialize(member.as_bytes()).collect()
}

/// The devices whose trust is ended, as the address and the form name them.
struct Chosen {
    user: UserId,
    /// The device; `None` for all.
    device: Option<DeviceId>,
}

impl Chosen {
    fn read(visit: &Visit) -> Result<Self, Error> {
        let device = match visit.fields.value("device") {
            "all" => None,
            id => Some(
                DeviceId::from_hex(id)
                    .ok_or_else(|| Error::violation("device_ids", "the id of a device"))?,
            ),
        };
        Ok(Self {
            user: UserId::parse(visit.fields.value("user"))?,
            device,
        })
    }

    fn purpose(&self) -> String {
        let device = self
            .device
            .map_or_else(|| "all".to_owned(), |id| id.to_string());
        format!("end-trust {device} {}", self.user.as_str())
    }

    fn which(&self) -> Which {
        self.device.map_or(Which::All, |id| Which::These(vec![id]))
    }
}

/// Asks for a confirmation, and then ends the trust of devices. This needs a recent sign-in, as an approval does.
pub(super) async fn end_trust(context: &Context, visit: &Visit) -> Answer {
    let chosen = Chosen::read(visit).map_err(|error| visit.failure(&error))?;
    visit.check_recent(context, &sign_in::address(None))?;
    if !visit.is_form {
        return confirm(context, visit, &chosen, None).await;
    }
    visit.check_token(&chosen.purpose())?;
    let are_lost = match visit.fields.value("cause") {
        "lost" => true,
        "untrusted" => false,
        _ => {
            let what = "Choose why the trust ends.";
            return confirm(context, visit, &chosen, Some(what)).await;
        }
    };
    let ended = Untrusted {
        user: Some(chosen.user.clone()),
        which: chosen.which(),
        are_lost,
        signature: None,
    };
    let broker = &context.broker;
    let ended = broker.untrust_devices(visit.principal(), &visit.call, ended);
    let back = format!("/devices?user={}", in_address(chosen.user.as_str()));
    match ended.await {
        Ok(_) => Ok(answer::see_other(&back)),
        Err(error) => Err(visit
            .failure(&error)
            .with_link(back, "Go back to the devices")),
    }
}

async fn confirm(
    context: &Context,
    visit: &Visit,
    chosen: &Chosen,
    refused: Option<&'static str>,
) -> Answer {
    let found = devices(context, visit, &chosen.user).await?;
    let mut listed = found.devices.iter();
    let device = match chosen.device {
        None => None,
        Some(id) => {
            let device = listed.find(|view| view.row.address.device == id);
            let device = device.ok_or_else(|| {
                let text = "The member has no device with this id.";
                Failure::new(StatusCode::NOT_FOUND, "There is no such device", text)
            })?;
            Some(Device::from(device))
        }
    };
    let status = match refused {
        Some(_) => StatusCode::BAD_REQUEST,
        None => StatusCode::OK,
    };
    let page = pages::EndTrust {
        frame: visit.frame(""),
        member: chosen.user.as_str().to_owned(),
        member_in_address: in_address(chosen.user.as_str()),
        device,
        token: visit.session.token(&chosen.purpose()),
        refused,
    };
    Ok(answer::page(status, &page))
}
