//! Entropy for the host's kernel. An emulated CPU without RDRAND, whose clock never jitters, has none of its own, and whoever
//! asks for random bytes, for a handshake for one, waits for half a minute.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

/// Bytes that are handed over; more is cut off.
const MOST: usize = 64;

/// `struct rand_pool_info` of `linux/random.h`, with its bytes.
#[repr(C)]
struct Pool {
    /// In bits.
    entropy_count: libc::c_int,
    /// In bytes.
    buf_size: libc::c_int,
    buf: [u8; MOST],
}

/// `RNDADDENTROPY`: `_IOW('R', 3, int[2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// Adds a secret that the machine's side drew at random. Needs root.
pub fn add(secret: &str) -> io::Result<()> {
    let mut pool = Pool { entropy_count: 256, buf_size: 64, buf: [0; MOST] };
    for (to, from) in pool.buf.iter_mut().zip(secret.bytes()) {
        *to = from;
    }
    let device = OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads a `rand_pool_info` and the `buf_size` bytes behind it, all of which `pool` has.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
