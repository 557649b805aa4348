//! Connections between members that break while a guest runs, and members that keep less memory than the guest has.

mod cluster;

use cluster::Cluster;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use vmm::member::{MemberEvent, PageTuning, VmExit};

/// A network in which connections can be cut, and forbidden.
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
                    let (Ok(()), Ok(copy)) = (from.set_nodelay(true), from.try_clone()) else { continue };
                    network.streams.lock().unwrap().push(copy);
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
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

fn start(vcpus: &[u16], reconnect_s: u64) -> Option<(Cluster, Arc<Network>)> {
    let network = Arc::new(Network::default());
    let pages = PageTuning { reconnect_s, ..PageTuning::default() };
    let cluster = Cluster::start_with(vcpus, 128 << 20, &pages, |addr| network.before(addr))?;
    Some((cluster, network))
}

#[test]
fn a_guest_does_not_notice_that_connections_break() {
    let Some((cluster, network)) = start(&[0, 1], 60) else { return };
    let is_over = Arc::new(AtomicBool::new(false));
    let mhz = cluster.members[0].plan().tsc_khz / 1000;
    let tests = "counter,pages,ipi,ipimodes,litmus";
    let more = "iterations=200 rounds=5";
    cluster.boot(&format!("cpus=2 deadline=100 timer_mhz={mhz} test={tests} {more}"));
    let cutter = thread::spawn({
        let (network, is_over) = (network.clone(), is_over.clone());
        move || {
            while !is_over.load(SeqCst) {
                thread::sleep(Duration::from_millis(150));
                network.cut();
            }
        }
    });
    // Whoever says farewell while a connection is cut is not heard, so only member 0's end counts.
    let end = Instant::now() + Duration::from_secs(150);
    let done = |output: &str| output.contains("BARE litmus PASS") || output.contains("FAIL");
    let mut output = cluster.output();
    while !done(&output) {
        assert!(Instant::now() < end, "{output}");
        thread::sleep(Duration::from_millis(20));
        output = cluster.output();
    }
    is_over.store(true, SeqCst);
    cutter.join().unwrap();
    for test in tests.split(',') {
        assert!(output.contains(&format!("BARE {test} PASS")), "{test}: {output}");
    }
    let stats: Vec<_> = cluster.members.iter().map(|m| m.stats()).collect();
    let pages: u64 = stats.iter().flat_map(|s| &s.memory.peers).map(|p| p.reconnects).sum();
    let fabric: u64 = stats.iter().map(|s| s.fabric_reconnects).sum();
    println!("{} connections, {pages} and {fabric} reconnects", network.made.load(SeqCst));
    assert!(pages > 0 && fabric > 0, "{stats:#?}");
}

#[test]
fn a_member_that_does_not_come_back_in_time_is_named() {
    let Some((cluster, network)) = start(&[0, 1], 1) else { return };
    cluster.boot("cpus=2 test=loop shared=1");
    thread::sleep(Duration::from_millis(300));
    network.is_closed.store(true, SeqCst);
    network.cut();
    let ended = cluster.wait(Duration::from_secs(60));
    for (event, other) in ended.last.iter().zip(["member 1 (host1", "member 0 (host0"]) {
        let MemberEvent::Failed { text, .. } = event else { panic!("{:?}", ended.last) };
        assert!(text.contains(other) && text.contains("not connected again within 1s"), "{text}");
    }
}

#[test]
fn a_guest_is_twice_as_large_as_what_each_member_may_keep() {
    const BUDGET: u64 = 32 << 20;
    let pages = PageTuning { budget: Some(BUDGET), ..PageTuning::default() };
    let Some(cluster) = Cluster::start_with(&[0, 1, 2], 2 * BUDGET, &pages, |addr| addr) else { return };
    // Nearly all that the test program leaves is written by one CPU and read by another.
    cluster.boot("cpus=3 deadline=100 test=counter,touch mib=44 words=16 iterations=300");
    let ended = cluster.wait(Duration::from_secs(150));
    assert!(ended.output.contains("BARE touch PASS"), "{}", ended.output);
    assert!(ended.output.contains("BARE counter PASS"), "{}", ended.output);
    assert!(ended.last.iter().all(|e| *e == MemberEvent::Exit(VmExit::PowerOff)), "{:?}", ended.last);
    for memory in ended.stats.iter().map(|s| &s.memory) {
        println!("at most {} MiB, {} evictions", memory.peak_bytes >> 20, memory.evictions);
        assert_eq!(memory.budget_bytes, Some(BUDGET));
        assert!(memory.peak_bytes <= BUDGET + BUDGET / 20, "{memory:#?}");
    }
    assert!(ended.stats.iter().any(|s| s.memory.evictions > 0));
}
