//! The manifest: what a checkpoint consists of, and the machine whose memory it is. The last file that is written.
//!
//! ```text
//! spanvm checkpoint 1                       format version
//! 0e2a9c44 1234                             CRC-32 and length of what follows
//! { "guest": ..., "machine": { ... } }      JSON
//! ```

use super::error::CheckpointError;
use super::id::Id;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Format version of manifests and page files.
pub const VERSION: u32 = 1;
/// Name of the manifest in a checkpoint's folder.
pub const MANIFEST: &str = "manifest";
/// Longest manifest, bytes.
pub const MAX_MANIFEST: u64 = 64 << 20;

const FIRST: &str = "spanvm checkpoint ";

/// The checkpoint on which an incremental one builds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Name of its folder, beside this one's.
    pub folder: String,
    /// Its id.
    pub id: Id,
}

/// A range of guest-physical memory, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
}

/// One page file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name in the checkpoint's folder.
    pub file: String,
    /// Its number, which its header repeats.
    pub number: u32,
    /// Its length, bytes.
    pub length: u64,
    /// CRC-32 of its index.
    pub index_crc: u32,
    /// Pages with contents.
    pub data_pages: u64,
    /// Pages that became zero since the parent.
    pub zero_pages: u64,
}

/// A checkpoint without its pages. `M` is the machine: whatever its owner needs to build it again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest<M> {
    /// Name of the VM, for people.
    pub vm: String,
    /// The guest: stays the same over restores.
    pub guest: Id,
    /// This checkpoint.
    pub id: Id,
    /// `None` for a full checkpoint.
    pub parent: Option<Parent>,
    /// When the guest was paused, milliseconds since 1970.
    pub taken_ms: u64,
    /// All of the guest's memory, ascending.
    pub memory: Vec<Range>,
    /// The page files.
    pub parts: Vec<Part>,
    /// The machine.
    pub machine: M,
}

/// The bytes of a manifest's file.
///
/// # Errors
/// A machine that JSON can't say.
pub fn encode<M: Serialize>(manifest: &Manifest<M>) -> Result<Vec<u8>, serde_json::Error> {
    let json = serde_json::to_vec(manifest)?;
    let head = format!("{FIRST}{VERSION}\n{:08x} {}\n", crc32fast::hash(&json), json.len());
    Ok([head.as_bytes(), &json].concat())
}

/// Reads and checks a manifest.
///
/// # Errors
/// [`CheckpointError`], naming the file.
pub fn read<M: DeserializeOwned>(path: &Path) -> Result<Manifest<M>, CheckpointError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_MANIFEST + 1).read_to_end(&mut bytes))
        .map_err(CheckpointError::io("read", path))?;
    if bytes.len() as u64 > MAX_MANIFEST {
        return Err(CheckpointError::damaged(path, "longer than a manifest can be"));
    }
    decode(path, &bytes)
}

fn decode<M: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<Manifest<M>, CheckpointError> {
    let damaged = |what: &str| CheckpointError::damaged(path, what);
    let foreign =
        || CheckpointError::Foreign { path: path.to_path_buf(), expected: "a checkpoint's manifest" };
    let (first, rest) = line(bytes).ok_or_else(foreign)?;
    let version = first.strip_prefix(FIRST).ok_or_else(foreign)?;
    match version.parse() {
        Ok(VERSION) => {}
        Ok(found) if found > VERSION => {
            return Err(CheckpointError::Newer { path: path.to_path_buf(), found, known: VERSION });
        }
        _ => return Err(damaged("its format version is none")),
    }
    let (second, json) = line(rest).ok_or_else(|| damaged("it is cut off"))?;
    let sums = second
        .split_once(' ')
        .and_then(|(crc, length)| Some((u32::from_str_radix(crc, 16).ok()?, length.parse::<usize>().ok()?)));
    let (crc, length) = sums.ok_or_else(|| damaged("its second line is not a checksum and a length"))?;
    if json.len() != length {
        return Err(damaged(&format!("{} bytes follow its head, it says {length}", json.len())));
    }
    if crc32fast::hash(json) != crc {
        return Err(damaged("its checksum is wrong"));
    }
    let manifest = serde_json::from_slice(json).map_err(|e| CheckpointError::damaged(path, e.to_string()))?;
    check(path, &manifest)?;
    Ok(manifest)
}

/// The first line, which must be short ASCII, and what follows it.
fn line(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let end = bytes.iter().take(100).position(|b| *b == b'\n')?;
    let (line, rest) = bytes.split_at(end);
    Some((std::str::from_utf8(line).ok()?, rest.get(1..)?))
}

/// What every later step relies on.
fn check<M>(path: &Path, manifest: &Manifest<M>) -> Result<(), CheckpointError> {
    let damaged = |what: String| Err(CheckpointError::damaged(path, what));
    let mut end = 0;
    for Range { start, len } in manifest.memory.iter().copied() {
        let next = start.checked_add(len);
        match next {
            Some(next) if len > 0 && start % 4096 == 0 && len % 4096 == 0 && start >= end => end = next,
            _ => return damaged(format!("its memory range {start:#x}+{len:#x} is impossible")),
        }
    }
    // Page numbers are 32 bits wide.
    let pages: u64 = manifest.memory.iter().map(|r| r.len / 4096).fold(0, u64::saturating_add);
    if pages == 0 || pages >= u64::from(u32::MAX) {
        return damaged(format!("a memory of {pages} pages"));
    }
    let named = manifest.parts.iter().map(|p| &p.file).chain(manifest.parent.iter().map(|p| &p.folder));
    for name in named {
        if !is_plain(name) {
            return damaged(format!("{name:?} is no name of a file of a checkpoint"));
        }
    }
    Ok(())
}

/// A name that stays in its folder.
fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 64
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn manifest() -> Manifest<String> {
        Manifest {
            vm: "t".into(),
            guest: Id([1; 16]),
            id: Id([2; 16]),
            parent: Some(Parent { folder: "00000001".into(), id: Id([3; 16]) }),
            taken_ms: 5,
            memory: vec![Range { start: 0, len: 8192 }, Range { start: 1 << 32, len: 4096 }],
            parts: vec![Part {
                file: "pages-0".into(),
                number: 0,
                length: 4096,
                index_crc: 7,
                data_pages: 1,
                zero_pages: 0,
            }],
            machine: "x".into(),
        }
    }

    fn decoded(bytes: &[u8]) -> Result<Manifest<String>, CheckpointError> {
        decode(Path::new("/d/manifest"), bytes)
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written() {
        assert_eq!(decoded(&encode(&manifest()).unwrap()).unwrap(), manifest());
    }

    #[test]
    fn bad_manifests_are_named() {
        type Change = fn(&mut Manifest<String>);
        let table: [(Change, &str); 6] = [
            (|m| m.memory.clear(), "0 pages"),
            (|m| m.memory[1].start = 4096, "0x1000+0x1000"),
            (|m| m.memory[0].len = 1, "0x0+0x1"),
            (|m| m.memory[1].len = !4095, "impossible"),
            (|m| m.parts[0].file = "../x".into(), "../x"),
            (|m| m.parent.as_mut().unwrap().folder = "/etc".into(), "/etc"),
        ];
        for (change, named) in table {
            let mut bad = manifest();
            change(&mut bad);
            let error = decoded(&encode(&bad).unwrap()).unwrap_err().to_string();
            assert!(error.contains("/d/manifest") && error.contains(named), "{error}");
        }
        let newer =
            String::from_utf8(encode(&manifest()).unwrap()).unwrap().replace("checkpoint 1", "checkpoint 2");
        let error = decoded(newer.as_bytes()).unwrap_err().to_string();
        assert!(error.contains("version 2") && error.contains("up to 1"), "{error}");
        assert!(matches!(decoded(b"hello\n"), Err(CheckpointError::Foreign { .. })));
    }

    proptest! {
        #[test]
        fn no_flip_and_no_cut_goes_unnoticed(at in 0usize..4000, bit in 0u8..8, cut in 0usize..4000) {
            let good = encode(&manifest()).unwrap();
            let mut bad = good.clone();
            let at = at % bad.len();
            bad[at] ^= 1 << bit;
            // The only change that may be read: the case of a hexadecimal digit.
            if let Ok(read) = decoded(&bad) {
                prop_assert_eq!(read, manifest());
                prop_assert!(good[at].is_ascii_alphabetic());
            }
            prop_assert!(decoded(&good[..cut % good.len()]).is_err());
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decoded(&bytes).is_err());
            let framed = [b"spanvm checkpoint 1\n", &bytes[..]].concat();
            prop_assert!(decoded(&framed).is_err());
        }
    }
}
