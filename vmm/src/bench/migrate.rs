//! How long the guest is without a vCPU that moves: two members in this process, connected over loopback, and a guest
//! whose only vCPU counts in a register.
//!
//! The floor is what nothing could avoid: two round trips of a loopback connection with an image's bytes one way, and
//! reading and setting the state with the ioctls alone. One round trip and one get and set follow each move, at the same
//! pace: so both see the same other load, the same cold caches, and a guest that keeps a processor busy.

use crate::devices::DeviceSpec;
use crate::kvm::vm::{KvmError, Vm};
use crate::member::travel::Departed;
use crate::member::{BootImages, HostError, HostFacts, Member, MemberError, MemberPlan, Origin, PageTuning};
use crate::topology::{MemberDesc, Topology};
use dsm::addr::{Epoch, HomeRange, MemberId};
use kvm_ioctls::VcpuFd;
use migration::vcpu::{StateError, VcpuState, msr_numbers, present};
use serde::Serialize;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// Longest wait for any one step.
const LIMIT: Duration = Duration::from_secs(10);
/// Guest memory per member.
const MEMORY: u64 = 16 << 20;
/// Moves before those that count: pages and caches settle.
const WARM_UP: u32 = 10;
/// Between a move and what is measured next.
const PACE: Duration = Duration::from_millis(2);

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct MigrateOptions {
    /// Moves that count.
    pub moves: u32,
}

/// The benchmark could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// This host can't run guests.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A member did not start.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A state could not be read or set.
    #[error(transparent)]
    State(#[from] StateError),
    /// Sockets of the floor.
    #[error("loopback connection: {0}")]
    Io(#[from] io::Error),
    /// A move failed.
    #[error("a move failed: {0}")]
    Move(String),
}

/// Microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// What nothing could avoid, microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// A round trip: an image's bytes there, a small answer back. Median.
    pub rtt_us: f64,
    /// Reading and setting a vCPU's state. Median.
    pub get_set_us: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MigrateReport {
    /// `migrate`.
    pub bench: &'static str,
    /// Moves.
    pub moves: usize,
    /// From the last instruction at the source to the first at the target.
    pub downtime_us: Percentiles,
    /// Bytes of one image.
    pub state_bytes: u64,
    /// The floor.
    pub floor: Floor,
    /// Median downtime over 2 x rtt + get and set.
    pub ratio: f64,
}

impl std::fmt::Display for MigrateReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} moves of a vCPU of {} bytes", self.moves, self.state_bytes)?;
        writeln!(f, "downtime   p50 {:8.1} us   p99 {:8.1} us", self.downtime_us.p50, self.downtime_us.p99)?;
        writeln!(
            f,
            "floor      round trip {:.1} us, get and set {:.1} us",
            self.floor.rtt_us, self.floor.get_set_us
        )?;
        write!(f, "ratio      {:.2} of 2 round trips, get and set", self.ratio)
    }
}

/// Runs the benchmark; `progress` hears how many of how many moves are done.
///
/// # Errors
/// [`BenchError`].
pub fn run(options: MigrateOptions, mut progress: impl FnMut(u32, u32)) -> Result<MigrateReport, BenchError> {
    let members = start()?;
    let bare = Bare::new()?;
    let mut wire = None;
    let all = options.moves.max(1) + WARM_UP;
    let (mut downtimes, mut trips, mut ioctls) = (Vec::new(), Vec::new(), Vec::new());
    let mut state_bytes = 0;
    for n in 0..all {
        let (from, to) = if n % 2 == 0 { (0u16, 1u16) } else { (1, 0) };
        let (Some(source), Some(target)) = (members.get(usize::from(from)), members.get(usize::from(to)))
        else {
            return Err(BenchError::Move("no such member".into()));
        };
        target.expect(&[0])?;
        let epoch = 2 * u64::from(n) + 1;
        match source.depart(&[0], MemberId(to), epoch, LIMIT).pop() {
            Some((_, Departed::Moved { bytes })) => state_bytes = bytes,
            other => return Err(BenchError::Move(format!("{other:?}"))),
        }
        // Some instructions on the other side.
        std::thread::sleep(PACE);
        let places = [(0, MemberId(to), epoch)];
        let times = target.placed(&places);
        source.placed(&places);
        let wire = match &mut wire {
            Some(wire) => wire,
            none => none.insert(Wire::new(state_bytes)?),
        };
        let trip = wire.round_trip()?;
        std::thread::sleep(PACE);
        let get_set = bare.get_and_set()?;
        if n >= WARM_UP {
            downtimes.extend(times.iter().map(|(_, ns)| micros(Duration::from_nanos(*ns))));
            trips.push(trip);
            ioctls.push(get_set);
            if (n + 1 - WARM_UP) % 50 == 0 || n + 1 == all {
                progress(n + 1 - WARM_UP, all - WARM_UP);
            }
        }
    }
    members.iter().for_each(|m| m.stop("the benchmark is done"));
    let floor = Floor { rtt_us: percentile(&mut trips, 50), get_set_us: percentile(&mut ioctls, 50) };
    let downtime_us =
        Percentiles { p50: percentile(&mut downtimes, 50), p99: percentile(&mut downtimes, 99) };
    let ratio = downtime_us.p50 / (2.0 * floor.rtt_us + floor.get_set_us);
    Ok(MigrateReport { bench: "migrate", moves: downtimes.len(), downtime_us, state_bytes, floor, ratio })
}

fn start() -> Result<Vec<Member>, BenchError> {
    let facts = HostFacts::probe()?;
    let listeners = [(); 2].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let listeners = listeners.into_iter().collect::<io::Result<Vec<_>>>()?;
    let mut members = Vec::new();
    for (n, listener) in (0u16..).zip(&listeners) {
        members.push(MemberDesc { id: MemberId(n), host: format!("h{n}"), addr: listener.local_addr()? });
    }
    let topology = Topology {
        epoch: Epoch(1),
        members,
        vcpus: vec![MemberId(0)],
        memory: (0..2)
            .map(|n| HomeRange { start: u64::from(n) * MEMORY, len: MEMORY, home: MemberId(n) })
            .collect(),
        distances: vec![vec![10, 20], vec![20, 10]],
    };
    let joins: Vec<_> = (0u16..)
        .zip(listeners)
        .map(|(me, listener)| {
            let plan = MemberPlan {
                vm: "bench".into(),
                me: MemberId(me),
                topology: topology.clone(),
                secret: None,
                cpuid: facts.cpuid.clone(),
                tsc_khz: facts.tsc_khz,
                devices: vec![DeviceSpec::Serial { member: MemberId(0), log: None }],
                pages: PageTuning::default(),
                deadline: LIMIT,
                origin: Origin::Boot,
                standing: None,
            };
            // Nobody listens to its events.
            std::thread::spawn(move || Member::join(plan, listener, channel().0))
        })
        .collect();
    let mut members = Vec::new();
    for join in joins {
        let joined = join.join().map_err(|_| BenchError::Move("a member panicked".into()))?;
        members.push(joined?);
    }
    if let Some(first) = members.first() {
        first.load(BootImages { kernel: guest(), initrd: None, cmdline: String::new() })?;
    }
    for member in &members {
        member.run()?;
    }
    // It is in its loop by then.
    std::thread::sleep(Duration::from_millis(50));
    Ok(members)
}

/// A kernel that counts: `inc rax; jmp -5`.
fn guest() -> Vec<u8> {
    super::kernel::elf(&[0x48, 0xFF, 0xC0, 0xEB, 0xFB])
}

/// A loopback connection whose other end answers so many bytes with 48.
struct Wire {
    near: TcpStream,
    image: Vec<u8>,
}

impl Wire {
    const ANSWER: usize = 48;

    fn new(bytes: u64) -> Result<Wire, BenchError> {
        let len = usize::try_from(bytes).unwrap_or(1 << 13);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_nodelay(true)?;
        }
        near.set_read_timeout(Some(LIMIT))?;
        // Ends when the near end is closed.
        std::thread::spawn(move || {
            let mut buffer = vec![0; len];
            while far.read_exact(&mut buffer).is_ok() && far.write_all(&[1; Wire::ANSWER]).is_ok() {}
        });
        Ok(Wire { near, image: vec![7u8; len] })
    }

    fn round_trip(&mut self) -> Result<f64, BenchError> {
        let start = Instant::now();
        self.near.write_all(&self.image)?;
        self.near.read_exact(&mut [0; Wire::ANSWER])?;
        Ok(micros(start.elapsed()))
    }
}

/// Two vCPUs that never run.
struct Bare {
    a: VcpuFd,
    b: VcpuFd,
    numbers: Vec<u32>,
    _vm: Vm,
}

impl Bare {
    fn new() -> Result<Bare, BenchError> {
        let failed = |e: kvm_ioctls::Error| BenchError::Io(io::Error::from_raw_os_error(e.errno()));
        let kvm = kvm_ioctls::Kvm::new().map_err(failed)?;
        let numbers = msr_numbers(&kvm)?;
        let vm = Vm::new()?;
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(failed)?;
        let (a, b) = (vm.bare_vcpu(0)?, vm.bare_vcpu(1)?);
        for vcpu in [&a, &b] {
            vcpu.set_cpuid2(&cpuid).map_err(failed)?;
        }
        let numbers = present(&a, &numbers)?;
        Ok(Bare { a, b, numbers, _vm: vm })
    }

    /// Reads a vCPU's state and sets it in another.
    fn get_and_set(&self) -> Result<f64, BenchError> {
        let start = Instant::now();
        VcpuState::capture(&self.a, &self.numbers)?.restore(&self.b)?;
        Ok(micros(start.elapsed()))
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn percentile(values: &mut [f64], part: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() * part / 100).min(values.len().saturating_sub(1));
    values.get(index).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few() {
        assert_eq!(percentile(&mut [], 50), 0.0);
        assert_eq!(percentile(&mut [3.0, 1.0, 2.0], 50), 2.0);
        assert_eq!(percentile(&mut [3.0, 1.0, 2.0], 99), 3.0);
    }

    #[test]
    fn a_few_moves() {
        if let Err(e) = HostFacts::probe() {
            eprintln!("skipped: {e}");
            return;
        }
        let report = run(MigrateOptions { moves: 20 }, |_, _| {}).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(report.moves, 20);
        assert!(report.downtime_us.p50 > 0.0 && report.floor.get_set_us > 0.0, "{report}");
        eprintln!("{report}");
    }
}
