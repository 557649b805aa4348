//! Devices that go from one member to another while the VM is paused. The coordinator makes it one step of the VM
//! ([`crate::control::ops::devices`]).
//!
//! ```text
//!  who has it                                   who is to have it
//!   describe                                     inspect              while the guest runs; nothing has changed
//!   give: flush, state, lock given up
//!                                                take: open, recognise, lock, make, restore
//!                    assign: the table with the new owner, at all members
//!   discard
//!
//!  undone:           assign: the old table, if the new one was given to anybody
//!                                                discard: the lock is free
//!   reclaim: lock
//! ```
//!
//! Between `give` and `take` nobody writes: the VM is paused, and a device that was given away does nothing even if it were to
//! go on by mistake. Only who has the lock of an image has a device that can write.

use super::image::{Identity, Image};
use super::local::Local;
use super::platform::{Board, Platform};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Longest wait for the worker of a device that has gone: it is idle.
const RETIRE: Duration = Duration::from_secs(2);

/// What a member must know of a device that it is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Portable {
    /// Index of its window.
    pub window: usize,
    /// Of a disk's image.
    pub image: Option<Identity>,
}

/// Who asked does not wait any longer: what would be done now would be undone by nobody.
fn in_time(start: Instant, limit: Duration) -> Result<(), String> {
    if start.elapsed() > limit { Err(format!("it took longer than {limit:?}")) } else { Ok(()) }
}

impl Platform {
    /// What other members must know to take these devices; with marks beside the images, which stay until the next description,
    /// if another host is to take them. What was written so far is flushed.
    ///
    /// # Errors
    /// No such device here, or an image that is gone.
    pub fn describe(&self, windows: &[usize], elsewhere: bool) -> Result<Vec<Portable>, String> {
        // Those of before first, or they would go with the new ones.
        self.aside().marks.clear();
        let board = self.now.load_full();
        let mut known = Vec::new();
        for n in windows {
            let device = board.local.get(n).ok_or_else(|| format!("there is no device {n} here"))?;
            let image = match &device.image {
                None => None,
                Some(image) => {
                    // So that little is left to do while the guest stands still.
                    image.flush().map_err(|e| e.to_string())?;
                    let (identity, mark) = image.identity(elsewhere).map_err(|e| e.to_string())?;
                    self.aside().marks.extend(mark);
                    Some(identity)
                }
            };
            known.push(Portable { window: *n, image });
        }
        Ok(known)
    }

    /// Whether this member could have these devices.
    ///
    /// # Errors
    /// Why not.
    pub fn inspect(&self, devices: &[Portable]) -> Result<(), String> {
        devices.iter().try_for_each(|device| self.open(device).map(drop))
    }

    fn open(&self, device: &Portable) -> Result<Option<Image>, String> {
        let board = self.now.load();
        let window = board.windows.get(device.window).ok_or("the VM has no such device")?;
        let image = self.parts.image(window).map_err(|e| e.to_string())?;
        match (&image, &device.image) {
            (Some(here), Some(there)) => {
                here.recognise(there).map_err(|e| e.to_string())?;
            }
            (None, None) => {}
            _ => return Err("what is a disk here is none there, or the other way round".into()),
        }
        Ok(image)
    }

    /// Gives these devices away: what was written is on the disk, the lock is free, and nothing more happens here until they are
    /// reclaimed. Returns index of the window and state. While the VM is paused, so not after `limit`.
    ///
    /// # Errors
    /// No such device here, or it can't be flushed in time; then none is given away.
    pub fn give(&self, windows: &[usize], limit: Duration) -> Result<Vec<(usize, String)>, String> {
        let start = Instant::now();
        let board = self.now.load_full();
        let mut states = Vec::new();
        for n in windows {
            let device = board.local.get(n).ok_or_else(|| format!("there is no device {n} here"))?;
            if device.virtio.as_ref().is_some_and(|t| !t.pause(Duration::ZERO)) {
                return Err(format!("{} is not quiet", device.device.name()));
            }
            if let Some(image) = &device.image {
                image.flush().map_err(|e| e.to_string())?;
            }
            states.push((*n, device.device.save()));
        }
        in_time(start, limit)?;
        self.aside().given.extend(windows);
        let images = windows.iter().filter_map(|n| board.local.get(n)?.image.as_ref());
        images.for_each(|image| image.unlock());
        Ok(states)
    }

    /// Takes devices that another member has given away. They do nothing before the table says that they are here, and the VM
    /// goes on. Not after `limit`.
    ///
    /// # Errors
    /// Why not; then none was taken.
    pub fn take(&self, devices: &[(Portable, String)], limit: Duration) -> Result<(), String> {
        let start = Instant::now();
        let mut taken = Vec::new();
        if let Err(e) = self.make_each(devices, &mut taken).and_then(|()| in_time(start, limit)) {
            // Now, not when their threads have ended: who had them wants the locks back.
            taken.iter().filter_map(|(_, local)| local.image.as_ref()).for_each(|image| image.unlock());
            return Err(e);
        }
        let mut aside = self.aside();
        // One of an earlier time, if it is still here, is not given away any more: it is replaced.
        aside.given.retain(|n| !taken.iter().any(|(m, _)| m == n));
        aside.held.extend(taken);
        Ok(())
    }

    fn make_each(
        &self,
        devices: &[(Portable, String)],
        made: &mut Vec<(usize, Local)>,
    ) -> Result<(), String> {
        let board = self.now.load_full();
        for (device, state) in devices {
            let image = self.open(device)?;
            image.as_ref().map_or(Ok(()), Image::lock).map_err(|e| e.to_string())?;
            let window = board.windows.get(device.window).ok_or("the VM has no such device")?;
            let local = self.parts.make(window, image).map_err(|e| e.to_string())?;
            made.push((device.window, local.clone()));
            if let Some(transport) = &local.virtio {
                transport.pause(Duration::ZERO);
            }
            let failed = |e| format!("the state of {}: {e}", local.device.name());
            local.device.restore(state).map_err(failed)?;
        }
        Ok(())
    }

    /// From now on these members have the devices, by window. All of this member's must be here.
    ///
    /// # Errors
    /// One is not; nothing has changed.
    pub fn assign(&self, owners: &[MemberId]) -> Result<(), String> {
        let board = self.now.load_full();
        if owners.len() != board.windows.len() {
            return Err(format!("the table has {} devices, the VM {}", owners.len(), board.windows.len()));
        }
        let mut windows = board.windows.clone();
        windows.iter_mut().zip(owners).for_each(|(window, owner)| window.member = *owner);
        let mut aside = self.aside();
        let mut local = std::collections::BTreeMap::new();
        for (n, window) in windows.iter().enumerate().filter(|(_, window)| window.member == self.me) {
            let device = board.local.get(&n).or_else(|| aside.held.get(&n));
            let device = device.ok_or_else(|| format!("the device at {:#x} is not here", window.start))?;
            local.insert(n, device.clone());
        }
        let next = Board::new(windows, local).map_err(|e| e.to_string())?;
        aside.held.retain(|n, _| !next.local.contains_key(n));
        let gone = board.local.iter().filter(|(n, _)| !next.local.contains_key(n));
        aside.held.extend(gone.map(|(n, device)| (*n, device.clone())));
        self.now.store(std::sync::Arc::new(next));
        Ok(())
    }

    /// Forgets what is here of devices that are another member's by the table: their locks are free.
    ///
    /// # Errors
    /// A worker does not end.
    pub fn discard(&self, windows: &[usize]) -> Result<(), String> {
        let mut aside = self.aside();
        let gone: Vec<_> = windows.iter().filter_map(|n| aside.held.remove(n)).collect();
        aside.given.retain(|n| !windows.contains(n));
        aside.marks.clear();
        drop(aside);
        for device in gone {
            if let Some(image) = &device.image {
                image.unlock();
            }
            if device.virtio.as_ref().is_some_and(|t| !t.shut_down(RETIRE)) {
                return Err(format!("the thread of {} does not end", device.device.name()));
            }
        }
        Ok(())
    }

    /// Devices that were given away, and that nobody has taken, are this member's as before. All that can be are.
    ///
    /// # Errors
    /// Somebody else has locked an image meanwhile.
    pub fn reclaim(&self, windows: &[usize]) -> Result<(), String> {
        let board = self.now.load_full();
        let mut failed = None;
        for n in windows {
            let image = board.local.get(n).and_then(|device| device.image.as_ref());
            match image.map_or(Ok(()), |image| image.lock()) {
                Ok(()) => drop(self.aside().given.remove(n)),
                Err(e) => failed = Some(e.to_string()),
            }
        }
        self.aside().marks.clear();
        failed.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::{DeviceSpec, Route, Space};
    use crate::interrupts::IrqLines;
    use std::path::Path;
    use std::sync::Arc;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    struct NoLines;
    impl IrqLines for NoLines {
        fn set_level(&self, _: u32, _: bool) {}
    }

    const LONG: Duration = Duration::from_secs(60);
    const DISK: usize = 3;
    const RNG: usize = 4;
    const BOTH: [usize; 2] = [DISK, RNG];
    const STATUS: u64 = 0xD000_0000 + 0x70;

    fn member(me: u16, disk: &Path) -> Platform {
        let specs = [
            DeviceSpec::Blk { member: MemberId(1), path: disk.into(), readonly: false },
            DeviceSpec::Rng { member: MemberId(1) },
        ];
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let irq = Arc::new(NoLines);
        Platform::build(&specs, MemberId(me), memory, irq, std::sync::mpsc::channel().0).unwrap()
    }

    fn owners(last: u16) -> Vec<MemberId> {
        [0, 0, 0, last, last].map(MemberId).to_vec()
    }

    fn locked(disk: &Path) -> bool {
        Image::open(disk, false).unwrap().lock().is_err()
    }

    fn status(platform: &Platform) -> u8 {
        let mut data = [0xEE; 4];
        platform.read(Space::Mmio, STATUS, &mut data);
        data[0]
    }

    fn has(platform: &Platform) -> bool {
        matches!(platform.route(Space::Mmio, STATUS, 4), Route::Local(..))
    }

    #[test]
    fn devices_go_with_their_state_and_their_lock_and_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, vec![0; 4096]).unwrap();
        let (old, new) = (member(1, &disk), member(2, &disk));
        // Acknowledged, as far as a driver gets with one write.
        old.write(Space::Mmio, STATUS, &1u32.to_le_bytes());
        let known = old.describe(&BOTH, false).unwrap();
        new.inspect(&known).unwrap();
        assert!(locked(&disk) && has(&old) && !has(&new));
        let carry = |from: &Platform, to: &Platform, known: &[Portable]| {
            let states = from.give(&BOTH, LONG).unwrap();
            assert!(!locked(&disk), "nobody has it for a moment");
            let with = |(n, state)| (known.iter().find(|p| p.window == n).unwrap().clone(), state);
            to.take(&states.into_iter().map(with).collect::<Vec<_>>(), LONG).unwrap();
            assert!(locked(&disk));
        };
        carry(&old, &new, &known);
        for platform in [&old, &new] {
            platform.assign(&owners(2)).unwrap();
        }
        old.discard(&BOTH).unwrap();
        assert!(locked(&disk) && !has(&old) && has(&new));
        assert_eq!((status(&new), status(&old)), (1, 0xFF));
        assert!(new.assign(&owners(1)).is_ok() && old.assign(&owners(1)).is_err(), "it has it no more");
        new.assign(&owners(2)).unwrap();
        // And back, by the same way.
        carry(&new, &old, &new.describe(&BOTH, false).unwrap());
        for platform in [&old, &new] {
            platform.assign(&owners(1)).unwrap();
        }
        new.discard(&BOTH).unwrap();
        assert!(locked(&disk) && has(&old) && !has(&new));
        assert_eq!(status(&old), 1);
    }

    #[test]
    fn whatever_is_undone_leaves_device_and_lock_where_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        std::fs::write(&disk, vec![0; 4096]).unwrap();
        let (old, new) = (member(1, &disk), member(2, &disk));
        let known = old.describe(&BOTH, false).unwrap();
        // Nobody took them.
        assert!(old.give(&BOTH, Duration::ZERO).is_err() && locked(&disk), "too late");
        old.give(&BOTH, LONG).unwrap();
        old.resume();
        old.reclaim(&BOTH).unwrap();
        assert!(locked(&disk) && has(&old));
        // They were taken, and the table as well, by one.
        let states = old.give(&BOTH, LONG).unwrap();
        let all: Vec<_> = known.into_iter().zip(states).map(|(p, (_, state))| (p, state)).collect();
        assert!(new.take(&[(all[0].0.clone(), "nonsense".into())], LONG).is_err());
        assert!(!locked(&disk), "what was not taken has no lock");
        assert!(new.take(&all, Duration::ZERO).is_err() && !locked(&disk), "too late");
        new.take(&all, LONG).unwrap();
        assert!(old.reclaim(&BOTH).is_err(), "two writers");
        new.assign(&owners(2)).unwrap();
        new.assign(&owners(1)).unwrap();
        new.discard(&BOTH).unwrap();
        old.reclaim(&BOTH).unwrap();
        assert!(locked(&disk) && has(&old) && !has(&new));
        // Another file under that name.
        let stranger = dir.path().join("other");
        std::fs::write(&stranger, vec![0; 4096]).unwrap();
        let third = member(3, &stranger);
        let e = third.inspect(&[all[0].0.clone()]).unwrap_err();
        assert!(e.contains("is not known to be the same file"), "{e}");
        third.inspect(&[all[1].0.clone()]).unwrap();
    }
}
