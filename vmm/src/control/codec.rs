//! The only place that knows how control messages look on the wire: a little-endian `u32` length, then that
//! many bytes of bincode. Nothing else may depend on the format.

use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest frame, bytes. Boot images travel in smaller pieces.
pub const MAX_FRAME: usize = 4 << 20;
/// Longest frame before the peer has proven who it is, bytes.
pub const MAX_HANDSHAKE: usize = 1024;

/// A value that travels as JSON inside a message: for types whose serde attributes (tags, flattening, skipped
/// fields) bincode can't decode, and which the API shows as JSON anyway.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Json<T>(pub T);

impl<T: Serialize> Serialize for Json<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        serde_json::to_string(&self.0).map_err(serde::ser::Error::custom)?.serialize(to)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Json<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Json<T>, D::Error> {
        let text = String::deserialize(from)?;
        serde_json::from_str(&text).map(Json).map_err(de::Error::custom)
    }
}

/// `#[serde(with = "codec::blob")]` for a `Vec<u8>`: it travels as one piece. Serde alone would take it byte by
/// byte, which costs seconds for a boot image.
pub mod blob {
    use super::{Deserializer, Serializer, de};
    use std::fmt;

    /// Writes the bytes.
    ///
    /// # Errors
    /// Those of the format.
    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    /// Reads the bytes.
    ///
    /// # Errors
    /// Those of the format.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Blob;
        impl de::Visitor<'_> for Blob {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        from.deserialize_byte_buf(Blob)
    }
}

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The connection failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// A frame longer than allowed here: length and limit.
    #[error("a message of {0} bytes, the limit is {1}")]
    TooLong(usize, usize),
    /// Not a message of the expected kind.
    #[error("not a message of this protocol: {0}")]
    Malformed(String),
    /// Nothing came, or nothing went out, in this time.
    #[error("no answer within {:.1} s", .0.as_secs_f32())]
    Timeout(Duration),
}

/// Encodes one message with its length in front.
///
/// # Errors
/// Longer than `limit`.
pub fn encode<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, CodecError> {
    let mut frame = vec![0; 4];
    let length = bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|e| CodecError::Malformed(e.to_string()))?;
    if length > limit {
        return Err(CodecError::TooLong(length, limit));
    }
    let header = u32::try_from(length).map_err(|_| CodecError::TooLong(length, limit))?;
    frame[..4].copy_from_slice(&header.to_le_bytes());
    Ok(frame)
}

/// Decodes one message that fills `bytes`. What it allocates is bounded by the limit.
///
/// # Errors
/// Anything else than exactly one message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let config = bincode::config::standard().with_limit::<MAX_FRAME>();
    let (message, used) =
        bincode::serde::decode_from_slice(bytes, config).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Malformed(format!("{} bytes too many", bytes.len() - used)));
    }
    Ok(message)
}

/// Sends one message.
///
/// # Errors
/// The connection, or a message longer than `limit`.
pub async fn send_limited<T: Serialize>(
    to: &mut (impl AsyncWrite + Unpin),
    message: &T,
    limit: usize,
) -> Result<(), CodecError> {
    let frame = encode(message, limit)?;
    to.write_all(&frame).await?;
    to.flush().await?;
    Ok(())
}

/// Sends one message of at most [`MAX_FRAME`] bytes.
///
/// # Errors
/// As [`send_limited`].
pub async fn send<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), message: &T) -> Result<(), CodecError> {
    send_limited(to, message, MAX_FRAME).await
}

/// Receives one message and not a byte more. Not cancellation-safe: a caller that gives up must drop the
/// connection, or read from a task of its own.
///
/// # Errors
/// The connection, its end ([`CodecError::Closed`]), a frame that is too long or no message.
pub async fn recv_limited<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> Result<T, CodecError> {
    let mut header = [0; 4];
    match from.read_exact(&mut header).await {
        Ok(_) => {}
        Err(e) if closed(&e) => return Err(CodecError::Closed),
        Err(e) => return Err(e.into()),
    }
    let length = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
    if length > limit {
        return Err(CodecError::TooLong(length, limit));
    }
    let mut frame = vec![0; length];
    match from.read_exact(&mut frame).await {
        Ok(_) => decode(&frame),
        Err(e) if closed(&e) => Err(CodecError::Closed),
        Err(e) => Err(e.into()),
    }
}

/// Receives one message of at most [`MAX_FRAME`] bytes.
///
/// # Errors
/// As [`recv_limited`].
pub async fn recv<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> Result<T, CodecError> {
    recv_limited(from, MAX_FRAME).await
}

/// Gives an exchange a deadline.
///
/// # Errors
/// [`CodecError::Timeout`], or what the exchange itself says.
pub async fn within<T>(
    limit: Duration,
    exchange: impl Future<Output = Result<T, CodecError>>,
) -> Result<T, CodecError> {
    tokio::time::timeout(limit, exchange).await.unwrap_or(Err(CodecError::Timeout(limit)))
}

/// A peer that is killed shows as any of these.
fn closed(e: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(e.kind(), UnexpectedEof | ConnectionReset | BrokenPipe | ConnectionAborted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn round_trip_and_limits() {
        let (mut a, mut b) = tokio::io::duplex(1 << 16);
        send(&mut a, &("hello".to_string(), 7u64)).await.unwrap();
        assert_eq!(recv::<(String, u64)>(&mut b).await.unwrap(), ("hello".to_string(), 7));
        assert!(matches!(
            send_limited(&mut a, &vec![0u8; 2000], MAX_HANDSHAKE).await,
            Err(CodecError::TooLong(_, MAX_HANDSHAKE))
        ));
        a.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
        assert!(matches!(recv::<u64>(&mut b).await, Err(CodecError::TooLong(_, MAX_FRAME))));
        drop(a);
        assert!(matches!(recv::<u64>(&mut b).await, Err(CodecError::Closed)));
    }

    #[test]
    fn trailing_bytes_are_no_message() {
        assert!(matches!(decode::<u8>(&[1, 2]), Err(CodecError::Malformed(_))));
        assert!(matches!(decode::<String>(&[250]), Err(CodecError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<super::super::wire::ToMember>(&bytes);
            let _ = decode::<super::super::wire::FromMember>(&bytes);
            let _ = decode::<super::super::wire::ToCoordinator>(&bytes);
            let _ = decode::<super::super::wire::NodeRequest>(&bytes);
        }
    }
}
