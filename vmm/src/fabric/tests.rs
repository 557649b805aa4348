//! Two fabrics over real sockets.

use super::*;
use crate::interrupts::{DeliveryMode, Destination};
use std::net::{Ipv4Addr, TcpListener};
use wire::{FRAME_LEN, Frame};
use zerocopy::FromBytes;

const EPOCH: Epoch = Epoch(3);

#[derive(Debug, PartialEq)]
enum Seen {
    Interrupt(u8),
    Write(u64, Vec<u8>),
    Level(u32, bool),
    Eoi(u8),
    Image(Vec<u8>),
    Moved(u64, u32),
    Stopped(MemberId, StopReason),
    Lost(MemberId, String),
}

#[derive(Default)]
struct Recorder {
    seen: Mutex<Vec<Seen>>,
    samples: AtomicU64,
}

impl Recorder {
    fn push(&self, seen: Seen) {
        self.seen.lock().unwrap().push(seen);
    }

    /// Waits until something that satisfies the condition was seen.
    fn wait(&self, what: &str, is: impl Fn(&Seen) -> bool) {
        let end = Instant::now() + Duration::from_secs(60);
        while !self.seen.lock().unwrap().iter().any(&is) {
            assert!(Instant::now() < end, "no {what} in {:?}", self.seen.lock().unwrap());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Handler for Recorder {
    fn image(&self, _: MemberId, image: &[u8]) {
        self.push(Seen::Image(image.to_vec()));
    }
    fn moved(&self, _: MemberId, token: u64, vcpu: u32) {
        self.push(Seen::Moved(token, vcpu));
    }
    fn interrupt(&self, message: InterruptMessage, _: VcpuGroup, _: u16) {
        self.push(Seen::Interrupt(message.vector));
    }
    fn read(&self, _: Space, addr: u64, data: &mut [u8]) {
        data.fill(u8::try_from(addr & 0xFF).unwrap());
    }
    fn write(&self, _: Space, addr: u64, data: &[u8]) {
        self.push(Seen::Write(addr, data.to_vec()));
    }
    fn set_level(&self, gsi: u32, high: bool) {
        self.push(Seen::Level(gsi, high));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.push(Seen::Eoi(vector));
    }
    fn guest_tsc(&self) -> u64 {
        crate::time::tsc::host_tsc()
    }
    fn host_clock(&self) -> u64 {
        crate::time::tsc::host_tsc()
    }
    fn clock_sample(&self, sample: Sample) {
        assert!(sample.sent <= sample.remote_received && sample.remote_sent <= sample.received);
        self.samples.fetch_add(1, Ordering::SeqCst);
    }
    fn steer_clock(&self) {}
    fn clock_is_settled(&self) -> bool {
        self.samples.load(Ordering::SeqCst) > 20
    }
    fn stopped(&self, peer: MemberId, reason: StopReason) {
        self.push(Seen::Stopped(peer, reason));
    }
    fn peer_lost(&self, peer: MemberId, reason: String) {
        self.push(Seen::Lost(peer, reason));
    }
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

struct Side {
    fabric: Arc<Fabric>,
    handler: Arc<Recorder>,
    threads: Vec<JoinHandle<()>>,
}

impl Side {
    fn new(me: u16, peer: u16, stream: TcpStream, deadline: Duration) -> Side {
        Side::with(me, peer, stream, deadline, None)
    }

    fn with(me: u16, peer: u16, stream: TcpStream, deadline: Duration, again: Option<Reconnect>) -> Side {
        Side::among(me, vec![(MemberId(peer), stream)], deadline, again)
    }

    fn among(
        me: u16,
        streams: Vec<(MemberId, TcpStream)>,
        deadline: Duration,
        again: Option<Reconnect>,
    ) -> Side {
        let fabric = Fabric::new(MemberId(me), EPOCH, deadline, again, streams).unwrap();
        let (fabric, handler) = (Arc::new(fabric), Arc::new(Recorder::default()));
        let threads = fabric.start(&handler).unwrap();
        Side { fabric, handler, threads }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.fabric.close();
        self.threads.drain(..).for_each(|t| t.join().unwrap());
    }
}

fn pair() -> (Side, Side) {
    let (a, b) = sockets();
    let deadline = Duration::from_secs(5);
    (Side::new(0, 1, a, deadline), Side::new(1, 0, b, deadline))
}

fn interrupt(vector: u8) -> Message {
    let message = InterruptMessage {
        destination: Destination::Physical(1),
        mode: DeliveryMode::Fixed,
        vector,
        level_triggered: false,
        asserted: true,
        source: Some(0),
    };
    Message::Interrupt { message, group: VcpuGroup::of(1), hops: 0 }
}

#[test]
fn messages_arrive_in_order() {
    let (a, b) = pair();
    a.fabric.send(MemberId(1), &interrupt(0x31));
    a.fabric.write(MemberId(1), Space::Mmio, 0xD000_0050, &[7, 0, 0, 0], true).unwrap();
    a.fabric.write(MemberId(1), Space::Pio, 0x3F8, b"x", false).unwrap();
    a.fabric.send(MemberId(1), &Message::SetLevel { gsi: 5, high: true });
    let mut data = [0; 4];
    a.fabric.read(MemberId(1), Space::Mmio, 0xD000_0034, &mut data).unwrap();
    assert_eq!(data, [0x34; 4]);
    let expected = [
        Seen::Interrupt(0x31),
        Seen::Write(0xD000_0050, vec![7, 0, 0, 0]),
        Seen::Write(0x3F8, b"x".to_vec()),
        Seen::Level(5, true),
    ];
    assert_eq!(*b.handler.seen.lock().unwrap(), expected);
    b.fabric.send(MemberId(0), &Message::Eoi { vector: 0x31 });
    a.handler.wait("EOI", |s| *s == Seen::Eoi(0x31));
}

#[test]
fn another_member_leads() {
    let (a, b) = pair();
    for side in [&a, &b] {
        assert!(side.fabric.set_leader(MemberId(1)));
        assert!(!side.fabric.set_leader(MemberId(1)));
    }
    let end = Instant::now() + Duration::from_secs(60);
    while a.handler.samples.load(Ordering::SeqCst) < 5 {
        assert!(Instant::now() < end, "nobody answers");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_clock_is_sampled_by_all_but_the_coordinator() {
    let (a, b) = pair();
    let end = Instant::now() + Duration::from_secs(5);
    while b.handler.samples.load(Ordering::SeqCst) < 25 && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
    assert!(b.handler.samples.load(Ordering::SeqCst) >= 25);
    assert_eq!(a.handler.samples.load(Ordering::SeqCst), 0);
}

#[test]
fn a_peer_that_dies_is_named_once_and_nobody_waits_for_it() {
    let (a, stream) = sockets();
    let a = Side::new(0, 1, a, Duration::from_secs(5));
    let (fabric, asked) = (a.fabric.clone(), Instant::now());
    let waiter = thread::spawn(move || fabric.read(MemberId(1), Space::Pio, 0x3FD, &mut [0]));
    thread::sleep(Duration::from_millis(50));
    drop(stream);
    a.handler.wait("loss", |s| matches!(s, Seen::Lost(MemberId(1), _)));
    // What the member does when it hears of the loss.
    a.fabric.cancel("member 1 is lost");
    assert_eq!(waiter.join().unwrap(), Err(AccessError::Cancelled("member 1 is lost".into())));
    assert!(asked.elapsed() < Duration::from_secs(3));
    a.fabric.send(MemberId(1), &interrupt(0x40));
    thread::sleep(Duration::from_millis(300));
    let seen = a.handler.seen.lock().unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
}

#[test]
fn a_silent_peer_is_given_up_after_the_deadline() {
    let (a, _silent) = sockets();
    let a = Side::new(0, 1, a, Duration::from_millis(300));
    a.handler.wait("loss", |s| matches!(s, Seen::Lost(_, why) if why.contains("nothing was heard")));
    let error = a.fabric.read(MemberId(1), Space::Pio, 0x3FD, &mut [0]).unwrap_err();
    let wanted = AccessError::TimedOut { peer: MemberId(1), addr: 0x3FD, within: Duration::from_millis(300) };
    assert_eq!(error, wanted);
    assert_eq!(a.fabric.read(MemberId(7), Space::Pio, 0, &mut [0]), Err(AccessError::NoMember(MemberId(7))));
}

#[test]
fn nonsense_ends_the_link() {
    use std::io::Write;
    let (a, mut stream) = sockets();
    let a = Side::new(0, 1, a, Duration::from_secs(5));
    stream.write_all(&[0xEE; FRAME_LEN]).unwrap();
    a.handler.wait("loss", |s| matches!(s, Seen::Lost(_, why) if why.contains("from member 61166")));
}

#[test]
fn an_announced_end_is_no_loss() {
    let (a, b) = pair();
    b.fabric.expect_end();
    b.fabric.send_all(&Message::Stop(StopReason::PowerOff));
    a.handler.wait("stop", |s| *s == Seen::Stopped(MemberId(1), StopReason::PowerOff));
    assert!(a.fabric.all_leaving());
    drop(b);
    thread::sleep(Duration::from_millis(50));
    let seen = a.handler.seen.lock().unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
}

/// A peer that reads nothing holds nobody up, and what waits for it arrives complete once it reads.
#[test]
fn sending_never_waits() {
    use std::io::Read;
    let (a, mut stream) = sockets();
    let a = Side::new(0, 1, a, Duration::from_secs(10));
    let (count, start) = (60_000usize, Instant::now());
    for _ in 0..count {
        a.fabric.send(MemberId(1), &interrupt(0x50));
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let (mut bytes, mut interrupts) = ([0; FRAME_LEN], 0);
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    while interrupts < count {
        stream.read_exact(&mut bytes).unwrap();
        let frame = Frame::read_from_bytes(&bytes).unwrap();
        let message = Message::decode(&frame, MemberId(0), EPOCH).unwrap();
        interrupts += usize::from(matches!(message, Message::Interrupt { .. }));
    }
}

/// Two sides whose streams break; the one with the higher number calls, as in the mesh.
fn breaking_pair(streams: &Arc<Mutex<Vec<TcpStream>>>, grace: Duration) -> (Side, Side) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let accept = move |_: MemberId, end: Instant| {
        loop {
            match listener.accept() {
                Ok((stream, _)) => return stream.set_nonblocking(false).map(|()| stream),
                Err(e) if Instant::now() >= end => return Err(e),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
    };
    let made = streams.clone();
    let call = move |_: MemberId, _: Instant| {
        let stream = TcpStream::connect(addr)?;
        made.lock().unwrap().push(stream.try_clone()?);
        Ok(stream)
    };
    let (a, b) = sockets();
    streams.lock().unwrap().push(b.try_clone().unwrap());
    let deadline = Duration::from_secs(5);
    (
        Side::with(0, 1, a, deadline, Some(Reconnect { grace, redial: Arc::new(accept) })),
        Side::with(1, 0, b, deadline, Some(Reconnect { grace, redial: Arc::new(call) })),
    )
}

/// Every message arrives once and in order, and every access is answered, however often the stream breaks.
#[test]
fn nothing_is_lost_or_done_twice_when_streams_break() {
    let streams = Arc::new(Mutex::new(Vec::<TcpStream>::new()));
    let (a, b) = breaking_pair(&streams, Duration::from_secs(60));
    let is_over = AtomicBool::new(false);
    let count = 400u64;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(10));
                for stream in streams.lock().unwrap().drain(..) {
                    let _ = stream.shutdown(std::net::Shutdown::Both);
                }
            }
        });
        for n in 0..count {
            for (side, peer) in [(&a, 1), (&b, 0)] {
                for part in 0..40 {
                    let level = Message::SetLevel { gsi: u32::try_from(n).unwrap(), high: part % 2 == 0 };
                    side.fabric.send(MemberId(peer), &level);
                }
                side.fabric.send_image(MemberId(peer), &vec![7; 3000]);
            }
            let mut data = [0];
            a.fabric.read(MemberId(1), Space::Pio, n & 0xFF, &mut data).unwrap();
            assert_eq!(u64::from(data[0]), n & 0xFF);
        }
        let last = Message::Write { token: None, space: Space::Pio, addr: 1, size: 1, data: 9 };
        a.fabric.send(MemberId(1), &last);
        b.fabric.send(MemberId(0), &last);
        for side in [&a, &b] {
            side.handler.wait("last message", |s| matches!(s, Seen::Write(..) | Seen::Lost(..)));
        }
        is_over.store(true, Ordering::SeqCst);
    });
    for side in [&a, &b] {
        let seen = side.handler.seen.lock().unwrap();
        let mut want = (0..count).flat_map(|n| {
            let gsi = u32::try_from(n).unwrap();
            let levels = (0..40).map(move |part| Seen::Level(gsi, part % 2 == 0));
            levels.chain([Seen::Image(vec![7; 3000])])
        });
        for seen in &seen[..seen.len() - 1] {
            assert_eq!(Some(seen), want.next().as_ref());
        }
        assert!(want.next().is_none() && matches!(seen.last(), Some(Seen::Write(..))));
    }
    let reconnects = a.fabric.reconnects() + b.fabric.reconnects();
    println!("{reconnects} reconnects");
    assert!(reconnects > 4, "{reconnects} reconnects");
}

#[test]
fn a_peer_that_does_not_come_back_within_the_grace_time_is_lost() {
    let streams = Arc::new(Mutex::new(Vec::new()));
    let (a, b) = breaking_pair(&streams, Duration::from_millis(400));
    b.fabric.close();
    a.handler.wait(
        "loss",
        |s| matches!(s, Seen::Lost(_, why) if why.contains("not connected again within 400ms")),
    );
}

#[test]
fn a_newcomer_gets_nothing_of_the_guest_until_it_is_a_member() {
    let (a, b) = sockets();
    let deadline = Duration::from_secs(5);
    let mut first = Side::among(0, Vec::new(), deadline, None);
    let second = Side::new(1, 0, b, deadline);
    let threads = first.fabric.admit(MemberId(1), a, &first.handler).unwrap();
    first.threads.extend(threads);
    assert_eq!(first.fabric.peers().count(), 0);
    first.fabric.send(MemberId(1), &interrupt(0x31));
    first.fabric.send_image(MemberId(1), &[7; 10]);
    assert_eq!(first.fabric.traffic(), (0, 0));
    first.fabric.set_members(|_| true);
    assert_eq!(first.fabric.peers().collect::<Vec<_>>(), [MemberId(1)]);
    first.fabric.send(MemberId(1), &interrupt(0x32));
    second.handler.wait("interrupt", |seen| *seen == Seen::Interrupt(0x32));
    assert_eq!(*second.handler.seen.lock().unwrap(), [Seen::Interrupt(0x32)]);
    let twice = first.fabric.admit(MemberId(1), sockets().0, &first.handler);
    assert!(twice.is_err(), "it is a member");
}
