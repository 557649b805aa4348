//! The memory of a guest as a chain of checkpoints has it: the newest word on each page counts.

use super::error::CheckpointError;
use super::id::Id;
use super::manifest::{self, MANIFEST, Manifest, Part, Range};
use super::part::{Extent, PAGE, PartWriter};
use super::reader::{Expected, PartFile};
use super::store::PartSink;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::path::Path;

/// Most checkpoints that one may build on.
pub const MAX_CHAIN: usize = 250;
/// Pages read at a time, at most.
const BATCH: usize = 64;

/// An open chain of checkpoints. Its files stay readable when the folders are removed.
#[derive(Debug)]
pub struct Image {
    memory: Vec<Range>,
    /// Oldest first.
    layers: Vec<Vec<PartFile>>,
    /// Per page of memory, in the order of addresses: 1 + the layer that has its contents, 0 for zero.
    newest: Vec<u8>,
}

impl Image {
    /// Opens a checkpoint and all that it builds on. The pages themselves are checked when they are read.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file.
    pub fn open<M: DeserializeOwned>(folder: &Path) -> Result<(Manifest<M>, Image), CheckpointError> {
        let path = folder.join(MANIFEST);
        let manifest: Manifest<M> = manifest::read(&path)?;
        let mut layers = vec![open_parts(folder, &manifest)?];
        let root = folder.parent().unwrap_or(Path::new(""));
        let mut below = manifest.parent.clone();
        while let Some(parent) = below {
            if layers.len() == MAX_CHAIN {
                return Err(CheckpointError::damaged(
                    &path,
                    format!("it builds on more than {MAX_CHAIN} others"),
                ));
            }
            let folder = root.join(&parent.folder);
            let path = folder.join(MANIFEST);
            let older: Manifest<IgnoredAny> = manifest::read(&path)?;
            if older.guest != manifest.guest || older.id != parent.id {
                return Err(CheckpointError::Mixed {
                    path,
                    found: format!("checkpoint {} of guest {}", older.id, older.guest),
                    expected: format!("checkpoint {} of guest {}", parent.id, manifest.guest),
                });
            }
            if older.memory != manifest.memory {
                return Err(CheckpointError::damaged(&path, "its guest has another memory"));
            }
            layers.push(open_parts(&folder, &older)?);
            below = older.parent;
        }
        layers.reverse();
        let mut image = Image { newest: Vec::new(), layers, memory: manifest.memory.clone() };
        image.settle();
        Ok((manifest, image))
    }

    /// Decides which layer has the newest contents of each page.
    fn settle(&mut self) {
        let pages: u64 = self.memory.iter().map(|r| r.len / PAGE as u64).sum();
        self.newest = vec![0; usize::try_from(pages).unwrap_or(0)];
        for (mark, layer) in (1u8..).zip(&self.layers) {
            for extent in layer.iter().flat_map(PartFile::extents) {
                // A run may reach over the seam of two ranges, whose pages are neighbours in the table, too.
                let Some(at) = slot(&self.memory, extent.gpa) else { continue };
                let end = at.saturating_add(usize::try_from(extent.pages).unwrap_or(usize::MAX));
                if let Some(slots) = self.newest.get_mut(at..end) {
                    slots.fill(if extent.has_data { mark } else { 0 });
                }
            }
        }
    }

    /// All runs of pages with contents: address and number of pages, ascending.
    pub fn runs(&self) -> Vec<(u64, u32)> {
        let mut runs: Vec<(u64, u32)> = Vec::new();
        let addresses =
            self.memory.iter().flat_map(|r| (0..r.len / PAGE as u64).map(|n| r.start + n * PAGE as u64));
        for (gpa, _) in addresses.zip(&self.newest).filter(|(_, layer)| **layer != 0) {
            match runs.last_mut() {
                Some((start, pages))
                    if *start + u64::from(*pages) * PAGE as u64 == gpa && *pages < u32::MAX =>
                {
                    *pages += 1;
                }
                _ => runs.push((gpa, 1)),
            }
        }
        runs
    }

    /// Reads the page at `gpa`, and, if `out` has room for more than one, pages behind it as far as that is one read.
    /// Returns how many; 0 when the page is zero, or no page of the guest. `out` is a multiple of the page size.
    ///
    /// # Errors
    /// A file can't be read, or a page is not what was written.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<usize, CheckpointError> {
        let at = slot(&self.memory, gpa);
        let mark = at.and_then(|at| self.newest.get(at)).copied().unwrap_or(0);
        let layer = usize::from(mark).checked_sub(1).and_then(|n| self.layers.get(n));
        let Some((layer, at)) = layer.zip(at) else { return Ok(0) };
        let found = layer.iter().find_map(|part| Some((part, *part.find(gpa).filter(|e| e.has_data)?)));
        let Some((part, extent)) = found else { return Ok(0) };
        let skip = u32::try_from((gpa - extent.gpa) / PAGE as u64).unwrap_or(u32::MAX);
        let room = (out.len() / PAGE).min(usize::try_from(extent.pages - skip).unwrap_or(usize::MAX));
        let behind = self.newest.get(at..).unwrap_or_default();
        let count = behind.iter().take(room).take_while(|m| **m == mark).count();
        let Some(out) = out.get_mut(..count * PAGE) else { return Ok(0) };
        part.read(&extent, skip, out)?;
        Ok(count)
    }

    /// Reads and checks every page.
    ///
    /// # Errors
    /// The first page that is not what was written.
    pub fn verify(&self) -> Result<(), CheckpointError> {
        self.each_batch(|_, _| Ok(()))
    }

    /// Writes all pages to one new file, as a full checkpoint has them.
    pub(super) fn copy_to(&self, sink: PartSink, guest: Id, id: Id) -> Result<Part, CheckpointError> {
        let path = sink.path().to_path_buf();
        let failed = |e: std::io::Error| unwrap(e, &path);
        let mut writer = PartWriter::new(sink, guest, id, 0).map_err(failed)?;
        self.each_batch(|gpa, bytes| writer.data(gpa, bytes).map_err(failed))?;
        Ok(writer.finish().map_err(failed)?.0)
    }

    fn each_batch(
        &self,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut buffer = vec![0; BATCH * PAGE];
        for (start, pages) in self.runs() {
            let (mut gpa, end) = (start, start + u64::from(pages) * PAGE as u64);
            while gpa < end {
                let room = buffer.len().min(usize::try_from(end - gpa).unwrap_or(usize::MAX));
                let count = self.read(gpa, buffer.get_mut(..room).unwrap_or_default())?;
                each(gpa, buffer.get(..count * PAGE).unwrap_or_default())?;
                // `runs` names only pages that a layer has.
                gpa += count.max(1) as u64 * PAGE as u64;
            }
        }
        Ok(())
    }
}

/// The error that a [`PartSink`] put into an `io::Error`.
fn unwrap(e: std::io::Error, path: &Path) -> CheckpointError {
    match e.downcast::<CheckpointError>() {
        Ok(e) => e,
        Err(source) => CheckpointError::Io { what: "write", path: path.to_path_buf(), source },
    }
}

/// Position of a page, counted over all ranges.
fn slot(memory: &[Range], gpa: u64) -> Option<usize> {
    let mut before = 0;
    for range in memory {
        match gpa.checked_sub(range.start) {
            Some(offset) if offset < range.len => {
                return usize::try_from((before + offset) / PAGE as u64).ok();
            }
            _ => before += range.len,
        }
    }
    None
}

/// Opens all page files of one checkpoint; no page may be in two of them.
fn open_parts<M>(folder: &Path, manifest: &Manifest<M>) -> Result<Vec<PartFile>, CheckpointError> {
    let expected =
        |part| Expected { guest: manifest.guest, checkpoint: manifest.id, part, memory: &manifest.memory };
    let parts = manifest.parts.iter().map(|part| PartFile::open(folder, expected(part)));
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    let mut all: Vec<(&Extent, &PartFile)> =
        parts.iter().flat_map(|p| p.extents().iter().map(move |e| (e, p))).collect();
    all.sort_by_key(|(e, _)| e.gpa);
    for pair in all.windows(2) {
        if let [(a, first), (b, second)] = pair {
            if a.end() > b.gpa {
                let what = format!("page {:#x} is also in {}", b.gpa, first.path().display());
                return Err(CheckpointError::damaged(second.path(), what));
            }
        }
    }
    Ok(parts)
}
