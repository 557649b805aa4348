//! Frames between a client and the agent.

use std::io::{self, Read, Write};

/// Largest frame in bytes; bounds what a client can make the agent allocate.
const MAX: u32 = 1 << 20;

/// What a frame holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Token,
    Run,
    Input,
    EndOfInput,
    Output,
    Error,
    Exit,
}

const CODES: [(Kind, u8); 7] = [
    (Kind::Token, b'T'),
    (Kind::Run, b'R'),
    (Kind::Input, b'I'),
    (Kind::EndOfInput, b'E'),
    (Kind::Output, b'O'),
    (Kind::Error, b'S'),
    (Kind::Exit, b'X'),
];

/// One frame.
pub struct Frame {
    pub kind: Kind,
    pub bytes: Vec<u8>,
}

/// Reads one frame; a kind or length that the protocol does not know is an error.
pub fn read_frame(stream: &mut impl Read) -> io::Result<Frame> {
    let mut header = [0; 5];
    stream.read_exact(&mut header)?;
    let [code, a, b, c, d] = header;
    let length = u32::from_le_bytes([a, b, c, d]);
    let kind = CODES.iter().find(|(_, known)| *known == code).map(|(kind, _)| *kind);
    let Some(kind) = kind.filter(|_| length <= MAX) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a frame"));
    };
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    stream.read_exact(&mut bytes)?;
    Ok(Frame { kind, bytes })
}

/// Writes one frame.
pub fn write_frame(stream: &mut impl Write, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    let code = CODES.iter().find(|(known, _)| *known == kind).map_or(0, |(_, code)| *code);
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    let mut frame = vec![code];
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(bytes);
    stream.write_all(&frame)
}

#[cfg(test)]
mod tests {
    use super::{Kind, read_frame, write_frame};

    #[test]
    fn a_frame_survives_the_wire() {
        let mut wire = Vec::new();
        write_frame(&mut wire, Kind::Output, b"hello").unwrap();
        let frame = read_frame(&mut wire.as_slice()).unwrap();
        assert!(frame.kind == Kind::Output);
        assert_eq!(frame.bytes, b"hello");
    }

    #[test]
    fn garbage_is_refused_without_allocating() {
        for wire in [&b"O\xff\xff\xff\xffx"[..], b"?\0\0\0\0", b"O\x05\0\0\0abc", b""] {
            assert!(read_frame(&mut &*wire).is_err(), "{wire:?}");
        }
    }
}
