//! The versions of the interface.

use std::ptr;

use cryptoki_sys::{CK_FUNCTION_LIST_3_0, CK_INTERFACE, CK_VERSION, CKR_ARGUMENTS_BAD, CKR_OK};

use crate::{
    cases,
    module::{Module, Rv, outcome},
};

fn newest(module: &Module, version: Option<CK_VERSION>) -> Result<CK_INTERFACE, Rv> {
    let mut interface: *mut CK_INTERFACE = ptr::null_mut();
    let mut version = version;
    let wanted = version.as_mut().map_or(ptr::null_mut(), ptr::from_mut);
    // SAFETY: every pointer is null or to a local variable.
    let code = unsafe {
        module
            .library
            .C_GetInterface(ptr::null_mut(), wanted, &raw mut interface, 0)
    };
    if code != CKR_OK {
        return Err(Rv(code));
    }
    // SAFETY: the module returned an interface that lives as long as it does.
    Ok(unsafe { *interface })
}

fn version(interface: CK_INTERFACE) -> String {
    // SAFETY: each table begins with its version.
    let version = unsafe { *interface.pFunctionList.cast::<CK_VERSION>() };
    format!("{}.{}", version.major, version.minor)
}

fn count(module: &Module) -> usize {
    let mut count = 0;
    // SAFETY: asks for the number of interfaces, then has room for as many.
    unsafe {
        assert_eq!(
            module
                .library
                .C_GetInterfaceList(ptr::null_mut(), &raw mut count),
            CKR_OK
        );
        let mut list = vec![
            CK_INTERFACE {
                pInterfaceName: ptr::null_mut(),
                pFunctionList: ptr::null_mut(),
                flags: 0
            };
            4
        ];
        assert_eq!(
            module
                .library
                .C_GetInterfaceList(list.as_mut_ptr(), &raw mut count),
            CKR_OK
        );
    }
    count.try_into().unwrap()
}

cases! {
    shows_version_3 covers ["interface"]:
    "3.0 of 2, login: CKR_SESSION_HANDLE_INVALID, 2.40: 2.40", not "2.40 of 1, login: none, 2.40: 2.40",
    with r#"
        interface = "3.0"
        [[rule]]
        function = "C_LoginUser"
        do = { return = "CKR_SESSION_HANDLE_INVALID" }
    "#, |module| {
        module.initialize().unwrap();
        let interface = newest(module, None).unwrap();
        let shown = version(interface);
        let login = if shown == "3.0" {
            // SAFETY: the table is of the version that it says, and the pointers are null.
            let code = unsafe {
                let list = *interface.pFunctionList.cast::<CK_FUNCTION_LIST_3_0>();
                (list.C_LoginUser.unwrap())(1, 1, ptr::null_mut(), 0, ptr::null_mut(), 0)
            };
            Rv(code).to_string()
        } else {
            "none".to_owned()
        };
        let old = newest(module, Some(CK_VERSION { major: 2, minor: 40 })).map(version);
        let unknown = newest(module, Some(CK_VERSION { major: 9, minor: 0 }));
        assert_eq!(outcome(unknown), Rv(CKR_ARGUMENTS_BAD).to_string());
        format!("{shown} of {}, login: {login}, 2.40: {}", count(module), old.unwrap())
    };
}
