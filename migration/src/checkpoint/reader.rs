//! Reading page files. Every byte may be wrong: nothing is believed before it was checked, and nothing is
//! allocated that the file's own length does not pay for.

use super::error::CheckpointError;
use super::id::Id;
use super::manifest::{Part, Range, VERSION};
use super::part::{END_MAGIC, EXTENT, Extent, HEADER, HEADER_SUM, MAGIC, PAGE, TRAILER, TRAILER_SUM};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A page file whose index has been read and checked.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    file: File,
    extents: Vec<Extent>,
    sums: Vec<u32>,
}

/// Whose file it has to be.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// The guest.
    pub guest: Id,
    /// The checkpoint.
    pub checkpoint: Id,
    /// What the manifest says of the file.
    pub part: &'a Part,
    /// The guest's memory.
    pub memory: &'a [Range],
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|b| <[u8; 4]>::try_from(b).ok());
    u32::from_le_bytes(word.unwrap_or_default())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let word = bytes.get(at..at + 8).and_then(|b| <[u8; 8]>::try_from(b).ok());
    u64::from_le_bytes(word.unwrap_or_default())
}

impl PartFile {
    /// Opens a file of the checkpoint in `folder` and checks all but the pages themselves.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file.
    pub fn open(folder: &Path, expected: Expected<'_>) -> Result<PartFile, CheckpointError> {
        let path = folder.join(&expected.part.file);
        let file = File::open(&path).map_err(CheckpointError::io("open", &path))?;
        let meta = file.metadata().map_err(CheckpointError::io("look at", &path))?;
        if !meta.is_file() {
            return Err(CheckpointError::Foreign { path, expected: "a file of pages" });
        }
        check_header(&path, &file, meta.len(), expected)?;
        let (extents, sums) = read_index(&path, &file, meta.len(), expected)?;
        check_extents(&path, &extents, sums.len() as u64, expected.memory)?;
        Ok(PartFile { path, file, extents, sums })
    }

    /// The runs of pages, ascending.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The run that has a page.
    pub fn find(&self, gpa: u64) -> Option<&Extent> {
        let at = self.extents.partition_point(|e| e.end() <= gpa);
        self.extents.get(at).filter(|e| e.gpa <= gpa)
    }

    /// Reads pages with contents that follow each other, and checks each: page `skip` of an extent and as many as fit
    /// into `out`, whose length is a multiple of the page size.
    ///
    /// # Errors
    /// The file can't be read, or a page is not what was written.
    pub fn read(&self, extent: &Extent, skip: u32, out: &mut [u8]) -> Result<(), CheckpointError> {
        let first = extent.first.saturating_add(u64::from(skip));
        let offset = HEADER as u64 + first.saturating_mul(PAGE as u64);
        self.file.read_exact_at(out, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => CheckpointError::damaged(&self.path, "it became shorter"),
            _ => CheckpointError::io("read", &self.path)(e),
        })?;
        for (page, number) in out.chunks_exact(PAGE).zip(first..) {
            let sum = usize::try_from(number).ok().and_then(|n| self.sums.get(n));
            if sum != Some(&crc32fast::hash(page)) {
                let gpa = extent.gpa.saturating_add((number - extent.first) * PAGE as u64);
                let what = format!("the contents of page {gpa:#x} have a wrong checksum");
                return Err(CheckpointError::damaged(&self.path, what));
            }
        }
        Ok(())
    }
}

fn check_header(
    path: &Path,
    file: &File,
    length: u64,
    expected: Expected<'_>,
) -> Result<(), CheckpointError> {
    let mut head = [0; HEADER];
    let have = usize::try_from(length).unwrap_or(usize::MAX).min(HEADER);
    let start = head.get_mut(..have).unwrap_or_default();
    file.read_exact_at(start, 0).map_err(CheckpointError::io("read", path))?;
    if head[..8] != MAGIC {
        return Err(CheckpointError::Foreign { path: path.to_path_buf(), expected: "a file of pages" });
    }
    let found = u32_at(&head, 8);
    if found > VERSION {
        return Err(CheckpointError::Newer { path: path.to_path_buf(), found, known: VERSION });
    }
    if length != expected.part.length {
        let what = format!("it has {length} bytes, its manifest says {}", expected.part.length);
        return Err(CheckpointError::damaged(path, what));
    }
    if length < (HEADER + TRAILER) as u64 {
        return Err(CheckpointError::damaged(path, "it is shorter than an empty one"));
    }
    if u32_at(&head, HEADER_SUM) != crc32fast::hash(&head[..HEADER_SUM]) || found != VERSION {
        return Err(CheckpointError::damaged(path, "the checksum of its header is wrong"));
    }
    if head[HEADER_SUM + 4..].iter().any(|b| *b != 0) {
        return Err(CheckpointError::damaged(path, "its header has something where nothing should be"));
    }
    let id = |at: usize| Id(head.get(at..at + 16).and_then(|b| b.try_into().ok()).unwrap_or_default());
    let mixed = |what: &str, found: Id, expected: Id| CheckpointError::Mixed {
        path: path.to_path_buf(),
        found: format!("{what} {found}"),
        expected: format!("{what} {expected}"),
    };
    if id(16) != expected.guest {
        return Err(mixed("guest", id(16), expected.guest));
    }
    if id(32) != expected.checkpoint {
        return Err(mixed("checkpoint", id(32), expected.checkpoint));
    }
    let number = u32_at(&head, 12);
    if number != expected.part.number {
        return Err(CheckpointError::Mixed {
            path: path.to_path_buf(),
            found: format!("part {number}"),
            expected: format!("part {}", expected.part.number),
        });
    }
    Ok(())
}

fn read_index(
    path: &Path,
    file: &File,
    length: u64,
    expected: Expected<'_>,
) -> Result<(Vec<Extent>, Vec<u32>), CheckpointError> {
    let damaged = |what: &str| CheckpointError::damaged(path, what);
    let mut trailer = [0; TRAILER];
    let at = length - TRAILER as u64;
    file.read_exact_at(&mut trailer, at).map_err(CheckpointError::io("read", path))?;
    if trailer[..8] != END_MAGIC || u32_at(&trailer, TRAILER_SUM) != crc32fast::hash(&trailer[..TRAILER_SUM])
    {
        return Err(damaged("its end is not that of a file of pages"));
    }
    if trailer[TRAILER_SUM + 4..].iter().any(|b| *b != 0) {
        return Err(damaged("its end has something where nothing should be"));
    }
    let (extents, pages) = (u64_at(&trailer, 8), u64_at(&trailer, 16));
    let index =
        extents.checked_mul(EXTENT as u64).zip(pages.checked_mul(4)).and_then(|(a, b)| a.checked_add(b));
    let whole = pages
        .checked_mul(PAGE as u64)
        .zip(index)
        .and_then(|(data, index)| data.checked_add(index)?.checked_add((HEADER + TRAILER) as u64));
    if whole != Some(length) {
        return Err(damaged("its length is not that of its pages and its index"));
    }
    // At most the file's own length.
    let size = index.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| damaged("its index is too long"))?;
    let mut bytes = vec![0; size];
    file.read_exact_at(&mut bytes, at - size as u64).map_err(CheckpointError::io("read", path))?;
    let sum = crc32fast::hash(&bytes);
    if sum != u32_at(&trailer, 24) || sum != expected.part.index_crc {
        return Err(damaged("the checksum of its index is wrong"));
    }
    let (runs, sums) = bytes.split_at(usize::try_from(extents).unwrap_or(0).saturating_mul(EXTENT).min(size));
    let extents: Option<Vec<Extent>> = runs
        .chunks_exact(EXTENT)
        .map(|b| {
            let has_data = match u32_at(b, 12) {
                0 => false,
                1 => true,
                _ => return None,
            };
            Some(Extent { gpa: u64_at(b, 0), pages: u32_at(b, 8), has_data, first: u64_at(b, 16) })
        })
        .collect();
    let extents = extents.ok_or_else(|| damaged("its index has a run of an unknown kind"))?;
    Ok((extents, sums.chunks_exact(4).map(|b| u32_at(b, 0)).collect()))
}

/// Ascending, in the guest's memory, and each page of the file in exactly one run.
fn check_extents(
    path: &Path,
    extents: &[Extent],
    pages: u64,
    memory: &[Range],
) -> Result<(), CheckpointError> {
    let (mut end, mut first) = (0u64, 0u64);
    for e in extents {
        let bad = |what: &str| {
            let what = format!("the run of {} pages at {:#x} {what}", e.pages, e.gpa);
            Err(CheckpointError::damaged(path, what))
        };
        let len = u64::from(e.pages) * PAGE as u64;
        let Some(next) = e.gpa.checked_add(len) else { return bad("is too long") };
        if e.pages == 0 || e.gpa % PAGE as u64 != 0 || e.gpa < end {
            return bad("is out of order");
        }
        if !is_inside(memory, e.gpa, next) {
            return bad("is not in the guest's memory");
        }
        if e.first != first {
            return bad("begins elsewhere in the file");
        }
        if e.has_data {
            first = first.saturating_add(u64::from(e.pages));
        }
        end = next;
    }
    if first == pages {
        Ok(())
    } else {
        Err(CheckpointError::damaged(path, format!("its index names {first} pages, the file has {pages}")))
    }
}

/// Whether memory covers all of a run; it may reach over the seam of two ranges.
fn is_inside(memory: &[Range], start: u64, end: u64) -> bool {
    let mut at = start;
    for range in memory {
        let range_end = range.start.saturating_add(range.len);
        if range.start <= at && at < range_end {
            at = range_end;
        }
        if at >= end {
            return true;
        }
    }
    false
}
