//! What the tests with real memory share; none of them uses all of it.
#![allow(dead_code)]

pub mod lan;

use dsm::addr::{Epoch, HomeRange, MemberId};
use dsm::bench::group::Group;
use dsm::bench::peer::Tuning;
use dsm::node::{Dsm, DsmConfig};
use dsm::transport::mesh::{self, MeshConfig};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// Says on stdout why a test is skipped where userfaultfd can't be used.
pub fn usable() -> bool {
    match dsm::region::probe() {
        Ok(()) => true,
        Err(e) => {
            println!("skipped: {e}");
            false
        }
    }
}

/// `homes.len()` ranges of `pages` pages each, one behind the other, with a hole of a page between them.
pub fn ranges(homes: &[u16], pages: u64) -> Vec<HomeRange> {
    let step = (pages + 1) * 4096;
    (0u64..)
        .zip(homes)
        .map(|(n, home)| HomeRange { start: n * step, len: pages * 4096, home: MemberId(*home) })
        .collect()
}

/// A group of members inside this process, each with its own mapping, over real TCP.
pub fn group(n: u16, memory: &[HomeRange], tune: impl Fn(&mut DsmConfig) + Sync) -> Vec<Dsm> {
    let listeners: Vec<_> = (0..n).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addrs: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
    let ids: Vec<_> = (0..n).map(MemberId).collect();
    thread::scope(|scope| {
        let members: Vec<_> = listeners
            .into_iter()
            .zip(&ids)
            .map(|(listener, me)| {
                let peers = ids.iter().zip(&addrs).filter(|(p, _)| *p != me);
                let mesh = MeshConfig {
                    me: *me,
                    vm: "test".into(),
                    epoch: Epoch(1),
                    peers: peers.map(|(p, a)| (*p, *a)).collect(),
                    secret: None,
                    deadline: Duration::from_secs(10),
                    channels: 1,
                };
                let mut cfg = DsmConfig::new(*me, ids.clone(), Epoch(1), memory.to_vec());
                tune(&mut cfg);
                scope.spawn(move || {
                    let links = mesh::connect(listener, &mesh).unwrap();
                    let links = links.into_iter().map(|mut l| (l.peer, l.streams.remove(0))).collect();
                    Dsm::start(cfg, links).unwrap()
                })
            })
            .collect();
        members.into_iter().map(|m| m.join().unwrap()).collect()
    })
}

/// Members in processes of their own.
pub type Processes = Group;

/// This very test binary as a member process: its test `member_process` does nothing unless it is told where to report.
pub fn launcher(addr: SocketAddr) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "member_process"]).env("DSM_PEER_CONTROL", addr.to_string());
    command.stdout(Stdio::null());
    command
}

/// The body of the test `member_process`.
pub fn member_process() {
    if let Ok(addr) = std::env::var("DSM_PEER_CONTROL") {
        // Whoever gives the orders is reached from here, the other members from the namespace.
        let control = std::net::TcpStream::connect(addr).unwrap();
        if let Ok(namespace) = std::env::var(lan::VARIABLE) {
            lan::enter(&std::fs::File::open(namespace).unwrap()).unwrap();
        }
        dsm::bench::serve(control).unwrap();
    }
}

/// Starts a process per member; each is home of `pages` pages, one range behind the other without holes.
pub fn processes(members: u16, pages: u64, tuning: Tuning) -> Group {
    let homes: Vec<u16> = (0..members).collect();
    let mut memory = ranges(&homes, pages);
    for (n, range) in (0u64..).zip(&mut memory) {
        range.start = n * pages * 4096;
    }
    Group::start(members, false, &memory, tuning, &launcher).unwrap()
}
