//! What members say to each other about one page, and the sets and rights that go with it.

use crate::addr::MemberId;

/// A set of members, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MemberSet(pub u64);

impl MemberSet {
    /// The set with nobody in it.
    pub const EMPTY: MemberSet = MemberSet(0);

    fn bit(member: MemberId) -> u64 {
        1u64.checked_shl(u32::from(member.0)).unwrap_or(0)
    }

    /// The set with one member.
    pub fn only(member: MemberId) -> MemberSet {
        MemberSet(Self::bit(member))
    }

    /// Whether `member` is in the set.
    pub fn has(self, member: MemberId) -> bool {
        self.0 & Self::bit(member) != 0
    }

    /// The set and `member`.
    pub fn with(self, member: MemberId) -> MemberSet {
        MemberSet(self.0 | Self::bit(member))
    }

    /// The set but `member`.
    pub fn without(self, member: MemberId) -> MemberSet {
        MemberSet(self.0 & !Self::bit(member))
    }

    /// Its one member, if it has one only.
    pub fn sole(self) -> Option<MemberId> {
        if self.0.is_power_of_two() { self.iter().next() } else { None }
    }

    /// Whether nobody is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The members, ascending.
    pub fn iter(self) -> impl Iterator<Item = MemberId> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let next = u16::try_from(left.trailing_zeros()).ok().filter(|_| left != 0)?;
            left &= left - 1;
            Some(MemberId(next))
        })
    }
}

/// What a member may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Right {
    /// Read; others may read too.
    Shared,
    /// Read and write; nobody else has the page.
    Modified,
}

/// The number by which a requester knows the answers to its request. Chosen by the requester, told by the home to
/// exactly those members that must answer: who does not know it has no right to answer. Its highest bit says that the
/// request is patient: its sender has had its part of the present [slot](super::slots).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

impl Token {
    const PATIENT: u64 = 1 << 63;

    /// The same token of a request that is patient, or is not.
    pub(super) fn patient(self, is_patient: bool) -> Token {
        Token(self.0 & !Token::PATIENT | if is_patient { Token::PATIENT } else { 0 })
    }

    /// Whether the request is patient.
    pub fn is_patient(self) -> bool {
        self.0 & Token::PATIENT != 0
    }
}

/// The bytes that come with a grant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Contents<D> {
    /// The page is all zero; nothing moves.
    Zero,
    /// The page.
    Bytes(D),
    /// The copy that the requester already has is the newest.
    Keep,
}

/// What a grant says beside the contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// The request that is answered.
    pub token: Token,
    /// What the requester may do with the page once everybody in `acks` has answered too.
    pub right: Right,
    /// The sharers whose [`Msg::InvAck`] the requester must wait for.
    pub acks: MemberSet,
    /// Whether the home waits for the requester's [`Msg::Done`].
    pub done: bool,
}

/// A message about one page.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Msg<D> {
    /// Requester to home: let me read (or write) this page.
    Get {
        /// Whether the requester wants to write.
        write: bool,
        /// The requester's number for this request.
        token: Token,
        /// No thread waits for the page yet: the home may [decline](Msg::Decline).
        hint: bool,
    },
    /// Home to requester: not now; nothing has changed.
    Decline {
        /// The requester's number.
        token: Token,
    },
    /// Home to the member that answers: grant the page to `requester` on these terms.
    Forward {
        /// Who asked.
        requester: MemberId,
        /// The terms of the grant; [`Right::Modified`] means to drop the own copy first.
        terms: Terms,
        /// Whether the requester needs the contents (else it holds them already).
        data: bool,
    },
    /// Home to a sharer: drop the page and tell `requester`.
    Invalidate {
        /// Who waits for the acknowledgement.
        requester: MemberId,
        /// The requester's number.
        token: Token,
    },
    /// Home or owner to requester: the page.
    Grant {
        /// The terms.
        terms: Terms,
        /// The bytes.
        contents: Contents<D>,
    },
    /// Sharer to requester: I dropped my copy.
    InvAck {
        /// The requester's number.
        token: Token,
    },
    /// Holder to home: I would like to be rid of the page. A hint: if something else is under way, nothing happens.
    Put {
        /// The holder's number for this.
        token: Token,
    },
    /// Home to a sharer that is not the only one: drop your copy and say [`Msg::Done`].
    Release {
        /// The holder's number.
        token: Token,
    },
    /// Home to a member that must answer for a page: behind the one for whom it is, this one waits. A hint: whoever holds the
    /// page against the one in front lets go of it when this one goes first.
    Awaited {
        /// Who waits.
        requester: MemberId,
        /// Its request is [patient](Token).
        patient: bool,
    },
    /// Requester to home: I have it (or have dropped it); go on with the next request.
    Done {
        /// The requester's number.
        token: Token,
    },
}

impl<D> Msg<D> {
    /// The message with something else for the bytes of its page.
    pub(crate) fn map<E>(self, bytes: impl FnOnce(D) -> E) -> Msg<E> {
        match self {
            Msg::Get { write, token, hint } => Msg::Get { write, token, hint },
            Msg::Forward { requester, terms, data } => Msg::Forward { requester, terms, data },
            Msg::Invalidate { requester, token } => Msg::Invalidate { requester, token },
            Msg::Grant { terms, contents } => {
                let contents = match contents {
                    Contents::Zero => Contents::Zero,
                    Contents::Bytes(d) => Contents::Bytes(bytes(d)),
                    Contents::Keep => Contents::Keep,
                };
                Msg::Grant { terms, contents }
            }
            Msg::InvAck { token } => Msg::InvAck { token },
            Msg::Put { token } => Msg::Put { token },
            Msg::Release { token } => Msg::Release { token },
            Msg::Awaited { requester, patient } => Msg::Awaited { requester, patient },
            Msg::Done { token } => Msg::Done { token },
            Msg::Decline { token } => Msg::Decline { token },
        }
    }

    /// The message without the bytes of its page.
    pub(crate) fn without_bytes(&self) -> Msg<()> {
        let contents = match self {
            Msg::Grant { contents: Contents::Bytes(_), .. } => Contents::Bytes(()),
            Msg::Grant { contents: Contents::Keep, .. } => Contents::Keep,
            _ => Contents::Zero,
        };
        match self {
            Msg::Get { write, token, hint } => Msg::Get { write: *write, token: *token, hint: *hint },
            Msg::Forward { requester, terms, data } => {
                Msg::Forward { requester: *requester, terms: *terms, data: *data }
            }
            Msg::Invalidate { requester, token } => Msg::Invalidate { requester: *requester, token: *token },
            Msg::Grant { terms, .. } => Msg::Grant { terms: *terms, contents },
            Msg::InvAck { token } => Msg::InvAck { token: *token },
            Msg::Put { token } => Msg::Put { token: *token },
            Msg::Release { token } => Msg::Release { token: *token },
            Msg::Awaited { requester, patient } => Msg::Awaited { requester: *requester, patient: *patient },
            Msg::Done { token } => Msg::Done { token: *token },
            Msg::Decline { token } => Msg::Decline { token: *token },
        }
    }

    /// The number of the request that it is about; 0 if that is not said.
    pub(crate) fn token(&self) -> Token {
        match self {
            Msg::Forward { terms, .. } | Msg::Grant { terms, .. } => terms.token,
            Msg::Get { token, .. }
            | Msg::Decline { token }
            | Msg::Invalidate { token, .. }
            | Msg::InvAck { token }
            | Msg::Put { token }
            | Msg::Release { token }
            | Msg::Done { token } => *token,
            Msg::Awaited { .. } => Token(0),
        }
    }

    /// The same about another request.
    pub(crate) fn with_token(mut self, new: Token) -> Msg<D> {
        match &mut self {
            Msg::Forward { terms, .. } | Msg::Grant { terms, .. } => terms.token = new,
            Msg::Get { token, .. }
            | Msg::Decline { token }
            | Msg::Invalidate { token, .. }
            | Msg::InvAck { token }
            | Msg::Put { token }
            | Msg::Release { token }
            | Msg::Done { token } => *token = new,
            Msg::Awaited { .. } => {}
        }
        self
    }
}

/// Why a fault was served as it was; for counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// A read of a page that is not here.
    Read,
    /// A write to a page that is not here.
    Write,
    /// A write to a page that is here to be read.
    Upgrade,
}

/// A fault that has been served: what its histogram needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Served {
    /// What was asked.
    pub want: Want,
    /// Whether any other member was involved.
    pub remote: bool,
    /// The member that had the page, or gave up its copy; this one if nobody else was involved.
    pub from: MemberId,
    /// When the request began, in the time of the events.
    pub since: u64,
    /// Asked for ahead: no thread had touched the page by the time it came.
    pub ahead: bool,
}
