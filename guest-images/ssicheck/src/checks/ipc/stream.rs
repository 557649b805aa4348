//! Pipes and Unix sockets.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use crate::checks::ipc::Link;
use crate::checks::ipc::channel::{Channel, MAX_MESSAGE};
use crate::context::{Note, PATIENCE};
use crate::failure::{During, Failure};
use crate::sys::io;

/// Messages on a byte stream, each after its length.
#[derive(Debug)]
pub struct Framed<R, W> {
    reader: R,
    writer: W,
}

impl<R: Read + AsFd, W: Write> Framed<R, W> {
    /// An end that reads from one stream and writes to another.
    pub fn new(reader: R, writer: W) -> Self {
        Framed { reader, writer }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Failure> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|r| !r.is_empty()) {
            io::wait_readable(&self.reader, PATIENCE, "bytes from the other process")?;
            match self.reader.read(rest).during("reading from the other process")? {
                0 => return Err(Failure::Other("the other process closed the stream".into())),
                n => done += n,
            }
        }
        Ok(())
    }
}

impl<R: Read + AsFd, W: Write> Channel for Framed<R, W> {
    fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        let length = u32::try_from(message.len()).unwrap_or(0).to_le_bytes();
        self.writer.write_all(&length).during("writing to the other process")?;
        self.writer.write_all(message).during("writing to the other process")
    }

    fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        let mut length = [0u8; 4];
        self.fill(&mut length)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length > MAX_MESSAGE {
            return Err(Failure::Other(format!("a message of {length} bytes was announced")));
        }
        let mut message = vec![0; length];
        self.fill(&mut message)?;
        Ok(message)
    }
}

/// A listening socket with a name in the file system, to which the other process connects.
pub fn unix_stream(link: &Link, path: &Path) -> Result<Note, Failure> {
    let listener = UnixListener::bind(path).during(format!("listening on {}", path.display()))?;
    let both = |stream: UnixStream| {
        let twin = stream.try_clone().during("duplicating a socket")?;
        Ok(Framed::new(stream, twin))
    };
    let note = link.talk(
        || both(UnixStream::connect(path).during(format!("connecting to {}", path.display()))?),
        |_| {
            io::wait_readable(&listener, PATIENCE, "connection from the other process")?;
            both(listener.accept().during("accepting a connection")?.0)
        },
    );
    std::fs::remove_file(path).during(format!("removing {}", path.display()))?;
    note
}

/// Messages on a socket that keeps their boundaries.
#[derive(Debug)]
pub struct Packets<'a>(&'a UnixDatagram);

impl Channel for Packets<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        // A byte in front: an empty packet looks like the end on some sockets.
        let packet = [&[0x5a], message].concat();
        let sent = self.0.send(&packet).during("sending a packet")?;
        crate::failure::expect_eq("bytes sent", packet.len(), sent)
    }

    fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        io::wait_readable(&self.0, PATIENCE, "packet from the other process")?;
        let mut packet = vec![0; MAX_MESSAGE + 1];
        let length = self.0.recv(&mut packet).during("receiving a packet")?;
        match packet.get(..length) {
            Some([0x5a, message @ ..]) => Ok(message.to_vec()),
            _ => Err(Failure::Other(format!("a packet of {length} bytes without its mark"))),
        }
    }
}

/// A pair of datagram sockets.
pub fn unix_datagram(link: &Link) -> Result<Note, Failure> {
    let (a, b) = UnixDatagram::pair().during("making a pair of datagram sockets")?;
    link.talk(|| Ok(Packets(&b)), |_| Ok(Packets(&a)))
}

/// A pair of sequenced-packet sockets.
pub fn unix_seqpacket(link: &Link) -> Result<Note, Failure> {
    let (a, b) = io::seqpacket_pair()?;
    link.talk(|| Ok(Packets(&b)), |_| Ok(Packets(&a)))
}
