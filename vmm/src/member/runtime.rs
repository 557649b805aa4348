//! The member: joins its peers, owns every thread of the VM on this host.
//!
//! Order of life: [`Member::join`] connects (mesh), maps memory, starts the fabric, agrees on the clock, makes
//! VM, vCPUs and devices; [`Member::load`] fills memory; [`Member::run`] lets the vCPU threads go;
//! [`super::watch`] decides when it is over; [`Member::stop`] and `Drop` take everything down in the reverse
//! order.

use super::event::MemberEvent;
use super::fault;
use super::machine::MemberMachine;
use super::peers::{Door, Peers};
use super::placement::Placement;
use super::plan::{BootImages, MemberPlan, Origin};
use super::ram::GuestRam;
use super::rest::Rest;
use super::switchboard::Switchboard;
use super::travel::Travels;
use super::watch::{Happening, Watch};
use crate::acpi::{self, AcpiError};
use crate::boot::{self, BootError, BootRequest};
use crate::devices::{ConsoleHandle, Platform, PlatformError, spec};
use crate::fabric::Fabric;
use crate::interrupts::lapic::LocalApic;
use crate::kvm::cpuid::Cores;
use crate::kvm::exec::Runner;
use crate::kvm::gate::Gate;
use crate::kvm::handle::VcpuHandle;
use crate::kvm::still::VcpuStill;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::{KvmError, Vm};
use crate::time::discipline::{Discipline, SAME_FREQUENCY_PPM};
use crate::time::tsc::{GuestClock, TscScale, needs_scaling};
use dsm::addr::MemberId;
use dsm::node::{Dsm, DsmError};
use dsm::transport::mesh::MeshError;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest silence of a peer while the guest runs, whatever the plan's deadline for starting is.
const RUNNING_DEADLINE: Duration = Duration::from_secs(20);
/// Longest wait in `stop` for each of: vCPU threads, peers' farewells, devices' workers.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// Why a member did not start.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The plan contradicts itself.
    #[error("bad plan: {0}")]
    Plan(String),
    /// Called in the wrong order, or at the wrong member.
    #[error("{0}")]
    Order(&'static str),
    /// A peer is missing.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// The shared memory can't be made or filled.
    #[error(transparent)]
    Dsm(#[from] DsmError),
    /// Plain memory can't be made or filled.
    #[error("guest memory: {0}")]
    Memory(String),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device can't be made.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// The VM can't be described to the guest.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The images can't be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU of a checkpoint can't be set up.
    #[error(transparent)]
    Vcpu(#[from] migration::vcpu::StateError),
    /// The coordinator's clock is not known.
    #[error("member 0 did not answer enough clock samples within {0:?}")]
    Clock(Duration),
    /// A peer failed to start.
    #[error("another member went away before the guest ran; its own message says why")]
    PeerLeft,
    /// Frequencies differ too much.
    #[error(
        "this host's TSC runs at {host_khz} kHz, the guest's is to run at {guest_khz} kHz, and this CPU can't scale it: \
         use hosts of one frequency, or let this one be the first member"
    )]
    TscFrequency {
        /// Of this host.
        host_khz: u32,
        /// Of the plan.
        guest_khz: u32,
    },
    /// A thread or a socket can't be had.
    #[error("can't start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// What `run` and `stop` take apart.
struct Parts {
    /// vCPUs that have not been let go yet.
    waiting: Vec<Vcpu>,
    vcpu_threads: Vec<JoinHandle<()>>,
    fabric_threads: Vec<JoinHandle<()>>,
    other_threads: Vec<JoinHandle<()>>,
    machine: Option<Arc<MemberMachine>>,
    ram: Option<GuestRam>,
    vm: Option<Vm>,
    loaded: bool,
    running: bool,
    /// vCPUs of a checkpoint, until they run.
    still: Vec<VcpuStill>,
    /// Runs of pages that are in the checkpoint's image.
    adopted: Vec<(u64, u32)>,
    door: Option<Door>,
}

/// A member. Dropping it stops its vCPUs and joins its threads.
pub struct Member {
    plan: MemberPlan,
    switchboard: Arc<Switchboard>,
    fabric: Arc<Fabric>,
    clock: Arc<GuestClock>,
    console: Option<ConsoleHandle>,
    happenings: Sender<Happening>,
    events: Sender<MemberEvent>,
    parts: Mutex<Parts>,
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Member").field("vm", &self.plan.vm).field("me", &self.plan.me).finish_non_exhaustive()
    }
}

fn start(what: &'static str) -> impl Fn(std::io::Error) -> MemberError {
    move |source| MemberError::Start { what, source }
}

impl Member {
    /// Connects to all peers, sets up memory, KVM, devices and vCPUs. Blocks until all peers have joined or
    /// `plan.deadline` has passed; nothing of the guest runs yet.
    ///
    /// # Errors
    /// What went wrong, and with which peer.
    pub fn join(
        plan: MemberPlan,
        listener: TcpListener,
        events: Sender<MemberEvent>,
    ) -> Result<Member, MemberError> {
        let topology = Arc::new(plan.topology.clone());
        plan.check()?;
        fault::at(plan.me, "join").map_err(MemberError::Plan)?;
        let deadline = plan.deadline.min(RUNNING_DEADLINE);
        let end = Instant::now() + plan.deadline;
        let mut peers = Peers::connect(&plan, listener)?;
        let vm = Vm::new()?;
        let links = std::mem::take(&mut peers.pages);
        let ram = GuestRam::new(&plan, deadline, links, peers.pages_again())?;
        for (slot, (gpa, len, hva)) in (0u32..).zip(ram.slots()) {
            // SAFETY: guest memory of ours; `Parts` keeps it until all vCPUs are gone.
            unsafe { vm.map(slot, *gpa, *len, *hva) }?;
        }

        let (again, door) = (peers.fabric_again(), peers.door());
        let fabric =
            Fabric::new(plan.me, topology.epoch, deadline, again, peers.fabric).map_err(start("a link"))?;
        let fabric = Arc::new(fabric);
        if let Some(standing) = &plan.standing {
            fabric.set_leader(standing.leader);
        }
        let lives_here = |member: &MemberId| *member == plan.me && plan.standing.is_none();
        let placement = Placement::new(&topology.vcpus);
        if let Some(standing) = &plan.standing {
            for (id, member) in (0u32..).zip(&standing.vcpus) {
                placement.set(id, *member, standing.placement);
            }
        }
        let vcpus = topology.vcpus.iter().filter(|member| lives_here(member)).count();
        let gate = Arc::new(Gate::default());
        let handles: Vec<_> = (0u32..)
            .zip(&topology.vcpus)
            .map(|(id, member)| Arc::new(VcpuHandle::new(id, lives_here(member), gate.clone())))
            .collect();
        let home = board_of(&plan)?;
        let board = Switchboard::new(plan.me, placement, handles, fabric.clone(), home);
        let switchboard = Arc::new(board);
        let (happenings, happened) = channel();
        let (platform_tx, platform_rx) = channel();
        let platform =
            Platform::build(&plan.devices, plan.me, ram.mmap().clone(), switchboard.clone(), platform_tx)?;
        let console = platform.serial_console();

        let clock = Arc::new(guest_clock(&plan, &vm)?);
        let follows = plan.me != MemberId(0) && !is_software_kvm();
        let machine = Arc::new(MemberMachine {
            switchboard: switchboard.clone(),
            platform,
            fabric: fabric.clone(),
            clock: clock.clone(),
            gate,
            discipline: follows.then(|| Discipline::new(clock.clone())),
            happenings: happenings.clone(),
            rest: Rest::new(vcpus, ram.dsm().map(Dsm::handle)),
            travels: Travels::default(),
        });
        let watch = Watch {
            topology: topology.clone(),
            switchboard: switchboard.clone(),
            fabric: fabric.clone(),
            events: events.clone(),
            happenings: happened,
        };
        let spawn = |name: &str| thread::Builder::new().name(name.into());
        let mut parts = Parts {
            waiting: Vec::new(),
            vcpu_threads: Vec::new(),
            fabric_threads: Vec::new(),
            other_threads: vec![spawn("watch").spawn(move || watch.run()).map_err(start("a thread"))?],
            machine: Some(machine.clone()),
            ram: Some(ram),
            vm: None,
            loaded: plan.me != MemberId(0) && plan.origin == Origin::Boot,
            running: false,
            still: Vec::new(),
            adopted: Vec::new(),
            door,
        };
        let forward = happenings.clone();
        let forwarder = spawn("platform-events").spawn(move || {
            platform_rx.iter().map(Happening::Platform).for_each(|h| drop(forward.send(h)));
        });
        parts.other_threads.push(forwarder.map_err(start("a thread"))?);
        // From here on `Drop` cleans up if something fails.
        let member = Member {
            switchboard,
            fabric: fabric.clone(),
            clock: clock.clone(),
            console,
            happenings: happenings.clone(),
            events,
            parts: Mutex::new(parts),
            plan,
        };
        let mut parts = member.parts();
        if let Some(dsm) = parts.ram.as_ref().and_then(GuestRam::dsm) {
            // `Sender` is Sync, so this is called from whatever thread of the memory fails.
            dsm.on_failure(Box::new(move |failure| drop(happenings.send(Happening::Memory(failure)))));
        }
        parts.fabric_threads = fabric.start(&machine).map_err(start("a thread"))?;
        if let Some(discipline) = &machine.discipline {
            while !discipline.is_settled() {
                if fabric.any_leaving() {
                    return Err(MemberError::PeerLeft);
                }
                if Instant::now() >= end {
                    return Err(MemberError::Clock(member.plan.deadline));
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
        for handle in member.switchboard.vcpus() {
            parts.waiting.push(member.new_vcpu(&vm, handle)?);
        }
        parts.vm = Some(vm);
        drop(parts);
        Ok(member)
    }

    /// A vCPU of the VM as this host's KVM has it after power-up.
    fn new_vcpu(&self, vm: &Vm, handle: &VcpuHandle) -> Result<Vcpu, MemberError> {
        let cores = Cores::of(&self.plan.topology.vcpus);
        let cpuid = self.plan.cpuid.for_vcpu(handle.id(), cores, self.plan.tsc_khz);
        let base = LocalApic::new(handle.id(), handle.id() == 0).base();
        Ok(Vcpu::new(vm, handle.id(), base, &cpuid, &self.clock)?)
    }

    /// Makes a vCPU that may come from another member, and its thread, unless they are there from an earlier time.
    pub(super) fn make_vcpu(&self, id: u32) -> Result<(), MemberError> {
        let mut parts = self.parts();
        let (Some(vm), Some(machine), Some(handle)) =
            (&parts.vm, &parts.machine, self.switchboard.handle(id))
        else {
            return Err(MemberError::Order("the guest does not run, or has no such vCPU"));
        };
        if handle.has_thread() {
            return Ok(());
        }
        let vcpu = self.new_vcpu(vm, handle)?;
        let runner = Runner::absent(vcpu, handle.clone(), self.clock.clone(), machine.clone());
        let thread = self.spawn_vcpu(handle, runner)?;
        parts.vcpu_threads.push(thread);
        Ok(())
    }

    fn spawn_vcpu(
        &self,
        handle: &VcpuHandle,
        runner: Runner<MemberMachine>,
    ) -> Result<JoinHandle<()>, MemberError> {
        let id = handle.id();
        handle.open_desk();
        let tell = self.happenings.clone();
        let thread = thread::Builder::new().name(format!("vcpu-{id}")).spawn(move || {
            // The watch thread outlives this one, unless the process ends.
            let _ = tell.send(Happening::VcpuStarted(id));
            let end = runner.run();
            let _ = tell.send(Happening::VcpuEnded(id, end));
        });
        thread.map_err(start("a vCPU thread"))
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts kernel, initrd, boot parameters and ACPI tables into guest memory. Member 0 only, once, before
    /// [`Member::run`] of any member.
    ///
    /// # Errors
    /// A damaged image, or one that does not fit.
    pub fn load(&self, images: BootImages) -> Result<(), MemberError> {
        let mut parts = self.parts();
        if self.plan.me != MemberId(0) {
            return Err(MemberError::Order("only member 0 loads the kernel"));
        }
        if parts.running || parts.loaded {
            return Err(MemberError::Order("a kernel is loaded already"));
        }
        let (Some(machine), Some(ram)) = (&parts.machine, &parts.ram) else {
            return Err(MemberError::Order("the member has been stopped"));
        };
        let acpi = acpi::build(&self.plan.topology, &machine.platform.windows())?;
        let cmdline = with_tsc_options(&images.cmdline, self.plan.tsc_khz);
        let request = BootRequest {
            kernel: &images.kernel,
            initrd: images.initrd.as_deref(),
            cmdline: &cmdline,
            memory: &self.plan.topology.memory,
            loader: self.plan.me,
            acpi: &acpi,
        };
        let entry =
            boot::load_kernel(&request, &mut |gpa, bytes| ram.preload(gpa, bytes).map_err(Into::into))?;
        let Some(vcpu) = parts.waiting.iter().find(|v| v.id() == 0) else {
            return Err(MemberError::Plan("vCPU 0 does not live on member 0".into()));
        };
        let mut sregs = vcpu.reset_sregs();
        entry.apply_sregs(&mut sregs);
        vcpu.set_state(&entry.regs(), &sregs)?;
        parts.loaded = true;
        Ok(())
    }

    /// Lets the vCPUs go: vCPU 0 starts at the kernel's entry, all others wait for their start-up IPI.
    /// Returns at once; what happens then comes over the event channel.
    ///
    /// # Errors
    /// Not loaded yet, or already running.
    pub fn run(&self) -> Result<(), MemberError> {
        let mut parts = self.parts();
        if !parts.loaded {
            return Err(MemberError::Order("no kernel and no checkpoint is loaded"));
        }
        if std::mem::replace(&mut parts.running, true) {
            return Err(MemberError::Order("the member runs already"));
        }
        let Some(machine) = parts.machine.clone() else {
            return Err(MemberError::Order("the member has been stopped"));
        };
        if let Some(discipline) = &machine.discipline {
            discipline.start();
        }
        for vcpu in std::mem::take(&mut parts.waiting) {
            let Some(handle) = self.switchboard.handle(vcpu.id()) else { continue };
            let still = parts.still.iter().find(|still| still.id == vcpu.id());
            let (clock, machine) = (self.clock.clone(), machine.clone());
            let runner = match still {
                Some(still) => Runner::restored(vcpu, handle.clone(), clock, machine, still)?,
                None => Runner::new(vcpu, handle.clone(), clock, machine),
            };
            parts.vcpu_threads.push(self.spawn_vcpu(handle, runner)?);
        }
        parts.still.clear();
        // Whoever started the member may have gone.
        let _ = self.events.send(MemberEvent::Running);
        Ok(())
    }

    /// Ends the guest on this member: vCPUs leave, threads end, peers are told. Idempotent; bounded by about
    /// ten seconds. A vCPU or device thread that can't be ended (it waits for a page of a dead peer) is left
    /// behind together with the memory it waits for, until the process ends.
    pub fn stop(&self, reason: &str) {
        // The watch thread may be gone if stop was called before.
        let _ = self.happenings.send(Happening::Stop(reason.to_owned()));
        self.switchboard.handles().iter().for_each(|v| v.stop());
        self.fabric.cancel(reason);
        let mut parts = self.parts();
        let stopped = join_within(&mut parts.vcpu_threads, STOP_GRACE);
        if parts.vm.is_some() {
            let end = Instant::now() + STOP_GRACE;
            while !self.fabric.all_leaving() && Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
            }
        }
        self.fabric.close();
        let quiet = join_within(&mut parts.fabric_threads, STOP_GRACE);
        parts.waiting.clear();
        let devices = parts.machine.take().is_none_or(retire_machine);
        if let Some(ram) = parts.ram.take() {
            if stopped && quiet && devices {
                parts.vm = None;
                // SAFETY: all vCPU threads, fabric threads and devices have ended.
                unsafe { ram.retire() };
            } else {
                tracing::warn!("threads of {} wait for memory; they end with the process", self.plan.vm);
                std::mem::forget((ram, parts.vm.take()));
            }
        }
        let _ = self.happenings.send(Happening::Quit);
        join_within(&mut parts.other_threads, STOP_GRACE);
    }

    /// The serial console, on the member that had the serial port at the start, wherever that is now.
    pub fn console(&self) -> Option<ConsoleHandle> {
        self.console.clone()
    }

    /// The machine, while the guest runs.
    pub(super) fn running_machine(&self) -> Option<Arc<MemberMachine>> {
        let parts = self.parts();
        parts.machine.clone().filter(|_| parts.running)
    }

    /// Looks at the machine; it can't be taken down meanwhile.
    pub(super) fn with_machine<T>(&self, look: impl FnOnce(Option<&MemberMachine>) -> T) -> T {
        look(self.parts().machine.as_deref())
    }

    pub(super) fn with_ram<T>(&self, work: impl FnOnce(&GuestRam) -> T) -> Result<T, String> {
        self.parts().ram.as_ref().map(work).ok_or_else(|| "the member has been stopped".into())
    }

    pub(super) fn note_adopted(&self, runs: Vec<(u64, u32)>) {
        self.parts().adopted.extend(runs);
    }

    pub(super) fn take_adopted(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.parts().adopted)
    }

    /// Before the guest runs.
    pub(super) fn restore_with(
        &self,
        work: impl FnOnce(&MemberMachine) -> Result<(), String>,
    ) -> Result<(), String> {
        let parts = self.parts();
        match &parts.machine {
            Some(machine) if !parts.running => work(machine),
            _ => Err("the guest runs already, or the member has been stopped".into()),
        }
    }

    /// The vCPUs of this member as they were.
    pub(super) fn keep_vcpus(&self, still: Vec<VcpuStill>) -> Result<(), MemberError> {
        let mut parts = self.parts();
        if let Some(missing) = parts.waiting.iter().find(|v| !still.iter().any(|s| s.id == v.id())) {
            return Err(MemberError::Plan(format!("the checkpoint has no vCPU {}", missing.id())));
        }
        parts.still = still;
        parts.loaded = true;
        Ok(())
    }

    pub(super) fn switchboard(&self) -> &Switchboard {
        &self.switchboard
    }

    pub(super) fn fabric(&self) -> &Fabric {
        &self.fabric
    }

    /// Connects with somebody who is to become a member.
    ///
    /// # Errors
    /// It is not there by `end`, or the VM does not run.
    pub(super) fn meet(&self, peer: MemberId, addr: SocketAddr, end: Instant) -> Result<(), String> {
        let door = self.parts().door.clone().ok_or("the member has been stopped")?;
        let failed = |e: &dyn std::fmt::Display| format!("can't connect with {peer} at {addr}: {e}");
        let (pages, fabric) = door.meet(peer, addr, end).map_err(|e| failed(&e))?;
        let machine = self.running_machine().ok_or("the guest does not run")?;
        let dsm = self.with_ram(|ram| ram.dsm().map(Dsm::handle))?.ok_or("the memory is not shared")?;
        // Of one that had the number before, and did not become a member.
        dsm.disconnect(peer).map_err(|e| failed(&e))?;
        dsm.connect(peer, pages).map_err(|e| failed(&e))?;
        let threads = self.fabric.admit(peer, fabric, &machine).map_err(|e| failed(&e))?;
        let mut parts = self.parts();
        parts.fabric_threads.retain(|thread| !thread.is_finished());
        parts.fabric_threads.extend(threads);
        Ok(())
    }

    /// Nothing goes to or comes from this peer any more, which is no member.
    pub(super) fn part(&self, peer: MemberId) {
        if let Some(door) = self.parts().door.clone() {
            door.part(peer);
        }
        self.fabric.part(peer);
    }

    pub(super) fn clock(&self) -> &GuestClock {
        &self.clock
    }

    /// Can the guest's TSC be set on this host?
    pub(super) fn can_stop_time(&self) -> bool {
        !is_software_kvm()
    }

    /// Keeps what is typed from the guest, or no longer.
    pub(super) fn hold_input(&self, hold: bool) {
        let now = self.parts().machine.as_ref().and_then(|machine| machine.platform.serial_console());
        self.console.iter().chain(&now).for_each(|console| console.hold(hold));
    }

    /// The serial port may have come back to where people look at it.
    pub(super) fn follow_console(&self, platform: &Platform) {
        if let (Some(console), Some(now)) = (&self.console, platform.serial_console()) {
            console.follow(&now);
        }
    }

    /// The orders this member was started with.
    pub fn plan(&self) -> &MemberPlan {
        &self.plan
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop("the member was dropped");
    }
}

/// Waits for threads; false if some did not end in time. Those that did are joined.
fn join_within(threads: &mut Vec<JoinHandle<()>>, grace: Duration) -> bool {
    let end = Instant::now() + grace;
    while threads.iter().any(|t| !t.is_finished()) && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
    let (done, stuck): (Vec<_>, Vec<_>) = threads.drain(..).partition(JoinHandle::is_finished);
    for thread in done {
        if thread.join().is_err() {
            tracing::error!("a thread panicked");
        }
    }
    *threads = stuck;
    threads.is_empty()
}

/// Drops the devices, whose workers may wait for memory. False if somebody still has them or they don't end.
fn retire_machine(machine: Arc<MemberMachine>) -> bool {
    let Some(machine) = Arc::into_inner(machine) else { return false };
    match thread::Builder::new().name("retire-devices".into()).spawn(move || drop(machine)) {
        Ok(thread) => join_within(&mut vec![thread], STOP_GRACE),
        Err(_) => false,
    }
}

/// The member that has the board.
fn board_of(plan: &MemberPlan) -> Result<MemberId, MemberError> {
    let windows = spec::windows(&plan.devices).map_err(PlatformError::from)?;
    Ok(windows.get(spec::BOARD_WINDOW).map_or(MemberId(0), |window| window.member))
}

fn is_software_kvm() -> bool {
    !["kvm_intel", "kvm_amd"]
        .iter()
        .any(|m| std::path::Path::new("/sys/module").join(m).join("parameters").exists())
}

/// The clock of this member's vCPUs. The coordinator's starts at zero now; the others' are set by samples
/// before any vCPU exists.
fn guest_clock(plan: &MemberPlan, vm: &Vm) -> Result<GuestClock, MemberError> {
    if is_software_kvm() {
        // Its guests read the host's TSC, whatever the offset.
        return Ok(GuestClock::new(TscScale::IDENTITY, plan.tsc_khz, 0));
    }
    let host_khz = super::facts::host_tsc_khz().unwrap_or(plan.tsc_khz);
    let scale = if !needs_scaling(plan.tsc_khz, host_khz) {
        TscScale::IDENTITY
    } else if vm.has_tsc_scaling() {
        let is_intel = std::path::Path::new("/sys/module/kvm_intel/parameters").exists();
        TscScale::new(plan.tsc_khz, host_khz, if is_intel { 48 } else { 32 })
    } else {
        let apart = u64::from(plan.tsc_khz.abs_diff(host_khz)) * 1_000_000;
        if apart > u64::from(host_khz) * SAME_FREQUENCY_PPM {
            return Err(MemberError::TscFrequency { host_khz, guest_khz: plan.tsc_khz });
        }
        // The same frequency, measured differently by the two kernels: the samples show the real rate.
        TscScale::IDENTITY
    };
    let clock = GuestClock::new(scale, plan.tsc_khz, 0);
    let start = match plan.origin {
        Origin::Checkpoint { tsc: Some(tsc) } => tsc,
        _ => 0,
    };
    clock.set_common_offset(start.wrapping_sub(clock.scaled_now()));
    Ok(clock)
}

/// Tells Linux the TSC's frequency and that it can be trusted, as there is no PIT to measure it with; what the
/// user says has precedence.
fn with_tsc_options(cmdline: &str, tsc_khz: u32) -> String {
    let given =
        |name: &str| cmdline.split_ascii_whitespace().any(|word| word.split('=').next() == Some(name));
    let mut result = cmdline.trim().to_owned();
    let mut add = |name: &str, option: String| {
        if !given(name) {
            if !result.is_empty() {
                result.push(' ');
            }
            result.push_str(&option);
        }
    };
    add("tsc_early_khz", format!("tsc_early_khz={tsc_khz}"));
    add("tsc", "tsc=reliable".into());
    add("no_timer_check", "no_timer_check".into());
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_clock_options_win() {
        assert_eq!(with_tsc_options("", 5), "tsc_early_khz=5 tsc=reliable no_timer_check");
        assert_eq!(
            with_tsc_options("quiet tsc=unstable", 5),
            "quiet tsc=unstable tsc_early_khz=5 no_timer_check"
        );
    }
}
