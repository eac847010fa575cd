//! Every function of PKCS#11 that takes part: its arguments, and the code that shapes it beyond the rules of the script.
//!
//! The type of an argument says what the module does with it: a `Key` or `Object` is translated where handles change, a
//! `Mechanism` can be refused, `Out` and `OutLength` can be corrupted or truncated. Everything else is passed on.

use cryptoki_sys::{
    CK_FUNCTION_LIST_3_2, CK_RV, CK_VERSION, CKR_FUNCTION_NOT_SUPPORTED, CKR_KEY_HANDLE_INVALID,
    CKR_OBJECT_HANDLE_INVALID, CKR_OK,
};

use crate::{
    call::{Call, run},
    login, objects, sessions, token,
};

/// The types of arguments, as the table of functions uses them.
pub(crate) mod kinds {
    use std::ffi::c_void;

    #[allow(clippy::wildcard_imports, reason = "nearly every type of the standard")]
    use cryptoki_sys::*;

    pub(crate) type AsyncData = *mut CK_ASYNC_DATA;
    pub(crate) type Bool = CK_BBOOL;
    pub(crate) type Count = CK_ULONG;
    pub(crate) type Flags = CK_FLAGS;
    pub(crate) type FoundObjects = *mut CK_OBJECT_HANDLE;
    pub(crate) type In = *mut CK_BYTE;
    pub(crate) type Info = *mut CK_INFO;
    pub(crate) type Key = CK_OBJECT_HANDLE;
    pub(crate) type Mechanism = *mut CK_MECHANISM;
    pub(crate) type MechanismInfo = *mut CK_MECHANISM_INFO;
    pub(crate) type MechanismType = CK_MECHANISM_TYPE;
    pub(crate) type MechanismTypes = *mut CK_MECHANISM_TYPE;
    pub(crate) type NewObject = *mut CK_OBJECT_HANDLE;
    pub(crate) type NewSession = *mut CK_SESSION_HANDLE;
    pub(crate) type Notify = CK_NOTIFY;
    pub(crate) type Object = CK_OBJECT_HANDLE;
    pub(crate) type Out = *mut CK_BYTE;
    pub(crate) type OutCount = *mut CK_ULONG;
    pub(crate) type OutFlags = *mut CK_FLAGS;
    pub(crate) type OutLength = *mut CK_ULONG;
    pub(crate) type OutSize = CK_ULONG;
    pub(crate) type Pointer = *mut c_void;
    pub(crate) type Session = CK_SESSION_HANDLE;
    pub(crate) type SessionInfo = *mut CK_SESSION_INFO;
    pub(crate) type Slot = CK_SLOT_ID;
    pub(crate) type SlotInfo = *mut CK_SLOT_INFO;
    pub(crate) type Slots = *mut CK_SLOT_ID;
    pub(crate) type Template = *mut CK_ATTRIBUTE;
    pub(crate) type Text = *mut CK_UTF8CHAR;
    pub(crate) type TokenInfo = *mut CK_TOKEN_INFO;
    pub(crate) type User = CK_USER_TYPE;
    pub(crate) type ValidationFlags = CK_SESSION_VALIDATION_FLAGS_TYPE;
}

macro_rules! incoming {
    (Key, $call:ident, $argument:ident) => {
        let Some($argument) = $call.real_handle($argument) else {
            return CKR_KEY_HANDLE_INVALID;
        };
    };
    (Object, $call:ident, $argument:ident) => {
        let Some($argument) = $call.real_handle($argument) else {
            return CKR_OBJECT_HANDLE_INVALID;
        };
    };
    (Mechanism, $call:ident, $argument:ident) => {
        // SAFETY: the caller of a PKCS#11 function passes null or a valid mechanism.
        if let Some(code) = $call.refuses_mechanism(unsafe { $argument.as_ref() }) {
            return code;
        }
    };
    ($other:ident, $call:ident, $argument:ident) => {};
}

macro_rules! outgoing {
    (NewObject, $call:ident, $argument:ident) => {
        // SAFETY: the real module has just written a handle to it.
        if let Some(handle) = unsafe { $argument.as_mut() } {
            *handle = $call.shown_handle(*handle);
        }
    };
    (Out, $call:ident, $argument:ident) => {
        $call.output.set($argument);
    };
    (OutLength, $call:ident, $argument:ident) => {
        // SAFETY: the real module has just written a length to it, and as many bytes to the output before it.
        unsafe { $call.damage_output($argument.as_mut()) };
    };
    (OutSize, $call:ident, $argument:ident) => {
        let mut length = $argument;
        // SAFETY: the real module has just filled the output before it, which has this length.
        unsafe { $call.damage_output(Some(&mut length)) };
    };
    ($other:ident, $call:ident, $argument:ident) => {};
}

macro_rules! forward {
    ([] $call:ident, $real:ident ($($argument:ident),*)) => {
        // SAFETY: the function is one of the real module, and the arguments are those of our caller, who vouches for them.
        unsafe { $real($($argument),*) }
    };
    ([$shape:path] $call:ident, $real:ident ($($argument:ident),*)) => {
        // SAFETY: as above; the shaping function has the same contract as the function that it shapes.
        unsafe { $shape($call, $real, $($argument),*) }
    };
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $kind:ident),*) $(by $shape:path)?;)*) => {
        /// A function of PKCS#11.
        #[allow(
            non_camel_case_types,
            clippy::enum_variant_names,
            reason = "the names of the standard"
        )]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub(crate) enum Function {
            $($name),*
        }

        impl Function {
            /// Every function with its name.
            pub(crate) const ALL: &[(&str, Self)] = &[$((stringify!($name), Self::$name)),*];
        }

        $(
            #[allow(non_snake_case, reason = "the name of the standard")]
            #[allow(clippy::too_many_arguments, reason = "the arguments of the standard")]
            unsafe extern "C" fn $name($($argument: kinds::$kind),*) -> CK_RV {
                run(Function::$name, |call: &Call| {
                    let Some(real) = call.process.real.list.$name else {
                        return CKR_FUNCTION_NOT_SUPPORTED;
                    };
                    $(incoming!($kind, call, $argument);)*
                    let code = forward!([$($shape)?] call, real ($($argument),*));
                    if code == CKR_OK {
                        $(outgoing!($kind, call, $argument);)*
                    }
                    code
                })
            }
        )*

        /// The complete table of functions, of the newest version.
        pub(crate) const LIST: CK_FUNCTION_LIST_3_2 = CK_FUNCTION_LIST_3_2 {
            version: CK_VERSION { major: 3, minor: 2 },
            C_GetFunctionList: Some(crate::C_GetFunctionList),
            C_GetInterfaceList: Some(crate::C_GetInterfaceList),
            C_GetInterface: Some(crate::C_GetInterface),
            $($name: Some($name)),*
        };
    };
}

functions! {
    C_Initialize(pointer: Pointer);
    C_Finalize(pointer: Pointer) by sessions::finalize;
    C_GetInfo(info: Info);
    C_GetSlotList(present: Bool, slots: Slots, count: OutCount) by token::slot_list;
    C_GetSlotInfo(slot: Slot, slot_info: SlotInfo) by token::slot_info;
    C_GetTokenInfo(slot: Slot, token_info: TokenInfo) by token::token_info;
    C_GetMechanismList(slot: Slot, mechanism_types: MechanismTypes, count: OutCount) by token::mechanism_list;
    C_GetMechanismInfo(slot: Slot, mechanism_type: MechanismType, mechanism_info: MechanismInfo) by token::mechanism_info;
    C_InitToken(slot: Slot, text: Text, length: Count, text_2: Text);
    C_InitPIN(session: Session, text: Text, length: Count) by login::init_pin;
    C_SetPIN(session: Session, text: Text, length: Count, text_2: Text, length_2: Count);
    C_OpenSession(slot: Slot, flags: Flags, pointer: Pointer, notify: Notify, new_session: NewSession) by sessions::open;
    C_CloseSession(session: Session) by sessions::close;
    C_CloseAllSessions(slot: Slot) by sessions::close_all;
    C_GetSessionInfo(session: Session, session_info: SessionInfo);
    C_GetOperationState(session: Session, output: Out, output_length: OutLength);
    C_SetOperationState(session: Session, input: In, length: Count, key: Key, key_2: Key);
    C_Login(session: Session, user: User, text: Text, length: Count) by login::login;
    C_Logout(session: Session) by login::logout;
    C_CreateObject(session: Session, template: Template, length: Count, new: NewObject) by objects::create;
    C_CopyObject(session: Session, object: Object, template: Template, length: Count, new: NewObject) by objects::copy;
    C_DestroyObject(session: Session, object: Object);
    C_GetObjectSize(session: Session, object: Object, count: OutCount);
    C_GetAttributeValue(session: Session, object: Object, template: Template, length: Count) by objects::get_attributes;
    C_SetAttributeValue(session: Session, object: Object, template: Template, length: Count) by objects::set_attributes;
    C_FindObjectsInit(session: Session, template: Template, length: Count) by objects::find_init;
    C_FindObjects(session: Session, found: FoundObjects, length: Count, count: OutCount) by objects::find;
    C_FindObjectsFinal(session: Session);
    C_EncryptInit(session: Session, mechanism: Mechanism, key: Key);
    C_Encrypt(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_EncryptUpdate(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_EncryptFinal(session: Session, output: Out, output_length: OutLength);
    C_DecryptInit(session: Session, mechanism: Mechanism, key: Key);
    C_Decrypt(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_DecryptUpdate(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_DecryptFinal(session: Session, output: Out, output_length: OutLength);
    C_DigestInit(session: Session, mechanism: Mechanism);
    C_Digest(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_DigestUpdate(session: Session, input: In, length: Count);
    C_DigestKey(session: Session, key: Key);
    C_DigestFinal(session: Session, output: Out, output_length: OutLength);
    C_SignInit(session: Session, mechanism: Mechanism, key: Key) by objects::begin_mac;
    C_Sign(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_SignUpdate(session: Session, input: In, length: Count);
    C_SignFinal(session: Session, output: Out, output_length: OutLength);
    C_SignRecoverInit(session: Session, mechanism: Mechanism, key: Key);
    C_SignRecover(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_VerifyInit(session: Session, mechanism: Mechanism, key: Key) by objects::begin_mac;
    C_Verify(session: Session, input: In, length: Count, input_2: In, length_2: Count);
    C_VerifyUpdate(session: Session, input: In, length: Count);
    C_VerifyFinal(session: Session, input: In, length: Count);
    C_VerifyRecoverInit(session: Session, mechanism: Mechanism, key: Key);
    C_VerifyRecover(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_DigestEncryptUpdate(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_DecryptDigestUpdate(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_SignEncryptUpdate(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_DecryptVerifyUpdate(session: Session, input: In, length: Count, output: Out, output_length: OutLength);
    C_GenerateKey(session: Session, mechanism: Mechanism, template: Template, length: Count, new: NewObject) by objects::generate_key;
    C_GenerateKeyPair(session: Session, mechanism: Mechanism, template: Template, length: Count, template_2: Template, length_2: Count, new: NewObject, new_2: NewObject) by objects::generate_pair;
    C_WrapKey(session: Session, mechanism: Mechanism, key: Key, key_2: Key, output: Out, output_length: OutLength);
    C_UnwrapKey(session: Session, mechanism: Mechanism, key: Key, input: In, length: Count, template: Template, length_2: Count, new: NewObject) by objects::unwrap;
    C_DeriveKey(session: Session, mechanism: Mechanism, key: Key, template: Template, length: Count, new: NewObject) by objects::derive;
    C_SeedRandom(session: Session, input: In, length: Count);
    C_GenerateRandom(session: Session, output: Out, output_length: OutSize);
    C_GetFunctionStatus(session: Session);
    C_CancelFunction(session: Session);
    C_WaitForSlotEvent(flags: Flags, slots: Slots, pointer: Pointer);
    C_LoginUser(session: Session, user: User, text: Text, length: Count, text_2: Text, length_2: Count);
    C_SessionCancel(session: Session, flags: Flags);
    C_MessageEncryptInit(session: Session, mechanism: Mechanism, key: Key);
    C_EncryptMessage(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, input_2: In, length_3: Count, output: Out, output_length: OutLength);
    C_EncryptMessageBegin(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count);
    C_EncryptMessageNext(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, output: Out, output_length: OutLength, flags: Flags);
    C_MessageEncryptFinal(session: Session);
    C_MessageDecryptInit(session: Session, mechanism: Mechanism, key: Key);
    C_DecryptMessage(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, input_2: In, length_3: Count, output: Out, output_length: OutLength);
    C_DecryptMessageBegin(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count);
    C_DecryptMessageNext(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, output: Out, output_length: OutLength, flags: Flags);
    C_MessageDecryptFinal(session: Session);
    C_MessageSignInit(session: Session, mechanism: Mechanism, key: Key);
    C_SignMessage(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, output: Out, output_length: OutLength);
    C_SignMessageBegin(session: Session, pointer: Pointer, length: Count);
    C_SignMessageNext(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, output: Out, output_length: OutLength);
    C_MessageSignFinal(session: Session);
    C_MessageVerifyInit(session: Session, mechanism: Mechanism, key: Key);
    C_VerifyMessage(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, input_2: In, length_3: Count);
    C_VerifyMessageBegin(session: Session, pointer: Pointer, length: Count);
    C_VerifyMessageNext(session: Session, pointer: Pointer, length: Count, input: In, length_2: Count, input_2: In, length_3: Count);
    C_MessageVerifyFinal(session: Session);
    C_EncapsulateKey(session: Session, mechanism: Mechanism, key: Key, template: Template, length: Count, output: Out, output_length: OutLength, new: NewObject);
    C_DecapsulateKey(session: Session, mechanism: Mechanism, key: Key, template: Template, length: Count, input: In, length_2: Count, new: NewObject);
    C_VerifySignatureInit(session: Session, mechanism: Mechanism, key: Key, input: In, length: Count);
    C_VerifySignature(session: Session, input: In, length: Count);
    C_VerifySignatureUpdate(session: Session, input: In, length: Count);
    C_VerifySignatureFinal(session: Session);
    C_GetSessionValidationFlags(session: Session, validation_flags: ValidationFlags, out_flags: OutFlags);
    C_AsyncComplete(session: Session, text: Text, async_data: AsyncData);
    C_AsyncGetID(session: Session, text: Text, count: OutCount);
    C_AsyncJoin(session: Session, text: Text, length: Count, input: In, length_2: Count);
    C_WrapKeyAuthenticated(session: Session, mechanism: Mechanism, key: Key, key_2: Key, input: In, length: Count, output: Out, output_length: OutLength);
    C_UnwrapKeyAuthenticated(session: Session, mechanism: Mechanism, key: Key, input: In, length: Count, template: Template, length_2: Count, input_2: In, length_3: Count, new: NewObject);
}
