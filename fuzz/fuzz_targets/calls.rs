//! libFuzzer's way into the target: see `src/calls`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| rsbucket_fuzz::calls::run(data));
