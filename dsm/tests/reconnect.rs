//! Connections that break again and again while members work: nothing may be lost; and one that does not come back.
#![allow(missing_docs)]

mod common;

use common::{ranges, usable};
use dsm::addr::{Epoch, MemberId};
use dsm::node::{Dsm, DsmConfig, Reconnect};
use dsm::transport::mesh::{self, MeshConfig};
use dsm::transport::redial::Redial;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// A network between a member that listens and those that call it: connections can be cut and forbidden.
#[derive(Default)]
struct Network {
    streams: Mutex<Vec<TcpStream>>,
    is_closed: AtomicBool,
    made: AtomicU32,
}

impl Network {
    /// Forwards callers to `to`; returns where to call.
    fn before(self: &Arc<Network>, to: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let network = self.clone();
        thread::spawn(move || {
            for caller in listener.incoming() {
                let Ok(caller) = caller else { return };
                let Ok(callee) = TcpStream::connect(to) else { continue };
                if network.is_closed.load(SeqCst) {
                    continue;
                }
                network.made.fetch_add(1, SeqCst);
                for (from, to) in [(&caller, &callee), (&callee, &caller)] {
                    from.set_nodelay(true).unwrap();
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    network.streams.lock().unwrap().push(from.try_clone().unwrap());
                    thread::spawn(move || forward(from, to));
                }
            }
        });
        addr
    }

    /// Breaks every connection; what is on its way is lost.
    fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream) {
    let mut buf = [0; 3000];
    while let Ok(n) = from.read(&mut buf) {
        if n == 0 || to.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn start(n: u16, network: &Arc<Network>, grace: Duration) -> Vec<Dsm> {
    let listeners: Vec<_> = (0..n).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addrs: Vec<_> = listeners.iter().map(|l| network.before(l.local_addr().unwrap())).collect();
    let ids: Vec<_> = (0..n).map(MemberId).collect();
    let homes: Vec<u16> = (0..n).collect();
    let memory = ranges(&homes, 4);
    thread::scope(|scope| {
        let join = |(listener, me): (TcpListener, MemberId)| {
            let peers = ids.iter().zip(&addrs).filter(|(p, _)| **p != me).map(|(p, a)| (*p, *a)).collect();
            let mesh = MeshConfig {
                me,
                vm: "test".into(),
                epoch: Epoch(1),
                peers,
                secret: Some(vec![7; 32]),
                deadline: Duration::from_secs(10),
                channels: 1,
            };
            let redial = Redial::new(listener.try_clone().unwrap(), mesh.clone()).unwrap();
            let links = mesh::connect(listener, &mesh).unwrap();
            let links = links.into_iter().map(|mut l| (l.peer, l.streams.remove(0))).collect();
            let mut cfg = DsmConfig::new(me, ids.clone(), Epoch(1), memory.clone());
            cfg.reconnect =
                Some(Reconnect { grace, redial: Arc::new(move |peer, end| redial.stream(peer, 0, end)) });
            Dsm::start(cfg, links).unwrap()
        };
        let members: Vec<_> =
            listeners.into_iter().zip(ids.clone()).map(|m| scope.spawn(move || join(m))).collect();
        members.into_iter().map(|m| m.join().unwrap()).collect()
    })
}

#[test]
fn nothing_is_lost_however_often_connections_break() {
    if !usable() {
        return;
    }
    let network = Arc::new(Network::default());
    let members = start(3, &network, Duration::from_secs(20));
    for member in &members {
        // Threads that wait for memory that has failed never end.
        member.on_failure(Box::new(|failure| {
            println!("{failure}");
            std::process::abort();
        }));
    }
    let end = Instant::now() + Duration::from_secs(3);
    let is_over = AtomicBool::new(false);
    let total: u64 = thread::scope(|scope| {
        let work = |member: &Dsm, first: u64| {
            let memory = member.memory();
            let mut count = 0;
            let mut seen = [0; 3];
            while Instant::now() < end {
                let page = (first + count) % 3;
                let before = memory.u64_at(page * 5 * 4096).unwrap().fetch_add(1, SeqCst);
                assert!(before >= seen[page as usize], "page {page} went down");
                seen[page as usize] = before;
                count += 1;
            }
            count
        };
        let threads: Vec<_> =
            members.iter().flat_map(|m| [0, 1].map(|first| scope.spawn(move || work(m, first)))).collect();
        scope.spawn(|| {
            while !is_over.load(SeqCst) {
                thread::sleep(Duration::from_millis(60));
                network.cut();
            }
        });
        let total = threads.into_iter().map(|t| t.join().unwrap()).sum();
        is_over.store(true, SeqCst);
        total
    });
    for member in &members {
        let sum: u64 = (0..3).map(|p| member.memory().u64_at(p * 5 * 4096).unwrap().load(SeqCst)).sum();
        assert_eq!(sum, total);
        assert_eq!(member.failure(), None);
    }
    let made = network.made.load(SeqCst);
    println!("{total} increments over {made} connections");
    assert!(made > 20, "{made} connections");
}

#[test]
fn who_does_not_come_back_in_time_is_named() {
    if !usable() {
        return;
    }
    let network = Arc::new(Network::default());
    let grace = Duration::from_millis(400);
    let members = start(2, &network, grace);
    members[0].memory().u64_at(5 * 4096).unwrap().store(1, SeqCst);
    network.is_closed.store(true, SeqCst);
    let start = Instant::now();
    network.cut();
    for (member, other) in [(0, 1), (1, 0)] {
        let failure = loop {
            if let Some(failure) = members[member].failure() {
                break failure;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "member {member} waits for ever");
            thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(failure.peer, Some(MemberId(other)), "{failure}");
        assert!(failure.to_string().contains("not connected again"), "{failure}");
    }
    assert!(start.elapsed() >= grace);
}

#[test]
fn who_comes_later_is_let_in_where_it_is_expected() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mesh = |me: u16, peers: Vec<(MemberId, SocketAddr)>| MeshConfig {
        me: MemberId(me),
        vm: "test".into(),
        epoch: Epoch(1),
        peers,
        secret: Some(vec![7; 32]),
        deadline: Duration::from_secs(60),
        channels: 1,
    };
    let door = Redial::new(listener, mesh(0, Vec::new())).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let newcomer = MemberId(1);
    assert!(door.stream(newcomer, 0, end).unwrap_err().to_string().contains("no peer"));
    door.meet(newcomer, addr);
    let caller = TcpListener::bind("127.0.0.1:0").unwrap();
    let caller = thread::spawn(move || mesh::connect(caller, &mesh(1, vec![(MemberId(0), addr)])));
    let mut stream = door.stream(newcomer, 0, end).unwrap();
    let mut links = caller.join().unwrap().unwrap();
    stream.write_all(b"x").unwrap();
    let mut byte = [0];
    links[0].streams[0].read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
    // Who waits hears at once that it is in vain.
    thread::scope(|scope| {
        let wait = scope.spawn(|| door.stream(newcomer, 0, end));
        door.part(newcomer);
        assert!(wait.join().unwrap().is_err());
    });
    assert!(!door.knows(newcomer) && Instant::now() < end);
}
