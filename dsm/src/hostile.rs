//! What a peer could send that means harm: the bodies of the fuzz targets, and of a short run of them among the tests.
//!
//! No input may make this crate panic or allocate without bound, and none may give a page to, or take one from, somebody
//! with no right to it. `cargo +nightly fuzz run frame` and `core` in `dsm/fuzz` search for such an input.

use crate::addr::{Epoch, HomeRange, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::protocol::hold::HoldConfig;
use crate::protocol::pages::Share;
use crate::protocol::{Command, Core, CoreConfig, Event, MemberSet};
use crate::transport::frame::{Frame, HEADER_LEN, Header, MAX_FRAME, Rules};
use crate::transport::reader::FrameReader;
use std::sync::Arc;
use std::time::Duration;
use zerocopy::FromBytes;

const ME: MemberId = MemberId(0);
/// The only peer that speaks.
const HOSTILE: MemberId = MemberId(1);
const SILENT: MemberId = MemberId(2);
const EPOCH: Epoch = Epoch(3);
/// Pages with their home at each member.
const PAGES: u32 = 4;

fn layout() -> Option<Layout> {
    let len = u64::from(PAGES) * PAGE_SIZE;
    let home = |n: u16| HomeRange { start: u64::from(n) * len, len, home: MemberId(n) };
    Layout::new(&[home(0), home(1), home(2)]).ok()
}

/// Reads frames from a stream until it ends or one is refused. Returns how many were accepted.
pub fn frames(stream: &[u8]) -> usize {
    let Some(layout) = layout() else { return 0 };
    let rules = Rules { peer: HOSTILE, epoch: EPOCH, layout: &layout, members: MemberSet(0b111) };
    let mut reader = FrameReader::with_capacity(stream, 0);
    let mut accepted = 0;
    while let Ok((header, bytes)) = reader.next(|_| ()) {
        assert!(bytes.len() <= MAX_FRAME - HEADER_LEN, "a frame of {} bytes", bytes.len());
        if header.decode(&rules, || bytes.len()).is_err() {
            break;
        }
        accepted += 1;
    }
    accepted
}

/// A member's protocol, its own faults and hold times, and a peer that says what it likes: one byte that chooses, then what
/// it needs. Returns how many messages of the peer were accepted.
pub fn core(mut data: &[u8]) -> usize {
    let Some(layout) = layout().map(Arc::new) else { return 0 };
    let hold = HoldConfig { min: Duration::from_nanos(5000), max: Duration::from_nanos(5000), transfers: 0 };
    let mut core: Core<()> = Core::new(CoreConfig {
        me: ME,
        layout: layout.clone(),
        share: Share::WHOLE,
        hold,
        token_key: 0x1234_5678_9ABC_DEF1,
        first_touch: 2,
    });
    let rules = Rules { peer: HOSTILE, epoch: EPOCH, layout: &layout, members: MemberSet(0b111) };
    let (mut out, mut now, mut accepted) = (Vec::new(), 1 << 20, 0);
    while let Some((choice, rest)) = data.split_first() {
        data = rest;
        now += 1024;
        let page = Page(u32::from(choice >> 4) % (3 * PAGES));
        let events = match choice % 8 {
            0 => vec![Event::Fault { page, write: false }],
            1 => vec![Event::Fault { page, write: true }],
            2 => vec![Event::Timer { page }],
            3 => vec![Event::Evict { page }],
            _ => messages(&mut data, *choice, &rules),
        };
        for event in events {
            let is_hostile = matches!(event, Event::Message { .. });
            if let Err(violation) = core.handle(now, event, &mut out) {
                assert_eq!(violation.from, HOSTILE, "{violation}");
                return accepted;
            }
            accepted += usize::from(is_hostile);
            for command in out.drain(..) {
                check(&layout, &command);
            }
        }
    }
    accepted
}

/// What the next frame says. What makes a frame pass at all is put right, so that chance gets further.
fn messages(data: &mut &[u8], choice: u8, rules: &Rules<'_>) -> Vec<Event<()>> {
    let Some((bytes, rest)) = data.split_at_checked(HEADER_LEN) else { return Vec::new() };
    *data = rest;
    let Ok(mut header) = Header::read_from_bytes(bytes) else { return Vec::new() };
    if choice & 8 == 0 {
        header.make_plausible(HOSTILE, EPOCH, u64::from(3 * PAGES));
    }
    let event = |(page, msg)| Event::Message { from: HOSTILE, page, msg };
    match header.decode(rules, || ()) {
        Ok(Frame::Page(page, msg)) => vec![event((page, msg))],
        Ok(Frame::Run(run)) => {
            let len = header.payload_len().map_or(0, |len| len.min(data.len()));
            let (payload, rest) = data.split_at(len);
            *data = rest;
            run.messages(payload).map(event).collect()
        }
        _ => Vec::new(),
    }
}

/// The silent member has granted and asked for nothing: no page of its home can come, and none can be given away.
fn check(layout: &Layout, command: &Command<()>) {
    let home = |page: &Page| layout.home_of(*page);
    match command {
        Command::Give { page, .. } | Command::Drop { page } | Command::Install { page, .. } => {
            assert_ne!(home(page), Some(SILENT), "{command:?}");
        }
        Command::Zero { page, count, .. } => {
            assert!(home(page) == Some(ME) && *count <= PAGES, "{command:?}");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::test_runner::{RngAlgorithm, TestRng};
    use rand::RngCore;

    /// A short run of the fuzz targets, the same every time.
    #[test]
    fn harm_is_refused() {
        let mut rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let mut accepted = [0; 2];
        for round in 0..20_000u32 {
            let mut data = vec![0; 16 + round as usize % 400];
            rng.fill_bytes(&mut data);
            // Small numbers are more often what a field may hold.
            data.iter_mut().filter(|b| **b & 1 == 0).for_each(|b| *b &= 7);
            accepted[0] += core(&data);
            let mut stream = data.clone();
            for frame in stream.chunks_exact_mut(HEADER_LEN) {
                if let Ok((header, _)) = Header::mut_from_prefix(frame) {
                    header.make_plausible(HOSTILE, EPOCH, u64::from(3 * PAGES));
                }
            }
            accepted[1] += frames(&stream) + frames(&data);
        }
        println!("{accepted:?} accepted");
        assert!(accepted.iter().all(|n| *n > 1000), "hardly anything got through: {accepted:?}");
    }
}
