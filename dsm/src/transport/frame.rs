//! The page protocol on the wire. Every frame is a [`Header`] of 48 bytes, then a page's 4096 bytes, a [run](super::run), or
//! nothing.

use super::run::{self, MAX_RUN, Run, TOKEN_LEN};
use crate::addr::{Epoch, MAX_MEMBERS, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::protocol::pages::BLOCK;
use crate::protocol::{Contents, MemberSet, Msg, Right, Terms, Token};
use crate::seeded::{SeededFault, is_on};
use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First two bytes of every frame.
const MAGIC: u16 = 0x7053;
/// Length of a [`Header`] in bytes.
pub const HEADER_LEN: usize = size_of::<Header>();
/// Length of a page in bytes, as a `usize`.
pub const PAGE_LEN: usize = 4096;
/// Length of the longest frame in bytes.
pub const MAX_FRAME: usize = HEADER_LEN + MAX_RUN as usize * (PAGE_LEN + TOKEN_LEN);
const _: () = assert!(HEADER_LEN == 48 && PAGE_LEN as u64 == PAGE_SIZE);

const GET: u8 = 1;
const FORWARD: u8 = 2;
const INVALIDATE: u8 = 3;
const GRANT: u8 = 4;
const INV_ACK: u8 = 5;
const DONE: u8 = 6;
const PING: u8 = 7;
const BYE: u8 = 8;
const PUT: u8 = 9;
const RELEASE: u8 = 10;
const BEAT: u8 = 11;
const DECLINE: u8 = 12;
const RESUME: u8 = 13;
const AWAITED: u8 = 14;

/// The right asked for or granted is to write.
const WRITE: u8 = 1;
/// The home waits for `Done`.
const WAITS: u8 = 2;
/// Forward: the requester needs the contents. Grant: a page follows.
const DATA: u8 = 4;
/// Grant: the page is all zero.
const ZERO: u8 = 8;
/// Get: nobody waits for the page yet.
const HINT: u8 = 16;
/// As many messages as the token field says, see [`super::run`].
const RUN: u8 = 32;
/// Awaited: the request that waits is patient.
const PATIENT: u8 = 64;

/// The fixed part of a frame, little-endian.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    magic: U16,
    kind: u8,
    flags: u8,
    from: U16,
    requester: U16,
    epoch: U64,
    gpa: U64,
    token: U64,
    acks: U64,
    len: U32,
    /// Frames that the sender has received on this stream and those before it, the low 32 bits.
    received: U32,
}

/// A frame that no honest member sends.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not the start of a frame.
    #[error("a frame starts with {0:#06x}")]
    Magic(u16),
    /// Not a message of this version.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// Flags that the kind does not have, or that contradict each other.
    #[error("frame kind {kind} has flags {flags:#04x}")]
    Flags {
        /// Kind of the frame.
        kind: u8,
        /// Its flags.
        flags: u8,
    },
    /// The frame says it comes from somebody else.
    #[error("a frame says it comes from {0}")]
    Sender(MemberId),
    /// The frame belongs to another topology.
    #[error("a frame of epoch {got}, ours is {ours}")]
    Epoch {
        /// Its epoch.
        got: u64,
        /// Our epoch.
        ours: u64,
    },
    /// The address has no page, or is not the first of one.
    #[error("a frame about {0:#x}, where there is no page")]
    Gpa(u64),
    /// A member that the memory does not have.
    #[error("a frame about members that do not exist")]
    Members,
    /// Not a run of pages that anybody may speak of at once.
    #[error("a frame about {count} pages from {gpa:#x} on")]
    Run {
        /// Address of the first.
        gpa: u64,
        /// How many.
        count: u64,
    },
    /// The length does not fit the kind.
    #[error("frame kind {kind} with {len} bytes behind it")]
    Length {
        /// Kind of the frame.
        kind: u8,
        /// Its length field.
        len: u32,
    },
}

/// What a frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame<D> {
    /// A message of the page protocol.
    Page(Page, Msg<D>),
    /// As many messages of the page protocol as there are pages.
    Run(Run),
    /// The sender is alive.
    Ping,
    /// The sender's time, and how long [slots](crate::protocol::slots) are.
    Beat {
        /// Nanoseconds of the sender's clock.
        clock: u64,
        /// Length of a slot, as a power of two of nanoseconds.
        shift: u8,
    },
    /// The sender has received so many frames on earlier streams.
    Resume(u64),
    /// The sender leaves in good order.
    Bye,
}

/// Who may say what on one stream.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The member at the other end.
    pub peer: MemberId,
    /// The topology's number.
    pub epoch: Epoch,
    /// The memory.
    pub layout: &'a Layout,
    /// All members.
    pub members: MemberSet,
}

impl Header {
    fn new(me: MemberId, epoch: Epoch, kind: u8) -> Header {
        Header {
            magic: U16::new(MAGIC),
            kind,
            flags: 0,
            from: U16::new(me.0),
            requester: U16::new(0),
            epoch: U64::new(epoch.0),
            gpa: U64::new(0),
            token: U64::new(0),
            acks: U64::new(0),
            len: U32::new(0),
            received: U32::new(0),
        }
    }

    /// A sign of life.
    pub fn ping(me: MemberId, epoch: Epoch) -> Header {
        Header::new(me, epoch, PING)
    }

    /// The time of the slots.
    pub fn beat(me: MemberId, epoch: Epoch, clock: u64, shift: u8) -> Header {
        let mut header = Header::new(me, epoch, BEAT);
        header.token = U64::new(clock);
        header.acks = U64::new(u64::from(shift));
        header
    }

    /// The first frame on a new stream between members that had one before: how many frames have come.
    pub fn resume(me: MemberId, epoch: Epoch, received: u64) -> Header {
        let mut header = Header::new(me, epoch, RESUME);
        header.token = U64::new(received);
        header
    }

    /// Says how many frames have come; part of every frame.
    pub(super) fn set_received(&mut self, received: u64) {
        self.received = U32::new(u32::try_from(received & u64::from(u32::MAX)).unwrap_or(0));
    }

    /// How many frames have come at its sender, the low 32 bits.
    pub fn received(&self) -> u32 {
        self.received.get()
    }

    /// A farewell.
    pub fn bye(me: MemberId, epoch: Epoch) -> Header {
        Header::new(me, epoch, BYE)
    }

    fn terms(mut self, terms: Terms) -> Header {
        self.token = U64::new(terms.token.0);
        self.acks = U64::new(terms.acks.0);
        self.flags |= if terms.right == Right::Modified { WRITE } else { 0 };
        self.flags |= if terms.done { WAITS } else { 0 };
        self
    }

    /// A message about the page at `gpa`. If it carries a page, the caller appends the bytes.
    pub fn message<D>(me: MemberId, epoch: Epoch, gpa: u64, msg: &Msg<D>) -> Header {
        let mut header = match msg {
            Msg::Get { .. } => Header::new(me, epoch, GET),
            Msg::Forward { terms, .. } => Header::new(me, epoch, FORWARD).terms(*terms),
            Msg::Invalidate { .. } => Header::new(me, epoch, INVALIDATE),
            Msg::Grant { terms, .. } => Header::new(me, epoch, GRANT).terms(*terms),
            Msg::InvAck { .. } => Header::new(me, epoch, INV_ACK),
            Msg::Put { .. } => Header::new(me, epoch, PUT),
            Msg::Release { .. } => Header::new(me, epoch, RELEASE),
            Msg::Awaited { .. } => Header::new(me, epoch, AWAITED),
            Msg::Done { .. } => Header::new(me, epoch, DONE),
            Msg::Decline { .. } => Header::new(me, epoch, DECLINE),
        };
        header.gpa = U64::new(gpa);
        match msg {
            Msg::Get { write, token, hint } => {
                header.flags |= if *write { WRITE } else { 0 };
                header.flags |= if *hint { HINT } else { 0 };
                header.token = U64::new(token.0);
            }
            Msg::Forward { requester, data, .. } => {
                header.flags |= if *data { DATA } else { 0 };
                header.requester = U16::new(requester.0);
            }
            Msg::Invalidate { requester, token } => {
                header.requester = U16::new(requester.0);
                header.token = U64::new(token.0);
            }
            Msg::Grant { contents, .. } => match contents {
                Contents::Zero => header.flags |= ZERO,
                Contents::Bytes(_) => {
                    header.flags |= DATA;
                    header.len = U32::new(4096);
                }
                Contents::Keep => {}
            },
            Msg::Awaited { requester, patient } => {
                header.requester = U16::new(requester.0);
                header.flags |= if *patient { PATIENT } else { 0 };
            }
            Msg::InvAck { token }
            | Msg::Put { token }
            | Msg::Release { token }
            | Msg::Done { token }
            | Msg::Decline { token } => header.token = U64::new(token.0),
        }
        header
    }

    /// `count` messages like `msg`, about the pages from `gpa` on. The caller appends the pages, if there are any, and the
    /// tokens of all.
    pub(crate) fn run(me: MemberId, epoch: Epoch, gpa: u64, msg: &Msg<()>, count: u32) -> Header {
        let mut header = Header::message(me, epoch, gpa, msg);
        let len = run::payload_len(u64::from(count), header.flags & DATA != 0 && header.kind == GRANT);
        header.flags |= RUN;
        header.token = U64::new(u64::from(count));
        header.len = U32::new(len.and_then(|len| u32::try_from(len).ok()).unwrap_or(u32::MAX));
        header
    }

    /// Makes a header that means harm pass the first checks, for [`crate::hostile`].
    pub(crate) fn make_plausible(&mut self, from: MemberId, epoch: Epoch, pages: u64) {
        self.magic = U16::new(MAGIC);
        self.kind = self.kind % AWAITED + 1;
        self.flags &= match self.kind {
            GET => WRITE | HINT | RUN,
            FORWARD => WRITE | WAITS | DATA | RUN,
            GRANT => WRITE | WAITS | ZERO | RUN,
            DECLINE | DONE | PUT => RUN,
            AWAITED => PATIENT,
            _ => 0,
        };
        self.from = U16::new(from.0);
        self.epoch = U64::new(epoch.0);
        self.gpa = U64::new(self.gpa.get() % pages * PAGE_SIZE);
        self.requester = U16::new(self.requester.get() % 4);
        self.acks = U64::new(self.acks.get() % 16);
        self.len = U32::new(0);
        if self.flags & RUN != 0 {
            let count = self.token.get() % 6;
            self.token = U64::new(count);
            self.acks = U64::new(0);
            self.len = U32::new(u32::try_from(count * 8).unwrap_or(0));
        }
    }

    /// How many messages the frame carries.
    pub fn messages(&self) -> u32 {
        if self.flags & RUN != 0 {
            u32::try_from(self.token.get()).unwrap_or(MAX_RUN).min(MAX_RUN)
        } else {
            1
        }
    }

    /// Bytes that follow the header. Never more than make a frame of [`MAX_FRAME`]; that is an error whatever the frame is.
    pub fn payload_len(&self) -> Result<usize, FrameError> {
        if self.magic.get() != MAGIC {
            return Err(FrameError::Magic(self.magic.get()));
        }
        if self.flags & RUN != 0 {
            let (gpa, count) = (self.gpa.get(), self.token.get());
            let has_pages = self.kind == GRANT && self.flags & DATA != 0;
            let len = run::payload_len(count, has_pages).ok_or(FrameError::Run { gpa, count })?;
            return match u32::try_from(len) {
                Ok(said) if said == self.len.get() => Ok(len),
                _ => Err(FrameError::Length { kind: self.kind, len: self.len.get() }),
            };
        }
        match self.len.get() {
            0 => Ok(0),
            4096 if self.kind == GRANT => Ok(PAGE_LEN),
            len => Err(FrameError::Length { kind: self.kind, len }),
        }
    }

    /// Checks everything that can be checked without the protocol's state. `bytes` makes the contents from the
    /// payload and is called only for a grant that has one.
    pub fn decode<D>(&self, rules: &Rules<'_>, bytes: impl FnOnce() -> D) -> Result<Frame<D>, FrameError> {
        let kind = self.kind;
        let flags = self.flags;
        let payload = self.payload_len()?;
        if self.from.get() != rules.peer.0 {
            return Err(FrameError::Sender(MemberId(self.from.get())));
        }
        // Signs of life say nothing about pages, and while homes change the members are not all as far.
        let is_a_sign = matches!(kind, PING | BEAT | RESUME | BYE);
        // A wish to be rid of a page, or word of who waits behind a request that has been answered since, that was on its way
        // when the homes changed.
        let is_old_wish = matches!(kind, PUT | AWAITED) && self.epoch.get() < rules.epoch.0;
        if self.epoch.get() != rules.epoch.0 && !is_a_sign && !is_old_wish && !is_on(SeededFault::StaleEpoch)
        {
            return Err(FrameError::Epoch { got: self.epoch.get(), ours: rules.epoch.0 });
        }
        let allowed = match kind {
            GET => WRITE | HINT | RUN,
            FORWARD => WRITE | WAITS | DATA | RUN,
            GRANT => WRITE | WAITS | DATA | ZERO | RUN,
            DONE | DECLINE | PUT => RUN,
            AWAITED => PATIENT,
            INVALIDATE | INV_ACK | RELEASE | PING | BYE | BEAT | RESUME => 0,
            _ => return Err(FrameError::Kind(kind)),
        };
        let contradictory = flags & DATA != 0 && flags & ZERO != 0;
        if flags & !allowed != 0 || contradictory {
            return Err(FrameError::Flags { kind, flags });
        }
        let is_run = flags & RUN != 0;
        if !is_run && (payload != 0) != (kind == GRANT && flags & DATA != 0) {
            return Err(FrameError::Length { kind, len: self.len.get() });
        }
        match kind {
            PING => return Ok(Frame::Ping),
            PUT | AWAITED if is_old_wish => return Ok(Frame::Ping),
            RESUME => return Ok(Frame::Resume(self.token.get())),
            BYE => return Ok(Frame::Bye),
            BEAT => {
                let shift = u8::try_from(self.acks.get()).map_err(|_| FrameError::Kind(kind))?;
                return Ok(Frame::Beat { clock: self.token.get(), shift });
            }
            _ => {}
        }
        let gpa = self.gpa.get();
        let page = match rules.layout.page_at(gpa) {
            Some(page) if gpa % PAGE_SIZE == 0 => page,
            _ => return Err(FrameError::Gpa(gpa)),
        };
        let requester = MemberId(self.requester.get());
        let acks = MemberSet(self.acks.get());
        let names = matches!(kind, FORWARD | INVALIDATE | AWAITED);
        let known = usize::from(requester.0) < MAX_MEMBERS && rules.members.has(requester);
        if (names && !known) || acks.0 & !rules.members.0 != 0 {
            return Err(FrameError::Members);
        }
        let token = Token(self.token.get());
        let right = if flags & WRITE != 0 { Right::Modified } else { Right::Shared };
        let terms = Terms { token, right, acks, done: flags & WAITS != 0 };
        let msg = match kind {
            GET => Msg::Get { write: flags & WRITE != 0, token, hint: flags & HINT != 0 },
            FORWARD => Msg::Forward { requester, terms, data: flags & DATA != 0 },
            INVALIDATE => Msg::Invalidate { requester, token },
            GRANT => {
                let contents = match flags & (DATA | ZERO) {
                    DATA => Contents::Bytes(bytes()),
                    ZERO => Contents::Zero,
                    _ => Contents::Keep,
                };
                Msg::Grant { terms, contents }
            }
            DECLINE => Msg::Decline { token },
            INV_ACK => Msg::InvAck { token },
            PUT => Msg::Put { token },
            RELEASE => Msg::Release { token },
            AWAITED => Msg::Awaited { requester, patient: flags & PATIENT != 0 },
            _ => Msg::Done { token },
        };
        if !is_run {
            return Ok(Frame::Page(page, msg));
        }
        let count = self.token.get();
        match u32::try_from(count) {
            Ok(count) if acks.is_empty() && is_one_run(rules.layout, page, count) => {
                Ok(Frame::Run(Run { page, count, msg: msg.without_bytes() }))
            }
            _ => Err(FrameError::Run { gpa, count }),
        }
    }
}

/// Whether the pages lie behind each other and in one block.
fn is_one_run(layout: &Layout, page: Page, count: u32) -> bool {
    let room = BLOCK - page.0 % BLOCK;
    count <= room && layout.is_run(page, count)
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
