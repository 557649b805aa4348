//! A member at work: the threads and file descriptors around the pure protocol.
//!
//! - [`fault threads`](threads): one per userfaultfd. Reads who waits, asks the core, and sends what it says itself; never
//!   waits for the network.
//! - [`receive threads`](threads): one per peer. Reads frames, asks the core, fills pages and wakes their waiters itself.
//! - [`homes`]: a change of homes and of members. [`leave`]: giving everything back before one leaves.
//! - [`gang`]: contended pages that are used together come back together.
//! - [`evict`]: what goes when there is more here than the member may keep.
//! - [`recent`]: on which pages each thread waited last.
//! - [`resume`]: a connection that broke is made again, and nothing is lost.
//! - [`keeper`]: one thread for everything that waits: hold times, full sockets, heartbeats and deadlines.
//! - [`engine`]: which cores are asked, in which order; [`shard`]: carries out what a core commands. Both run in the
//!   simulation, too. [`shell`]: what all threads share. [`Dsm`] is the door.
//!
//! A fault thus costs two thread switches here: the fault thread and the receive thread.

mod config;
pub(crate) mod engine;
pub(crate) mod evict;
mod failure;
mod gang;
pub(crate) mod homes;
mod keeper;
pub(crate) mod leave;
mod pace;
mod recent;
mod resume;
mod save;
pub(crate) mod shard;
mod shell;
mod stream;
mod threads;

pub use config::{DsmConfig, HoldConfig, Reconnect, Redialer};
pub use failure::{Cause, DsmFailure, Lost};
pub use homes::{HomeRun, HomesError, Table};
pub use leave::Evicted;
pub use save::{PageSink, PageSource, SaveError, SaveOptions, Saved};

use crate::addr::{MAX_MEMBERS, MemberId, PAGE_SIZE};
use crate::layout::LayoutError;
use crate::region::{Mapping, Memory, RegionError};
use crate::stats::{DsmSnapshot, FaultRecord, PeerWaits};
use shell::Shell;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use thiserror::Error;

/// A member that could not be started or filled.
#[derive(Debug, Error)]
pub enum DsmError {
    /// The ranges make no memory.
    #[error("the guest's memory map is wrong: {0}")]
    Layout(#[from] LayoutError),
    /// The members make no group.
    #[error("{0} is wrong in the list of members: it is named twice, missing, or not below {MAX_MEMBERS}")]
    Members(MemberId),
    /// There is not exactly one stream to every other member.
    #[error("there must be one connection to {0}, no more and no less")]
    Links(MemberId),
    /// The kernel refused something.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A thread or a file descriptor could not be had.
    #[error("can't start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Memory to be filled is not homed here, or does not exist.
    #[error("{gpa:#x} has no page whose home is this member")]
    NotHome {
        /// The address.
        gpa: u64,
    },
    /// Memory to be filled is with another member already.
    #[error("the page at {gpa:#x} is in use by another member; preload before the guest runs")]
    InUse {
        /// The address.
        gpa: u64,
    },
    /// The member has failed or was shut down.
    #[error("this member's memory is no longer running")]
    Stopped,
}

/// One member's end of a shared memory.
///
/// Dropping it shuts it down, ends its threads and unmaps the memory.
#[derive(Debug)]
pub struct Dsm {
    shell: Arc<Shell>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Dsm {
    /// Maps the memory and starts to serve it. `links` has one stream to every other member
    /// (from [`crate::transport::mesh`], channel 0).
    pub fn start(cfg: DsmConfig, links: Vec<(MemberId, TcpStream)>) -> Result<Dsm, DsmError> {
        let shell = Arc::new(Shell::new(cfg, links)?);
        let dsm = Dsm { shell, threads: Arc::default() };
        for task in threads::tasks(&dsm.shell) {
            let shell = dsm.shell.clone();
            let thread = thread::Builder::new()
                .name(task.name())
                .spawn(move || task.run(&shell))
                .map_err(|source| DsmError::Start { what: "a memory thread", source })?;
            threads_of(&dsm.threads).push(thread);
        }
        Ok(dsm)
    }

    /// Where the memory lies in this process: one mapping per range, ascending. Touching an absent page waits until it
    /// has come. The mappings end when the `Dsm` is dropped: who keeps the pointers must be done with them by then.
    pub fn mappings(&self) -> &[Mapping] {
        self.shell.region().mappings()
    }

    /// The memory as atomics, for programs that are not a hypervisor.
    pub fn memory(&self) -> Memory<'_> {
        self.shell.region().memory()
    }

    /// Fills memory homed here before anybody uses it, without a fault per page. `gpa` and the length need not be
    /// aligned; the rest of a partly filled page is zero, or what an earlier call put there.
    pub fn preload(&self, gpa: u64, bytes: &[u8]) -> Result<(), DsmError> {
        self.shell.preload(gpa, bytes)
    }

    /// For how long the memory may still move though nobody uses it: waits until nothing is under way at this member. When
    /// that is so at all members, whose vCPUs and devices stand still, the memory is the same everywhere.
    /// [`Dsm::release`] ends it.
    ///
    /// # Errors
    /// Something is still under way at the deadline, or the memory has failed.
    pub fn quiesce(&self, limit: Duration) -> Result<(), SaveError> {
        self.shell.quiesce(limit)
    }

    /// Pages may be brought in ahead again.
    pub fn release(&self) {
        self.shell.release();
    }

    /// See [`DsmHandle::save`].
    ///
    /// # Errors
    /// As there.
    pub fn save(&self, options: SaveOptions, sink: &mut dyn PageSink) -> Result<Saved, SaveError> {
        self.shell.save(options, sink)
    }

    /// This member has the image that pages are adopted from; once, before [`Dsm::adopt`].
    pub fn set_image(&self, image: Arc<dyn PageSource>) {
        let _ = self.shell.image.set(image);
    }

    /// Before anybody uses the memory, and at every member: the contents of these runs of pages (address, number) are in
    /// the image that `holder` has.
    ///
    /// # Errors
    /// A page that does not exist or has been touched.
    pub fn adopt(&self, runs: &[(u64, u32)], holder: MemberId) -> Result<(), DsmError> {
        self.shell.adopt(runs, holder)
    }

    /// Brings adopted pages in before anybody needs them, at a pace that leaves room for who does: each page comes to its
    /// home. Returns at once.
    ///
    /// # Errors
    /// No thread.
    pub fn prefetch(&self, runs: Vec<(u64, u32)>, holder: MemberId) -> Result<(), DsmError> {
        let shell = self.shell.clone();
        // It holds what it uses, and ends soon after the memory has.
        thread::Builder::new()
            .name("dsm-prefetch".into())
            .spawn(move || shell.prefetch(&runs, holder))
            .map_err(|source| DsmError::Start { what: "a memory thread", source })?;
        Ok(())
    }

    /// Counters since the start. Walks the page tables of the protocol: milliseconds for gigabytes.
    pub fn snapshot(&self) -> DsmSnapshot {
        self.shell.snapshot()
    }

    /// The last faults, oldest first, if [`DsmConfig::fault_log`] asks for them; empties the log.
    pub fn take_fault_log(&self) -> Vec<FaultRecord> {
        self.shell.take_fault_log()
    }

    /// Sets who is told, once, that the memory has failed; from a thread of this crate, or at once if it has failed
    /// already. From then on faults stay unanswered until [`Dsm::shutdown`].
    pub fn on_failure(&self, handler: Box<dyn Fn(DsmFailure) + Send + Sync>) {
        self.shell.on_failure(handler);
    }

    /// The failure, if there was one.
    pub fn failure(&self) -> Option<DsmFailure> {
        self.shell.failure()
    }

    /// Ends the service. Any thread may call it, any number of times. Peers are told, so that they do not take it for
    /// a failure. The memory becomes inaccessible and all who wait for pages are let go: KVM_RUN and other system calls
    /// return EFAULT, direct access raises SIGSEGV. So stop vCPUs and devices first where that is possible.
    pub fn shutdown(&self) {
        self.shell.shutdown();
    }

    /// A handle for shutting down from elsewhere.
    pub fn handle(&self) -> DsmHandle {
        DsmHandle { shell: self.shell.clone(), threads: self.threads.clone() }
    }
}

impl Drop for Dsm {
    fn drop(&mut self) {
        self.shell.shutdown();
        let me = thread::current().id();
        let threads: Vec<_> = threads_of(&self.threads).drain(..).collect();
        for thread in threads.into_iter().filter(|t| t.thread().id() != me) {
            if thread.join().is_err() {
                tracing::error!("a memory thread panicked");
            }
        }
    }
}

/// What may be asked of a [`Dsm`] from anywhere, for example from its failure handler.
#[derive(Clone, Debug)]
pub struct DsmHandle {
    shell: Arc<Shell>,
    threads: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl DsmHandle {
    /// See [`Dsm::snapshot`].
    pub fn snapshot(&self) -> DsmSnapshot {
        self.shell.snapshot()
    }

    /// See [`Dsm::shutdown`].
    pub fn shutdown(&self) {
        self.shell.shutdown();
    }

    /// The pages on which a thread of this member (by its kernel id) waited last for another member, the newest first, and
    /// whether it wrote. At most a few dozen.
    pub fn recent(&self, thread: u32) -> Vec<(u64, bool)> {
        self.shell.recent(thread)
    }

    /// How often and for how long a thread of this member (by its kernel id) waited for each other member, since the start.
    pub fn waits(&self, thread: u32) -> Vec<PeerWaits> {
        self.shell.waits(thread)
    }

    /// Pages that a thread is about to use here, and whether it will write: those that are not here are asked for, without
    /// waiting, except contended ones. Homes may decline reads; then the thread asks again when it needs them. Addresses
    /// outside of the memory are passed over.
    pub fn want(&self, pages: &[(u64, bool)]) {
        self.shell.want(pages);
    }

    /// Saves what this member has to save of the memory. All members must be quiet ([`Dsm::quiesce`]) and stay so. If it
    /// fails, the next one must be full.
    ///
    /// # Errors
    /// What the sink said, a page that can't be had, or a memory that has failed.
    pub fn save(&self, options: SaveOptions, sink: &mut dyn PageSink) -> Result<Saved, SaveError> {
        self.shell.save(options, sink)
    }

    /// See [`Dsm::quiesce`].
    ///
    /// # Errors
    /// As there.
    pub fn quiesce(&self, limit: Duration) -> Result<(), SaveError> {
        self.shell.quiesce(limit)
    }

    /// Pages may be brought in ahead again, and wishes to be rid of pages are heard: see [`Dsm::release`].
    pub fn release(&self) {
        self.shell.release();
    }

    /// There is a connection (channel 0 of the mesh) to somebody who is to become a member with the next
    /// [`DsmHandle::change_table`]. Until then what happens to it harms nobody.
    ///
    /// # Errors
    /// It is a peer already, or there is no thread.
    pub fn connect(&self, peer: MemberId, stream: TcpStream) -> Result<(), HomesError> {
        let link = self.shell.connect(peer, stream)?;
        let shell = self.shell.clone();
        let thread = thread::Builder::new()
            .name(format!("dsm-recv-{}", peer.0))
            .spawn(move || {
                crate::priority::raise();
                threads::receive(&shell, &link);
            })
            .map_err(|e| HomesError::Memory(e.to_string()))?;
        let mut threads = threads_of(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Ends the connection to somebody who is no member (any more).
    ///
    /// # Errors
    /// It is a member.
    pub fn disconnect(&self, peer: MemberId) -> Result<(), HomesError> {
        self.shell.disconnect(peer)
    }

    /// What this home knows of its pages: at most `most` runs from address `from` on, and where the rest begins. All members
    /// must be quiet ([`Dsm::quiesce`]), as for [`DsmHandle::inherit`].
    pub fn entries(&self, from: u64, most: usize) -> (Vec<HomeRun>, Option<u64>) {
        self.shell.entries(from, most)
    }

    /// Before the first [`DsmHandle::inherit`] of a change: pages in these ranges (start, length) are to be homed here, and
    /// count as untouched unless that says otherwise.
    pub fn begin_inherit(&self, ranges: &[(u64, u64)]) {
        self.shell.engine.forget(&self.shell.layout, ranges);
    }

    /// What the old homes know of pages that are to be homed here. Nothing comes of it before the table changes.
    ///
    /// # Errors
    /// It names members or pages that are not there, or pages homed here.
    pub fn inherit(&self, runs: &[HomeRun]) -> Result<(), HomesError> {
        self.shell.engine.inherit(&self.shell.layout, runs, self.shell.members())
    }

    /// The new table holds, here: all members must be quiet until it holds everywhere.
    ///
    /// # Errors
    /// Nothing has changed.
    pub fn change_table(&self, table: &Table) -> Result<(), HomesError> {
        self.shell.change_table(table)
    }

    /// For at most about `limit`: asks all pages that are not homed here to go to their homes.
    pub fn evict_all(&self, limit: Duration) -> Evicted {
        self.shell.evict_all(limit)
    }

    /// Says that a thread of this member is about to wait for something that another member does: for a few transfer
    /// times contended pages go to whom asks for them without a hold.
    pub fn soften(&self) {
        self.shell.soften();
    }

    /// Says whether all threads of this member that use the memory rest (a vCPU in HLT, for one). While they do, contended
    /// pages go to whom asks for them without a hold.
    pub fn rest(&self, resting: bool) {
        self.shell.rest(resting);
    }
}

fn threads_of(threads: &Mutex<Vec<JoinHandle<()>>>) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
    threads.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Length of a page as a `usize`.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);
