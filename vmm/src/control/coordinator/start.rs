//! The way up: connect, prepare, compare, plan, join, load, run. Every wait has a deadline, and the error names
//! who did not answer.

use super::link::{Link, Stream};
use super::{Coordinator, Source, watch};
use crate::config::plan;
use crate::config::spec::DiskSpec;
use crate::control::codec::{self, Json};
use crate::control::crew::Crew;
use crate::control::end::End;
use crate::control::ops::checkpoint::Blueprint;
use crate::control::ops::recruit::Recruiter;
use crate::control::ops::table::Roster;
use crate::control::ops::{OpError, Turn, pause};
use crate::control::restore::{self, Identity, Machine, Opened};
use crate::control::rtt;
use crate::control::secret::Secret;
use crate::control::spawn::ChildProcess;
use crate::control::wire::{FromCoordinator, FromMember, Inherit, NodeRequest, Role, ToMember};
use crate::control::{fit, member_task, node_client};
use crate::devices::DeviceSpec;
use crate::member::{BootImages, HostFacts, MemberPlan, MemberTask, Origin, PageTuning};
use crate::topology::Topology;
use dsm::addr::MemberId;
use dsm::node::Table;
use migration::checkpoint::Range;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::time::timeout;

/// Runs of pages that one message names.
const RUNS: usize = 100_000;

/// What `Ready` says.
struct Ready {
    host: String,
    pid: u32,
    facts: HostFacts,
    addr: SocketAddr,
}

impl Coordinator {
    /// Brings the VM up until the guest runs.
    pub(super) async fn start(&mut self, source: Source) -> Result<(), End> {
        let limit = self.spec.start_timeout;
        let bind = self.connect_all().await?;
        let nonce = rand::random();
        for link in &self.links {
            link.order(ToMember::Prepare {
                vm: self.spec.name.clone(),
                me: link.id,
                nonce,
                disks: self.disks_of(link.id),
                bind: if link.id == MemberId(0) { bind } else { None },
                silence: self.patience(),
            });
        }
        let ready = self
            .gather("prepare", limit, |message| match message {
                FromMember::Ready { host, pid, facts, addr } => Ok(Ready { host, pid, facts: *facts, addr }),
                other => Err(other),
            })
            .await?;
        let mut common = self.compare(&ready).await?;
        if let Source::Checkpoint(opened) = &source {
            let machine = &opened.manifest.machine;
            let hosts: Vec<_> = self.links.iter().map(|link| link.host.clone()).collect();
            restore::check_cpu(machine, &common, &hosts.join(", "))?;
            (common.cpuid, common.tsc_khz) = (machine.cpuid.clone(), machine.tsc_khz);
        }
        let topology = self.topology(&ready);
        if let Source::Checkpoint(opened) = &source {
            let room =
                |ready: &Ready| (ready.host.clone(), (ready.facts.memory_mib + ready.facts.swap_mib) << 20);
            let hosts: Vec<_> = ready.iter().map(room).collect();
            restore::check_memory(&opened.runs, &topology, &self.spec, &hosts)?;
        }
        self.shared.placed(&topology);
        let members = topology.members.iter().map(|m| m.id).collect();
        let table = Table { epoch: topology.epoch, memory: topology.memory.clone(), members };
        self.shared.ops().set_roster(Roster {
            table,
            devices: self.devices(),
            hosts: (0u16..).map(MemberId).zip(self.spec.members.iter().map(|m| m.host.clone())).collect(),
            home: self.spec.members.first().and_then(|m| m.host.clone()),
            leader: MemberId(0),
        });
        let has_engine =
            topology.members.len() > 1 || self.spec.pages.always || !matches!(source, Source::Boot(_));
        if let (Some(orders), Some(first)) = (self.orders.clone(), ready.first()) {
            self.shared.ops().recruit_with(Recruiter {
                vm: self.spec.name.clone(),
                spawner: self.spawner.clone(),
                orders,
                node_secret: self.inherit.secret.clone().map(Secret::from_bytes),
                is_private: self.inherit.secret.is_none() && !self.spec.uses_nodes(),
                inbox: self.inbox_tx.clone(),
                nonce,
                silence: self.patience(),
                limit,
                pages: self.spec.pages.clone(),
                common: common.clone(),
                first: (first.host.clone(), first.facts.clone()),
                topology: topology.clone(),
                has_engine,
            });
        }
        for link in &self.links {
            let plan = MemberPlan {
                vm: self.spec.name.clone(),
                me: link.id,
                topology: topology.clone(),
                secret: None,
                cpuid: common.cpuid.clone(),
                tsc_khz: common.tsc_khz,
                devices: self.devices(),
                pages: self.pages_of(link.id),
                origin: match &source {
                    Source::Boot(_) => Origin::Boot,
                    Source::Checkpoint(opened) => Origin::Checkpoint { tsc: opened.manifest.machine.tsc },
                },
                standing: None,
                deadline: limit,
            };
            link.order(ToMember::Join(Json(Box::new(plan))));
        }
        // The members' own deadline is `limit`, and their errors say more than ours would.
        let grace = limit + Duration::from_secs(5);
        self.gather("join", grace, |message| match message {
            FromMember::Joined => Ok(()),
            other => Err(other),
        })
        .await?;
        self.launcher.progress(format!("{} joined", self.who())).await;
        self.describe(&source, &common, &topology);
        match &source {
            Source::Boot(images) => self.load(images.clone(), limit).await?,
            Source::Checkpoint(opened) => self.adopt(opened, &topology, limit).await?,
        }
        for link in &self.links {
            link.order(ToMember::Run);
        }
        self.gather("start the guest", limit, |message| match message {
            FromMember::Started => Ok(()),
            other => Err(other),
        })
        .await?;
        let seats = self.links.iter().map(|link| (link.id, link.host.clone(), link.orders()));
        self.shared.ops().staff(Crew::new(seats));
        let shares = (0u16..).zip(self.spec.members.iter().map(|m| m.cpus));
        self.shared.ops().placement().begin(self.spec.policy, shares);
        self.shared.set_policy(self.spec.policy);
        match &source {
            Source::Boot(_) => self.announcement().await,
            Source::Checkpoint(opened) => {
                self.shared.ops().restored(&opened.dir);
                self.go_on(opened);
            }
        }
        Ok(())
    }

    /// Says to all who wait for it that the guest runs.
    fn announcement(&self) -> impl Future<Output = ()> + Send + 'static {
        let (shared, launcher) = (self.shared.clone(), self.launcher.clone());
        let (pid, host) = (std::process::id(), self.inherit.host.clone());
        async move {
            shared.running();
            launcher.say(FromCoordinator::Running { pid, host }).await;
        }
    }

    /// What later checkpoints will say of this VM.
    fn describe(&self, source: &Source, common: &fit::Common, topology: &Topology) {
        let machine = Machine {
            spec: self.spec.clone(),
            cpuid: common.cpuid.clone(),
            tsc_khz: common.tsc_khz,
            tsc: None,
            members: Vec::new(),
        };
        // Ranges that differ in their home alone are one.
        let mut memory: Vec<Range> = Vec::new();
        for range in &topology.memory {
            match memory.last_mut() {
                Some(last) if last.start + last.len == range.start => last.len += range.len,
                _ => memory.push(Range { start: range.start, len: range.len }),
            }
        }
        let identity = match source {
            Source::Boot(_) => Identity::default(),
            Source::Checkpoint(opened) => Identity {
                guest: opened.manifest.guest,
                // Its pages are noted as unchanged from the start.
                base: Some((opened.manifest.id, opened.folder.clone())),
            },
        };
        self.shared.ops().describe(Blueprint { machine, memory }, identity);
    }

    /// Gives every member what it needs of a checkpoint. No page is read yet.
    async fn adopt(&mut self, opened: &Opened, topology: &Topology, limit: Duration) -> Result<(), End> {
        let memory: u64 = topology.memory.iter().map(|r| r.len).sum();
        let saved: u64 = opened.manifest.memory.iter().map(|r| r.len).sum();
        if memory != saved {
            return Err(End::BadInput(format!(
                "{}: its memory has {saved} bytes, its specification says {memory}",
                opened.folder.display()
            )));
        }
        let folder = opened.folder.clone();
        if let Some(first) = self.links.first() {
            first.order(ToMember::Task { id: 0, task: MemberTask::OpenImage { folder } });
        }
        self.done("open the checkpoint", 1, limit).await?;
        for runs in opened.runs.chunks(RUNS) {
            for link in &self.links {
                link.order(ToMember::Task { id: 0, task: MemberTask::Adopt { runs: runs.to_vec() } });
            }
            self.done("take pages of the checkpoint", self.links.len(), limit).await?;
        }
        let states = restore::deal(&opened.manifest.machine, topology);
        for (link, state) in self.links.iter().zip(states) {
            link.order(ToMember::Task { id: 0, task: MemberTask::Restore { state: Box::new(state) } });
        }
        self.done("restore vCPUs and devices", self.links.len(), limit).await?;
        let folder = opened.folder.display();
        self.launcher
            .progress(format!("{folder}: {} pages, read when they are needed", self.pages(opened)))
            .await;
        Ok(())
    }

    fn pages(&self, opened: &Opened) -> u64 {
        opened.runs.iter().map(|(_, pages)| u64::from(*pages)).sum()
    }

    /// Waits until so many members have done a task. What a member says against it is the checkpoint's fault.
    async fn done(&mut self, step: &str, count: usize, limit: Duration) -> Result<(), End> {
        let deadline = Instant::now() + limit;
        for _ in 0..count {
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                match timeout(left, self.inbox.recv()).await {
                    Ok(Some((_, Ok(FromMember::TaskDone { result: Ok(_), .. })))) => break,
                    Ok(Some((id, Ok(FromMember::TaskDone { result: Err(reason), .. })))) => {
                        let host = self.links.get(usize::from(id.0)).map_or("?", |link| &link.host);
                        let symptom = End::BadInput(format!("{id} on {host} can't {step}: {reason}"));
                        return Err(self.cause(symptom).await);
                    }
                    Ok(Some((id, message))) => {
                        if let Some(end) = self.trouble(id, message).await {
                            return Err(end);
                        }
                    }
                    Ok(None) | Err(_) => {
                        return Err(End::Failed(format!(
                            "a member did not {step} within {} s (--start-timeout)",
                            limit.as_secs()
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// The restored VM stands as the checkpoint left it: lets it go on, and brings its pages in behind it. It counts as
    /// running when that is done, so whoever waits for it can give it the next order at once.
    fn go_on(&self, opened: &Opened) {
        pause::begin_paused(self.shared.ops(), opened.manifest.machine.tsc);
        let (shared, announcement) = (self.shared.clone(), self.announcement());
        tokio::spawn(async move {
            let went = async {
                let turn = Turn::claim(&shared, "the restore")?;
                pause::release(&turn, pause::LIMIT).await?;
                let limit = pause::LIMIT;
                turn.crew()?.ask_all(&MemberTask::Prefetch, limit).await.map_err(OpError::from)
            };
            match went.await {
                Ok(_) => announcement.await,
                // It stays paused for the member it has lost.
                Err(e) if shared.loss().is_some() => tracing::warn!("the restored VM did not go on: {e}"),
                Err(e) => shared.stop(End::Failed(format!("the restored VM did not go on: {e}"))),
            }
        });
    }

    fn who(&self) -> String {
        match self.links.len() {
            1 => "1 member".into(),
            n => format!("{n} members"),
        }
    }

    /// The knobs of one member's page engine.
    fn pages_of(&self, member: MemberId) -> PageTuning {
        let budget = self.spec.members.get(usize::from(member.0)).and_then(|m| m.budget);
        PageTuning { budget, ..self.spec.pages.clone() }
    }

    fn disks_of(&self, member: MemberId) -> Vec<DiskSpec> {
        self.spec.disks.iter().filter(|disk| disk.member == member.0).cloned().collect()
    }

    /// The serial port, then disks, rng and console in a fixed order: the guest's names follow it.
    fn devices(&self) -> Vec<DeviceSpec> {
        let spec = &self.spec;
        let serial = DeviceSpec::Serial { member: MemberId(0), log: None };
        let disks = spec.disks.iter().map(|disk| DeviceSpec::Blk {
            member: MemberId(disk.member),
            path: disk.path.clone(),
            readonly: disk.readonly,
        });
        let rng = spec.rng.map(|member| DeviceSpec::Rng { member: MemberId(member) });
        let console = spec.console.map(|member| DeviceSpec::Console { member: MemberId(member) });
        std::iter::once(serial).chain(disks).chain(rng).chain(console).collect()
    }

    /// Connects to every member; returns the address at which this host is reached by the others.
    async fn connect_all(&mut self) -> Result<Option<IpAddr>, End> {
        let local_secret = Secret::random();
        self.orders = Some(self.member_inherit(&local_secret));
        let mut bind = None;
        let specs = self.spec.members.clone();
        for (id, member) in (0u16..).map(MemberId).zip(&specs) {
            let mut round_trip = None;
            let (stream, child, host): (Box<dyn Stream>, Option<ChildProcess>, String) = match &member.host {
                _ if id == MemberId(0) => {
                    let host = member.host.as_ref().map_or(self.inherit.host.clone(), ToString::to_string);
                    (self.own_member(&local_secret), None, host)
                }
                None => {
                    let (stream, child) = self.spawn_member(id, &local_secret).await?;
                    (stream, child, self.inherit.host.clone())
                }
                Some(host) => {
                    let secret = self.inherit.secret.clone().map(Secret::from_bytes);
                    let me = &self.inherit.host;
                    let stream = node_client::open(host, secret.as_ref(), me, &NodeRequest::Member).await?;
                    round_trip = rtt::of(&stream);
                    bind = bind.or(stream.local_addr().ok().map(|addr| addr.ip()));
                    self.launcher.progress(format!("{host} answers")).await;
                    (Box::new(stream), None, host.to_string())
                }
            };
            self.links.push(Link::new(id, host, round_trip, stream, child, self.inbox_tx.clone()));
        }
        Ok(bind)
    }

    /// Key material of the members: the node's secret, or a random one that only this VM's processes know.
    fn member_inherit(&self, local: &Secret) -> Inherit {
        let secret = match (&self.inherit.secret, self.spec.uses_nodes()) {
            (Some(secret), _) => Some(secret.clone()),
            (None, true) => None,
            (None, false) => Some(local.bytes().to_vec()),
        };
        Inherit { role: Role::Member, secret, die_with_parent: true, ..self.inherit.clone() }
    }

    /// Member 0 in this process, over a pipe that behaves like a connection.
    fn own_member(&self, local: &Secret) -> Box<dyn Stream> {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let (host, slot) = (self.host.clone(), self.slot.clone());
        tokio::spawn(member_task::serve(theirs, host, self.member_inherit(local), slot));
        Box::new(ours)
    }

    async fn spawn_member(
        &self,
        member: MemberId,
        local: &Secret,
    ) -> Result<(Box<dyn Stream>, Option<ChildProcess>), End> {
        let (mut stream, child) = self
            .spawner
            .spawn()
            .map_err(|e| End::Failed(format!("can't start a process for {member}: {e}")))?;
        codec::within(watch::SILENCE, codec::send(&mut stream, &self.member_inherit(local))).await.map_err(
            |e| End::MemberLost {
                member,
                host: self.inherit.host.clone(),
                reason: format!("its process ended before it was told what to be ({e})"),
            },
        )?;
        Ok((stream, child))
    }

    async fn compare(&self, ready: &[Ready]) -> Result<fit::Common, End> {
        for (link, ready) in self.links.iter().zip(ready) {
            self.shared.member_ready(link.id.0, &ready.host, ready.pid, ready.addr);
            let facts = &ready.facts;
            self.launcher
                .progress(format!(
                    "{} on {}: Linux {}, {}, process {}",
                    link.id,
                    ready.host,
                    facts.kernel,
                    fit::kind(facts.virtualization),
                    ready.pid
                ))
                .await;
        }
        let hosts: Vec<_> =
            self.links.iter().zip(ready).map(|(link, r)| (link.host.clone(), r.facts.clone())).collect();
        let common = fit::compare(&hosts)?;
        for warning in &common.warnings {
            self.launcher.progress(format!("warning: {warning}")).await;
        }
        Ok(common)
    }

    fn topology(&self, ready: &[Ready]) -> Topology {
        let hosts = ready.iter().map(|r| (r.host.clone(), r.addr)).collect();
        let from_here: Vec<_> = self.links.iter().map(|link| link.round_trip).collect();
        plan::topology(&self.spec, hosts, plan::distances(&plan::mesh(&from_here)))
    }

    /// Member 0 is in this process, so the images need not travel again.
    async fn load(&mut self, images: BootImages, limit: Duration) -> Result<(), End> {
        let guest = self.slot.get().cloned().ok_or_else(|| End::Failed("member 0 has not joined".into()))?;
        let load = tokio::task::spawn_blocking(move || guest.load(images));
        match timeout(limit, load).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(reason))) => {
                let symptom = End::BadInput(format!("--kernel {}: {reason}", self.spec.kernel.display()));
                Err(self.cause(symptom).await)
            }
            Ok(Err(e)) => Err(End::Failed(format!("internal error while loading: {e}"))),
            Err(_) => Err(End::Failed(format!("loading the kernel took more than {} s", limit.as_secs()))),
        }
    }

    /// Waits for one answer of every member, in whatever order, and returns them by member.
    async fn gather<T>(
        &mut self,
        step: &str,
        limit: Duration,
        mut take: impl FnMut(FromMember) -> Result<T, FromMember>,
    ) -> Result<Vec<T>, End> {
        let deadline = Instant::now() + limit;
        let mut answers: Vec<Option<T>> = self.links.iter().map(|_| None).collect();
        while answers.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(Some((id, message))) = timeout(left, self.inbox.recv()).await else {
                let missing: Vec<_> = self
                    .links
                    .iter()
                    .zip(&answers)
                    .filter(|(_, answer)| answer.is_none())
                    .map(|(link, _)| format!("{} on {}", link.id, link.host))
                    .collect();
                return Err(End::Unreachable {
                    host: missing.join(", "),
                    reason: format!(
                        "asked to {step}, no answer within {} s (--start-timeout)",
                        limit.as_secs()
                    ),
                });
            };
            let message = match message {
                Ok(message) => match take(message) {
                    Ok(answer) => {
                        if let Some(slot) = answers.get_mut(usize::from(id.0)) {
                            *slot = Some(answer);
                        }
                        continue;
                    }
                    Err(message) => Ok(message),
                },
                Err(e) => Err(e),
            };
            if let Some(end) = self.trouble(id, message).await {
                return Err(end);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }
}
