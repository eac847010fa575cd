//! Marks the module as one that stays loaded: the thread of the control socket runs in it, and an application may unload
//! a module while that thread is running.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
