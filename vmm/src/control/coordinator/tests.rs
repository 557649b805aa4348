//! The whole control plane in one process: a fake host, members as tasks, a real launcher's conversation.

use super::link::Stream;
use super::{Spawner, Surroundings};
use crate::config::{MemberSpec, VmSpec};
use crate::control::api::PauseBody;
use crate::control::client::{Place, VmClient};
use crate::control::codec;
use crate::control::end::End;
use crate::control::fit;
use crate::control::host::{Guest, Host};
use crate::control::member_task;
use crate::control::ops::pause::PauseReport;
use crate::control::rundir;
use crate::control::spawn::ChildProcess;
use crate::control::view::{VmInfo, VmStatus};
use crate::control::wire::{FromCoordinator, ImageKind, Inherit, Role, ToCoordinator};
use crate::devices::ConsoleHandle;
use crate::devices::console::{ConsoleInput, Output};
use crate::member::travel::Departed;
use crate::member::{
    BootImages, Culprit, HostError, HostFacts, MemberEvent, MemberPlan, MemberReply, MemberStats, MemberTask,
    PageTuning, VcpuStats, VmExit,
};
use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::DuplexStream;

/// What the fake guest does.
#[derive(Clone, Debug, Default)]
struct Script {
    /// Event of this member, once it runs.
    /// Who says what, and after how many milliseconds.
    events: Vec<(u16, u64, MemberEvent)>,
    /// This member's host refuses.
    unfit: Option<u16>,
    /// Joining fails at this member.
    join_error: Option<u16>,
    /// Joining never ends at this member.
    join_hangs: Option<u16>,
    /// Stopping takes for ever.
    stop_hangs: bool,
    /// Loading fails.
    load_error: bool,
    /// This member can't be paused.
    pause_error: Option<u16>,
    /// This member never answers when asked to pause.
    pause_hangs: Option<u16>,
}

struct FakeHost {
    script: Script,
    me: u16,
    plans: Arc<Mutex<Vec<MemberPlan>>>,
    tasks: TaskLog,
}

/// What members were asked to do, in order.
type TaskLog = Arc<Mutex<Vec<(u16, MemberTask)>>>;

struct FakeGuest {
    script: Script,
    me: u16,
    vcpus: Vec<u32>,
    events: Mutex<Sender<MemberEvent>>,
    tasks: TaskLog,
    console: Option<(ConsoleHandle, Arc<Output>)>,
}

/// A console that echoes.
struct Echo(Arc<Output>);

impl ConsoleInput for Echo {
    fn push(&self, bytes: &[u8]) -> usize {
        self.0.write(bytes);
        bytes.len()
    }
}

impl Host for FakeHost {
    fn facts(&self) -> Result<HostFacts, HostError> {
        if self.script.unfit == Some(self.me) { Err(HostError::NoKvm) } else { Ok(fit::tests::facts()) }
    }

    fn join(
        &self,
        plan: MemberPlan,
        listener: TcpListener,
        events: Sender<MemberEvent>,
    ) -> Result<Arc<dyn Guest>, String> {
        assert_eq!(listener.local_addr().unwrap(), plan.topology.members[usize::from(self.me)].addr);
        self.plans.lock().unwrap().push(plan.clone());
        if self.script.join_error == Some(self.me) {
            return Err("the peer does not speak".into());
        }
        if self.script.join_hangs == Some(self.me) {
            std::thread::sleep(Duration::from_secs(3600));
        }
        let output = Arc::new(Output::default());
        let handle = ConsoleHandle::new(output.clone(), Arc::new(Echo(output.clone())));
        Ok(Arc::new(FakeGuest {
            script: self.script.clone(),
            me: self.me,
            vcpus: plan.topology.vcpus_of(plan.me).collect(),
            events: Mutex::new(events),
            tasks: self.tasks.clone(),
            console: (self.me == 0).then_some((handle, output)),
        }))
    }
}

impl Guest for FakeGuest {
    fn load(&self, images: BootImages) -> Result<(), String> {
        assert_eq!((images.kernel.len(), images.cmdline.as_str()), (3 << 20, "hello"));
        assert_eq!(images.initrd, Some(b"initrd".to_vec()));
        if self.script.load_error { Err("this is no kernel".into()) } else { Ok(()) }
    }

    fn run(&self) -> Result<(), String> {
        if let Some((_, output)) = &self.console {
            output.write(b"booting\n");
        }
        let events = self.events.lock().unwrap();
        let _ = events.send(MemberEvent::Running);
        for (_, delay, event) in self.script.events.iter().filter(|(me, ..)| *me == self.me).cloned() {
            let events = events.clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(delay));
                let _ = events.send(event);
            });
        }
        Ok(())
    }

    fn stop(&self, _: &str) {
        if self.script.stop_hangs {
            std::thread::sleep(member_task::STOP_DEADLINE + Duration::from_secs(2));
        }
    }

    fn stats(&self) -> MemberStats {
        let vcpus = self.vcpus.iter().map(|vcpu| VcpuStats { vcpu: *vcpu, exits: 5, ..VcpuStats::default() });
        MemberStats { vcpus: vcpus.collect(), ..MemberStats::default() }
    }

    fn task(&self, task: MemberTask) -> Result<MemberReply, String> {
        self.tasks.lock().unwrap().push((self.me, task.clone()));
        Ok(match task {
            MemberTask::Pause { .. } if self.script.pause_error == Some(self.me) => {
                return Err("vCPU 2 did not leave the guest".into());
            }
            MemberTask::Pause { .. } if self.script.pause_hangs == Some(self.me) => {
                std::thread::sleep(Duration::from_secs(4));
                MemberReply::Done
            }
            MemberTask::Pause { .. } => MemberReply::Paused { clock: Some(1000 + u64::from(self.me)) },
            MemberTask::Expect { .. } => MemberReply::Done,
            MemberTask::Depart { vcpus, .. } => {
                MemberReply::Departed(vcpus.iter().map(|id| (*id, Departed::Moved { bytes: 5000 })).collect())
            }
            MemberTask::Placed { .. } => MemberReply::Downtimes(Vec::new()),
            MemberTask::Traffic => MemberReply::Traffic { sent: 7, done: 7 },
            MemberTask::Clock => MemberReply::Clock(5000),
            MemberTask::Resume { .. } => MemberReply::Done,
            other => return Err(format!("not in this script: {other:?}")),
        })
    }

    fn console(&self) -> Option<ConsoleHandle> {
        self.console.as_ref().map(|(handle, _)| handle.clone())
    }
}

/// Members as tasks; the tasks of those in `killed` end when told to.
struct Tasks {
    script: Script,
    plans: Arc<Mutex<Vec<MemberPlan>>>,
    next: Mutex<u16>,
    tasks: Arc<Mutex<Vec<tokio::task::JoinHandle<()>>>>,
    log: TaskLog,
}

impl Spawner for Tasks {
    fn spawn(&self) -> io::Result<(Box<dyn Stream>, Option<ChildProcess>)> {
        let mut next = self.next.lock().unwrap();
        *next += 1;
        let host = FakeHost {
            script: self.script.clone(),
            me: *next,
            plans: self.plans.clone(),
            tasks: self.log.clone(),
        };
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        let task = tokio::spawn(async move {
            let inherit: Inherit = codec::recv(&mut theirs).await.unwrap();
            member_task::serve(theirs, Arc::new(host), inherit, Default::default()).await;
        });
        self.tasks.lock().unwrap().push(task);
        Ok((Box::new(ours), None))
    }
}

struct Vm {
    stream: DuplexStream,
    plans: Arc<Mutex<Vec<MemberPlan>>>,
    tasks: Arc<Mutex<Vec<tokio::task::JoinHandle<()>>>>,
    log: TaskLog,
    coordinator: tokio::task::JoinHandle<End>,
    root: tempfile::TempDir,
}

pub(in crate::control) fn spec(members: usize) -> VmSpec {
    VmSpec {
        name: "t".into(),
        kernel: "/kernel".into(),
        initrd: Some("/initrd".into()),
        cmdline: "hello".into(),
        cpus: u32::try_from(2 * members).unwrap(),
        memory: 64 << 20,
        members: vec![
            MemberSpec { host: None, cpus: 2, memory: (64 << 20) / members as u64, budget: None };
            members
        ],
        disks: Vec::new(),
        rng: Some(0),
        console: None,
        pages: PageTuning::default(),
        secret_file: None,
        start_timeout: Duration::from_secs(2),
        on_member_loss: Default::default(),
        policy: Default::default(),
    }
}

async fn launch(spec: VmSpec, script: Script) -> Vm {
    let root = tempfile::tempdir().unwrap();
    let plans = Arc::new(Mutex::new(Vec::new()));
    let tasks = Arc::new(Mutex::new(Vec::new()));
    let log = TaskLog::default();
    let around = Surroundings {
        host: Arc::new(FakeHost { script: script.clone(), me: 0, plans: plans.clone(), tasks: log.clone() }),
        spawner: Arc::new(Tasks {
            script,
            plans: plans.clone(),
            next: Mutex::new(0),
            tasks: tasks.clone(),
            log: log.clone(),
        }),
        root: root.path().to_path_buf(),
        redirect_log: false,
    };
    let (mut stream, theirs) = tokio::io::duplex(1 << 20);
    let inherit = Inherit {
        role: Role::Coordinator,
        secret: None,
        host: "here".into(),
        bind: None,
        die_with_parent: true,
    };
    let coordinator = tokio::spawn(super::run(Box::new(theirs), inherit, around));
    let kernel = vec![7u8; 3 << 20];
    let launch = ToCoordinator::Launch {
        spec: Box::new(spec),
        kernel_len: kernel.len() as u64,
        initrd_len: Some(6),
        console: true,
    };
    codec::send(&mut stream, &launch).await.unwrap();
    for piece in kernel.chunks(1 << 20) {
        codec::send(&mut stream, &ToCoordinator::Image(ImageKind::Kernel, piece.to_vec())).await.unwrap();
    }
    codec::send(&mut stream, &ToCoordinator::Image(ImageKind::Initrd, b"initrd".to_vec())).await.unwrap();
    Vm { stream, plans, tasks, log, coordinator, root }
}

impl Vm {
    /// The next message that is neither progress nor console.
    async fn next(&mut self) -> FromCoordinator {
        loop {
            let limit = Duration::from_secs(30);
            match codec::within(limit, codec::recv(&mut self.stream)).await.unwrap() {
                FromCoordinator::Progress(_) | FromCoordinator::Console(_) => {}
                message => return message,
            }
        }
    }

    async fn running(&mut self) {
        let next = self.next().await;
        assert!(matches!(next, FromCoordinator::Running { .. }), "{next:?}");
    }

    async fn end(&mut self) -> End {
        match self.next().await {
            FromCoordinator::Ended(end) => {
                assert!(rundir::running(self.root.path()).is_empty(), "the runtime folder is left");
                end
            }
            other => panic!("{other:?}"),
        }
    }

    fn client(&self) -> VmClient {
        VmClient::new(Place::Here(self.root.path().to_path_buf()), "t")
    }
}

fn exit(member: u16, exit: VmExit) -> Script {
    Script { events: vec![(member, 0, MemberEvent::Exit(exit))], ..Script::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_ends_the_vm() {
    let fault = VmExit::TripleFault { vcpu: 3, registers: "rip=1".into() };
    let table = [
        (exit(0, VmExit::PowerOff), End::PowerOff),
        (exit(1, VmExit::Reset), End::Reset),
        // vCPU 3 lives on member 1.
        (exit(1, fault), End::TripleFault { vcpu: 3, registers: "rip=1".into() }),
    ];
    for (script, expected) in table {
        let mut vm = launch(spec(3), script).await;
        // The guest may be over before the coordinator has heard that all members started.
        let mut message = vm.next().await;
        if matches!(message, FromCoordinator::Running { .. }) {
            message = vm.next().await;
        }
        assert!(matches!(&message, FromCoordinator::Ended(end) if *end == expected), "{message:?}");
        assert_eq!(vm.coordinator.await.unwrap(), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_get_the_same_plan_and_a_key() {
    let mut vm = launch(spec(2), Script::default()).await;
    vm.running().await;
    let plans = vm.plans.lock().unwrap().clone();
    let (a, b) = (&plans[0], &plans[1]);
    assert_ne!(a.me, b.me);
    assert_eq!((&a.topology, &a.secret, &a.devices), (&b.topology, &b.secret, &b.devices));
    assert_eq!(a.secret.as_ref().map(Vec::len), Some(32));
    assert_eq!(a.topology.vcpus.iter().map(|m| m.0).collect::<Vec<_>>(), [0, 0, 1, 1]);
    assert!(a.topology.members.iter().all(|m| m.addr.ip().is_loopback()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_shows_the_vm_and_stops_it() {
    let mut vm = launch(spec(2), Script::default()).await;
    vm.running().await;
    let client = vm.client();
    let info: VmInfo = client.get("/vm").await.unwrap();
    assert_eq!((info.status, info.cpus, info.vcpus.as_slice()), (VmStatus::Running, 4, &[0, 0, 1, 1][..]));
    assert_eq!(info.members.iter().map(|m| m.exits).collect::<Vec<_>>(), [10, 10]);
    assert!(info.members.iter().all(|m| m.age_s.is_some_and(|age| age < 2.0)));
    client.post("/vm/console/input", "typed\n").await.unwrap();
    let output = client.request(hyper::Method::GET, "/vm/console", Default::default()).await.unwrap();
    let output = http_body_util::BodyExt::collect(output.into_body()).await.unwrap().to_bytes();
    assert_eq!(&output[..], b"booting\ntyped\n");
    for (path, body) in [("/vm/nothing", ""), ("/vm/stop", "{\"x\":1}")] {
        assert!(client.post(path, body).await.is_err(), "{path}");
    }
    client.post("/vm/stop", "{\"by\":\"me\"}").await.unwrap();
    assert_eq!(vm.end().await, End::Stopped { by: "me".into() });
    assert!(
        matches!(vm.client().get::<VmInfo>("/vm").await, Err(End::BadInput(e)) if e.contains("no VM named"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pause_and_resume_reach_all_members_and_keep_the_clock() {
    let mut vm = launch(spec(3), Script::default()).await;
    vm.running().await;
    let client = vm.client();
    let status = async || client.get::<VmInfo>("/vm").await.unwrap();
    assert!(client.post("/vm/resume", "").await.unwrap_err().to_string().contains("is not paused"));
    for stopped in [3998, 2 * 3998] {
        let report: PauseReport = client.call("/vm/pause", &PauseBody::default()).await.unwrap();
        assert!(report.time_stopped);
        let info = status().await;
        assert_eq!((info.status, info.reason.as_deref()), (VmStatus::Paused, Some("paused by the API")));
        let again = client.post("/vm/pause", "").await.unwrap_err().to_string();
        assert!(again.contains("paused already"), "{again}");
        client.call::<()>("/vm/resume", &PauseBody::default()).await.unwrap();
        assert_eq!((status().await.status, status().await.reason), (VmStatus::Running, None));
        // The clock stood at the latest of 1000, 1001, 1002 and is 5000 now, each time.
        let mut log = std::mem::take(&mut *vm.log.lock().unwrap());
        log.retain(|(_, task)| matches!(task, MemberTask::Resume { .. }));
        log.sort_by_key(|(me, _)| *me);
        assert_eq!(log, [0, 1, 2].map(|me| (me, MemberTask::Resume { stopped })));
    }
    for body in ["{\"limit_s\":0}", "{\"limit_s\":11}", "{\"limit_s\":-1}", "{\"x\":1}"] {
        assert!(matches!(client.post("/vm/pause", body).await, Err(End::BadInput(_))), "{body}");
    }
    client.post("/vm/stop", "").await.unwrap();
    vm.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_can_not_be_paused_is_named_and_the_vm_runs_on() {
    let table = [
        (
            Script { pause_error: Some(1), ..Script::default() },
            "member 1 on here: vCPU 2 did not leave the guest",
        ),
        (Script { pause_hangs: Some(2), ..Script::default() }, "member 2 on here: no answer within 2.1 s"),
    ];
    for (script, named) in table {
        let mut vm = launch(spec(3), script).await;
        vm.running().await;
        let client = vm.client();
        let body = PauseBody { limit_s: Some(0.1), ..PauseBody::default() };
        let error = client.call::<PauseReport>("/vm/pause", &body).await.unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("the VM runs on"), "{error}");
        assert_eq!(client.get::<VmInfo>("/vm").await.unwrap().status, VmStatus::Running);
        let log = vm.log.lock().unwrap().clone();
        for me in 0..3 {
            assert!(log.contains(&(me, MemberTask::Resume { stopped: 0 })), "{me}: {log:?}");
        }
        client.post("/vm/stop", "").await.unwrap();
        vm.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_goes_wrong_at_a_member_is_told() {
    let table: [(Script, &str, u8); 5] = [
        (Script { unfit: Some(1), ..Script::default() }, "/dev/kvm does not exist", 3),
        (Script { unfit: Some(0), ..Script::default() }, "/dev/kvm does not exist", 3),
        (Script { join_error: Some(1), ..Script::default() }, "member 1 on here: the peer does not speak", 1),
        (Script { load_error: true, ..Script::default() }, "--kernel /kernel: this is no kernel", 2),
        (
            Script { join_hangs: Some(1), ..Script::default() },
            "member 1 on here: asked to join, no answer",
            4,
        ),
    ];
    for (script, named, code) in table {
        let since = Instant::now();
        let mut vm = launch(spec(2), script.clone()).await;
        let end = vm.end().await;
        assert!(end.to_string().contains(named) && end.exit_code() == code, "{script:?} gave {end:?}");
        assert!(since.elapsed() < Duration::from_secs(12), "{script:?} took {:?}", since.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_member_is_named() {
    let mut vm = launch(spec(3), Script::default()).await;
    vm.running().await;
    vm.tasks.lock().unwrap()[1].abort();
    let end = vm.end().await;
    assert!(matches!(&end, End::MemberLost { member, .. } if member.0 == 2), "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hearsay_yields_to_the_cause() {
    let peer = dsm::addr::MemberId(1);
    let failed = |culprit| MemberEvent::Failed { text: "a bad page".into(), culprit };
    let lost = || failed(Culprit::Lost { peer, reason: "reset".into() });
    let told = || failed(Culprit::Told { peer });
    let own = || failed(Culprit::Own);
    let table = [
        (vec![(2, 0, lost())], "reset", 5),
        // Both speak when their vCPUs have ended, in whatever order, and that may take seconds.
        (vec![(2, 0, told()), (1, 1500, own())], "a bad page", 1),
        (vec![(2, 200, told()), (1, 0, own())], "a bad page", 1),
        (vec![(2, 0, lost()), (1, 100, own())], "a bad page", 1),
        (vec![(2, 0, told())], "nobody why", 5),
    ];
    for (events, named, code) in table {
        let mut vm = launch(spec(3), Script { events, ..Script::default() }).await;
        let mut message = vm.next().await;
        if matches!(message, FromCoordinator::Running { .. }) {
            message = vm.next().await;
        }
        let FromCoordinator::Ended(end) = message else { panic!("{message:?}") };
        assert!(end.to_string().contains(named) && end.exit_code() == code, "{named}: {end:?}");
        if let End::MemberLost { member, .. } = end {
            assert_eq!(member, peer);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_launcher_goes() {
    let mut vm = launch(spec(2), Script::default()).await;
    vm.running().await;
    drop(vm.stream);
    let end = tokio::time::timeout(Duration::from_secs(20), vm.coordinator).await.unwrap().unwrap();
    assert_eq!(end, End::Stopped { by: "the launcher is gone".into() });

    let mut vm = launch(spec(2), Script::default()).await;
    vm.running().await;
    codec::send(&mut vm.stream, &ToCoordinator::Detach).await.unwrap();
    let client = vm.client();
    drop(vm.stream);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(client.get::<VmInfo>("/vm").await.unwrap().status, VmStatus::Running);
    client.post("/vm/stop", "").await.unwrap();
    let end = tokio::time::timeout(Duration::from_secs(20), vm.coordinator).await.unwrap().unwrap();
    assert_eq!(end, End::Stopped { by: "the API".into() });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_taken() {
    let mut vm = launch(spec(1), Script::default()).await;
    vm.running().await;
    let claimed = rundir::RunDir::claim(vm.root.path(), "t");
    assert!(matches!(claimed, Err(rundir::RunDirError::Taken(_))));
    assert!(Path::new(&rundir::socket(vm.root.path(), "t")).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_stop_is_left_behind() {
    let mut vm = launch(spec(2), Script { stop_hangs: true, ..Script::default() }).await;
    vm.running().await;
    let since = Instant::now();
    codec::send(&mut vm.stream, &ToCoordinator::Stop { by: "me".into() }).await.unwrap();
    assert_eq!(vm.end().await, End::Stopped { by: "me".into() });
    assert!(since.elapsed() < Duration::from_secs(15));
}
