//! Which library this is. The numbers come from Cargo.toml; the header's macros are checked against
//! them when this file compiles.
//!
//! # Version
//!
//! The macros say which header a program was compiled with, the functions which library it runs
//! with. Functions of this section may be called from any thread, at any time; they never block and
//! cannot fail.

use std::ffi::{c_char, CStr};

/// Major version of this header.
pub const RSB_VERSION_MAJOR: u32 = 0;
/// Minor version: new functions, fields and numbers.
pub const RSB_VERSION_MINOR: u32 = 1;
/// Patch version: corrections only.
pub const RSB_VERSION_PATCH: u32 = 0;
/// The ABI of this header, and the SONAME's suffix: librsbucket.so.0.
pub const RSB_ABI_VERSION: u32 = 0u32;

/// The number that `text`, decimal digits, stands for.
const fn number(text: &str) -> u32 {
    let (digits, mut value, mut i) = (text.as_bytes(), 0, 0);
    while i < digits.len() {
        value = value * 10 + (digits[i] - b'0') as u32;
        i += 1;
    }
    value
}

const _: () = assert!(
    RSB_VERSION_MAJOR == number(env!("CARGO_PKG_VERSION_MAJOR"))
        && RSB_VERSION_MINOR == number(env!("CARGO_PKG_VERSION_MINOR"))
        && RSB_VERSION_PATCH == number(env!("CARGO_PKG_VERSION_PATCH")),
    "the RSB_VERSION_ macros differ from Cargo.toml"
);

/// The version of the loaded library, as major << 16 | minor << 8 | patch.
#[no_mangle]
pub unsafe extern "C" fn rsb_version() -> u32 {
    RSB_VERSION_MAJOR << 16 | RSB_VERSION_MINOR << 8 | RSB_VERSION_PATCH
}

/// The ABI of the loaded library. A program may use it only if this is the RSB_ABI_VERSION that the
/// program was compiled with.
#[no_mangle]
pub unsafe extern "C" fn rsb_abi_version() -> u32 {
    RSB_ABI_VERSION
}

/// The version of the loaded library as text, such as "0.1.0". Static: never freed, never NULL.
#[no_mangle]
pub unsafe extern "C" fn rsb_version_string() -> *const c_char {
    const TEXT: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(text) => text,
            Err(_) => panic!("the version holds a NUL"),
        };
    TEXT.as_ptr()
}

// ## Features

/// rsb_comm_create_shm works.
pub const RSB_FEATURE_SHM: u64 = 1u64 << 0;
/// Device memory works.
pub const RSB_FEATURE_CUDA: u64 = 1u64 << 1;
/// rsb_comm_wrap_nccl works.
pub const RSB_FEATURE_NCCL: u64 = 1u64 << 2;

/// What works here: RSB_FEATURE_ bits. A bit is set where the part is built into the loaded library
/// and usable on this machine.
#[no_mangle]
pub unsafe extern "C" fn rsb_features() -> u64 {
    let shm = cfg!(all(
        target_os = "linux",
        any(target_arch = "x86_64", target_arch = "aarch64")
    ));
    super::imp::features() | if shm { RSB_FEATURE_SHM } else { 0 }
}
