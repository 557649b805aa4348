//! The threads of a member. None of them outlives [`Shell::shutdown`] by more than it takes to notice.

use super::failure::Cause;
use super::resume;
use super::shard::Env;
use super::shell::Shell;
use crate::addr::MemberId;
use crate::protocol::{MemberSet, Msg};
use crate::transport::frame::{Frame, Header, Rules};
use crate::transport::link::Link;
use crate::transport::reader::{FrameReader, ReadError};
use crate::transport::run::Run;
use rustix::event::{PollFd, PollFlags};
use std::io::Read;

/// Messages whose answers are written together at most.
const BURST: u32 = 16;

/// Frames after which the peer is told that they have come, at the latest.
const SAY: u32 = 128;

/// What one thread does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task {
    /// Reads the faults of one userfaultfd.
    Faults(usize),
    /// Reads the frames of one peer.
    Receive(MemberId),
    /// Waits for what nobody else waits for.
    Keep,
}

/// One task per thread that a member needs.
pub(super) fn tasks(shell: &Shell) -> Vec<Task> {
    let faults = (0..shell.region().shards()).map(Task::Faults);
    let receive = shell.links().map(|l| Task::Receive(l.peer()));
    faults.chain(receive).chain([Task::Keep]).collect()
}

impl Task {
    pub(super) fn name(self) -> String {
        match self {
            Task::Faults(shard) => format!("dsm-fault-{shard}"),
            Task::Receive(peer) => format!("dsm-recv-{}", peer.0),
            Task::Keep => "dsm-keeper".into(),
        }
    }

    pub(super) fn run(self, shell: &Shell) {
        crate::priority::raise();
        match self {
            Task::Faults(shard) => faults(shell, shard),
            Task::Receive(peer) => {
                if let Some(link) = shell.link(peer) {
                    receive(shell, &link);
                }
            }
            Task::Keep => super::keeper::run(shell),
        }
    }
}

fn faults(shell: &Shell, shard: usize) {
    let Some(fd) = shell.region().shard_fd(shard) else { return };
    let mut waiting = Vec::with_capacity(16);
    while shell.is_running() {
        let mut fds =
            [PollFd::new(&fd, PollFlags::IN), PollFd::new(shell.keeper().stopped_fd(), PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return shell.fail(None, Cause::Local(format!("can't wait for page faults: {e}"))),
        }
        if let Err(e) = shell.region().faults(shard, &mut waiting) {
            return shell.fail(None, Cause::Local(format!("can't read page faults: {e}")));
        }
        for fault in waiting.drain(..) {
            shell.fault(fault);
        }
    }
}

pub(super) fn receive(shell: &Shell, link: &Link) {
    let peer = link.peer();
    while let Err(cause) = frames(shell, link)
        && shell.is_running()
    {
        let is_broken = matches!(cause, Cause::Disconnected(_)) && resume::is_enabled(shell, link);
        let result =
            if is_broken { resume::resume(shell, link, &rules(shell, peer), cause) } else { Err(cause) };
        if let Err(cause) = result
            && shell.is_running()
            && !link.has_left()
        {
            shell.fail(Some(peer), cause);
            break;
        }
    }
    // A stream that is closed with unread bytes in it is reset, and the peer might lose our farewell.
    if shell.is_leaving() {
        let mut rest = [0; 4096];
        while matches!((&*link.stream()).read(&mut rest), Ok(n) if n > 0) {}
    }
    link.set_ended();
}

/// What the peer may say now: members and homes change.
fn rules(shell: &Shell, peer: MemberId) -> Rules<'_> {
    Rules { peer, epoch: shell.epoch(), layout: shell.layout(), members: shell.members() }
}

/// Reads frames until the member stops or the peer has left in order.
fn frames(shell: &Shell, link: &Link) -> Result<(), Cause> {
    let peer = link.peer();
    let stream = link.stream();
    let mut reader = FrameReader::new(link.ear().attend(&stream, shell.config().busy_poll));
    let mut unsaid = 0;
    let mut talk = MemberSet::EMPTY;
    let mut answered = 0;
    // Of the last frame, or of the last bytes that came.
    let mut now = shell.now();
    while shell.is_running() {
        // Requests come in bursts (pages that are used together), and so do the answers: one write for all that are at
        // hand costs less than one for each. But not for too many: the peer has work to do with the first of them.
        if !talk.is_empty() && (!reader.has_next() || answered >= BURST) {
            answered = 0;
            shell.flush(std::mem::take(&mut talk), now);
            reader.source().expect_more();
        }
        let mut is_fresh = false;
        if !reader.has_next() {
            shell.region().tidy();
        }
        let next = reader.next(|n| {
            now = shell.now();
            is_fresh = true;
            link.note_read(now, n);
        });
        let (header, bytes) = match next {
            Ok(next) => next,
            Err(ReadError::Closed) if link.has_left() => return Ok(()),
            Err(ReadError::Frame(e)) => return Err(Cause::Violation(e.to_string())),
            Err(e) => return Err(Cause::Disconnected(e.to_string())),
        };
        if !is_fresh {
            now = shell.now();
        }
        link.note_message();
        link.acknowledged(header.received());
        // A run is as much to keep for the peer as the messages in it would be.
        unsaid += header.messages();
        if link.keeps() && unsaid >= SAY {
            // Who only receives would let the peer keep everything.
            unsaid = 0;
            link.push(&Header::ping(shell.config().me, shell.epoch()));
            talk = talk.with(peer);
        }
        match header.decode(&rules(shell, peer), || ()).map_err(|e| Cause::Violation(e.to_string()))? {
            Frame::Page(_, Msg::Put { .. } | Msg::Awaited { .. })
            | Frame::Run(Run { msg: Msg::Put { .. }, .. })
                if !shell.members().has(peer) => {}
            Frame::Page(..) | Frame::Run(_) if !shell.members().has(peer) => {
                return Err(Cause::Violation("it speaks of pages and is no member".into()));
            }
            Frame::Page(page, msg) => {
                answered += 1;
                talk = MemberSet(talk.0 | shell.message(now, peer, page, msg, bytes).0);
            }
            Frame::Run(run) => {
                answered += run.count;
                talk = MemberSet(talk.0 | shell.run(now, peer, &run, bytes).0);
            }
            Frame::Ping => {}
            Frame::Resume(_) => {
                return Err(Cause::Violation("it resumes a stream that did not break".into()));
            }
            Frame::Beat { clock, shift } => shell.beat(peer, clock, shift),
            Frame::Bye => {
                link.set_left();
                link.answer_farewell();
            }
        }
    }
    Ok(())
}
