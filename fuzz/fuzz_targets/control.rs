//! libFuzzer's way into the target: see `src/control.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rsbucket_fuzz::control::run(data));
