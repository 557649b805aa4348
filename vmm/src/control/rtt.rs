//! The round-trip time of a connection, as the kernel measured it.

use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use tokio::net::TcpStream;

/// Shortest round trip so far, in microseconds; `None` if the kernel does not know (tcp(7), `TCP_INFO`).
pub fn of(stream: &TcpStream) -> Option<u64> {
    let info = tcp_info(std::os::fd::AsFd::as_fd(stream))?;
    // Linux says "unknown" with all bits set.
    Some(u64::from(info.tcpi_rtt)).filter(|us| *us != 0 && *us != u64::from(u32::MAX))
}

fn tcp_info(fd: BorrowedFd<'_>) -> Option<libc::tcp_info> {
    // SAFETY: all bits zero are a valid value of this struct of integers.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
    // SAFETY: the kernel writes at most `len` bytes to `info`, which is that long and outlives the call.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast::<libc::c_void>(),
            &raw mut len,
        )
    };
    (result == 0).then_some(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn loopback_is_near() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(of(&stream).is_some_and(|us| us < 1_000_000));
    }
}
