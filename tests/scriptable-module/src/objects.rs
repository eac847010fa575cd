//! Objects: what the token does with the attributes in templates, and what it answers when they are read.

#![allow(clippy::too_many_arguments, reason = "the arguments of the standard")]

use std::{ptr, slice};

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_ATTRIBUTE_TYPE, CK_BBOOL, CK_BYTE, CK_FALSE, CK_MECHANISM, CK_OBJECT_CLASS,
    CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_TRUE, CK_ULONG, CK_UNAVAILABLE_INFORMATION,
    CKA_CLASS, CKA_ID, CKA_KEY_TYPE, CKA_VALUE_LEN, CKA_WRAP_WITH_TRUSTED, CKF_SERIAL_SESSION,
    CKK_GENERIC_SECRET, CKM_GENERIC_SECRET_KEY_GEN, CKO_PRIVATE_KEY, CKO_PUBLIC_KEY,
    CKO_SECRET_KEY, CKR_ATTRIBUTE_TYPE_INVALID, CKR_BUFFER_TOO_SMALL, CKR_OK,
};

use crate::{
    call::Call,
    functions::kinds::{
        Count, FoundObjects, In, Key, Mechanism, NewObject, Object, OutCount, Session, Template,
    },
    script::{AttributeRule, AttributeValue, Hmac, InTemplate, OnRead, Part},
};

/// A template as the real token is to see it.
#[derive(Debug, Default)]
struct Edited {
    attributes: Vec<CK_ATTRIBUTE>,
    /// What added and replaced attributes point to.
    values: Vec<Box<[u8]>>,
}

impl Edited {
    fn push(&mut self, name: CK_ATTRIBUTE_TYPE, value: Box<[u8]>) {
        let mut value = value;
        self.attributes.push(CK_ATTRIBUTE {
            type_: name,
            pValue: value.as_mut_ptr().cast(),
            ulValueLen: length_of(&value),
        });
        self.values.push(value);
    }

    fn parts(&mut self) -> (*mut CK_ATTRIBUTE, CK_ULONG) {
        let count = length_of(&self.attributes);
        (self.attributes.as_mut_ptr(), count)
    }
}

fn length_of<T>(values: &[T]) -> CK_ULONG {
    CK_ULONG::try_from(values.len()).unwrap_or(CK_ULONG::MAX)
}

/// The attributes of a template.
///
/// # Safety
///
/// `template` is null or has `count` attributes, which nothing else uses meanwhile.
unsafe fn attributes<'a>(template: Template, count: Count) -> &'a mut [CK_ATTRIBUTE] {
    if template.is_null() {
        return &mut [];
    }
    let count = usize::try_from(count).unwrap_or_default();
    // SAFETY: the caller vouches for it.
    unsafe { slice::from_raw_parts_mut(template, count) }
}

/// The value of an attribute.
///
/// # Safety
///
/// The attribute has a value of its length, or none.
unsafe fn value(attribute: &CK_ATTRIBUTE) -> &[u8] {
    if attribute.pValue.is_null() || attribute.ulValueLen == CK_UNAVAILABLE_INFORMATION {
        return &[];
    }
    let length = usize::try_from(attribute.ulValueLen).unwrap_or_default();
    // SAFETY: the caller vouches for it.
    unsafe { slice::from_raw_parts(attribute.pValue.cast(), length) }
}

/// The number in a template, such as a class or a key type.
fn number(template: &[CK_ATTRIBUTE], name: CK_ATTRIBUTE_TYPE) -> Option<CK_ULONG> {
    let attribute = template.iter().find(|attribute| attribute.type_ == name)?;
    // SAFETY: an attribute of a template has a value of its length.
    let bytes = unsafe { value(attribute) };
    bytes.try_into().ok().map(CK_ULONG::from_ne_bytes)
}

fn part_of_class(class: Option<CK_OBJECT_CLASS>, unknown: Part) -> Part {
    match class {
        Some(CKO_PUBLIC_KEY) => Part::Public,
        Some(CKO_PRIVATE_KEY) => Part::Private,
        Some(CKO_SECRET_KEY) => Part::Secret,
        Some(_) => Part::Other,
        None => unknown,
    }
}

/// What the object is, as the real token says.
fn part_of_object(call: &Call, session: Session, object: Object) -> Part {
    let mut class: CK_OBJECT_CLASS = 0;
    let mut attribute = CK_ATTRIBUTE {
        type_: CKA_CLASS,
        pValue: (&raw mut class).cast(),
        ulValueLen: CK_ULONG::try_from(size_of::<CK_OBJECT_CLASS>()).unwrap_or_default(),
    };
    let Some(read) = call.process.real.list.C_GetAttributeValue else {
        return Part::Other;
    };
    // SAFETY: a function of the real module; the attribute has room for its value.
    let code = unsafe { read(session, object, &raw mut attribute, 1) };
    part_of_class((code == CKR_OK).then_some(class), Part::Other)
}

impl InTemplate {
    /// Whether it concerns an attribute with this value.
    fn applies(&self, value: &[u8]) -> bool {
        let is = |wanted: &AttributeValue| *wanted.bytes() == *value;
        self.when.as_ref().is_none_or(is) && !self.unless.as_ref().is_some_and(is)
    }
}

/// What a template is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// An object is made: what is missing can be refused or added.
    Make,
    /// Attributes are changed or searched for.
    Name,
}

/// The template as the real token is to see it, or the code with which this token refuses it.
fn edit(
    call: &Call,
    part: Part,
    purpose: Purpose,
    template: &[CK_ATTRIBUTE],
) -> Result<Edited, CK_RV> {
    refuse_others(call, part, template)?;
    let rules = call.script.attributes.iter();
    let rules: Vec<&AttributeRule> = rules.filter(|rule| rule.covers(part)).collect();
    let mut edited = Edited::default();
    for attribute in template {
        // SAFETY: an attribute of a template has a value of its length.
        let own = unsafe { value(attribute) };
        let rule = rules
            .iter()
            .filter(|rule| rule.name.0 == attribute.type_)
            .map(|rule| &rule.in_template)
            .find(|rule| rule.applies(own));
        match rule {
            None => edited.attributes.push(*attribute),
            Some(rule) => {
                if let Some(code) = rule.refuse {
                    return Err(code.0);
                }
                match &rule.replace {
                    Some(value) => edited.push(attribute.type_, value.bytes()),
                    None if rule.leave_out => (),
                    None => edited.attributes.push(*attribute),
                }
            }
        }
    }
    if purpose == Purpose::Make {
        add_missing(&rules, template, &mut edited)?;
    }
    let shown = call.script.hmac.as_ref().and_then(|hmac| hmac.key_type);
    if let Some(shown) = shown
        && number(&edited.attributes, CKA_KEY_TYPE) == Some(shown.0)
    {
        edited
            .attributes
            .retain(|attribute| attribute.type_ != CKA_KEY_TYPE);
        edited.push(CKA_KEY_TYPE, Box::new(CKK_GENERIC_SECRET.to_ne_bytes()));
    }
    Ok(edited)
}

/// Refuses attributes that the template must not have.
fn refuse_others(call: &Call, part: Part, template: &[CK_ATTRIBUTE]) -> Result<(), CK_RV> {
    let rules = call.script.templates.iter();
    for rule in rules.filter(|rule| rule.covers(call.function, part)) {
        let is_known = |attribute: &CK_ATTRIBUTE| {
            let mut known = rule.only.iter();
            known.any(|name| name.0 == attribute.type_)
        };
        if !template.iter().all(is_known) {
            return Err(rule.refuse.0);
        }
    }
    Ok(())
}

/// Treats attributes that the template lacks: it is refused for the lack of a value, or the attribute is added.
fn add_missing(
    rules: &[&AttributeRule],
    template: &[CK_ATTRIBUTE],
    edited: &mut Edited,
) -> Result<(), CK_RV> {
    for rule in rules {
        let mut names = template.iter().map(|attribute| attribute.type_);
        if names.any(|name| name == rule.name.0) {
            continue;
        }
        let in_template = &rule.in_template;
        if let (Some(code), Some(_)) = (in_template.refuse, &in_template.unless) {
            return Err(code.0);
        }
        if let (Some(value), None) = (&in_template.replace, &in_template.when) {
            edited.push(rule.name.0, value.bytes());
        }
    }
    Ok(())
}

/// As [`edit`], for an object that is made.
fn edit_new(
    call: &Call,
    part: Part,
    session: Session,
    template: &[CK_ATTRIBUTE],
) -> Result<Edited, CK_RV> {
    match refuses_id(call, session, template) {
        Some(code) => Err(code),
        None => edit(call, part, Purpose::Make, template),
    }
}

/// Calls the real function with the edited template.
fn with(
    edited: Result<Edited, CK_RV>,
    real: impl FnOnce(*mut CK_ATTRIBUTE, CK_ULONG) -> CK_RV,
) -> CK_RV {
    match edited {
        Ok(mut edited) => {
            let (template, count) = edited.parts();
            real(template, count)
        }
        Err(code) => code,
    }
}

/// Calls the real function with the edited template of a new object, whose class is `unknown` if the template has none.
///
/// # Safety
///
/// `template` is null or has `count` attributes, which nothing else uses meanwhile.
unsafe fn with_new(
    call: &Call,
    session: Session,
    unknown: Part,
    (template, count): (Template, Count),
    real: impl FnOnce(*mut CK_ATTRIBUTE, CK_ULONG) -> CK_RV,
) -> CK_RV {
    // SAFETY: the caller vouches for it.
    let own = unsafe { attributes(template, count) };
    let part = part_of_class(number(own, CKA_CLASS), unknown);
    with(edit_new(call, part, session, own), real)
}

/// Calls the real function with an edited template that names attributes of existing objects.
///
/// # Safety
///
/// `template` is null or has `count` attributes, which nothing else uses meanwhile.
unsafe fn with_named(
    call: &Call,
    part: Part,
    (template, count): (Template, Count),
    real: impl FnOnce(*mut CK_ATTRIBUTE, CK_ULONG) -> CK_RV,
) -> CK_RV {
    // SAFETY: the caller vouches for it.
    let own = unsafe { attributes(template, count) };
    with(edit(call, part, Purpose::Name, own), real)
}

/// The code for a template whose `CKA_ID` another object has.
fn refuses_id(call: &Call, session: Session, template: &[CK_ATTRIBUTE]) -> Option<CK_RV> {
    let code = call.script.objects.refuse_duplicate_id?;
    let id = template
        .iter()
        .find(|attribute| attribute.type_ == CKA_ID)?;
    has_object(call, session, *id)
        .unwrap_or_default()
        .then_some(code.0)
}

/// Whether an object with this attribute exists, searched for in a separate session: the application may be searching in
/// its own. `None` when that is not possible.
fn has_object(call: &Call, session: Session, mut attribute: CK_ATTRIBUTE) -> Option<bool> {
    let slot = call.process.sessions().get(&session)?.slot;
    let list = &call.process.real.list;
    let (open, close) = (list.C_OpenSession?, list.C_CloseSession?);
    let (begin, next, end) = (
        list.C_FindObjectsInit?,
        list.C_FindObjects?,
        list.C_FindObjectsFinal?,
    );
    let (mut own, mut found, mut count): (CK_SESSION_HANDLE, CK_OBJECT_HANDLE, CK_ULONG) =
        (0, 0, 0);
    // SAFETY: functions of the real module, with pointers to our own variables and an attribute of the application.
    unsafe {
        if open(
            slot,
            CKF_SERIAL_SESSION,
            ptr::null_mut(),
            None,
            &raw mut own,
        ) != CKR_OK
        {
            return None;
        }
        if begin(own, &raw mut attribute, 1) == CKR_OK {
            next(own, &raw mut found, 1, &raw mut count);
            end(own);
        }
        close(own);
    }
    Some(count > 0)
}

/// `C_CreateObject`.
pub(crate) unsafe fn create(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_OBJECT_HANDLE,
    ) -> CK_RV,
    session: Session,
    template: Template,
    count: Count,
    new: NewObject,
) -> CK_RV {
    let real = |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long.
        unsafe { real(session, template, count, new) }
    };
    // SAFETY: the arguments of our caller.
    unsafe { with_new(call, session, Part::Other, (template, count), real) }
}

/// `C_CopyObject`.
pub(crate) unsafe fn copy(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        CK_OBJECT_HANDLE,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_OBJECT_HANDLE,
    ) -> CK_RV,
    session: Session,
    object: Object,
    template: Template,
    count: Count,
    new: NewObject,
) -> CK_RV {
    let part = part_of_object(call, session, object);
    let real = |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long.
        unsafe { real(session, object, template, count, new) }
    };
    // SAFETY: the arguments of our caller.
    unsafe { with_named(call, part, (template, count), real) }
}

/// `C_SetAttributeValue`.
pub(crate) unsafe fn set_attributes(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        CK_OBJECT_HANDLE,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
    ) -> CK_RV,
    session: Session,
    object: Object,
    template: Template,
    count: Count,
) -> CK_RV {
    let part = part_of_object(call, session, object);
    let real = |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long.
        unsafe { real(session, object, template, count) }
    };
    // SAFETY: the arguments of our caller.
    unsafe { with_named(call, part, (template, count), real) }
}

/// `C_FindObjectsInit`.
pub(crate) unsafe fn find_init(
    call: &Call,
    real: unsafe extern "C" fn(CK_SESSION_HANDLE, *mut CK_ATTRIBUTE, CK_ULONG) -> CK_RV,
    session: Session,
    template: Template,
    count: Count,
) -> CK_RV {
    let real = |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long.
        unsafe { real(session, template, count) }
    };
    // SAFETY: the arguments of our caller.
    unsafe { with_named(call, Part::Search, (template, count), real) }
}

/// `C_FindObjects`: the handles that are valid now.
pub(crate) unsafe fn find(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        *mut CK_OBJECT_HANDLE,
        CK_ULONG,
        *mut CK_ULONG,
    ) -> CK_RV,
    session: Session,
    found: FoundObjects,
    room: Count,
    count: OutCount,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let code = unsafe { real(session, found, room, count) };
    if code == CKR_OK
        && !found.is_null()
        // SAFETY: the caller vouches for the pointer.
        && let Some(count) = unsafe { count.as_ref() }
    {
        let count = usize::try_from(*count).unwrap_or_default();
        // SAFETY: the real module has just written as many handles.
        for handle in unsafe { slice::from_raw_parts_mut(found, count) } {
            *handle = call.shown_handle(*handle);
        }
    }
    code
}

/// The code with which the token refuses to make a key for HMAC in this way.
fn refuses_hmac(hmac: &Hmac, mechanism: &CK_MECHANISM, template: &[CK_ATTRIBUTE]) -> Option<CK_RV> {
    let is_own = hmac
        .mechanism
        .is_some_and(|own| own.0 == mechanism.mechanism);
    let is_generic = mechanism.mechanism == CKM_GENERIC_SECRET_KEY_GEN;
    if !is_own && !is_generic {
        return None;
    }
    let wrong_mechanism = is_generic && hmac.mechanism.is_some();
    let key_type = number(template, CKA_KEY_TYPE);
    let wrong_type = hmac.key_type.is_some_and(|own| key_type != Some(own.0));
    (wrong_mechanism || wrong_type).then_some(hmac.refuse.0)
}

/// Whether a key is one that the token has made and refuses to use for HMAC (`hmac.refuse_at_use`). The real token keeps it with
/// `CKA_WRAP_WITH_TRUSTED`, which concerns extractable keys only.
fn is_unusable(call: &Call, session: Session, key: Object) -> bool {
    let Some(read) = call.process.real.list.C_GetAttributeValue else {
        return false;
    };
    let mut is_marked: CK_BBOOL = CK_FALSE;
    let mut attribute = CK_ATTRIBUTE {
        type_: CKA_WRAP_WITH_TRUSTED,
        pValue: (&raw mut is_marked).cast(),
        ulValueLen: 1,
    };
    // SAFETY: a function of the real module; the attribute has room for its value.
    let code = unsafe { read(session, key, &raw mut attribute, 1) };
    code == CKR_OK && is_marked == CK_TRUE
}

/// `C_SignInit` and `C_VerifyInit`.
pub(crate) unsafe fn begin_mac(
    call: &Call,
    real: unsafe extern "C" fn(CK_SESSION_HANDLE, *mut CK_MECHANISM, CK_OBJECT_HANDLE) -> CK_RV,
    session: Session,
    mechanism: Mechanism,
    key: Key,
) -> CK_RV {
    if let Some(hmac) = call.script.hmac.as_ref().filter(|hmac| hmac.refuse_at_use)
        && is_unusable(call, session, key)
    {
        return hmac.refuse.0;
    }
    // SAFETY: the arguments of our caller.
    unsafe { real(session, mechanism, key) }
}

/// `C_GenerateKey`.
pub(crate) unsafe fn generate_key(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        *mut CK_MECHANISM,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_OBJECT_HANDLE,
    ) -> CK_RV,
    session: Session,
    mechanism: Mechanism,
    template: Template,
    count: Count,
    new: NewObject,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let (own, named) = unsafe { (attributes(template, count), mechanism.as_ref()) };
    let mut generic = CK_MECHANISM {
        mechanism: CKM_GENERIC_SECRET_KEY_GEN,
        pParameter: ptr::null_mut(),
        ulParameterLen: 0,
    };
    let mut used = mechanism;
    let mut length = None;
    let mut is_unusable = false;
    if let (Some(hmac), Some(named)) = (&call.script.hmac, named) {
        match refuses_hmac(hmac, named, own) {
            Some(code) if !hmac.refuse_at_use => return code,
            refused => is_unusable = refused.is_some(),
        }
        if hmac.mechanism.is_some_and(|own| own.0 == named.mechanism) {
            used = &raw mut generic;
        }
        if used == &raw mut generic || named.mechanism == CKM_GENERIC_SECRET_KEY_GEN {
            length = hmac.length;
        }
    }
    let edited = edit_new(call, Part::Secret, session, own).map(|mut edited| {
        if let Some(length) = length
            && number(&edited.attributes, CKA_VALUE_LEN).is_none()
        {
            edited.push(CKA_VALUE_LEN, Box::new(length.to_ne_bytes()));
        }
        if is_unusable {
            edited.push(CKA_WRAP_WITH_TRUSTED, Box::new([CK_TRUE]));
        }
        edited
    });
    with(edited, |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long; the generic mechanism has no parameter.
        unsafe { real(session, used, template, count, new) }
    })
}

/// `C_GenerateKeyPair`.
pub(crate) unsafe fn generate_pair(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        *mut CK_MECHANISM,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_OBJECT_HANDLE,
        *mut CK_OBJECT_HANDLE,
    ) -> CK_RV,
    session: Session,
    mechanism: Mechanism,
    public: Template,
    public_count: Count,
    private: Template,
    private_count: Count,
    new_public: NewObject,
    new_private: NewObject,
) -> CK_RV {
    // SAFETY: the arguments of our caller.
    let (public, private) = unsafe {
        (
            attributes(public, public_count),
            attributes(private, private_count),
        )
    };
    // Both are looked at before either is made: the two may have the same identifier.
    let public = edit_new(call, Part::Public, session, public);
    let mut private = match edit_new(call, Part::Private, session, private) {
        Ok(private) => private,
        Err(code) => return code,
    };
    let (private, private_count) = private.parts();
    with(public, |public, public_count| {
        // SAFETY: the arguments of our caller, and templates that live as long.
        unsafe {
            real(
                session,
                mechanism,
                public,
                public_count,
                private,
                private_count,
                new_public,
                new_private,
            )
        }
    })
}

/// `C_UnwrapKey`.
pub(crate) unsafe fn unwrap(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        *mut CK_MECHANISM,
        CK_OBJECT_HANDLE,
        *mut CK_BYTE,
        CK_ULONG,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_OBJECT_HANDLE,
    ) -> CK_RV,
    session: Session,
    mechanism: Mechanism,
    key: Object,
    wrapped: In,
    length: Count,
    template: Template,
    count: Count,
    new: NewObject,
) -> CK_RV {
    let real = |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long.
        unsafe {
            real(
                session, mechanism, key, wrapped, length, template, count, new,
            )
        }
    };
    // SAFETY: the arguments of our caller.
    unsafe { with_new(call, session, Part::Secret, (template, count), real) }
}

/// `C_DeriveKey`.
pub(crate) unsafe fn derive(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        *mut CK_MECHANISM,
        CK_OBJECT_HANDLE,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
        *mut CK_OBJECT_HANDLE,
    ) -> CK_RV,
    session: Session,
    mechanism: Mechanism,
    key: Object,
    template: Template,
    count: Count,
    new: NewObject,
) -> CK_RV {
    let real = |template, count| {
        // SAFETY: the arguments of our caller, and a template that lives as long.
        unsafe { real(session, mechanism, key, template, count, new) }
    };
    // SAFETY: the arguments of our caller.
    unsafe { with_new(call, session, Part::Secret, (template, count), real) }
}

/// `C_GetAttributeValue`: some attributes are answered by the script, the others by the real token.
pub(crate) unsafe fn get_attributes(
    call: &Call,
    real: unsafe extern "C" fn(
        CK_SESSION_HANDLE,
        CK_OBJECT_HANDLE,
        *mut CK_ATTRIBUTE,
        CK_ULONG,
    ) -> CK_RV,
    session: Session,
    object: Object,
    template: Template,
    count: Count,
) -> CK_RV {
    let script = &call.script;
    if script.attributes.is_empty() && script.hmac.is_none() {
        // SAFETY: the arguments of our caller.
        return unsafe { real(session, object, template, count) };
    }
    let part = part_of_object(call, session, object);
    // SAFETY: the arguments of our caller.
    let asked = unsafe { attributes(template, count) };
    let mut forwarded = Vec::new();
    let mut places = Vec::new();
    let mut scripted = CKR_OK;
    for (place, attribute) in asked.iter_mut().enumerate() {
        let name = attribute.type_;
        let rule = script
            .attributes
            .iter()
            .filter(|rule| rule.name.0 == name && rule.covers(part))
            .map(|rule| &rule.on_read)
            // SAFETY: the caller vouches for the room that the attribute says it has.
            .find_map(|rule| unsafe { answer(rule, attribute) });
        match rule {
            Some(CKR_OK) => (),
            Some(code) if scripted == CKR_OK => scripted = code,
            Some(_) => (),
            None => {
                forwarded.push(*attribute);
                places.push(place);
            }
        }
    }
    let mut code = CKR_OK;
    if !forwarded.is_empty() {
        // SAFETY: the attributes of our caller.
        code = unsafe {
            real(
                session,
                object,
                forwarded.as_mut_ptr(),
                length_of(&forwarded),
            )
        };
        for (attribute, place) in forwarded.iter().zip(places) {
            asked[place].ulValueLen = attribute.ulValueLen;
        }
    }
    if let Some(shown) = script.hmac.as_ref().and_then(|hmac| hmac.key_type)
        && part == Part::Secret
        && number(asked, CKA_KEY_TYPE) == Some(CKK_GENERIC_SECRET)
        && !is_unusable(call, session, object)
        && let Some(attribute) = asked
            .iter()
            .find(|attribute| attribute.type_ == CKA_KEY_TYPE)
    {
        // SAFETY: the value has just been read and has this length.
        unsafe { attribute.pValue.cast::<CK_ULONG>().write_unaligned(shown.0) };
    }
    if scripted == CKR_OK { code } else { scripted }
}

/// Answers for the real token. `None` when the real token is to answer.
///
/// # Safety
///
/// The attribute has room for a value of its length, or no room.
unsafe fn answer(rule: &OnRead, attribute: &mut CK_ATTRIBUTE) -> Option<CK_RV> {
    let refused = if attribute.pValue.is_null() && rule.size_query.is_some() {
        rule.size_query.map(|code| code.0)
    } else if rule.absent {
        Some(CKR_ATTRIBUTE_TYPE_INVALID)
    } else {
        rule.fail.map(|code| code.0)
    };
    if let Some(code) = refused {
        attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return Some(code);
    }
    let bytes: Box<[u8]> = if rule.empty {
        Box::default()
    } else {
        rule.value.as_ref()?.bytes()
    };
    let room = std::mem::replace(&mut attribute.ulValueLen, length_of(&bytes));
    if attribute.pValue.is_null() {
        return Some(CKR_OK);
    }
    if room < length_of(&bytes) {
        attribute.ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return Some(CKR_BUFFER_TOO_SMALL);
    }
    // SAFETY: the caller vouches for the room, which is enough.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), attribute.pValue.cast::<u8>(), bytes.len()) };
    Some(CKR_OK)
}
