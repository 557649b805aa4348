use super::*;
use crate::addr::{HomeRange, MemberId};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;
use std::time::{Duration, Instant};

fn region(pages: u64, shards: usize) -> Option<Region> {
    let ranges = [
        HomeRange { start: 0, len: pages * PAGE_SIZE, home: MemberId(0) },
        HomeRange { start: 1 << 30, len: pages * PAGE_SIZE, home: MemberId(1) },
    ];
    match Region::new(&Layout::new(&ranges).unwrap(), shards) {
        Ok(region) => Some(region),
        Err(e @ RegionError::Unusable { .. }) => {
            println!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Waits for `count` faults at any shard.
fn next_faults(region: &Region, count: usize) -> Vec<Fault> {
    let end = Instant::now() + Duration::from_secs(20);
    let mut faults = Vec::new();
    while faults.len() < count && Instant::now() < end {
        (0..region.shards()).for_each(|s| region.faults(s, &mut faults).unwrap());
        thread::sleep(Duration::from_millis(1));
    }
    if faults.len() != count {
        // Who waits would keep the test from ending.
        eprintln!("{count} faults should have come, not {faults:?}");
        std::process::abort();
    }
    faults
}

fn next_fault(region: &Region) -> Fault {
    next_faults(region, 1)[0]
}

#[test]
fn a_page_comes_with_its_right() {
    let Some(region) = region(4, 1) else { return };
    let page = Page(5);
    let gpa = (1 << 30) + PAGE_SIZE;
    thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let word = region.memory().u64_at(gpa).unwrap();
            let before = word.load(SeqCst);
            word.store(before + 1, SeqCst);
            word.load(SeqCst)
        });
        let fault = next_fault(&region);
        assert_eq!((fault.page, fault.write), (page, false));
        assert_ne!(fault.thread, 0);
        region.fill(page, &[1; PAGE], true, Wake::Later).unwrap();
        region.wake(page, 1).unwrap();
        // It came to be read only, so the store waits, too.
        assert_eq!(next_fault(&region), Fault { write: true, ..fault });
        region.unprotect(page, Wake::Later).unwrap();
        region.wake(page, 1).unwrap();
        assert_eq!(guest.join().unwrap(), 0x0101_0101_0101_0102);
    });
    region.protect(page, 1).unwrap();
    let mut bytes = Vec::new();
    region.read(page, &mut bytes).unwrap();
    assert_eq!((bytes.len(), bytes[0], bytes[8]), (PAGE, 2, 1));
    region.discard(page, 1).unwrap();
    region.fill_zero(page, 1, false, Wake::Later).unwrap();
    assert_eq!(region.memory().u64_at(gpa).unwrap().load(SeqCst), 0);
}

#[test]
fn a_page_that_should_not_be_there_is_replaced_and_its_waiter_woken() {
    let Some(region) = region(4, 1) else { return };
    region.fill(Page(0), &[9; PAGE], false, Wake::Later).unwrap();
    region.fill(Page(0), &[3; PAGE], false, Wake::Later).unwrap();
    assert_eq!(region.memory().u8_at(7).unwrap().load(SeqCst), 3);
    assert_eq!(region.replaced(), 1);
}

#[test]
fn runs_cross_from_one_userfaultfd_to_the_next() {
    let Some(region) = region(2048, 3) else { return };
    let edge = Page(512);
    let waiters = [Page(511), Page(512), Page(513)];
    thread::scope(|scope| {
        let guests = waiters.map(|page| {
            let word = region.memory().u64_at(u64::from(page.0) * PAGE_SIZE).unwrap();
            scope.spawn(move || word.load(SeqCst))
        });
        let mut seen: Vec<Page> = next_faults(&region, 3).iter().map(|f| f.page).collect();
        seen.sort_unstable();
        assert_eq!(seen, waiters);
        region.fill_zero(Page(edge.0 - 8), 16, false, Wake::Later).unwrap();
        waiters.iter().for_each(|p| region.wake(*p, 1).unwrap());
        for guest in guests {
            assert_eq!(guest.join().unwrap(), 0);
        }
        region.protect(Page(edge.0 - 8), 16).unwrap();
        let guests = waiters.map(|page| {
            let word = region.memory().u64_at(u64::from(page.0) * PAGE_SIZE).unwrap();
            scope.spawn(move || word.store(1, SeqCst))
        });
        assert!(next_faults(&region, 3).iter().all(|f| f.write));
        waiters.iter().for_each(|p| region.unprotect(*p, Wake::Later).unwrap());
        region.wake(waiters[0], 3).unwrap();
        guests.into_iter().for_each(|guest| guest.join().unwrap());
        region.discard(Page(edge.0 - 8), 16).unwrap();
        region.fill_zero(Page(edge.0 - 8), 16, false, Wake::Later).unwrap();
    });
    assert_eq!(region.replaced(), 0);
}

/// With the kernel's way to move pages, and without it as before Linux 6.8: more pages than the attic has room for.
#[test]
fn a_page_that_is_taken_is_gone_and_its_bytes_are_the_last_ones() {
    for can_move in [true, false] {
        let Some(mut region) = region(200, 2) else { return };
        if !can_move {
            region.attics.clear();
        } else if region.attics.is_empty() {
            println!("skipped: this kernel has no UFFDIO_MOVE");
            continue;
        }
        for n in 0..200u8 {
            let page = Page(u32::from(n));
            region.fill(page, &[n; PAGE], n % 2 == 0, Wake::Later).unwrap();
            let word = region.memory().u64_at(u64::from(n) * PAGE_SIZE).unwrap();
            if n % 2 == 1 {
                word.store(u64::from(n), SeqCst);
            }
            let mut bytes = vec![7];
            region.take(page, n % 2 == 0, &mut bytes).unwrap();
            assert_eq!((bytes.len(), bytes[0], bytes[PAGE]), (PAGE + 1, 7, n));
            assert_eq!(bytes[2], if n % 2 == 1 { 0 } else { n });
            if n % 50 == 0 {
                region.tidy();
            }
        }
        thread::scope(|scope| {
            let guest = scope.spawn(|| region.memory().u64_at(3 * PAGE_SIZE).unwrap().load(SeqCst));
            let fault = next_fault(&region);
            assert_eq!((fault.page, fault.write), (Page(3), false), "it is gone");
            region.fill(Page(3), &[1; PAGE], true, Wake::Now).unwrap();
            assert_eq!(guest.join().unwrap(), 0x0101_0101_0101_0101);
        });
        region.drop_one(Page(3)).unwrap();
        region.drop_one(Page(4)).unwrap();
        region.fill_zero(Page(3), 1, false, Wake::Later).unwrap();
        assert_eq!((region.memory().u8_at(3 * PAGE_SIZE).unwrap().load(SeqCst), region.replaced()), (0, 0));
    }
}

#[test]
fn what_is_not_there_is_an_error() {
    let Some(region) = region(1, 1) else { return };
    for result in [
        region.fill(Page(2), &[0; PAGE], false, Wake::Later),
        region.protect(Page(2), 1),
        region.protect(Page(0), 3),
        region.discard(Page(0), u32::MAX),
        region.discard(Page(9), 1),
        region.wake(Page(2), 1),
        region.read(Page(2), &mut Vec::new()),
        region.take(Page(2), true, &mut Vec::new()),
        region.drop_one(Page(2)),
    ] {
        assert!(matches!(result, Err(RegionError::Step { .. })), "{result:?}");
    }
}

#[test]
fn who_waits_when_the_memory_closes_gets_an_error_and_no_zeros() {
    let Some(region) = region(4, 2) else { return };
    let (mut out, _in) = std::os::unix::net::UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let mapping = region.mappings()[0];
        let writer = scope.spawn(move || {
            // SAFETY: the mapping lives until the scope has ended, and only the kernel looks at the bytes: the system call
            // waits for the page as KVM_RUN would.
            let page = unsafe { std::slice::from_raw_parts({ mapping }.hva, PAGE) };
            std::io::Write::write(&mut out, page)
        });
        let fault = next_fault(&region);
        assert_eq!(fault.page, Page(0));
        region.close();
        assert_eq!(writer.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
    });
}
