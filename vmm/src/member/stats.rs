//! What a member counts, in one serialisable snapshot.

use super::ram::GuestRam;
use super::runtime::Member;
use crate::time::discipline::Discipline;
use dsm::stats::{DsmSnapshot, PeerWaits};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::thread;

/// Counters of one vCPU. Exits are by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuStats {
    /// The vCPU's id.
    pub vcpu: u32,
    /// All returns of KVM_RUN.
    pub exits: u64,
    /// Port reads and writes.
    pub pio: u64,
    /// Memory-mapped reads and writes, APIC included.
    pub mmio: u64,
    /// RDMSR and WRMSR handled in user space.
    pub msr: u64,
    /// HLT.
    pub hlt: u64,
    /// Interrupt windows that were asked for.
    pub irq_window: u64,
    /// Kicks by a signal, and other interruptions.
    pub interrupted: u64,
    /// Interrupts handed to the guest.
    pub injections: u64,
    /// NMIs handed to the guest.
    pub nmis: u64,
    /// Inter-processor interrupts sent to vCPUs of this member.
    pub ipis_local: u64,
    /// Inter-processor interrupts sent to other members.
    pub ipis_remote: u64,
    /// Local APIC timer expiries.
    pub timer_fires: u64,
    /// Device accesses that another member answered.
    pub remote_accesses: u64,
    /// Time in HLT, or waiting for a start-up IPI, microseconds.
    pub halted_us: u64,
    /// Page faults by the member that answered them, while the vCPU lived on this one.
    #[serde(default)]
    pub waits: Vec<PeerWaits>,
}

/// Counters of one member.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemberStats {
    /// One entry per vCPU that lives here.
    pub vcpus: Vec<VcpuStats>,
    /// The memory: pages held, faults by kind, latencies, contended pages. Of a VM with one member only the
    /// resident size is counted, as nothing ever faults.
    pub memory: DsmSnapshot,
    /// Processors of the host; 0 if it does not say.
    #[serde(default)]
    pub host_cpus: u32,
    /// Bound of the clock disagreement with the coordinator, nanoseconds; 0 at the coordinator.
    pub clock_skew_bound_ns: u64,
    /// Fabric messages sent to peers.
    pub fabric_sent: u64,
    /// Fabric messages received from peers.
    pub fabric_received: u64,
    /// How often fabric connections to peers that broke were made again.
    #[serde(default)]
    pub fabric_reconnects: u64,
}

impl Member {
    /// Everything that is counted, as of now.
    pub fn stats(&self) -> MemberStats {
        let (vcpus, clock_skew_bound_ns) = self.with_machine(|machine| {
            let waits = |thread| machine.map(|m| m.rest.waits(thread)).unwrap_or_default();
            let vcpus = self.switchboard().vcpus();
            let vcpus = vcpus.map(|v| VcpuStats { waits: waits(v.thread()), ..v.stats() }).collect();
            (vcpus, machine.and_then(|m| m.discipline.as_ref()).map_or(0, Discipline::bound_ns))
        });
        let fabric = self.fabric();
        MemberStats {
            vcpus,
            // None once it has been stopped.
            memory: self.with_ram(GuestRam::snapshot).unwrap_or_default(),
            host_cpus: thread::available_parallelism().map_or(0, |n| u32::try_from(n.get()).unwrap_or(0)),
            clock_skew_bound_ns,
            fabric_sent: fabric.sent.load(Ordering::Relaxed),
            fabric_received: fabric.received.load(Ordering::Relaxed),
            fabric_reconnects: fabric.reconnects(),
        }
    }
}
