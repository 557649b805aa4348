//! Whole members on the real /dev/kvm, running the bare-metal guest: one member, and several in one process
//! that are connected over loopback as hosts would be. The guest checks itself and reports on COM1.

use dsm::addr::{Epoch, HomeRange, MemberId};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use vmm::devices::DeviceSpec;
use vmm::member::{BootImages, HostFacts, Member, MemberEvent, MemberPlan, MemberStats, PageTuning, VmExit};
use vmm::topology::{MemberDesc, Topology};

/// The bare-metal guest's ELF; building it takes a few seconds the first time.
fn bare() -> &'static [u8] {
    static ELF: OnceLock<Vec<u8>> = OnceLock::new();
    ELF.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/bare/build.sh");
        let output = Command::new(&script).output().expect("build.sh runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let path = String::from_utf8(output.stdout).unwrap();
        std::fs::read(path.trim()).expect("the guest was built")
    })
}

struct Cluster {
    members: Vec<Member>,
    events: Vec<Receiver<MemberEvent>>,
}

/// How a run ended, as seen by each member, and what the guest printed.
struct Ended {
    last: Vec<MemberEvent>,
    output: String,
    stats: Vec<MemberStats>,
}

fn plan(facts: &HostFacts, me: u16, topology: &Topology) -> MemberPlan {
    MemberPlan {
        vm: "test".into(),
        me: MemberId(me),
        topology: topology.clone(),
        secret: None,
        cpuid: facts.cpuid.clone(),
        tsc_khz: facts.tsc_khz,
        devices: vec![DeviceSpec::Serial { member: MemberId(0), log: None }],
        pages: PageTuning::default(),
        deadline: Duration::from_secs(20),
    }
}

fn topology(vcpus: &[u16], ports: &[u16]) -> Topology {
    let members = ports.len();
    let each = ((128u64 << 20) / u64::try_from(members).unwrap()).next_multiple_of(2 << 20);
    Topology {
        epoch: Epoch(1),
        members: (0u16..)
            .zip(ports)
            .map(|(id, port)| MemberDesc {
                id: MemberId(id),
                host: format!("host{id}"),
                addr: (Ipv4Addr::LOCALHOST, *port).into(),
            })
            .collect(),
        vcpus: vcpus.iter().map(|m| MemberId(*m)).collect(),
        memory: (0u16..)
            .zip(ports)
            .map(|(id, _)| HomeRange { start: u64::from(id) * each, len: each, home: MemberId(id) })
            .collect(),
        distances: (0..members)
            .map(|a| (0..members).map(|b| if a == b { 10 } else { 20 }).collect())
            .collect(),
    }
}

impl Cluster {
    /// vCPU `i` lives on member `vcpus[i]`. `None`, with the reason printed, where there is no KVM.
    fn start(vcpus: &[u16]) -> Option<Cluster> {
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
        let ports: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap().port()).collect();
        let topology = topology(vcpus, &ports);
        let joins: Vec<_> = (0u16..)
            .zip(listeners)
            .map(|(me, listener)| {
                let plan = plan(&facts, me, &topology);
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

    fn boot(&self, cmdline: &str) {
        let images = BootImages { kernel: bare().to_vec(), initrd: None, cmdline: cmdline.into() };
        self.members[0].load(images).unwrap_or_else(|e| panic!("load: {e}"));
        self.members.iter().for_each(|m| m.run().unwrap());
    }

    fn output(&self) -> String {
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
    fn wait(self, within: Duration) -> Ended {
        let end = Instant::now() + within;
        let last = self.events.iter().zip(&self.members).map(|(events, member)| {
            loop {
                match events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    Ok(event @ (MemberEvent::Exit(_) | MemberEvent::Failed(_))) => return event,
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

fn passes(vcpus: &[u16], tests: &str, more: &str) -> Option<Ended> {
    let cluster = Cluster::start(vcpus)?;
    let mhz = cluster.members[0].plan().tsc_khz / 1000;
    cluster.boot(&format!("cpus={} deadline=20 timer_mhz={mhz} test={tests} {more}", vcpus.len()));
    let ended = cluster.wait(Duration::from_secs(100));
    for test in tests.split(',') {
        let want = format!("BARE {test} PASS");
        assert!(ended.output.contains(&want), "no {want:?} in\n{}\n{:?}", ended.output, ended.last);
    }
    for event in &ended.last {
        assert_eq!(*event, MemberEvent::Exit(VmExit::PowerOff), "{}", ended.output);
    }
    eprintln!("{}", ended.output);
    Some(ended)
}

#[test]
fn one_member_runs_the_guest() {
    passes(&[0, 0], "counter,ipi,ipimodes,timer,pages", "iterations=1000 rounds=10 count=20");
}

#[test]
fn timer_modes_on_one_member() {
    for mode in ["oneshot", "periodic"] {
        passes(&[0], "timer", &format!("mode={mode} count=20"));
    }
}

#[test]
fn xapic_mode_on_one_member() {
    passes(&[0, 0], "counter,ipi,ipimodes,timer", "apic=xapic iterations=500 rounds=5 count=10");
}

#[test]
fn two_members_are_one_machine() {
    let tests = "counter,pages,private,ipi,ipimodes,timer,tsc,litmus";
    let Some(ended) = passes(&[0, 1], tests, "iterations=1000 rounds=10 count=20") else { return };
    let remote: u64 = ended.stats.iter().map(|s| s.memory.faults.remote()).sum();
    assert!(remote > 0, "no page moved: {:#?}", ended.stats);
    assert!(ended.stats[0].vcpus[0].ipis_remote > 0 && ended.stats[1].vcpus[0].remote_accesses == 0);
}

#[test]
fn three_members_with_four_vcpus() {
    passes(&[0, 0, 1, 2], "counter,ipi,ipimodes,pages", "iterations=300 rounds=5");
}

#[test]
fn a_triple_fault_and_a_reset_end_all_members_with_their_name() {
    for (test, cpu) in [("triple", 1), ("reset", 1)] {
        let Some(cluster) = Cluster::start(&[0, 1]) else { return };
        cluster.boot(&format!("cpus=2 deadline=20 test={test} cpu={cpu}"));
        let ended = cluster.wait(Duration::from_secs(60));
        for event in &ended.last {
            let as_expected = match event {
                MemberEvent::Exit(VmExit::TripleFault { vcpu, .. }) => test == "triple" && *vcpu == cpu,
                MemberEvent::Exit(VmExit::Reset) => test == "reset",
                _ => false,
            };
            assert!(as_expected, "{test}: {event:?}\n{}", ended.output);
        }
    }
}

#[test]
fn stop_ends_a_running_guest_everywhere() {
    let Some(cluster) = Cluster::start(&[0, 1]) else { return };
    cluster.boot("cpus=2 test=loop shared=1");
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    cluster.members[1].stop("enough");
    let ended = cluster.wait(Duration::from_secs(20));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let MemberEvent::Exit(VmExit::Stopped { reason }) = &ended.last[1] else { panic!("{:?}", ended.last) };
    assert_eq!(reason, "enough");
    let MemberEvent::Exit(VmExit::Stopped { reason }) = &ended.last[0] else { panic!("{:?}", ended.last) };
    assert!(reason.contains("member 1 (host1"), "{reason}");
}
