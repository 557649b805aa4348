//! The fabric's messages as bytes: one frame of fixed size and layout, little-endian; behind one kind of frame (`Image`)
//! come as many bytes as it says.
//!
//! ```text
//!  vCPU 0 (member 0)         member 1                     a read of a device elsewhere
//!     | Interrupt  ---------->|  IRR of vCPU 2              | Read  ---------->|
//!     |                       |                             |<---------- Done  |
//!     | Write, posted ------->|  device                   a clock sample
//!     | SetLevel, Eoi ------->|  IOAPIC (member 0)          | Ping  ---------->|
//!     | Image + bytes ------->|  vCPU moves here            |<---------- Pong  |
//!     |<-------------- Moved  |                             |
//!     | Heartbeat <---------->|                             |
//!     | Stop  --------------->|  the VM is over
//! ```
//!
//! Frames of one link arrive in order. Everything in a frame is checked before it is used: an unknown kind, a
//! wrong sender or epoch, or a field out of its range ends the link.

use crate::devices::Space;
use crate::interrupts::{DeliveryMode, Destination, InterruptMessage};
use crate::kvm::image::MAX_IMAGE;
use dsm::addr::{Epoch, MemberId};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a frame.
pub const FRAME_LEN: usize = size_of::<Frame>();

/// A frame as it is on the wire.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Frame {
    kind: u8,
    /// Bytes of an access, or a flag.
    small: u8,
    sender: U16,
    hops: U16,
    group: U16,
    epoch: U64,
    token: U64,
    addr: U64,
    data: U64,
    words: [U32; 2],
}

/// A frame that no member of our version sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not one of ours.
    #[error("message of unknown kind {0}")]
    Kind(u8),
    /// The link's peer claims to be another.
    #[error("message says that it is from member {0}")]
    Sender(u16),
    /// A topology that this member does not have.
    #[error("message of epoch {0}, which is not ours")]
    Epoch(u64),
    /// A field is out of its range.
    #[error("{0} out of range")]
    Field(&'static str),
}

/// Why a member ends the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// ACPI S5.
    PowerOff,
    /// ACPI reset.
    Reset,
    /// A vCPU shut down.
    TripleFault(u32),
    /// Somebody stopped it.
    Stopped,
    /// The member can't go on: it lost this member, or, without one, it knows why itself.
    Failed(Option<MemberId>),
}

/// Up to 64 vCPUs: `64 * base` and up, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuGroup {
    base: u16,
    mask: u64,
}

impl VcpuGroup {
    /// A group of one. APIC ids end at 32 bits, vCPUs long before 2^22.
    pub fn of(id: u32) -> VcpuGroup {
        VcpuGroup { base: u16::try_from(id / 64).unwrap_or(u16::MAX), mask: 1 << (id % 64) }
    }

    /// Can this vCPU be in the same message?
    pub fn fits(&self, id: u32) -> bool {
        u32::from(self.base) == id / 64
    }

    /// One more, which fits.
    pub fn add(&mut self, id: u32) {
        self.mask |= 1 << (id % 64);
    }

    /// The vCPUs, ascending.
    pub fn ids(self) -> impl Iterator<Item = u32> {
        (0..64).filter(move |bit| self.mask >> bit & 1 != 0).map(move |bit| u32::from(self.base) * 64 + bit)
    }
}

/// Everything that crosses members besides pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// An interrupt for vCPUs of the receiver. `hops` counts how often it was handed on.
    Interrupt {
        /// The interrupt.
        message: InterruptMessage,
        /// The vCPUs that it is for and that the sender takes to be at the receiver.
        group: VcpuGroup,
        /// Times handed on.
        hops: u16,
    },
    /// Read a device register.
    Read {
        /// Names the request in the answer.
        token: u64,
        /// Ports or memory.
        space: Space,
        /// Address.
        addr: u64,
        /// Bytes, 1, 2, 4 or 8.
        size: u8,
    },
    /// Write a device register; answered if `token` is given.
    Write {
        /// Names the request in the answer; none for a posted write.
        token: Option<u64>,
        /// Ports or memory.
        space: Space,
        /// Address.
        addr: u64,
        /// Bytes, 1 to 8.
        size: u8,
        /// What to write, little-endian.
        data: u64,
    },
    /// Answer to `Read` (with data) and to `Write`.
    Done {
        /// The request.
        token: u64,
        /// What was read.
        data: u64,
    },
    /// Sets an input of the IOAPIC.
    SetLevel {
        /// The input.
        gsi: u32,
        /// Asserted.
        high: bool,
    },
    /// A level-triggered vector was serviced.
    Eoi {
        /// The vector.
        vector: u8,
    },
    /// What is your clock?
    Ping {
        /// The asker's clock.
        sent: u64,
    },
    /// This is my clock.
    Pong {
        /// From the ping.
        sent: u64,
        /// Guest TSC when the ping came.
        received: u64,
        /// Guest TSC when this left.
        answered: u64,
    },
    /// A vCPU; so many bytes of its image follow this frame, at most [`MAX_IMAGE`].
    Image {
        /// Bytes.
        len: u32,
    },
    /// The vCPU of that move is set up here.
    Moved {
        /// Names the move at its origin.
        token: u64,
        /// The vCPU.
        vcpu: u32,
    },
    /// I live, and so many bytes have come to me on this link, this message's not counted.
    Heartbeat {
        /// Bytes.
        received: u64,
    },
    /// The VM is over.
    Stop(StopReason),
}

mod kind {
    pub const INTERRUPT: u8 = 1;
    pub const READ: u8 = 2;
    pub const WRITE: u8 = 3;
    pub const DONE: u8 = 4;
    pub const SET_LEVEL: u8 = 5;
    pub const EOI: u8 = 6;
    pub const PING: u8 = 7;
    pub const PONG: u8 = 8;
    pub const HEARTBEAT: u8 = 9;
    pub const STOP: u8 = 10;
    pub const IMAGE: u8 = 11;
    pub const MOVED: u8 = 12;
}

/// Token of a posted write.
const POSTED: u64 = u64::MAX;

const MODES: [DeliveryMode; 7] = [
    DeliveryMode::Fixed,
    DeliveryMode::LowestPriority,
    DeliveryMode::Smi,
    DeliveryMode::Nmi,
    DeliveryMode::Init,
    DeliveryMode::Startup,
    DeliveryMode::ExtInt,
];

impl Message {
    /// Can it change what the guest sees?
    pub fn is_for_the_guest(&self) -> bool {
        !matches!(
            self,
            Message::Ping { .. } | Message::Pong { .. } | Message::Heartbeat { .. } | Message::Stop(_)
        )
    }

    /// As bytes.
    pub fn encode(&self, sender: MemberId, epoch: Epoch) -> Frame {
        let mut frame = Frame { sender: sender.0.into(), epoch: epoch.0.into(), ..Frame::default() };
        match *self {
            Message::Interrupt { message, group, hops } => {
                let (destination, id) = match message.destination {
                    Destination::Physical(id) => (0, id),
                    Destination::Logical(mda) => (1, mda),
                    Destination::AllButSelf => (2, 0),
                    Destination::All => (3, 0),
                };
                let mode = MODES.iter().position(|m| *m == message.mode).unwrap_or(0);
                frame.kind = kind::INTERRUPT;
                frame.hops = hops.into();
                (frame.group, frame.token) = (group.base.into(), group.mask.into());
                frame.small = message.vector;
                frame.addr = u64::from(id).into();
                // 0: no source; else its id + 1.
                frame.data = message.source.map_or(0, |s| u64::from(s) + 1).into();
                frame.words = [
                    U32::from(destination | u32::try_from(mode).unwrap_or(0) << 8),
                    U32::from(u32::from(message.level_triggered) | u32::from(message.asserted) << 1),
                ];
            }
            Message::Read { token, space, addr, size } => {
                (frame.kind, frame.small) = (kind::READ, size);
                (frame.token, frame.addr) = (token.into(), addr.into());
                frame.words[0] = space_code(space).into();
            }
            Message::Write { token, space, addr, size, data } => {
                (frame.kind, frame.small) = (kind::WRITE, size);
                (frame.token, frame.addr, frame.data) =
                    (token.unwrap_or(POSTED).into(), addr.into(), data.into());
                frame.words[0] = space_code(space).into();
            }
            Message::Done { token, data } => {
                frame.kind = kind::DONE;
                (frame.token, frame.data) = (token.into(), data.into());
            }
            Message::SetLevel { gsi, high } => {
                (frame.kind, frame.small) = (kind::SET_LEVEL, u8::from(high));
                frame.words[0] = gsi.into();
            }
            Message::Eoi { vector } => (frame.kind, frame.small) = (kind::EOI, vector),
            Message::Ping { sent } => (frame.kind, frame.token) = (kind::PING, sent.into()),
            Message::Pong { sent, received, answered } => {
                frame.kind = kind::PONG;
                (frame.token, frame.addr, frame.data) = (sent.into(), received.into(), answered.into());
            }
            Message::Image { len } => (frame.kind, frame.words[0]) = (kind::IMAGE, len.into()),
            Message::Moved { token, vcpu } => {
                (frame.kind, frame.token, frame.words[0]) = (kind::MOVED, token.into(), vcpu.into());
            }
            Message::Heartbeat { received } => (frame.kind, frame.token) = (kind::HEARTBEAT, received.into()),
            Message::Stop(reason) => {
                let (code, vcpu) = match reason {
                    StopReason::PowerOff => (0, 0),
                    StopReason::Reset => (1, 0),
                    StopReason::TripleFault(vcpu) => (2, vcpu),
                    StopReason::Stopped => (3, 0),
                    StopReason::Failed(lost) => (4, lost.map_or(0, |m| u32::from(m.0) + 1)),
                };
                (frame.kind, frame.small, frame.words[0]) = (kind::STOP, code, vcpu.into());
            }
        }
        frame
    }

    /// From bytes, checked against the link they came over.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(frame: &Frame, from: MemberId, epoch: Epoch) -> Result<Message, WireError> {
        if frame.sender.get() != from.0 {
            return Err(WireError::Sender(frame.sender.get()));
        }
        if frame.epoch.get() != epoch.0 {
            return Err(WireError::Epoch(frame.epoch.get()));
        }
        let (token, addr, data) = (frame.token.get(), frame.addr.get(), frame.data.get());
        let word = frame.words[0].get();
        Ok(match frame.kind {
            kind::INTERRUPT => {
                let group = VcpuGroup { base: frame.group.get(), mask: token };
                Message::Interrupt { message: decode_interrupt(frame)?, group, hops: frame.hops.get() }
            }
            kind::READ => {
                let (space, size) = (decode_space(word)?, decode_size(frame.small)?);
                Message::Read { token, space, addr, size }
            }
            kind::WRITE => {
                let (space, size) = (decode_space(word)?, decode_size(frame.small)?);
                Message::Write { token: (token != POSTED).then_some(token), space, addr, size, data }
            }
            kind::DONE => Message::Done { token, data },
            kind::SET_LEVEL => Message::SetLevel { gsi: word, high: flag(frame.small)? },
            kind::EOI => Message::Eoi { vector: frame.small },
            kind::PING => Message::Ping { sent: token },
            kind::PONG => Message::Pong { sent: token, received: addr, answered: data },
            kind::IMAGE => match usize::try_from(word) {
                Ok(len) if len <= MAX_IMAGE => Message::Image { len: word },
                _ => return Err(WireError::Field("length of a vCPU image")),
            },
            kind::MOVED => Message::Moved { token, vcpu: word },
            kind::HEARTBEAT => Message::Heartbeat { received: token },
            kind::STOP => Message::Stop(match frame.small {
                0 => StopReason::PowerOff,
                1 => StopReason::Reset,
                2 => StopReason::TripleFault(word),
                3 => StopReason::Stopped,
                4 => StopReason::Failed(match word.checked_sub(1) {
                    None => None,
                    Some(id) => {
                        Some(MemberId(u16::try_from(id).map_err(|_| WireError::Field("lost member"))?))
                    }
                }),
                _ => return Err(WireError::Field("reason")),
            }),
            other => return Err(WireError::Kind(other)),
        })
    }
}

fn space_code(space: Space) -> u32 {
    match space {
        Space::Pio => 0,
        Space::Mmio => 1,
    }
}

fn decode_space(code: u32) -> Result<Space, WireError> {
    match code {
        0 => Ok(Space::Pio),
        1 => Ok(Space::Mmio),
        _ => Err(WireError::Field("address space")),
    }
}

fn decode_size(size: u8) -> Result<u8, WireError> {
    if (1..=8).contains(&size) { Ok(size) } else { Err(WireError::Field("size of access")) }
}

fn flag(value: u8) -> Result<bool, WireError> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(WireError::Field("flag")),
    }
}

fn decode_interrupt(frame: &Frame) -> Result<InterruptMessage, WireError> {
    let id = u32::try_from(frame.addr.get()).map_err(|_| WireError::Field("destination"))?;
    let [destination, mode, high @ ..] = frame.words[0].get().to_le_bytes();
    if high != [0, 0] {
        return Err(WireError::Field("destination mode"));
    }
    let flags = frame.words[1].get();
    let source = match frame.data.get() {
        0 => None,
        n => Some(u32::try_from(n - 1).map_err(|_| WireError::Field("source"))?),
    };
    let mode = *MODES.get(usize::from(mode)).ok_or(WireError::Field("delivery mode"))?;
    if flags > 3 {
        return Err(WireError::Field("trigger mode"));
    }
    Ok(InterruptMessage {
        destination: match destination {
            0 => Destination::Physical(id),
            1 => Destination::Logical(id),
            2 => Destination::AllButSelf,
            3 => Destination::All,
            _ => return Err(WireError::Field("destination mode")),
        },
        mode,
        vector: frame.small,
        level_triggered: flags & 1 != 0,
        asserted: flags & 2 != 0,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ME: MemberId = MemberId(3);
    const EPOCH: Epoch = Epoch(7);

    fn space() -> impl Strategy<Value = Space> {
        prop_oneof![Just(Space::Pio), Just(Space::Mmio)]
    }

    fn interrupt() -> impl Strategy<Value = InterruptMessage> {
        let destination = prop_oneof![
            any::<u32>().prop_map(Destination::Physical),
            any::<u32>().prop_map(Destination::Logical),
            Just(Destination::AllButSelf),
            Just(Destination::All),
        ];
        (destination, 0usize..7, any::<u8>(), any::<bool>(), any::<bool>(), any::<Option<u32>>()).prop_map(
            |(destination, mode, vector, level_triggered, asserted, source)| InterruptMessage {
                destination,
                mode: MODES[mode],
                vector,
                level_triggered,
                asserted,
                source,
            },
        )
    }

    fn message() -> impl Strategy<Value = Message> {
        prop_oneof![
            (interrupt(), any::<(u16, u64)>(), any::<u16>()).prop_map(|(message, (base, mask), hops)| {
                Message::Interrupt { message, group: VcpuGroup { base, mask }, hops }
            }),
            (0u32..=256 << 10).prop_map(|len| Message::Image { len }),
            any::<(u64, u32)>().prop_map(|(token, vcpu)| Message::Moved { token, vcpu }),
            (any::<u64>(), space(), any::<u64>(), 1u8..=8)
                .prop_map(|(token, space, addr, size)| Message::Read { token, space, addr, size }),
            (proptest::option::of(0..u64::MAX), space(), any::<u64>(), 1u8..=8, any::<u64>()).prop_map(
                |(token, space, addr, size, data)| Message::Write { token, space, addr, size, data }
            ),
            (any::<u64>(), any::<u64>()).prop_map(|(token, data)| Message::Done { token, data }),
            (any::<u32>(), any::<bool>()).prop_map(|(gsi, high)| Message::SetLevel { gsi, high }),
            any::<u8>().prop_map(|vector| Message::Eoi { vector }),
            any::<u64>().prop_map(|sent| Message::Ping { sent }),
            (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(sent, received, answered)| Message::Pong {
                sent,
                received,
                answered
            }),
            any::<u64>().prop_map(|received| Message::Heartbeat { received }),
            any::<u32>().prop_map(|v| Message::Stop(StopReason::TripleFault(v))),
            any::<Option<u16>>().prop_map(|m| Message::Stop(StopReason::Failed(m.map(MemberId)))),
        ]
    }

    #[test]
    fn strangers_and_old_epochs_are_refused() {
        let frame = Message::Heartbeat { received: 9 }.encode(ME, EPOCH);
        assert_eq!(Message::decode(&frame, MemberId(1), EPOCH), Err(WireError::Sender(3)));
        assert_eq!(Message::decode(&frame, ME, Epoch(8)), Err(WireError::Epoch(7)));
        assert_eq!(Message::decode(&Frame { kind: 99, ..frame }, ME, EPOCH), Err(WireError::Kind(99)));
        assert_eq!(FRAME_LEN, 48);
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_comes(message in message()) {
            prop_assert_eq!(Message::decode(&message.encode(ME, EPOCH), ME, EPOCH), Ok(message));
        }

        /// Any bytes: no panic, and what is accepted is within its limits.
        #[test]
        fn any_bytes_are_survived(bytes: [u8; FRAME_LEN]) {
            let mut frame = Frame::read_from_bytes(&bytes).unwrap();
            frame.sender = ME.0.into();
            frame.epoch = EPOCH.0.into();
            frame.kind %= 14;
            let decoded = Message::decode(&frame, ME, EPOCH);
            if let Ok(Message::Read { size, .. } | Message::Write { size, .. }) = decoded {
                prop_assert!((1..=8).contains(&size));
            }
        }
    }
}
