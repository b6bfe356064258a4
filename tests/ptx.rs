//! The GPU kernels' text agrees with their source, and keeps to what it promises. `make ptx-check`
//! goes further: it makes the text anew and assembles it for every architecture.

use std::fs;

const KERNELS: [&str; 10] = [
    "rsb_pack",
    "rsb_pack_few",
    "rsb_reduce_f32",
    "rsb_reduce_f64",
    "rsb_reduce_f16",
    "rsb_reduce_bf16",
    "rsb_reduce_i32",
    "rsb_reduce_i64",
    "rsb_reduce_u8",
    "rsb_reduce_i8",
];

fn read(name: &str) -> String {
    let path = format!("{}/src/cuda/{name}", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn text_was_made_from_these_sources() {
    let sources = read("kernels.cu") + &read("numbers.cuh");
    // FNV-1a, as tools/make_ptx computes it.
    let hash = sources.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    });
    let text = read("kernels.ptx");
    let head = text.lines().nth(1).unwrap_or_default();
    assert!(
        head.starts_with(&format!("// sources {hash:016x},")),
        "src/cuda has changed ({hash:016x}), kernels.ptx has not: run tools/make_ptx\n{head}"
    );
}

#[test]
fn text_has_every_kernel_and_no_other() {
    let text = read("kernels.ptx");
    let mut entries: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix(".visible .entry "))
        .map(|l| l.trim_end_matches('('))
        .collect();
    let mut expected = KERNELS;
    entries.sort_unstable();
    expected.sort_unstable();
    assert_eq!(entries, expected);
}

#[test]
fn every_driver_from_11_2_on_takes_the_text() {
    let text = read("kernels.ptx");
    assert!(text.contains("\n.version 6.4\n.target sm_70\n.address_size 64\n"));
    assert!(text.is_ascii());
    // Larger parameters need a newer driver.
    for line in text
        .lines()
        .filter(|l| l.contains(".param") && l.contains(".b8"))
    {
        let bytes = line.split(['[', ']']).nth(1).and_then(|n| n.parse().ok());
        assert!(bytes.is_some_and(|n: u32| n <= 4096), "{line}");
    }
}

#[test]
fn arithmetic_is_rounded_step_by_step() {
    for line in read("kernels.ptx").lines() {
        let op = line
            .split_whitespace()
            .find(|w| !w.starts_with('@'))
            .unwrap_or("");
        assert!(
            !op.starts_with("fma") && !op.starts_with("mad.rn"),
            "fused: {line}"
        );
        assert!(
            !op.contains(".ftz") && !op.contains(".approx"),
            "inexact: {line}"
        );
        let float = op.ends_with(".f32") || op.ends_with(".f64");
        let arithmetic = ["add.", "sub.", "mul.", "div."]
            .iter()
            .any(|a| op.starts_with(a));
        assert!(
            !(float && arithmetic) || op.contains(".rn."),
            "ptxas may fuse it: {line}"
        );
        assert!(
            !op.starts_with(".local"),
            "memory for spilled values: {line}"
        );
    }
}
