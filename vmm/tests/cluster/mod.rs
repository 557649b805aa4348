//! Several members in one process, connected over loopback as hosts would be, that run the bare-metal guest on the
//! real /dev/kvm.
#![allow(dead_code, missing_debug_implementations, missing_docs, reason = "each test file uses a part")]

use dsm::addr::{Epoch, HomeRange, MemberId};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use vmm::devices::DeviceSpec;
use vmm::member::{BootImages, HostFacts, Member, MemberEvent, MemberPlan, MemberStats, Origin, PageTuning};
use vmm::topology::{MemberDesc, Topology};

/// The bare-metal guest's ELF; building it takes a few seconds the first time.
pub fn bare() -> &'static [u8] {
    static ELF: OnceLock<Vec<u8>> = OnceLock::new();
    ELF.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/bare/build.sh");
        let output = Command::new(&script).output().expect("build.sh runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = String::from_utf8(output.stdout).unwrap();
        std::fs::read(path.trim()).expect("the guest was built")
    })
}

pub struct Cluster {
    pub members: Vec<Member>,
    pub events: Vec<Receiver<MemberEvent>>,
}

/// How a run ended, as seen by each member, and what the guest printed.
pub struct Ended {
    pub last: Vec<MemberEvent>,
    pub output: String,
    pub stats: Vec<MemberStats>,
}

fn plan(facts: &HostFacts, me: u16, topology: &Topology, pages: &PageTuning) -> MemberPlan {
    MemberPlan {
        vm: "test".into(),
        me: MemberId(me),
        topology: topology.clone(),
        secret: None,
        cpuid: facts.cpuid.clone(),
        tsc_khz: facts.tsc_khz,
        devices: vec![DeviceSpec::Serial { member: MemberId(0), log: None }],
        pages: pages.clone(),
        origin: Origin::default(),
        standing: None,
        deadline: Duration::from_secs(20),
    }
}

fn topology(vcpus: &[u16], addrs: &[SocketAddr], memory: u64) -> Topology {
    let members = addrs.len();
    let each = (memory / u64::try_from(members).unwrap()).next_multiple_of(2 << 20);
    Topology {
        epoch: Epoch(1),
        members: (0u16..)
            .zip(addrs)
            .map(|(id, addr)| MemberDesc { id: MemberId(id), host: format!("host{id}"), addr: *addr })
            .collect(),
        vcpus: vcpus.iter().map(|m| MemberId(*m)).collect(),
        memory: (0u16..)
            .zip(addrs)
            .map(|(id, _)| HomeRange { start: u64::from(id) * each, len: each, home: MemberId(id) })
            .collect(),
        distances: (0..members)
            .map(|a| (0..members).map(|b| if a == b { 10 } else { 20 }).collect())
            .collect(),
    }
}

impl Cluster {
    /// vCPU `i` lives on member `vcpus[i]`. `None`, with the reason printed, where there is no KVM.
    pub fn start(vcpus: &[u16]) -> Option<Cluster> {
        Cluster::start_with(vcpus, 128 << 20, &PageTuning::default(), |addr| addr)
    }

    /// The same with so much memory and these knobs. `through` is told where a member listens and says where the others
    /// are to call.
    pub fn start_with(
        vcpus: &[u16],
        memory: u64,
        pages: &PageTuning,
        through: impl Fn(SocketAddr) -> SocketAddr,
    ) -> Option<Cluster> {
        let facts = match HostFacts::probe() {
            Ok(facts) => facts,
            Err(e) => {
                eprintln!("skipped: {e}");
                return None;
            }
        };
        let count = usize::from(*vcpus.iter().max().unwrap()) + 1;
        let listeners: Vec<_> =
            (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
        let addrs: Vec<_> = listeners.iter().map(|l| through(l.local_addr().unwrap())).collect();
        let topology = topology(vcpus, &addrs, memory);
        let joins: Vec<_> = (0u16..)
            .zip(listeners)
            .map(|(me, listener)| {
                let plan = plan(&facts, me, &topology, pages);
                let (tx, rx) = channel();
                (std::thread::spawn(move || Member::join(plan, listener, tx)), rx)
            })
            .collect();
        let (mut members, mut events) = (Vec::new(), Vec::new());
        for (join, rx) in joins {
            members.push(join.join().unwrap().unwrap_or_else(|e| panic!("join: {e}")));
            events.push(rx);
        }
        Some(Cluster { members, events })
    }

    pub fn boot(&self, cmdline: &str) {
        let images = BootImages { kernel: bare().to_vec(), initrd: None, cmdline: cmdline.into() };
        self.members[0].load(images).unwrap_or_else(|e| panic!("load: {e}"));
        self.members.iter().for_each(|m| m.run().unwrap());
    }

    pub fn output(&self) -> String {
        let console = self.members[0].console().expect("member 0 has the serial port");
        let mut reader = console.reader();
        let mut output = Vec::new();
        loop {
            let chunk = reader.read(1 << 16, Duration::from_millis(20));
            if chunk.bytes.is_empty() {
                return String::from_utf8_lossy(&output).into_owned();
            }
            output.extend(chunk.bytes);
        }
    }

    /// Waits until all members say that it is over.
    pub fn wait(self, within: Duration) -> Ended {
        let end = Instant::now() + within;
        let last = self.events.iter().zip(&self.members).map(|(events, member)| {
            loop {
                match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(event @ (MemberEvent::Exit(_) | MemberEvent::Failed { .. })) => return event,
                    Ok(_) => {}
                    Err(e) => panic!(
                        "{} did not end: {e}\n{}\n{:#?}",
                        member.plan().me,
                        self.output(),
                        self.members.iter().map(Member::stats).collect::<Vec<_>>()
                    ),
                }
            }
        });
        let last = last.collect();
        Ended { last, output: self.output(), stats: self.members.iter().map(Member::stats).collect() }
    }
}
