#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    keybroker_fuzz_targets::recipient_key(input);
});
