//! Replays the committed corpus through the targets, with a stable toolchain and without libFuzzer:
//! RUSTFLAGS="--cfg fuzzing" cargo test --no-default-features.

#![cfg(fuzzing)]

use std::fs;
use std::path::{Path, PathBuf};

/// Every input of a target, in the order of their names.
fn inputs(target: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let mut paths: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
}

/// One test: the targets share the process's environment and count its open files.
#[test]
fn every_target_accepts_its_corpus() {
    for (target, run) in rsbucket_fuzz::TARGETS {
        let inputs = inputs(target);
        assert!(!inputs.is_empty(), "no corpus for {target}");
        for path in &inputs {
            println!("{}", path.display());
            run(&fs::read(path).unwrap());
        }
    }
    rsbucket_fuzz::tidy();
}
