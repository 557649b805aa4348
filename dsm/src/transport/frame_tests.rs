use super::*;
use crate::addr::HomeRange;

type Case = (Box<dyn Fn(&mut Header)>, FrameError);
const ME: MemberId = MemberId(1);

fn layout() -> Layout {
    Layout::new(&[HomeRange { start: 0, len: 0x4000, home: MemberId(0) }]).unwrap()
}

fn messages() -> Vec<Msg<u8>> {
    let token = Token(0x1234_5678_9abc);
    let terms = Terms { token, right: Right::Modified, acks: MemberSet(0b100), done: true };
    let read = Terms { token, right: Right::Shared, acks: MemberSet::EMPTY, done: false };
    vec![
        Msg::Get { write: true, token, hint: false },
        Msg::Get { write: false, token, hint: true },
        Msg::Decline { token },
        Msg::Forward { requester: MemberId(2), terms, data: true },
        Msg::Forward { requester: MemberId(2), terms, data: false },
        Msg::Invalidate { requester: MemberId(2), token },
        Msg::Grant { terms, contents: Contents::Bytes(7) },
        Msg::Grant { terms, contents: Contents::Keep },
        Msg::Grant { terms: read, contents: Contents::Zero },
        Msg::InvAck { token },
        Msg::Put { token },
        Msg::Release { token },
        Msg::Awaited { requester: MemberId(2), patient: true },
        Msg::Awaited { requester: MemberId(0), patient: false },
        Msg::Done { token },
    ]
}

fn decode(header: &Header) -> Result<Frame<u8>, FrameError> {
    let layout = layout();
    let members = MemberSet(0b111);
    header.decode(&Rules { peer: ME, epoch: Epoch(9), layout: &layout, members }, || 7)
}

#[test]
fn every_message_survives_the_wire() {
    for msg in messages() {
        let header = Header::message(ME, Epoch(9), 0x3000, &msg);
        let bytes = header.as_bytes().to_vec();
        let back = Header::read_from_bytes(&bytes).unwrap();
        let has_page = matches!(msg, Msg::Grant { contents: Contents::Bytes(_), .. });
        assert_eq!(back.payload_len().unwrap() != 0, has_page);
        assert_eq!(decode(&back), Ok(Frame::Page(Page(3), msg)));
    }
    assert_eq!(decode(&Header::ping(ME, Epoch(9))), Ok(Frame::Ping));
    let beat = Frame::Beat { clock: 1 << 50, shift: 21 };
    assert_eq!(decode(&Header::beat(ME, Epoch(9), 1 << 50, 21)), Ok(beat));
    assert_eq!(decode(&Header::bye(ME, Epoch(9))), Ok(Frame::Bye));
}

#[test]
fn a_wish_of_an_earlier_table_of_homes_is_passed_over() {
    let wish = |epoch| Header::message(ME, epoch, 0x3000, &Msg::<u8>::Put { token: Token(1) });
    assert_eq!(decode(&wish(Epoch(8))), Ok(Frame::Ping));
    let awaited = Msg::<u8>::Awaited { requester: MemberId(2), patient: true };
    assert_eq!(decode(&Header::message(ME, Epoch(8), 0x3000, &awaited)), Ok(Frame::Ping));
    let (mut wishes, _) = run(&Msg::Put { token: Token(0) }, 0x1000, 3);
    wishes.epoch = 8.into();
    assert_eq!(decode(&wishes), Ok(Frame::Ping));
    assert_eq!(decode(&wish(Epoch(10))), Err(FrameError::Epoch { got: 10, ours: 9 }));
    assert_eq!(decode(&Header::ping(ME, Epoch(8))), Ok(Frame::Ping));
}

/// A run of `count` messages and its payload, as it lies on the wire.
fn run(msg: &Msg<()>, gpa: u64, count: u32) -> (Header, Vec<u8>) {
    let header = Header::run(ME, Epoch(9), gpa, msg, count);
    let mut payload = Vec::new();
    if matches!(msg, Msg::Grant { contents: Contents::Bytes(()), .. }) {
        payload.resize(count as usize * PAGE_LEN, 3);
    }
    (0..u64::from(count)).for_each(|n| payload.extend((100 + n).to_le_bytes()));
    (header, payload)
}

#[test]
fn a_run_is_as_many_messages() {
    let terms = Terms { token: Token(0), right: Right::Shared, acks: MemberSet::EMPTY, done: true };
    for msg in [
        Msg::Get { write: false, token: Token(0), hint: true },
        Msg::Decline { token: Token(0) },
        Msg::Forward { requester: MemberId(2), terms, data: true },
        Msg::Grant { terms, contents: Contents::Bytes(()) },
        Msg::Grant { terms, contents: Contents::Zero },
        Msg::Done { token: Token(0) },
        Msg::Put { token: Token(0) },
    ] {
        let (header, payload) = run(&msg, 0x1000, 3);
        assert_eq!(header.payload_len(), Ok(payload.len()));
        let Ok(Frame::Run(run)) = decode(&header) else { panic!("{:?}", decode(&header)) };
        let expect = (0..3u32).map(|n| (Page(1 + n), msg.clone().with_token(Token(100 + u64::from(n)))));
        assert!(run.messages(&payload).eq(expect), "{msg:?}");
    }
}

#[test]
fn a_run_that_reaches_too_far_is_refused() {
    let get = Msg::Get { write: false, token: Token(0), hint: true };
    let bad = |gpa, count| Err(FrameError::Run { gpa, count });
    // Two ranges, of 4 and of 200 pages, with a hole between.
    let ranges = [(0, 4), (0x10_0000, 200)].map(|(start, pages)| HomeRange {
        start,
        len: pages * PAGE_SIZE,
        home: MemberId(0),
    });
    let layout = Layout::new(&ranges).unwrap();
    let members = MemberSet(0b111);
    let rules = Rules { peer: ME, epoch: Epoch(9), layout: &layout, members };
    let decode = |gpa: u64, count: u32| {
        let header = Header::run(ME, Epoch(9), gpa, &get, count);
        header.decode(&rules, || 7).map(|frame| matches!(frame, Frame::Run(_)))
    };
    assert_eq!(decode(0, 4), Ok(true));
    assert_eq!(decode(0, 5), bad(0, 5), "over the end of a range");
    assert_eq!(decode(0x3000, 2), bad(0x3000, 2));
    assert_eq!(decode(0x10_0000, 60), Ok(true));
    assert_eq!(decode(0x10_0000, 61), bad(0x10_0000, 61), "over the end of a block");
    assert_eq!(decode(0x10_0000 + 60 * PAGE_SIZE, 64), Ok(true));
    assert_eq!(decode(0x10_0000 + 60 * PAGE_SIZE, 65), bad(0x10_0000 + 60 * PAGE_SIZE, 65));
    assert_eq!(decode(0x10_0000 + 188 * PAGE_SIZE, 13), bad(0x10_0000 + 188 * PAGE_SIZE, 13));
    for count in [0, 1, u32::MAX] {
        assert_eq!(decode(0, count), bad(0, u64::from(count)));
    }
    let (good, _) = run(&get, 0, 3);
    let spoilt = |spoil: fn(&mut Header)| {
        let mut header = good;
        spoil(&mut header);
        header.decode(&rules, || 7).unwrap_err()
    };
    assert_eq!(spoilt(|h| h.token = U64::new(u64::MAX)), FrameError::Run { gpa: 0, count: u64::MAX });
    assert_eq!(spoilt(|h| h.len = U32::new(32)), FrameError::Length { kind: GET, len: 32 });
    assert_eq!(spoilt(|h| h.len = U32::new(u32::MAX)), FrameError::Length { kind: GET, len: u32::MAX });
    assert_eq!(spoilt(|h| h.kind = INV_ACK), FrameError::Flags { kind: INV_ACK, flags: RUN | HINT });
    assert_eq!(spoilt(|h| h.acks = U64::new(2)), FrameError::Run { gpa: 0, count: 3 });
}

#[test]
fn what_no_honest_member_sends_is_refused() {
    let good = Header::message(ME, Epoch(9), 0x3000, &messages()[3]);
    let cases: Vec<Case> = vec![
        (Box::new(|h| h.magic = U16::new(1)), FrameError::Magic(1)),
        (Box::new(|h| h.kind = 99), FrameError::Kind(99)),
        (Box::new(|h| h.flags = 0x80), FrameError::Flags { kind: FORWARD, flags: 0x80 }),
        (Box::new(|h| h.from = U16::new(2)), FrameError::Sender(MemberId(2))),
        (Box::new(|h| h.epoch = U64::new(8)), FrameError::Epoch { got: 8, ours: 9 }),
        (Box::new(|h| h.gpa = U64::new(0x3001)), FrameError::Gpa(0x3001)),
        (Box::new(|h| h.gpa = U64::new(0x4000)), FrameError::Gpa(0x4000)),
        (Box::new(|h| h.requester = U16::new(3)), FrameError::Members),
        (Box::new(|h| h.requester = U16::new(900)), FrameError::Members),
        (Box::new(|h| h.acks = U64::new(8)), FrameError::Members),
        (Box::new(|h| h.len = U32::new(4096)), FrameError::Length { kind: FORWARD, len: 4096 }),
        (Box::new(|h| h.len = U32::new(u32::MAX)), FrameError::Length { kind: FORWARD, len: u32::MAX }),
    ];
    for (spoil, error) in cases {
        let mut bad = good;
        spoil(&mut bad);
        assert_eq!(decode(&bad), Err(error));
    }
    let mut grant = Header::message(ME, Epoch(9), 0, &messages()[6]);
    grant.len = U32::new(0);
    assert_eq!(decode(&grant), Err(FrameError::Length { kind: GRANT, len: 0 }));
}
