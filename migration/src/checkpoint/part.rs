//! Page files: their layout, and the writer, which only ever appends.
//!
//! ```text
//! 0      header, 4096 bytes: magic, version, guest, checkpoint, number of the part, CRC-32
//! 4096   pages with contents, 4096 bytes each, in the order of their addresses
//! ...    index: one extent (24 bytes) per run of pages, then one CRC-32 (4 bytes) per page with contents
//! end-48 trailer: magic, number of extents, number of pages with contents, CRC-32 of the index, CRC-32 of the trailer
//! ```
//! All numbers are little-endian. A page that no extent names is zero in a full checkpoint, and unchanged in an
//! incremental one.

use super::id::Id;
use super::manifest::{Part, VERSION};
use std::io::{self, Write};

/// Size of a page, bytes.
pub const PAGE: usize = 4096;
pub(super) const HEADER: usize = PAGE;
pub(super) const EXTENT: usize = 24;
pub(super) const TRAILER: usize = 48;
pub(super) const MAGIC: [u8; 8] = *b"SPANPAGE";
pub(super) const END_MAGIC: [u8; 8] = *b"PAGESEND";
/// Bytes of the header that its checksum covers.
pub(super) const HEADER_SUM: usize = 52;
/// Bytes of the trailer that its checksum covers.
pub(super) const TRAILER_SUM: usize = 40;

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Address of the first page.
    pub gpa: u64,
    /// Number of pages.
    pub pages: u32,
    /// Whether the file has their contents; else they are zero.
    pub has_data: bool,
    /// Position of the first page among the file's pages with contents.
    pub first: u64,
}

impl Extent {
    /// First address behind the run.
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(u64::from(self.pages) * PAGE as u64)
    }

    fn encode(&self) -> [u8; EXTENT] {
        let mut bytes = [0; EXTENT];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.pages.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::from(self.has_data).to_le_bytes());
        bytes[16..].copy_from_slice(&self.first.to_le_bytes());
        bytes
    }
}

/// What a page file begins with.
pub(super) fn header(guest: Id, checkpoint: Id, number: u32) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&number.to_le_bytes());
    bytes[16..32].copy_from_slice(&guest.0);
    bytes[32..48].copy_from_slice(&checkpoint.0);
    // 48..52 is kept for flags.
    let sum = crc32fast::hash(&bytes[..HEADER_SUM]);
    bytes[HEADER_SUM..HEADER_SUM + 4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Writes one page file to anything that takes bytes in order: a file, or a connection to who has the file.
#[derive(Debug)]
pub struct PartWriter<W: Write> {
    to: W,
    number: u32,
    extents: Vec<Extent>,
    sums: Vec<u32>,
    zero_pages: u64,
}

/// Pages out of order: a fault of the caller.
fn disorder(gpa: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("page {gpa:#x} is out of order, or no page"))
}

impl<W: Write> PartWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn new(mut to: W, guest: Id, checkpoint: Id, number: u32) -> io::Result<PartWriter<W>> {
        to.write_all(&header(guest, checkpoint, number))?;
        Ok(PartWriter { to, number, extents: Vec::new(), sums: Vec::new(), zero_pages: 0 })
    }

    /// Appends whole pages that follow each other from `gpa` on. Addresses must ascend from call to call.
    ///
    /// # Errors
    /// Pages out of order, or those of the writer.
    pub fn data(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let pages = u32::try_from(bytes.len() / PAGE).ok().filter(|_| bytes.len() % PAGE == 0);
        self.extend(gpa, pages.ok_or_else(|| disorder(gpa))?, true)?;
        self.sums.extend(bytes.chunks_exact(PAGE).map(crc32fast::hash));
        self.to.write_all(bytes)
    }

    /// Says that pages have become zero.
    ///
    /// # Errors
    /// Pages out of order.
    pub fn zero(&mut self, gpa: u64, pages: u32) -> io::Result<()> {
        self.extend(gpa, pages, false)?;
        self.zero_pages += u64::from(pages);
        Ok(())
    }

    fn extend(&mut self, gpa: u64, pages: u32, has_data: bool) -> io::Result<()> {
        let end = self.extents.last().map_or(0, Extent::end);
        let fits = gpa.checked_add(u64::from(pages) * PAGE as u64).is_some();
        if gpa < end || gpa % PAGE as u64 != 0 || !fits {
            return Err(disorder(gpa));
        }
        if pages == 0 {
            return Ok(());
        }
        match self.extents.last_mut() {
            Some(last)
                if gpa == end && last.has_data == has_data && last.pages.checked_add(pages).is_some() =>
            {
                last.pages += pages;
            }
            _ => {
                let first = self.sums.len() as u64;
                self.extents.push(Extent { gpa, pages, has_data, first });
            }
        }
        Ok(())
    }

    /// Writes index and trailer; returns the file's entry in the manifest (under the name `pages-NUMBER`) and what
    /// it was written to, flushed.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn finish(mut self) -> io::Result<(Part, W)> {
        let mut index = Vec::with_capacity(self.extents.len() * EXTENT + self.sums.len() * 4);
        self.extents.iter().for_each(|e| index.extend(e.encode()));
        self.sums.iter().for_each(|s| index.extend(s.to_le_bytes()));
        let index_crc = crc32fast::hash(&index);
        let data_pages = self.sums.len() as u64;
        let mut trailer = [0; TRAILER];
        trailer[..8].copy_from_slice(&END_MAGIC);
        trailer[8..16].copy_from_slice(&(self.extents.len() as u64).to_le_bytes());
        trailer[16..24].copy_from_slice(&data_pages.to_le_bytes());
        trailer[24..28].copy_from_slice(&index_crc.to_le_bytes());
        let sum = crc32fast::hash(&trailer[..TRAILER_SUM]);
        trailer[TRAILER_SUM..TRAILER_SUM + 4].copy_from_slice(&sum.to_le_bytes());
        self.to.write_all(&index)?;
        self.to.write_all(&trailer)?;
        self.to.flush()?;
        let length = HEADER as u64 + data_pages * PAGE as u64 + index.len() as u64 + TRAILER as u64;
        let file = file_name(self.number);
        let part =
            Part { file, number: self.number, length, index_crc, data_pages, zero_pages: self.zero_pages };
        Ok((part, self.to))
    }
}

/// Name of the page file of a part.
pub fn file_name(number: u32) -> String {
    format!("pages-{number}")
}
