//! Link settings of the shared library.
//!
//! The library is never unmapped (`-z nodelete`): its threads' storage and callers' callbacks may
//! outlive a dlclose. A SONAME is set only on request, since a plain `cargo build` makes no links for
//! it and programs linked against target/ would not start.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=RSBUCKET_SONAME");
    if env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
        if env::var("RSBUCKET_SONAME").is_ok_and(|v| v == "1") {
            println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,librsbucket.so.0");
        }
    }
}
