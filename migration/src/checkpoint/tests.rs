use super::manifest::{MANIFEST, encode, read};
use super::part::{HEADER, PAGE};
use super::store::{Probe, complete};
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const GUEST: Id = Id([7; 16]);
const MEMORY: [Range; 2] = [Range { start: 0, len: 64 << 12 }, Range { start: 1 << 32, len: 64 << 12 }];

/// What the guest's memory holds: a byte per page, 0 for zero.
type Model = BTreeMap<u64, u8>;

fn gpa_of(n: u64) -> u64 {
    if n < 64 { n << 12 } else { (1 << 32) + ((n - 64) << 12) }
}

fn page(fill: u8) -> [u8; PAGE] {
    std::array::from_fn(|n| if n % 64 == 0 { fill } else { u8::try_from(n % 251).unwrap() })
}

/// Writes a checkpoint whose pages (0 = zero) are dealt out to `parts` files.
fn save(
    store: &Arc<Store>,
    pages: &Model,
    parent: Option<Parent>,
    parts: u32,
) -> Result<PathBuf, CheckpointError> {
    let id = Id::random();
    let draft = store.begin()?;
    let mut done = Vec::new();
    for number in 0..parts {
        let sink = draft.part(number)?;
        let path = sink.path().to_path_buf();
        let io = |e: io::Error| e.downcast::<CheckpointError>().unwrap_or_else(|e| panic!("{path:?}: {e}"));
        let mut writer = PartWriter::new(sink, GUEST, id, number).map_err(io)?;
        for (gpa, fill) in
            pages.iter().filter(|(gpa, _)| (**gpa >> 12) % u64::from(parts) == u64::from(number))
        {
            match fill {
                0 => writer.zero(*gpa, 1).map_err(io)?,
                fill => writer.data(*gpa, &page(*fill)).map_err(io)?,
            }
        }
        done.push(writer.finish().map_err(io)?.0);
    }
    draft.finish(&Manifest {
        vm: "t".into(),
        guest: GUEST,
        id,
        parent,
        taken_ms: 0,
        memory: MEMORY.to_vec(),
        parts: done,
        machine: vec!["machine".to_string()],
    })
}

fn parent_of(folder: &Path) -> Parent {
    let manifest: Manifest<Vec<String>> = read(&folder.join(MANIFEST)).unwrap();
    Parent { folder: folder.file_name().unwrap().to_str().unwrap().into(), id: manifest.id }
}

/// Opens a checkpoint and reads all of it.
fn load(folder: &Path) -> Result<Model, CheckpointError> {
    let (manifest, image) = Image::open::<Vec<String>>(folder)?;
    assert_eq!(manifest.machine, ["machine"]);
    image.verify()?;
    let mut model = Model::new();
    let mut named: Vec<u64> = Vec::new();
    for (gpa, pages) in image.runs() {
        named.extend((0..u64::from(pages)).map(|n| gpa + (n << 12)));
    }
    for gpa in (0..128).map(gpa_of) {
        let mut out = [0; PAGE];
        if image.read(gpa, &mut out)? == 1 {
            model.insert(gpa, out[0]);
            assert_eq!(out, page(out[0]));
        }
    }
    assert_eq!(model.keys().copied().collect::<Vec<_>>(), named);
    Ok(model)
}

fn some_pages() -> Model {
    [(0, 1), (1, 2), (2, 3), (9, 4), (63, 5), (64, 6), (127, 7)].map(|(n, f)| (gpa_of(n), f)).into()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Whatever is saved, in full or as what changed, consolidated or not: the newest checkpoint is the memory.
    #[test]
    fn a_chain_is_the_guests_memory(
        steps in proptest::collection::vec(
            (proptest::collection::btree_map(0u64..128, 0u8..4, 0..20), any::<bool>(), 1u32..4, any::<bool>()),
            1..6,
        ),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).map(Arc::new).unwrap();
        let mut model = Model::new();
        let mut last: Option<PathBuf> = None;
        for (changes, full, parts, consolidate) in steps {
            let changes: Model = changes.into_iter().map(|(n, fill)| (gpa_of(n), fill)).collect();
            model.extend(changes.clone());
            model.retain(|_, fill| *fill != 0);
            let parent = last.as_deref().filter(|_| !full).map(parent_of);
            let pages = if parent.is_some() { &changes } else { &model };
            last = Some(save(&store, pages, parent, parts).unwrap());
            if consolidate {
                last = Some(store.consolidate::<Vec<String>>().unwrap());
                store.prune().unwrap();
                prop_assert_eq!(complete(dir.path()).unwrap().len(), 1);
            }
            let newest = newest(dir.path()).unwrap();
            prop_assert_eq!(Some(&newest), last.as_ref());
            prop_assert_eq!(&load(&newest).unwrap(), &model);
        }
    }
}

#[test]
fn zero_and_untouched_pages_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder =
        save(&Arc::new(Store::open(dir.path()).unwrap()), &some_pages(), None, 1).map(Arc::new).unwrap();
    let length = fs::metadata(folder.join("pages-0")).unwrap().len();
    assert!(length < (HEADER + 7 * PAGE + 300) as u64, "{length}");
}

#[test]
fn no_changed_byte_goes_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    let pages = [(gpa_of(3), 1), (gpa_of(4), 2)].into();
    let folder = save(&Arc::new(Store::open(dir.path()).unwrap()), &pages, None, 1).map(Arc::new).unwrap();
    let good = load(&folder).unwrap();
    for file in ["pages-0", MANIFEST] {
        let path = folder.join(file);
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            match load(&folder) {
                Err(e) => assert!(e.to_string().contains(path.to_str().unwrap()), "{file} byte {at}: {e}"),
                // The case of a hexadecimal digit in the manifest's head.
                Ok(read) => assert!(read == good && file == MANIFEST && at < 40, "{file} byte {at}"),
            }
        }
        for length in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
            fs::write(&path, &bytes[..length]).unwrap();
            let error = load(&folder).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{file} cut to {length}: {error}");
        }
        fs::write(&path, [&bytes[..], b"more"].concat()).unwrap();
        assert!(load(&folder).is_err());
        fs::write(&path, &bytes).unwrap();
    }
    assert_eq!(load(&folder).unwrap(), good);
}

fn rewrite(folder: &Path, change: impl FnOnce(&mut Manifest<Vec<String>>)) {
    let path = folder.join(MANIFEST);
    let mut manifest = read(&path).unwrap();
    change(&mut manifest);
    fs::write(&path, encode(&manifest).unwrap()).unwrap();
}

/// A store with a full and an incremental checkpoint; returns the latter's folder.
fn chain(root: &Path) -> PathBuf {
    let store = Store::open(root).map(Arc::new).unwrap();
    let base = save(&store, &some_pages(), None, 2).unwrap();
    save(&store, &[(gpa_of(1), 0), (gpa_of(2), 9)].into(), Some(parent_of(&base)), 2).unwrap()
}

#[test]
fn bad_checkpoints_are_refused_with_the_name_of_the_file() {
    type Spoil = fn(&Path, &Path);
    let table: [(&str, Spoil, &[&str]); 13] = [
        (
            "missing page file",
            |new, _| fs::remove_file(new.join("pages-1")).unwrap(),
            &["pages-1", "missing"],
        ),
        ("missing manifest", |new, _| fs::remove_file(new.join(MANIFEST)).unwrap(), &["manifest", "missing"]),
        ("missing parent", |_, old| fs::remove_dir_all(old).unwrap(), &["00000001/manifest", "missing"]),
        (
            "missing page file of the parent",
            |_, old| fs::remove_file(old.join("pages-0")).unwrap(),
            &["00000001/pages-0", "missing"],
        ),
        (
            "a page file of the parent",
            |new, old| assert!(fs::copy(old.join("pages-0"), new.join("pages-0")).unwrap() > 0),
            &["00000002/pages-0"],
        ),
        (
            "a page file of another guest",
            |new, _| {
                let path = new.join("pages-0");
                let id = read::<Vec<String>>(&new.join(MANIFEST)).unwrap().id;
                let mut bytes = fs::read(&path).unwrap();
                bytes[..HEADER].copy_from_slice(&part::header(Id([8; 16]), id, 0));
                fs::write(path, bytes).unwrap();
            },
            &["00000002/pages-0", "belongs to guest 0808"],
        ),
        (
            "page files change places",
            |new, _| {
                fs::rename(new.join("pages-0"), new.join("x")).unwrap();
                fs::rename(new.join("pages-1"), new.join("pages-0")).unwrap();
                fs::rename(new.join("x"), new.join("pages-1")).unwrap();
            },
            &["pages-0"],
        ),
        (
            "a newer page file",
            |new, _| {
                let mut bytes = fs::read(new.join("pages-0")).unwrap();
                bytes[8] = 9;
                fs::write(new.join("pages-0"), bytes).unwrap();
            },
            &["pages-0", "version 9"],
        ),
        ("another parent", |_, old| rewrite(old, |m| m.id = Id([9; 16])), &["00000001/manifest", "0909"]),
        (
            "a parent of another guest",
            |_, old| rewrite(old, |m| m.guest = Id([9; 16])),
            &["00000001/manifest"],
        ),
        ("a parent with another memory", |_, old| rewrite(old, |m| m.memory.truncate(1)), &["00000001"]),
        ("a part named twice", |new, _| rewrite(new, |m| m.parts.push(m.parts[0].clone())), &["also in"]),
        (
            "less memory than pages",
            |new, _| rewrite(new, |m| assert!(m.memory.drain(..1).next().is_some())),
            &["not in the guest's memory"],
        ),
    ];
    for (what, spoil, named) in table {
        let dir = tempfile::tempdir().unwrap();
        let new = chain(dir.path());
        load(&new).unwrap();
        spoil(&new, &dir.path().join("00000001"));
        let error = load(&new).expect_err(what).to_string();
        for word in named {
            assert!(error.contains(word), "{what}: {error}");
        }
    }
}

#[test]
fn a_parent_that_is_itself_is_no_endless_loop() {
    let dir = tempfile::tempdir().unwrap();
    let new = chain(dir.path());
    rewrite(&new, |m| m.parent = Some(Parent { folder: "00000002".into(), id: m.id }));
    let error = load(&new).unwrap_err().to_string();
    assert!(error.contains("more than 250"), "{error}");
}

#[test]
fn one_writer_at_a_time_and_no_checkpoint_at_all() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(newest(dir.path()), Err(CheckpointError::Empty { .. })));
    assert!(matches!(newest(&dir.path().join("none")), Err(CheckpointError::Missing { .. })));
    let first = Store::open(dir.path()).map(Arc::new).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(CheckpointError::Busy { .. })));
    drop(first);
    Store::open(dir.path()).map(Arc::new).unwrap();
}

/// A probe that fails at call number `nth`, and counts calls.
fn failing(nth: usize, errno: i32) -> (Probe, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let probe = Arc::new(move |_| {
        if counter.fetch_add(1, Ordering::SeqCst) == nth {
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(())
    });
    (probe, calls)
}

/// A new full checkpoint over an old chain, then what is not needed any more goes.
fn replace(root: &Path, probe: Probe, pages: &Model) -> Result<(), CheckpointError> {
    let store = Arc::new(Store::open_with(root, probe)?);
    save(&store, pages, None, 2)?;
    store.prune()?;
    Ok(())
}

#[test]
fn whichever_step_fails_the_newest_whole_checkpoint_is_the_old_or_the_new_one() {
    let new: Model = [(gpa_of(5), 3), (gpa_of(6), 3)].into();
    let steps = {
        let dir = tempfile::tempdir().unwrap();
        chain(dir.path());
        let (probe, calls) = failing(usize::MAX, 0);
        replace(dir.path(), probe, &new).unwrap();
        calls.load(Ordering::SeqCst)
    };
    assert!(steps > 12, "{steps}");
    for errno in [libc::ENOSPC, libc::EIO] {
        let mut seen = (0, 0);
        for nth in 0..steps {
            let dir = tempfile::tempdir().unwrap();
            let old = load(&chain(dir.path())).unwrap();
            let error = replace(dir.path(), failing(nth, errno).0, &new).unwrap_err().to_string();
            assert!(error.contains(dir.path().to_str().unwrap()), "step {nth}: {error}");
            let found =
                load(&newest(dir.path()).unwrap()).unwrap_or_else(|e| panic!("after step {nth}: {e}"));
            assert!(found == old || found == new, "step {nth}: {found:?}");
            seen = if found == old { (seen.0 + 1, seen.1) } else { (seen.0, seen.1 + 1) };
            // The next one goes through and leaves nothing else behind.
            replace(dir.path(), failing(usize::MAX, 0).0, &new).unwrap();
            assert_eq!(load(&newest(dir.path()).unwrap()).unwrap(), new);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "lock and one checkpoint");
        }
        assert!(seen.0 > 8 && seen.1 > 2, "{seen:?}");
    }
}

fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// As if the process had been killed: nothing is cleaned up.
#[test]
fn a_killed_writer_leaves_the_old_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let old = load(&chain(dir.path())).unwrap();
    let store = Store::open(dir.path()).map(Arc::new).unwrap();
    let draft = store.begin().unwrap();
    let mut sink = draft.part(0).unwrap();
    sink.append(b"half a header").unwrap();
    std::mem::forget(draft);
    drop(store);
    // The draft that nobody drops holds the lock, which a process that is killed does not: its files, elsewhere.
    let killed = dir;
    let dir = tempfile::tempdir().unwrap();
    copy_tree(killed.path(), dir.path());
    assert_eq!(load(&newest(dir.path()).unwrap()).unwrap(), old);
    let store = Store::open(dir.path()).map(Arc::new).unwrap();
    save(&store, &some_pages(), None, 1).unwrap();
    assert_eq!(load(&newest(dir.path()).unwrap()).unwrap(), some_pages());
}

#[test]
fn a_file_that_was_not_written_to_its_end_makes_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).map(Arc::new).unwrap();
    let draft = store.begin().unwrap();
    draft.part(0).unwrap().append(b"x").unwrap();
    let part =
        Part { file: "pages-0".into(), number: 0, length: 4, index_crc: 0, data_pages: 0, zero_pages: 0 };
    let manifest = Manifest {
        vm: "t".into(),
        guest: GUEST,
        id: Id::random(),
        parent: None,
        taken_ms: 0,
        memory: MEMORY.to_vec(),
        parts: vec![part],
        machine: (),
    };
    let error = draft.finish(&manifest).unwrap_err().to_string();
    assert!(error.contains("1 of 4 bytes"), "{error}");
    assert!(complete(dir.path()).unwrap().is_empty());
}

proptest! {
    #[test]
    fn pages_out_of_order_are_refused(runs in proptest::collection::vec((0u64..40, 0u32..5, any::<bool>()), 1..10)) {
        let mut writer = PartWriter::new(io::sink(), GUEST, GUEST, 0).unwrap();
        let mut end = 0;
        for (at, pages, zero) in runs {
            let bytes = vec![1; usize::try_from(pages).unwrap() * PAGE];
            let done = if zero { writer.zero(at << 12, pages) } else { writer.data(at << 12, &bytes) };
            prop_assert_eq!(done.is_ok(), at >= end);
            if done.is_ok() && pages > 0 {
                end = at + u64::from(pages);
            }
        }
        writer.finish().unwrap();
    }
}
