//! A vCPU that is out of the guest, whole: what moves to another member. On the wire it is two parts, so that the first,
//! which takes long to encode, is done before the cut, and the second, which others change until the cut, at the cut.

use super::vm::KvmError;
use crate::control::codec::{self, CodecError};
use crate::interrupts::lapic::LocalApic;
use dsm::addr::MemberId;
use migration::vcpu::VcpuState;
use serde::{Deserialize, Serialize};

/// Longest image on the wire, bytes. One is about 4 to 8 KiB.
pub const MAX_IMAGE: usize = 256 << 10;

/// Which move this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// The vCPU.
    pub vcpu: u32,
    /// Placement epoch from which it lives at the receiver.
    pub epoch: u64,
    /// The member that it leaves, which waits for the confirmation.
    pub origin: MemberId,
    /// Names the move there.
    pub token: u64,
    /// The target could not take it, and why: it comes back.
    pub returned: Option<String>,
}

/// What only the vCPU's own thread knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Body {
    /// KVM's part.
    pub state: VcpuState,
    /// In HLT.
    pub halted: bool,
    /// Waits for a start-up IPI.
    pub waits_for_startup: bool,
    /// An NMI that has not been handed to KVM.
    pub nmi: bool,
    /// The guest's TSC at this moment; no later one of this vCPU may be below it.
    pub tsc: u64,
    /// The members' common clock when it last was in the guest.
    pub left: u64,
    /// The pages on which it waited last, by address, and whether it wrote: its working set, as far as that shows it.
    pub pages: Vec<(u64, bool)>,
}

/// What others put there for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inbox {
    /// Its local APIC.
    pub apic: LocalApic,
    /// NMI, INIT and start-up IPI that it has not seen, as bits of the mailbox.
    pub mail: u32,
    /// Vector of the start-up IPI.
    pub startup: u32,
}

/// A whole vCPU.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuImage {
    /// Which move.
    pub ticket: Ticket,
    /// Registers and flags.
    pub body: Body,
    /// Interrupts.
    pub inbox: Inbox,
}

/// Why a vCPU could not leave or come.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Its state can't be read or set.
    #[error(transparent)]
    State(#[from] migration::vcpu::StateError),
    /// Its clock can't be set.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// This member refuses it.
    #[error("{0}")]
    Refused(String),
    /// It can't be written, or what came is none.
    #[error("vCPU image: {0}")]
    Codec(#[from] CodecError),
}

/// First part on the wire.
pub(crate) fn encode_body(ticket: &Ticket, body: &Body) -> Result<Vec<u8>, CodecError> {
    codec::encode(&(ticket, body), MAX_IMAGE / 2)
}

/// Second part on the wire.
pub(crate) fn encode_inbox(inbox: &Inbox) -> Result<Vec<u8>, CodecError> {
    codec::encode(inbox, MAX_IMAGE / 2)
}

/// The two parts, one after the other.
///
/// # Errors
/// What is wrong with them.
pub fn decode(bytes: &[u8]) -> Result<VcpuImage, CodecError> {
    let (first, rest) = split(bytes)?;
    let (second, rest) = split(rest)?;
    if !rest.is_empty() {
        return Err(CodecError::Malformed("a vCPU image with something behind it".into()));
    }
    let (ticket, body) = codec::decode(first)?;
    Ok(VcpuImage { ticket, body, inbox: codec::decode(second)? })
}

fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), CodecError> {
    let short = || CodecError::Malformed("a vCPU image that is cut off".into());
    let (len, rest) = bytes.split_first_chunk::<4>().ok_or_else(short)?;
    let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|_| short())?;
    rest.split_at_checked(len).ok_or_else(short)
}
