//! The protocol core with a hostile peer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    dsm::hostile::core(data);
});
