//! The library exports the header's functions and nothing else, and needs libc and libgcc_s alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The shared library that cargo built beside this test.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("path of this test");
    let profile = test
        .parent()
        .and_then(Path::parent)
        .expect("target/PROFILE");
    profile.join("librsbucket.so")
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(library())
        .output()
        .expect(program);
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn exported_symbols_are_the_headers_functions() {
    let header = include_str!("../include/rsbucket.h");
    let prototypes = include_str!("contract_prototypes.h");
    let functions = |text: &str| -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '(');
        let calls = words.filter_map(|w| w.split_once('(').map(|(name, _)| name.to_string()));
        calls.filter(|name| name.starts_with("rsb_")).collect()
    };
    let listing = said("nm", &["-D", "--defined-only"]);
    let exported: BTreeSet<String> = listing
        .lines()
        .filter_map(|l| l.split_whitespace().nth(2).map(String::from))
        .collect();
    let contract = functions(prototypes);
    assert_eq!(exported, contract);
    assert!(contract.is_subset(&functions(header)));
    assert_eq!(contract.len(), 31);
}

#[test]
fn nothing_but_libc_and_libgcc_is_needed() {
    let dynamic = said("readelf", &["-d"]);
    for line in dynamic.lines().filter(|l| l.contains("(NEEDED)")) {
        let known = ["libc.so", "libgcc_s.so", "ld-linux"];
        assert!(known.iter().any(|name| line.contains(name)), "{line}");
    }
    assert!(
        dynamic.contains("NODELETE"),
        "the library must never be unmapped"
    );
    assert!(
        !said("readelf", &["-lW"]).contains("RWE"),
        "no executable stack"
    );
}

#[test]
fn versions_are_cargos() {
    // SAFETY: these functions take nothing and return static text.
    let (packed, text) = unsafe {
        let text = std::ffi::CStr::from_ptr(rsbucket::ffi::rsb_version_string());
        (rsbucket::ffi::rsb_version(), text.to_str().expect("UTF-8"))
    };
    let part = |text: &str| text.parse::<u32>().expect("a number");
    let version = part(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | part(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | part(env!("CARGO_PKG_VERSION_PATCH"));
    assert_eq!((packed, text), (version, env!("CARGO_PKG_VERSION")));
}
