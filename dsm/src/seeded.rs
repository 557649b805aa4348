//! Bugs put in on purpose, to see that the tests would find them.
//!
//! Each names one mistake that somebody could make in this crate. The code asks [`is_on`] at the place of the mistake.
//! Without the cargo feature `seeded-faults` the answer is the constant `false`: the mistakes are not in the binary and
//! nothing can switch them on.

use std::fmt;

/// One mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SeededFault {
    /// The home forgets to tell one sharer that its copy is void.
    LostInvalidation,
    /// A sharer acknowledges an invalidation and keeps its copy.
    KeptCopy,
    /// An upgrade neither invalidates nor waits for one of the other sharers.
    UpgradeSkipsSharer,
    /// The requester writes before the sharers have acknowledged.
    WriteBeforeAcks,
    /// The home begins a page's next transaction before the last one has ended.
    EarlyNext,
    /// A read-only page is filled first and write-protected then.
    CopyThenProtect,
    /// A page is read first and write-protected then when it is given up.
    ReadBeforeProtect,
    /// The acknowledgement is sent before the copy is dropped.
    AckBeforeDrop,
    /// After EEXIST nobody is woken.
    ForgottenWake,
    /// A copy that stopped half way is taken for complete.
    HalfCopy,
    /// A page whose first bytes are zero is granted as a zero page.
    ZeroGrant,
    /// A frame overtakes those that were queued before it.
    BrokenFifo,
    /// A frame of another epoch is accepted.
    StaleEpoch,
    /// Anybody may end a transaction.
    DoneByAnyone,
    /// A hold time never runs out.
    EndlessHold,
    /// An evicted copy is dropped without a word to its home.
    SilentEviction,
    /// A new home is not told who has a page.
    LostEntry,
    /// A page is given up at once, however short it was here.
    NoHold,
    /// Of a run of pages that are given up only the first is write-protected.
    ShortProtect,
}

use SeededFault::{
    AckBeforeDrop, BrokenFifo, CopyThenProtect, DoneByAnyone, EarlyNext, EndlessHold, ForgottenWake,
    HalfCopy, KeptCopy, LostEntry, LostInvalidation, NoHold, ReadBeforeProtect, ShortProtect, SilentEviction,
    StaleEpoch, UpgradeSkipsSharer, WriteBeforeAcks, ZeroGrant,
};

impl SeededFault {
    /// All of them.
    pub const ALL: [SeededFault; 19] = [
        LostInvalidation,
        KeptCopy,
        UpgradeSkipsSharer,
        WriteBeforeAcks,
        EarlyNext,
        CopyThenProtect,
        ReadBeforeProtect,
        AckBeforeDrop,
        ForgottenWake,
        HalfCopy,
        ZeroGrant,
        BrokenFifo,
        StaleEpoch,
        DoneByAnyone,
        EndlessHold,
        NoHold,
        SilentEviction,
        LostEntry,
        ShortProtect,
    ];

    /// Its name on command lines and in tables.
    pub fn name(self) -> &'static str {
        match self {
            LostInvalidation => "lost-invalidation",
            KeptCopy => "kept-copy",
            UpgradeSkipsSharer => "upgrade-skips-sharer",
            WriteBeforeAcks => "write-before-acks",
            EarlyNext => "early-next",
            CopyThenProtect => "copy-then-protect",
            ReadBeforeProtect => "read-before-protect",
            AckBeforeDrop => "ack-before-drop",
            ForgottenWake => "forgotten-wake",
            HalfCopy => "half-copy",
            ZeroGrant => "zero-grant",
            BrokenFifo => "broken-fifo",
            StaleEpoch => "stale-epoch",
            DoneByAnyone => "done-by-anyone",
            EndlessHold => "endless-hold",
            NoHold => "no-hold",
            ShortProtect => "short-protect",
            SilentEviction => "silent-eviction",
            LostEntry => "lost-entry",
        }
    }

    /// What is wrong, in a few words.
    pub fn what(self) -> &'static str {
        match self {
            LostInvalidation => "the home forgets to invalidate one sharer",
            KeptCopy => "a sharer acknowledges an invalidation and keeps its copy",
            UpgradeSkipsSharer => "an upgrade neither invalidates nor waits for one sharer",
            WriteBeforeAcks => "the requester writes before the sharers have acknowledged",
            EarlyNext => "the home does not wait for the end of a transaction",
            CopyThenProtect => "a read-only page is filled, then write-protected",
            ReadBeforeProtect => "a page that is given up is read, then write-protected",
            AckBeforeDrop => "the acknowledgement leaves before the copy is dropped",
            ForgottenWake => "after EEXIST nobody is woken",
            HalfCopy => "a copy that stopped half way is taken for complete",
            ZeroGrant => "a page whose first bytes are zero is granted as zero",
            BrokenFifo => "a frame overtakes those queued before it",
            StaleEpoch => "a frame of another epoch is accepted",
            DoneByAnyone => "anybody may end a transaction",
            EndlessHold => "a hold time never runs out",
            SilentEviction => "an evicted copy is dropped without a word to its home",
            LostEntry => "a new home is not told who has a page",
            NoHold => "the hold time is not honoured",
            ShortProtect => "of a run of pages that are given up only the first is write-protected",
        }
    }

    /// The fault of that name.
    pub fn named(name: &str) -> Option<SeededFault> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }
}

impl fmt::Display for SeededFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(feature = "seeded-faults")]
mod switch {
    use super::SeededFault;
    use std::cell::Cell;

    thread_local! {
        static ON: Cell<Option<SeededFault>> = const { Cell::new(None) };
    }

    pub(crate) fn is_on(fault: SeededFault) -> bool {
        ON.get() == Some(fault)
    }

    /// Switches a fault on (or all off) for what this thread does.
    pub fn switch_on(fault: Option<SeededFault>) {
        ON.set(fault);
    }
}

#[cfg(feature = "seeded-faults")]
pub(crate) use switch::is_on;
#[cfg(feature = "seeded-faults")]
pub use switch::switch_on;

/// Whether the mistake is to be made: never.
#[cfg(not(feature = "seeded-faults"))]
#[inline(always)]
pub(crate) const fn is_on(_: SeededFault) -> bool {
    false
}

#[cfg(all(test, feature = "seeded-faults"))]
mod tests;
