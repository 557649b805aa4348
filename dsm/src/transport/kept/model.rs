//! Exhaustive check of connections that break and are made again: two members, a few frames each way, every interleaving of
//! sending (a socket takes half a frame, too), arriving, acknowledging, breaking, noticing it (each side in its own time),
//! calling, answering, giving an attempt up, and a crash.
//!
//! [`Kept`] is the production code; around it is what [`crate::transport::link`] and `node/resume.rs` do with it, without
//! threads. Frames are real, with their number where a resumption says its count. Always: every frame arrives once and
//! in order, and nobody says what the other one refuses.

use super::Kept;
use crate::addr::{Epoch, HomeRange, MemberId};
use crate::layout::Layout;
use crate::transport::frame::{Frame, HEADER_LEN, Header, Rules};
use stateright::{Checker, Model, Property};
use zerocopy::{FromBytes, IntoBytes};

/// Who listens, and who calls.
const SIDES: [usize; 2] = [0, 1];
const CALLER: usize = 1;
/// What a socket takes or a network delivers at once, in bytes.
const PIECE: usize = HEADER_LEN / 2;

/// One member's end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Side {
    /// Frames that have been made so far.
    pushed: u64,
    queue: Vec<u8>,
    queued: u64,
    buf: Vec<u8>,
    at: usize,
    frames: u64,
    /// Frames that it keeps: acknowledged, kept, and the kept bytes.
    kept: (u64, u64, Vec<(Vec<u8>, u64)>),
    acked: u64,
    /// Frames that have come.
    received: u64,
    /// Bytes of the next one.
    partial: Vec<u8>,
    /// The stream that it uses; `None` while it has none.
    stream: Option<u8>,
}

impl Side {
    fn new() -> Side {
        Side {
            pushed: 0,
            queue: Vec::new(),
            queued: 0,
            buf: Vec::new(),
            at: 0,
            frames: 0,
            kept: (0, 0, Vec::new()),
            acked: 0,
            received: 0,
            partial: Vec::new(),
            stream: Some(0),
        }
    }

    /// The production code's state, to work with.
    fn take(&self) -> Kept {
        let (acked, frames, buffers) = self.kept.clone();
        Kept { acked, frames, buffers: buffers.into(), spare: Vec::new() }
    }

    /// Buffers for reuse are no part of the state.
    fn put(&mut self, kept: Kept) {
        self.kept = (kept.acked, kept.frames, kept.buffers.into());
    }

    /// As `Link::push`.
    fn push(&mut self) {
        self.pushed += 1;
        let mut header = Header::resume(MemberId(1), Epoch(1), self.pushed);
        header.set_received(self.received);
        self.queue.extend_from_slice(header.as_bytes());
        self.queued += 1;
    }

    /// As `Link::drain`, up to one call of the socket, which takes `most` bytes. Returns them.
    fn drain(&mut self, most: usize) -> Result<Vec<u8>, String> {
        let mut kept = self.take();
        kept.acknowledge(self.acked, self.frames).map_err(|e| e.to_string())?;
        if self.at == self.buf.len() {
            if self.frames > 0 {
                kept.keep(std::mem::take(&mut self.buf), self.frames);
            }
            self.buf = std::mem::take(&mut self.queue);
            self.frames = std::mem::take(&mut self.queued);
            self.at = 0;
        }
        self.put(kept);
        let end = self.buf.len().min(self.at.saturating_add(most));
        let taken = self.buf[self.at..end].to_vec();
        self.at = end;
        Ok(taken)
    }

    fn has_to_send(&self) -> bool {
        self.at < self.buf.len() || !self.queue.is_empty()
    }

    /// As `Link::resume`.
    fn resume(&mut self, stream: u8, got: u64) -> Result<(), String> {
        let mut kept = self.take();
        let (buf, frames) = kept.again(&self.buf, self.frames, got).map_err(|e| e.to_string())?;
        self.put(kept);
        (self.buf, self.frames, self.at) = (buf, frames, 0);
        self.acked = got;
        self.stream = Some(stream);
        Ok(())
    }

    /// As the receive thread.
    fn read(&mut self, bytes: &[u8], rules: &Rules<'_>) -> Result<(), String> {
        self.partial.extend_from_slice(bytes);
        if self.partial.len() < HEADER_LEN {
            return Ok(());
        }
        let header = Header::read_from_bytes(&self.partial).map_err(|_| "no whole frame")?;
        self.partial.clear();
        match header.decode(rules, || ()).map_err(|e| e.to_string())? {
            Frame::Resume(number) if number == self.received + 1 => self.received = number,
            other => return Err(format!("frame {} is {other:?}", self.received + 1)),
        }
        // As `Link::acknowledged`: a frame that was sent again says what was true when it was made.
        self.acked = self.acked.max(u64::from(header.received()));
        Ok(())
    }
}

/// One connection: what is on its way to each side, and who has said how far it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Stream {
    is_cut: bool,
    to: [Vec<u8>; 2],
    words: [Option<u64>; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    sides: [Side; 2],
    streams: Vec<Stream>,
    /// The caller's attempt.
    calling: Option<u8>,
    cuts: u8,
    crashed: bool,
    resent: bool,
    wrong: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Push(usize),
    /// All that there is, or a piece.
    Send(usize, bool),
    Arrive(usize),
    Cut,
    Notice(usize),
    Call,
    Answer,
    Finish,
    GiveUp,
    Crash,
}

struct Breaking {
    frames: u64,
    cuts: u8,
    crash: bool,
}

impl Breaking {
    fn step(state: &mut State, action: Action) -> Result<(), String> {
        let rules = |layout| Rules {
            peer: MemberId(1),
            epoch: Epoch(1),
            layout,
            members: crate::protocol::MemberSet(0b11),
        };
        let State { sides, streams, calling, .. } = state;
        match action {
            Action::Push(side) => sides[side].push(),
            Action::Send(side, whole) => {
                let bytes = sides[side].drain(if whole { usize::MAX } else { PIECE })?;
                let stream = sides[side].stream.and_then(|s| streams.get_mut(usize::from(s)));
                // What is sent into a stream that is cut is gone.
                if let Some(stream) = stream.filter(|s| !s.is_cut) {
                    stream.to[1 - side].extend(bytes);
                }
            }
            Action::Arrive(side) => {
                let page = HomeRange { start: 0, len: 4096, home: MemberId(0) };
                let layout = Layout::new(&[page]).unwrap();
                let stream = sides[side].stream.and_then(|s| streams.get_mut(usize::from(s)));
                let piece: Vec<u8> = stream.map_or(Vec::new(), |s| s.to[side].drain(..PIECE).collect());
                sides[side].read(&piece, &rules(&layout))?;
            }
            Action::Cut => {
                state.cuts -= 1;
                let stream = streams.last_mut().ok_or("no stream")?;
                *stream = Stream { is_cut: true, ..Stream::default() };
            }
            Action::Notice(side) => {
                sides[side].stream = None;
                // A frame that came half way comes again.
                sides[side].partial.clear();
            }
            Action::Call => {
                let words = [None, Some(sides[CALLER].received)];
                *calling = Some(u8::try_from(streams.len()).unwrap());
                streams.push(Stream { words, ..Stream::default() });
            }
            Action::Answer => {
                let id = u8::try_from(streams.len() - 1).unwrap();
                let stream = streams.last_mut().ok_or("no stream")?;
                let got = stream.words[CALLER].ok_or("no word")?;
                stream.words[0] = Some(sides[0].received);
                state.resent |= sides[0].pushed > got;
                sides[0].resume(id, got)?;
            }
            Action::Finish => {
                let id = calling.take().ok_or("nobody calls")?;
                let got = streams[usize::from(id)].words[0].ok_or("no word")?;
                state.resent |= sides[CALLER].pushed > got;
                sides[CALLER].resume(id, got)?;
            }
            Action::GiveUp => {
                state.cuts -= 1;
                let id = calling.take().ok_or("nobody calls")?;
                streams[usize::from(id)] = Stream { is_cut: true, ..Stream::default() };
            }
            Action::Crash => {
                state.crashed = true;
                let stream = streams.last_mut().ok_or("no stream")?;
                *stream = Stream { is_cut: true, ..Stream::default() };
                *calling = None;
            }
        }
        Ok(())
    }
}

impl Model for Breaking {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            sides: [Side::new(), Side::new()],
            streams: vec![Stream::default()],
            calling: None,
            cuts: self.cuts,
            crashed: false,
            resent: false,
            wrong: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.wrong.is_some() {
            return;
        }
        // The caller is the one that crashes.
        for side in SIDES.into_iter().filter(|side| !state.crashed || *side != CALLER) {
            let own = &state.sides[side];
            if own.pushed < self.frames {
                actions.push(Action::Push(side));
            }
            let Some(stream) = own.stream else { continue };
            let stream = &state.streams[usize::from(stream)];
            if own.has_to_send() {
                actions.extend([true, false].map(|whole| Action::Send(side, whole)));
            }
            if !stream.to[side].is_empty() {
                actions.push(Action::Arrive(side));
            }
            if stream.is_cut {
                actions.push(Action::Notice(side));
            }
        }
        let newest = state.streams.last();
        if state.cuts > 0 && newest.is_some_and(|s| !s.is_cut) {
            actions.push(Action::Cut);
        }
        if self.crash && !state.crashed {
            actions.push(Action::Crash);
        }
        if state.sides[0].stream.is_none()
            && newest.is_some_and(|s| !s.is_cut && s.words[CALLER].is_some() && s.words[0].is_none())
        {
            actions.push(Action::Answer);
        }
        match state.calling.map(|id| &state.streams[usize::from(id)]) {
            None if state.sides[CALLER].stream.is_none() && !state.crashed => actions.push(Action::Call),
            Some(stream) if stream.is_cut => actions.push(Action::Call),
            Some(stream) => {
                if stream.words[0].is_some() {
                    actions.push(Action::Finish);
                }
                if state.cuts > 0 {
                    actions.push(Action::GiveUp);
                }
            }
            None => {}
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        if let Err(what) = Breaking::step(&mut state, action) {
            state.wrong = Some(format!("{action:?}: {what}"));
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("every frame once and in order, and nothing refused", |_, s: &State| {
                s.wrong.is_none()
            }),
            Property::always("all arrive", |m: &Breaking, s: &State| {
                let mut actions = Vec::new();
                m.actions(s, &mut actions);
                s.crashed || !actions.is_empty() || s.sides.iter().all(|side| side.received == m.frames)
            }),
            Property::sometimes(
                "all have arrived after a break in which frames were lost",
                |m: &Breaking, s: &State| s.resent && s.sides.iter().all(|side| side.received == m.frames),
            ),
            Property::sometimes("frames are forgotten because they have come", |_, s: &State| {
                s.sides.iter().any(|side| side.kept.0 > 0)
            }),
        ]
    }
}

fn check(model: Breaking) {
    let start = std::time::Instant::now();
    let (frames, cuts, crash) = (model.frames, model.cuts, model.crash);
    let checker = model.checker().threads(2).spawn_bfs().join();
    let (states, seconds) = (checker.unique_state_count(), start.elapsed().as_secs_f64());
    println!("{frames} frames, {cuts} breaks, crash {crash}: {states} states, {seconds:.1} s");
    checker.assert_properties();
}

#[test]
fn connections_that_break() {
    check(Breaking { frames: 2, cuts: 2, crash: false });
}

#[test]
fn connections_that_break_and_a_crash() {
    check(Breaking { frames: 2, cuts: 1, crash: true });
}

#[test]
#[ignore = "minutes"]
fn connections_that_break_often() {
    check(Breaking { frames: 3, cuts: 3, crash: true });
}
