//! How two members make sure of each other before the first frame of a stream.
//!
//! ```text
//!   caller                                   listener
//!     | Hello: version, vm, epoch, from, to, channel, nonce |
//!     |-------------------------------------------->|  checks all of it
//!     | Reply: verdict, nonce, HMAC("listener", both)  |
//!     |<--------------------------------------------|
//!     | Proof: HMAC("caller", both)                 |
//!     |-------------------------------------------->|
//!     | Verdict                                     |
//!     |<--------------------------------------------|
//! ```
//!
//! Both prove that they know the secret without showing it; the nonces make every proof good once. Without a secret
//! the same messages pass with an empty key and prove nothing: for loopback only.

use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use thiserror::Error;
use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub(super) const MAGIC: [u8; 8] = *b"SPANVM\0M";
/// Version of the page protocol and of this handshake; both ends must have the same.
pub(super) const VERSION: u16 = 1;

/// The caller's first message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Hello {
    pub(super) magic: [u8; 8],
    pub(super) version: U16,
    pub(super) from: U16,
    pub(super) to: U16,
    pub(super) channel: U16,
    pub(super) epoch: U64,
    /// SHA-256 of the VM's name.
    pub(super) vm: [u8; 32],
    pub(super) nonce: [u8; 32],
}

/// The listener's answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Reply {
    pub(super) verdict: u8,
    pub(super) nonce: [u8; 32],
    pub(super) proof: [u8; 32],
}

/// Why a listener refuses a caller.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Refusal {
    /// Another version of the protocol.
    #[error("it runs another version of spanvm")]
    Version,
    /// Another VM.
    #[error("it belongs to another VM")]
    Vm,
    /// Another topology.
    #[error("it has another epoch of the topology")]
    Epoch,
    /// A caller that is not expected, or a channel that is.
    #[error("this member and channel are not expected there (two members with the same number?)")]
    Unexpected,
    /// The secrets differ.
    #[error("its secret is another one: give all members the same secret file")]
    Secret,
}

pub(super) const ACCEPTED: u8 = 0;

impl Refusal {
    pub(super) fn code(self) -> u8 {
        match self {
            Refusal::Version => 1,
            Refusal::Vm => 2,
            Refusal::Epoch => 3,
            Refusal::Unexpected => 4,
            Refusal::Secret => 5,
        }
    }

    pub(super) fn from_code(code: u8) -> Refusal {
        match code {
            2 => Refusal::Vm,
            3 => Refusal::Epoch,
            4 => Refusal::Unexpected,
            5 => Refusal::Secret,
            _ => Refusal::Version,
        }
    }
}

pub(super) fn vm_hash(vm: &str) -> [u8; 32] {
    Sha256::digest(vm.as_bytes()).into()
}

fn mac(secret: &[u8], role: &[u8], hello: &Hello, nonce: &[u8; 32]) -> Hmac<Sha256> {
    // HMAC takes keys of any length, so this never falls back.
    let mut mac = Hmac::<Sha256>::new_from_slice(secret)
        .unwrap_or_else(|_| <Hmac<Sha256> as hmac::digest::KeyInit>::new(&Default::default()));
    mac.update(role);
    mac.update(hello.as_bytes());
    mac.update(nonce);
    mac
}

/// What one end shows the other.
pub(super) fn proof(secret: &[u8], role: &[u8], hello: &Hello, nonce: &[u8; 32]) -> [u8; 32] {
    mac(secret, role, hello, nonce).finalize().into_bytes().into()
}

/// Checks the other end's proof in constant time.
pub(super) fn proves(secret: &[u8], role: &[u8], hello: &Hello, nonce: &[u8; 32], proof: &[u8; 32]) -> bool {
    mac(secret, role, hello, nonce).verify_slice(proof).is_ok()
}
