//! Saving one member's part of a paused VM, and becoming one that was saved. The coordinator makes it the whole VM's
//! ([`crate::control::ops::checkpoint`]).
//!
//! ```text
//!  join -> image, adopt, restore -> run (paused) -> resume -> prefetch
//! ```

use super::runtime::{Member, MemberError};
use super::task::{MemberReply, MemberTask};
use crate::interrupts::ioapic::IoApic;
use crate::kvm::still::{self, VcpuStill};
use dsm::addr::MemberId;
use dsm::node::{Dsm, PageSink, PageSource, SaveOptions, Saved};
use migration::checkpoint::{Id, Image, Part, PartWriter};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that go to the coordinator at a time.
const PIECE: usize = 256 << 10;
/// Longest wait for a parked vCPU to say its state.
const CAPTURE: Duration = Duration::from_secs(5);

/// What is not memory, of one member.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemberState {
    /// The vCPUs that live there.
    pub vcpus: Vec<VcpuStill>,
    /// The IOAPIC, of the member that has it.
    pub ioapic: Option<IoApic>,
    /// Devices: index of the window, state.
    pub devices: Vec<(usize, String)>,
}

/// What a page file is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// The guest.
    pub guest: Id,
    /// The checkpoint.
    pub checkpoint: Id,
    /// All pages, or those that changed since the last checkpoint.
    pub full: bool,
    /// Another incremental checkpoint may follow.
    pub track: bool,
}

/// How saving went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagesSaved {
    /// The page file, as it was sent.
    pub part: Part,
    /// Pages that were all zero.
    pub zero: u64,
    /// See [`Saved::answers_for`].
    pub answers_for: u64,
    /// See [`Saved::touched`].
    pub touched: u64,
    /// Changes are noted, so an incremental checkpoint may follow.
    pub tracked: bool,
}

/// Takes a page file piece by piece; false when it is not wanted any more.
pub type Pieces<'a> = dyn FnMut(Vec<u8>) -> bool + 'a;

/// Cuts what is written into pieces.
struct Cutter<'a> {
    to: &'a mut Pieces<'a>,
    piece: Vec<u8>,
}

impl Cutter<'_> {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        if (self.to)(piece) { Ok(()) } else { Err(io::Error::other("the coordinator wants no more of it")) }
    }
}

impl Write for Cutter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= PIECE {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() { Ok(()) } else { self.send() }
    }
}

struct Sink<W: Write>(PartWriter<W>);

impl<W: Write> PageSink for Sink<W> {
    fn data(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.data(gpa, bytes)
    }

    fn zero(&mut self, gpa: u64, pages: u32) -> io::Result<()> {
        self.0.zero(gpa, pages)
    }
}

/// The image of a checkpoint as the page engine sees it.
struct Source(Image);

impl PageSource for Source {
    fn page(&self, gpa: u64, out: &mut [u8; 4096]) -> Result<(), String> {
        match self.0.read(gpa, out) {
            Ok(0) => Err(format!("the checkpoint has no page {gpa:#x}")),
            Ok(_) => Ok(()),
            Err(e) => Err(e.to_string()),
        }
    }
}

impl Member {
    /// State of vCPUs, IOAPIC and devices. The member must be paused.
    ///
    /// # Errors
    /// It is not, or KVM refuses something.
    pub fn state(&self) -> Result<MemberState, String> {
        let machine = self.running_machine().ok_or("the guest does not run")?;
        let mut state = MemberState::default();
        let end = Instant::now() + CAPTURE;
        let asked: Vec<_> =
            self.switchboard().vcpus().map(|vcpu| (vcpu.id(), vcpu, still::order())).collect();
        for (id, vcpu, (order, wait)) in asked {
            if !vcpu.order(order) {
                return Err(format!("vCPU {id} has ended"));
            }
            let left = end.saturating_duration_since(Instant::now());
            let answer = wait.recv_timeout(left).map_err(|_| format!("vCPU {id} does not say its state"))?;
            state.vcpus.extend(answer?.map(|still| *still));
        }
        state.ioapic = self.switchboard().ioapic().map(|ioapic| ioapic.clone());
        state.devices = machine.platform.save();
        Ok(state)
    }

    /// Waits until no page moves, and keeps the engine from moving any by itself.
    ///
    /// # Errors
    /// Something is still under way at the end of `limit`.
    pub fn quiet_memory(&self, limit: Duration) -> Result<(), String> {
        match self.with_ram(|ram| ram.dsm().map(Dsm::handle))? {
            Some(dsm) => dsm.quiesce(limit).map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    /// Ends [`Member::quiet_memory`].
    pub fn release_memory(&self) {
        // After the end of the guest there is nothing to release.
        let _ = self.with_ram(|ram| ram.dsm().map(Dsm::release));
    }

    /// Writes this member's page file to `out`, piece by piece. All members are paused and their memory is quiet.
    ///
    /// # Errors
    /// In words.
    pub fn save_pages<'a>(
        &self,
        request: SaveRequest,
        out: &'a mut Pieces<'a>,
    ) -> Result<PagesSaved, String> {
        super::fault::at(self.plan().me, "save")?;
        let words = |e: io::Error| e.to_string();
        let cutter = Cutter { to: out, piece: Vec::with_capacity(PIECE) };
        let number = u32::from(self.plan().me.0);
        let writer = PartWriter::new(cutter, request.guest, request.checkpoint, number).map_err(words)?;
        let mut sink = Sink(writer);
        let options = SaveOptions { full: request.full, track: request.track };
        // Counters must be had meanwhile, so no lock is held.
        let (saved, tracked) = match self.with_ram(|ram| ram.dsm().map(Dsm::handle))? {
            Some(dsm) => (dsm.save(options, &mut sink).map_err(|e| e.to_string())?, request.track),
            None if !request.full => return Err("a memory that is not shared is saved in full".into()),
            None => (self.with_ram(|ram| ram.save_plain(&mut sink))?.map_err(words)?, false),
        };
        let Saved { zero, answers_for, touched, .. } = saved;
        let (part, mut cutter) = sink.0.finish().map_err(words)?;
        cutter.flush().map_err(words)?;
        Ok(PagesSaved { part, zero, answers_for, touched, tracked })
    }

    /// The member with the checkpoint's files opens them. Before the guest runs.
    ///
    /// # Errors
    /// A damaged checkpoint.
    pub fn open_image(&self, folder: &Path) -> Result<(), String> {
        let (_, image) = Image::open::<serde::de::IgnoredAny>(folder).map_err(|e| e.to_string())?;
        self.with_ram(|ram| {
            let dsm = ram.dsm().ok_or("the memory is not shared")?;
            dsm.set_image(Arc::new(Source(image)));
            Ok(())
        })?
    }

    /// These pages are in the image of member 0. Before the guest runs.
    ///
    /// # Errors
    /// Pages that the VM does not have.
    pub fn adopt(&self, runs: Vec<(u64, u32)>) -> Result<(), String> {
        self.with_ram(|ram| match ram.dsm() {
            Some(dsm) => dsm.adopt(&runs, MemberId(0)).map_err(|e| e.to_string()),
            None => Err("the memory is not shared".into()),
        })??;
        self.note_adopted(runs);
        Ok(())
    }

    /// Becomes what was saved: `state` has this member's vCPUs, and devices of whatever member. Instead of
    /// [`Member::load`], before [`Member::run`].
    ///
    /// # Errors
    /// In words.
    pub fn restore(&self, state: MemberState) -> Result<(), String> {
        self.restore_with(|machine| {
            // They begin when the VM goes on.
            machine.platform.pause(Duration::ZERO);
            machine.platform.restore(&state.devices)?;
            if let (Some(mut ioapic), Some(saved)) = (self.switchboard().ioapic(), state.ioapic.clone()) {
                *ioapic = saved;
            }
            Ok(())
        })?;
        self.keep_vcpus(state.vcpus).map_err(|e: MemberError| e.to_string())
    }

    /// Tasks about checkpoints.
    ///
    /// # Errors
    /// In words.
    pub(super) fn checkpoint_task(&self, task: MemberTask) -> Result<MemberReply, String> {
        match task {
            MemberTask::QuietMemory { limit } => self.quiet_memory(limit)?,
            MemberTask::ReleaseMemory => self.release_memory(),
            MemberTask::Capture => return Ok(MemberReply::Captured(Box::new(self.state()?))),
            MemberTask::OpenImage { folder } => self.open_image(&folder)?,
            MemberTask::Adopt { runs } => self.adopt(runs)?,
            MemberTask::Restore { state } => self.restore(*state)?,
            MemberTask::Prefetch => self.prefetch()?,
            other => return Err(format!("not done this way: {other:?}")),
        }
        Ok(MemberReply::Done)
    }

    /// Brings the pages of the image in before they are needed. Returns at once.
    ///
    /// # Errors
    /// No thread.
    pub fn prefetch(&self) -> Result<(), String> {
        let runs = self.take_adopted();
        self.with_ram(|ram| {
            let Some(dsm) = ram.dsm() else { return Ok(()) };
            dsm.prefetch(runs, MemberId(0)).map_err(|e| e.to_string())
        })?
    }
}
