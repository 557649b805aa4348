//! One private anonymous mapping.

use std::io;

/// Where a range of guest-physical memory lies in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// First byte of the mapping. Touching an absent page waits until the protocol has brought it.
    pub hva: *mut u8,
}

// SAFETY: a `Mapping` is an address and a length; it gives no access by itself. Whoever dereferences `hva` has to argue
// for that access, on whatever thread it is.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared `Mapping` can only be copied and compared.
unsafe impl Sync for Mapping {}

/// A mapping that is unmapped when dropped. The address is kept as a number: nothing here makes a reference from it.
#[derive(Debug)]
pub(super) struct Map {
    base: u64,
    len: u64,
}

fn advise(base: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    let size = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: callers pass ranges inside a `Map` that they hold. The advice used (no huge pages, no copy at fork, drop
    // the contents) affects only that anonymous memory, to which nothing in Rust holds a reference.
    let result = unsafe { libc::madvise(base as *mut libc::c_void, size, advice) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Map {
    pub(super) fn new(len: u64) -> io::Result<Map> {
        let size = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no fixed address is asked for, so the kernel places the mapping where nothing else is.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let map = Map { base: base as u64, len };
        // Coherence is per 4 KiB page. Kernels without transparent huge pages don't know the advice.
        match advise(map.base, len, libc::MADV_NOHUGEPAGE) {
            Err(e) if e.raw_os_error() != Some(libc::EINVAL) => return Err(e),
            _ => {}
        }
        // A child would share pages copy-on-write, and the parent's would move at its next write.
        advise(map.base, len, libc::MADV_DONTFORK)?;
        Ok(map)
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn mapping(&self, gpa: u64) -> Mapping {
        Mapping { gpa, len: self.len, hva: self.base as *mut u8 }
    }

    /// Whether `len` bytes from `offset` lie inside.
    fn holds(&self, offset: u64, len: usize) -> bool {
        offset.checked_add(len as u64).is_some_and(|end| end <= self.len)
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if !self.holds(offset, usize::try_from(len).unwrap_or(usize::MAX)) {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        advise(self.base + offset, len, libc::MADV_DONTNEED)
    }

    pub(super) fn read(&self, offset: u64, len: usize, out: &mut Vec<u8>) {
        if !self.holds(offset, len) {
            return;
        }
        out.reserve(len);
        let at = out.len();
        // SAFETY: the source is `len` bytes inside the mapping (checked above), the destination `len` reserved bytes
        // behind the vector's end; a vector never lies in guest memory, so they don't overlap. The protocol has
        // taken the right to write from every vCPU of this process, so the bytes do not change while they are copied.
        // All `len` bytes are written before the length grows over them.
        unsafe {
            std::ptr::copy_nonoverlapping((self.base + offset) as *const u8, out.as_mut_ptr().add(at), len);
            out.set_len(at + len);
        }
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) {
        if !self.holds(offset, bytes.len()) {
            return;
        }
        // SAFETY: the destination lies inside the mapping (checked above) and no Rust reference points there; the
        // source is a slice outside of guest memory.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.base + offset) as *mut u8, bytes.len());
        }
    }

    /// Takes all access away.
    pub(super) fn forbid(&self) -> io::Result<()> {
        let size = usize::try_from(self.len).unwrap_or(usize::MAX);
        // SAFETY: exactly our own mapping, to which nothing in Rust holds a reference.
        let result = unsafe { libc::mprotect(self.base as *mut libc::c_void, size, libc::PROT_NONE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let size = usize::try_from(self.len).unwrap_or(usize::MAX);
        // SAFETY: the mapping is ours and unmapped once. Who still uses a `Mapping` of it breaks the promise that
        // `Dsm::mappings` asks for.
        let result = unsafe { libc::munmap(self.base as *mut libc::c_void, size) };
        debug_assert_eq!(result, 0);
    }
}
