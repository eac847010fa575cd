//! Translates the broker's terms into Cedar entities, actions and context.
//!
//! Every request to Cedar must conform to the schema, because the policies were validated against
//! the same schema. The broker does not check each request against the schema. A test checks
//! requests of every kind against the schema.

use std::{
    collections::{HashMap, HashSet},
    iter,
    str::FromStr as _,
    sync::LazyLock,
};

use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, Request, RequestEnv,
    RestrictedExpression as Value, Schema,
};

use keybroker_core::{
    call::Timestamp,
    principal::{Action, Identity, Kind, Reach, Role},
};

use super::{Case, Release, Resource, error::Error};

pub(super) const SCHEMA: &str = include_str!("schema.cedarschema");
const MICROS_PER_SECOND: i64 = 1_000_000;
/// The values of `release`: the form in which a user key is released.
const PLAIN: &str = "plain";
const SEALED: &str = "sealed";

pub(super) static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(Vocabulary::new);

/// The parts that all requests to Cedar have in common.
pub(super) struct Vocabulary {
    pub(super) schema: Schema,
    user: EntityTypeName,
    service: EntityTypeName,
    user_key: EntityTypeName,
    user_keys: EntityTypeName,
    devices: EntityTypeName,
    access_request: EntityTypeName,
    broker: EntityUid,
    roles: [EntityUid; Role::ALL.len()],
    actions: HashMap<Action, AskedAction>,
}

/// An action in the form of Cedar. The position of the action in the hierarchy of actions is
/// computed only once, because the computation takes longer than the evaluation of most policies.
struct AskedAction {
    uid: EntityUid,
    entities: Entities,
}

/// The attributes that are passed to Cedar.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted<'a> {
    /// All attributes of the schema.
    All,
    /// The attributes that policies mention.
    Mentioned(&'a HashSet<String>),
}

impl Wanted<'_> {
    fn has(self, word: &str) -> bool {
        match self {
            Self::All => true,
            Self::Mentioned(words) => words.contains(word),
        }
    }

    /// Operators choose the names of tags, and a policy may compute these names. Therefore, all tags are passed if any
    /// policy uses tags.
    fn tags(self) -> bool {
        self.has("getTag") || self.has("hasTag")
    }
}

/// A list of attributes that is being built.
struct Attributes<'a> {
    wanted: Wanted<'a>,
    pairs: Vec<(String, Value)>,
}

impl<'a> Attributes<'a> {
    fn new(wanted: Wanted<'a>) -> Self {
        Self {
            wanted,
            pairs: Vec::new(),
        }
    }

    fn add(&mut self, name: &str, value: impl FnOnce() -> Value) {
        if self.wanted.has(name) {
            self.pairs.push((name.to_owned(), value()));
        }
    }

    fn add_some<T>(&mut self, name: &str, known: Option<T>, value: impl FnOnce(T) -> Value) {
        if let Some(known) = known {
            self.add(name, || value(known));
        }
    }
}

/// An authorization request in the form that Cedar requires.
pub(super) struct Asked {
    pub(super) request: Request,
    pub(super) entities: Entities,
}

impl Vocabulary {
    fn new() -> Self {
        let (schema, _) = Schema::from_cedarschema_str(SCHEMA)
            .expect("the shipped schema is valid: a test loads it");
        let named = |name: &str| {
            EntityTypeName::from_str(&format!("Keybroker::{name}"))
                .expect("an identifier is a name")
        };
        let uid =
            |kind: &str, id: &str| EntityUid::from_type_name_and_id(named(kind), EntityId::new(id));
        let action_type = named("Action");
        let known: HashMap<EntityUid, Entity> = schema
            .action_entities()
            .expect("the actions of the shipped schema have no cycle: a test loads it")
            .into_iter()
            .map(|entity| (entity.uid(), entity))
            .collect();
        let action = |action: Action| {
            let uid = EntityUid::from_type_name_and_id(
                action_type.clone(),
                EntityId::new(action.as_str()),
            );
            let entity = known.get(&uid).cloned();
            let entity = entity.expect("the shipped schema has every action: a test asks for each");
            let entities = Entities::from_entities([entity], None)
                .expect("an action of a valid schema is a valid entity");
            (action, AskedAction { uid, entities })
        };
        Self {
            actions: Action::ALL.into_iter().map(action).collect(),
            roles: Role::ALL.map(|role| uid("Role", role.as_str())),
            user: named("User"),
            service: named("Service"),
            user_key: named("UserKey"),
            user_keys: named("UserKeys"),
            devices: named("Devices"),
            access_request: named("AccessRequest"),
            broker: uid("Broker", "broker"),
            schema,
        }
    }

    /// The action and kind of principal to which a policy can apply.
    pub(super) fn case(&self, case: &RequestEnv) -> Option<(Action, Kind)> {
        let kind = if *case.principal() == self.user {
            Kind::User
        } else {
            Kind::Service
        };
        let mut actions = self.actions.iter();
        let (action, _) = actions.find(|(_, asked)| asked.uid == *case.action())?;
        Some((*action, kind))
    }

    /// Builds a request to Cedar. If `schema` is present, the request must conform to the schema.
    /// Otherwise this function fails.
    pub(super) fn ask(
        &self,
        case: &Case<'_>,
        wanted: Wanted<'_>,
        schema: Option<&Schema>,
    ) -> Result<Asked, Error> {
        let principal = self.principal(case.identity, wanted)?;
        let resource = self.resource(case.resource, wanted)?;
        let action = self
            .actions
            .get(&case.action)
            .expect("the vocabulary is built from every action");
        let context = context(case, wanted)?;
        let request = Request::new(
            principal.uid(),
            action.uid.clone(),
            resource.uid(),
            context,
            schema,
        )
        .map_err(Error::on("create the Cedar request"))?;
        let entities = action.entities.clone();
        let entities = entities
            .add_entities([principal, resource], schema)
            .map_err(Error::on("create the entities of the Cedar request"))?;
        Ok(Asked { request, entities })
    }

    fn principal(&self, identity: &Identity, wanted: Wanted<'_>) -> Result<Entity, Error> {
        let mut attributes = Attributes::new(wanted);
        attributes.add("name", || text(&identity.name));
        attributes.add("tenant", || text(identity.tenant.as_str()));
        attributes.add("credential", || text(identity.credential.as_str()));
        attributes.add_some("mapping", identity.mapping.as_deref(), text);
        let (kind, roles) = match identity.kind {
            Kind::User => {
                attributes.add_some("subject", identity.subject.as_ref(), |user| {
                    text(user.as_str())
                });
                // A person has no role, even if a claim contains a role.
                (&self.user, Vec::new())
            }
            Kind::Service => {
                attributes.add("allUsers", || Value::new_bool(identity.users == Reach::All));
                attributes.add("allKeyNames", || {
                    Value::new_bool(identity.key_names == Reach::All)
                });
                let held = iter::zip(Role::ALL, &self.roles)
                    .filter(|(role, _)| identity.roles.contains(role));
                (&self.service, held.map(|(_, uid)| uid.clone()).collect())
            }
        };
        let tags = identity.claims.attributes.iter().filter(|_| wanted.tags());
        let tags = tags.map(|(name, values)| (name.clone(), texts(values)));
        let uid = EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(&identity.name));
        Entity::new_with_tags(uid, attributes.pairs, roles, tags)
            .map_err(Error::on("describe the principal"))
    }

    fn resource(&self, resource: Resource<'_>, wanted: Wanted<'_>) -> Result<Entity, Error> {
        let mut attributes = Attributes::new(wanted);
        attributes.add_some("tenant", resource.tenant(), |tenant| text(tenant.as_str()));
        let (kind, id) = match resource {
            Resource::Broker => return Ok(Entity::with_uid(self.broker.clone())),
            Resource::UserKey { tenant, user, name } => {
                attributes.add("user", || text(user.as_str()));
                attributes.add("keyName", || text(name.as_str()));
                // A tenant or a key name cannot contain a slash.
                (&self.user_key, format!("{tenant}/{name}/{user}"))
            }
            Resource::UserKeys { tenant, user: None } => (&self.user_keys, tenant.to_string()),
            Resource::UserKeys {
                tenant,
                user: Some(user),
            } => {
                attributes.add("user", || text(user.as_str()));
                (&self.user_keys, format!("{tenant}/{user}"))
            }
            Resource::Devices { tenant, user: None } => (&self.devices, tenant.to_string()),
            Resource::Devices {
                tenant,
                user: Some(user),
            } => {
                attributes.add("user", || text(user.as_str()));
                (&self.devices, format!("{tenant}/{user}"))
            }
            Resource::AccessRequest {
                tenant,
                user,
                requested_by,
                device_type,
                peer,
                place,
            } => {
                attributes.add("user", || text(user.as_str()));
                attributes.add("requestedBy", || text(requested_by));
                attributes.add("deviceType", || text(device_type));
                attributes.add("requestPeer", || {
                    Value::new_ip(peer.to_canonical().to_string())
                });
                attributes.add("requestPlace", || text(place));
                (&self.access_request, format!("{tenant}/{user}"))
            }
        };
        let uid = EntityUid::from_type_name_and_id(kind.clone(), EntityId::new(&id));
        Entity::new_with_tags(uid, attributes.pairs, [], [])
            .map_err(Error::on("describe the resource"))
    }
}

fn context(case: &Case<'_>, wanted: Wanted<'_>) -> Result<Context, Error> {
    let claims = &case.identity.claims;
    let mut attributes = Attributes::new(wanted);
    attributes.add("amr", || texts(&claims.amr));
    attributes.add_some("acr", claims.acr.as_deref(), text);
    attributes.add_some("authAgeSeconds", claims.authenticated, |at| {
        Value::new_long(age_seconds(case.at, at))
    });
    attributes.add_some("device", claims.device.as_deref(), text);
    attributes.add("organisations", || texts(&claims.organisations));
    attributes.add("granted", || Value::new_bool(is_granted(case)));
    // A socket for both address families reports IPv4 addresses in IPv6 form, which Cedar does not
    // recognise as IPv4. After the conversion to IPv4 form, policies about IPv4 addresses also
    // apply to the converted address.
    attributes.add("peer", || {
        Value::new_ip(case.peer.to_canonical().to_string())
    });
    attributes.add("place", || text(case.place));
    attributes.add("time", || Value::new_datetime(datetime(case.at)));
    if case.action == Action::Unwrap {
        let (form, recipient) = match case.release {
            Release::Plain => (PLAIN, None),
            Release::Sealed(recipient) => (SEALED, Some(recipient)),
        };
        attributes.add("release", || text(form));
        attributes.add_some("recipient", recipient, |it| text(&it.to_string()));
    }
    Context::from_pairs(attributes.pairs).map_err(Error::on("describe the call"))
}

/// Whether the grant of a service covers the resource. The broker itself checks the grant, because
/// a grant may list thousands of users. Passing thousands of users to Cedar for every call would
/// take too long.
pub(super) fn is_granted(case: &Case<'_>) -> bool {
    let Identity {
        kind,
        users,
        key_names,
        ..
    } = case.identity;
    if *kind != Kind::Service {
        return false;
    }
    match case.resource {
        Resource::UserKey { user, name, .. } => users.contains(user) && key_names.contains(name),
        // A list of records shows all key names. If the list is not limited to one user, it also
        // shows all users.
        Resource::UserKeys { user, .. } => {
            *key_names == Reach::All
                && user.map_or(*users == Reach::All, |user| users.contains(user))
        }
        Resource::Devices { user, .. } => {
            user.map_or(*users == Reach::All, |user| users.contains(user))
        }
        Resource::AccessRequest { user, .. } => users.contains(user),
        Resource::Broker => false,
    }
}

/// Returns at least 0. If the provider's clock is ahead, the authentication counts as new.
pub(super) fn age_seconds(now: Timestamp, at: Timestamp) -> i64 {
    (now.micros().saturating_sub(at.micros()) / MICROS_PER_SECOND).max(0)
}

/// Formats a time in UTC with milliseconds.
pub(super) fn datetime(at: Timestamp) -> String {
    let nanos = i128::from(at.micros()) * 1_000;
    let at = time::OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.millisecond()
    )
}

pub(super) fn text(text: &str) -> Value {
    Value::new_string(text.to_owned())
}

pub(super) fn texts<'a>(texts: impl IntoIterator<Item = &'a String>) -> Value {
    Value::new_set(texts.into_iter().map(|one| text(one)))
}
