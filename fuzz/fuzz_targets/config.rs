//! libFuzzer's way into the target: see `src/config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rsbucket_fuzz::config::run(data));
