//! The guest's memory on this member: shared page by page with the others, or, in a VM of one member, plain.

use super::plan::{MemberPlan, Origin};
use super::runtime::MemberError;
use dsm::addr::MemberId;
use dsm::node::{Dsm, DsmConfig, DsmError, PageSink, Reconnect, Saved};
use dsm::stats::DsmSnapshot;
use std::net::TcpStream;
use std::time::Duration;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Guest memory.
#[derive(Debug)]
pub struct GuestRam {
    /// `None` in a VM of one member, where nothing ever faults.
    dsm: Option<Dsm>,
    /// The same memory for devices. Of a shared memory it borrows the mappings: it must not outlive `dsm`,
    /// which [`GuestRam::retire`] sees to.
    mmap: GuestMemoryMmap,
    /// gpa, length and host address of each mapping.
    slots: Vec<(u64, u64, *mut u8)>,
}

// SAFETY: the host addresses are only handed to KVM and to vm-memory, which are thread-safe users of guest memory.
unsafe impl Send for GuestRam {}
// SAFETY: as above; nothing in here changes after construction.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Maps the memory of the plan. `links` has a stream to every other member; `again` says how one that breaks is made again.
    ///
    /// # Errors
    /// No memory, no userfaultfd, or a bad memory map.
    pub fn new(
        plan: &MemberPlan,
        deadline: Duration,
        links: Vec<(MemberId, TcpStream)>,
        again: Option<Reconnect>,
    ) -> Result<GuestRam, MemberError> {
        let engine = plan.pages.always || plan.origin != Origin::Boot;
        if plan.topology.members.len() == 1 && !engine {
            GuestRam::plain(plan)
        } else {
            GuestRam::shared(plan, deadline, links, again)
        }
    }

    fn plain(plan: &MemberPlan) -> Result<GuestRam, MemberError> {
        let ranges = plan.topology.memory.iter().map(|r| (GuestAddress(r.start), usize::try_from(r.len)));
        let ranges: Option<Vec<_>> = ranges.map(|(gpa, len)| Some((gpa, len.ok()?))).collect();
        let ranges = ranges.ok_or_else(|| MemberError::Plan("memory of more than 2^64 bytes".into()))?;
        let mmap = GuestMemoryMmap::from_ranges(&ranges).map_err(|e| MemberError::Memory(e.to_string()))?;
        let slots = slots_of(&mmap);
        Ok(GuestRam { dsm: None, mmap, slots })
    }

    fn shared(
        plan: &MemberPlan,
        deadline: Duration,
        links: Vec<(MemberId, TcpStream)>,
        again: Option<Reconnect>,
    ) -> Result<GuestRam, MemberError> {
        let topology = &plan.topology;
        let members = topology.members.iter().map(|m| m.id).collect();
        let epoch = plan.standing.as_ref().map_or(topology.epoch, |standing| standing.table);
        let mut cfg = DsmConfig::new(plan.me, members, epoch, topology.memory.clone());
        cfg.deadline = deadline;
        cfg.reconnect = again;
        cfg.budget = plan.pages.budget;
        cfg.busy_poll = plan.pages.busy_poll.unwrap_or(cfg.busy_poll);
        if let Some(us) = plan.pages.hold_us {
            cfg.hold.max = Duration::from_micros(us);
            cfg.hold.min = cfg.hold.min.min(cfg.hold.max);
        }
        if let Some(shards) = plan.pages.shards {
            cfg.shards = usize::from(shards).max(1);
        }
        let dsm = Dsm::start(cfg, links)?;
        let mut regions = Vec::new();
        for mapping in dsm.mappings() {
            let len = usize::try_from(mapping.len).map_err(|e| MemberError::Memory(e.to_string()))?;
            let builder = MmapRegionBuilder::new(len)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE);
            // SAFETY: the mapping is dsm's and stays until the Dsm is dropped, which `retire` does last.
            let region = unsafe { builder.with_raw_mmap_pointer(mapping.hva) }.build();
            let region = region.map_err(|e| MemberError::Memory(e.to_string()))?;
            let region = GuestRegionMmap::new(region, GuestAddress(mapping.gpa));
            regions
                .push(region.ok_or_else(|| MemberError::Memory("a range leaves the address space".into()))?);
        }
        let mmap = GuestMemoryMmap::from_regions(regions).map_err(|e| MemberError::Memory(e.to_string()))?;
        let slots = dsm.mappings().iter().map(|m| (m.gpa, m.len, m.hva)).collect();
        Ok(GuestRam { dsm: Some(dsm), mmap, slots })
    }

    /// The memory for devices; must not be used after [`GuestRam::retire`].
    pub fn mmap(&self) -> &GuestMemoryMmap {
        &self.mmap
    }

    /// What KVM maps: gpa, length, host address.
    pub fn slots(&self) -> &[(u64, u64, *mut u8)] {
        &self.slots
    }

    /// The shared memory, if it is.
    pub fn dsm(&self) -> Option<&Dsm> {
        self.dsm.as_ref()
    }

    /// Fills memory before the guest runs; at pages whose home is here without a fault.
    ///
    /// # Errors
    /// No such memory, or the shared memory has failed.
    pub fn preload(&self, gpa: u64, bytes: &[u8]) -> Result<(), MemberError> {
        match self.dsm.as_ref().map(|dsm| dsm.preload(gpa, bytes)) {
            Some(Ok(())) => Ok(()),
            // The home is elsewhere: write through the mapping, page by page as a vCPU would.
            Some(Err(DsmError::NotHome { .. })) | None => self
                .mmap
                .write_slice(bytes, GuestAddress(gpa))
                .map_err(|e| MemberError::Memory(format!("{gpa:#x}: {e}"))),
            Some(Err(e)) => Err(e.into()),
        }
    }

    /// Saves plain memory, in full, while nobody uses it.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn save_plain(&self, sink: &mut dyn PageSink) -> std::io::Result<Saved> {
        const PAGE: usize = 4096;
        let mut saved = Saved::default();
        let mut buffer = vec![0; 64 * PAGE];
        for (gpa, len, _) in &self.slots {
            let mut at = 0;
            while at < *len {
                let size = usize::try_from(len - at).unwrap_or(usize::MAX).min(buffer.len());
                let bytes = buffer.get_mut(..size).unwrap_or_default();
                self.mmap.read_slice(bytes, GuestAddress(gpa + at)).map_err(std::io::Error::other)?;
                for (n, page) in (0u64..).zip(bytes.chunks_exact(PAGE)) {
                    if page.iter().any(|b| *b != 0) {
                        sink.data(gpa + at + n * PAGE as u64, page)?;
                        saved.data += 1;
                    }
                }
                at += size as u64;
            }
        }
        Ok(saved)
    }

    /// Counters.
    pub fn snapshot(&self) -> DsmSnapshot {
        match &self.dsm {
            Some(dsm) => dsm.snapshot(),
            None => {
                let bytes = self.slots.iter().map(|(_, len, hva)| resident(*hva, *len)).sum();
                let pages_total = self.slots.iter().map(|(_, len, _)| len / dsm::addr::PAGE_SIZE).sum();
                let pages_modified = bytes / dsm::addr::PAGE_SIZE;
                DsmSnapshot { resident_bytes: bytes, pages_total, pages_modified, ..DsmSnapshot::default() }
            }
        }
    }

    /// Ends the sharing and gives the memory back.
    ///
    /// # Safety
    /// No vCPU and no device uses the memory any more.
    pub unsafe fn retire(self) {
        drop(self.mmap);
        drop(self.dsm);
    }
}

fn slots_of(mmap: &GuestMemoryMmap) -> Vec<(u64, u64, *mut u8)> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    mmap.iter().map(|r| (r.start_addr().0, r.len(), r.as_ptr())).collect()
}

/// Bytes of a mapping that are in memory.
fn resident(hva: *mut u8, len: u64) -> u64 {
    let Ok(len) = usize::try_from(len) else { return 0 };
    let mut map = vec![0u8; len.div_ceil(4096)];
    // SAFETY: the range is a mapping of ours and `map` has a byte per page of it.
    if unsafe { libc::mincore(hva.cast(), len, map.as_mut_ptr()) } != 0 {
        return 0;
    }
    map.iter().filter(|page| **page & 1 != 0).map(|_| 4096).sum()
}
