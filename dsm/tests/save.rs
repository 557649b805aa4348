//! Saving the memory of a group, and starting other groups from it: real userfaultfd, real TCP.
#![allow(missing_docs)]

mod common;

use common::{group, ranges, usable};
use dsm::addr::MemberId;
use dsm::node::{Dsm, PageSink, PageSource, SaveOptions};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(10);

/// The contents of pages that are not zero.
#[derive(Clone, Debug, Default, PartialEq)]
struct Image(BTreeMap<u64, Vec<u8>>);

impl PageSink for Image {
    fn data(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        for (n, page) in (0u64..).zip(bytes.chunks_exact(4096)) {
            self.0.insert(gpa + n * 4096, page.to_vec());
        }
        Ok(())
    }

    fn zero(&mut self, gpa: u64, pages: u32) -> io::Result<()> {
        (0..u64::from(pages)).for_each(|n| drop(self.0.remove(&(gpa + n * 4096))));
        Ok(())
    }
}

struct Source(Image, Mutex<u64>);

impl PageSource for Source {
    fn page(&self, gpa: u64, out: &mut [u8; 4096]) -> Result<(), String> {
        *self.1.lock().unwrap() += 1;
        out.copy_from_slice(self.0.0.get(&gpa).ok_or("no such page")?);
        Ok(())
    }
}

fn save(members: &[Dsm], full: bool, image: &mut Image) -> u64 {
    for member in members {
        member.quiesce(SECOND).unwrap();
    }
    let (mut answers_for, mut touched, mut data) = (0, 0, 0);
    for member in members {
        let saved = member.save(SaveOptions { full, track: true }, image).unwrap();
        answers_for += saved.answers_for;
        touched += saved.touched;
        data += saved.data + saved.zero;
    }
    assert_eq!(answers_for, touched, "a page is missing or saved twice");
    members.iter().for_each(Dsm::release);
    data
}

fn word(member: &Dsm, gpa: u64) -> u64 {
    member.memory().u64_at(gpa).unwrap().load(SeqCst)
}

/// The image says what every member sees.
fn check(members: &[Dsm], image: &Image, pages: &[u64]) {
    for member in members {
        for gpa in pages {
            let saved = image.0.get(gpa).map_or(0, |p| u64::from_le_bytes(p[..8].try_into().unwrap()));
            assert_eq!(word(member, *gpa), saved, "{gpa:#x}");
        }
    }
}

fn addresses(homes: u64, pages: u64) -> Vec<u64> {
    (0..homes).flat_map(|h| (0..pages).map(move |n| (h * (pages + 1) + n) * 4096)).collect()
}

#[test]
fn cuts_of_a_busy_memory_and_groups_that_start_from_them() {
    if !usable() {
        return;
    }
    const PAGES: u64 = 70;
    let members = group(3, &ranges(&[0, 1, 2], PAGES), |_| ());
    let all = addresses(3, PAGES);
    let mut image = Image::default();
    for round in 0..6u64 {
        // Everybody writes to pages of its own and to common ones, and reads what others wrote.
        thread::scope(|scope| {
            for (n, member) in (0u64..).zip(&members) {
                let all = &all;
                scope.spawn(move || {
                    let mut seed = round * 3 + n + 1;
                    for _ in 0..120 {
                        seed = seed
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let gpa = all[(seed >> 33) as usize % (all.len() / 2)];
                        let cell = member.memory().u64_at(gpa).unwrap();
                        match seed >> 60 {
                            0..6 => drop(cell.fetch_add(1, SeqCst)),
                            6 => cell.store(0, SeqCst),
                            _ => drop(cell.load(SeqCst)),
                        }
                    }
                });
            }
        });
        let saved = save(&members, round == 0, &mut image);
        println!("round {round}: {saved} pages");
        let mut full = Image::default();
        save(&members, true, &mut full);
        assert_eq!(full, image, "round {round}: what changed is not all that changed");
    }
    assert_eq!(save(&members, false, &mut image), 0, "nothing changed");
    check(&members, &image, &all);
    drop(members);

    for n in [1u16, 2, 3] {
        // Other homes than before.
        let homes: Vec<u16> = [2u16, 0, 1].iter().map(|h| h % n).collect();
        let members = group(n, &ranges(&homes, PAGES), |_| ());
        let runs: Vec<_> = image.0.keys().map(|gpa| (*gpa, 1)).collect();
        let source = Arc::new(Source(image.clone(), Mutex::default()));
        members[0].set_image(source.clone());
        for member in &members {
            member.adopt(&runs, MemberId(0)).unwrap();
        }
        assert!(members[0].adopt(&runs, MemberId(0)).is_err(), "twice");
        assert_eq!(*source.1.lock().unwrap(), 0, "nothing is read before it is needed");
        // Nothing was written since: an incremental cut of untouched memory is empty.
        let mut same = image.clone();
        assert_eq!(save(&members, false, &mut same), 0);
        let mut full = Image::default();
        save(&members, true, &mut full);
        assert_eq!(full, image);
        for (member, gpa) in members.iter().rev().zip(&all) {
            member.memory().u64_at(*gpa).unwrap().fetch_add(7, SeqCst);
        }
        for member in &members {
            member.prefetch(runs.clone(), MemberId(0)).unwrap();
        }
        thread::sleep(Duration::from_millis(200));
        save(&members, false, &mut same);
        check(&members, &same, &all);
        let mut full = Image::default();
        save(&members, true, &mut full);
        assert_eq!(full, same);
    }
}

#[test]
fn an_image_that_cant_be_read_ends_the_memory_with_its_reason() {
    if !usable() {
        return;
    }
    let members = group(2, &ranges(&[0, 1], 4), |_| ());
    members[0].set_image(Arc::new(Source(Image::default(), Mutex::default())));
    members.iter().for_each(|m| m.adopt(&[(4096, 1)], MemberId(0)).unwrap());
    let error = members[0].save(SaveOptions { full: true, track: false }, &mut Image::default()).unwrap_err();
    assert!(error.to_string().contains("no such page") && error.to_string().contains("0x1000"), "{error}");
}
