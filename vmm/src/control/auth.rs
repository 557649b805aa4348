//! Who is at the other end: a challenge and a response in both directions, before anything else is said.
//!
//! ```text
//! server -> client   Challenge { magic, version, name, nonce_s, secret required? }
//! client -> server   Response  { version, name, nonce_c, HMAC(secret, "client", nonce_s, nonce_c) }
//! server -> client   Verdict   { Welcome(HMAC(secret, "server", nonce_s, nonce_c)) | Refused(reason) }
//! ```
//!
//! Without a secret only loopback is served, and only loopback is called. This proves identity; it neither
//! encrypts nor protects what follows from somebody who can change packets on the wire.

use super::codec::{self, CodecError, MAX_HANDSHAKE};
use super::secret::{Mac256, Secret};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;

/// Version of the control protocol; both ends must have the same.
pub const VERSION: u32 = 1;
/// First bytes of a conversation.
const MAGIC: [u8; 8] = *b"spanvm\0\x01";
/// Longest time for the whole handshake.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why a peer is not talked to.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A secret is needed for this address, and none was given.
    #[error("{0} is not a loopback address: give --secret-file FILE, with the same secret on every host")]
    SecretNeeded(SocketAddr),
    /// The peer speaks something else.
    #[error("what answers there is not a spanvm node")]
    NotSpanvm,
    /// The peer is of another version.
    #[error(
        "it speaks version {0} of the control protocol, this is version {VERSION}: install the same spanvm on every host"
    )]
    Version(u32),
    /// The peer wants a secret, and we have none.
    #[error(
        "it asks for a secret: give --secret-file FILE with the one that `spanvm node` there was started with"
    )]
    SecretAsked,
    /// The peer did not prove that it has our secret.
    #[error("it does not have the same secret: compare the files given to --secret-file on both hosts")]
    WrongSecret,
    /// The peer said no.
    #[error("it refused: {0}")]
    Refused(String),
    /// The connection.
    #[error("{0}")]
    Codec(#[from] CodecError),
}

#[derive(Serialize, Deserialize)]
struct Challenge {
    magic: [u8; 8],
    version: u32,
    name: String,
    nonce: [u8; 32],
    secret_required: bool,
}

#[derive(Serialize, Deserialize)]
struct Response {
    version: u32,
    name: String,
    nonce: [u8; 32],
    proof: Option<Mac256>,
}

#[derive(Serialize, Deserialize)]
enum Verdict {
    Welcome(Option<Mac256>),
    Refused { version: u32, wrong_secret: bool, reason: String },
}

/// Checks that an address may be used with or without a secret.
///
/// # Errors
/// [`AuthError::SecretNeeded`].
pub fn check_address(addr: SocketAddr, secret: Option<&Secret>) -> Result<(), AuthError> {
    if secret.is_none() && !addr.ip().to_canonical().is_loopback() {
        return Err(AuthError::SecretNeeded(addr));
    }
    Ok(())
}

/// The calling side. Returns the peer's name.
///
/// # Errors
/// The peer is not who it should be, or does not answer within [`HANDSHAKE`].
pub async fn connect(
    stream: &mut TcpStream,
    secret: Option<&Secret>,
    name: &str,
) -> Result<String, AuthError> {
    check_address(stream.peer_addr().map_err(CodecError::from)?, secret)?;
    tokio::time::timeout(HANDSHAKE, call(stream, secret, name))
        .await
        .unwrap_or(Err(CodecError::Timeout(HANDSHAKE).into()))
}

async fn call(stream: &mut TcpStream, secret: Option<&Secret>, name: &str) -> Result<String, AuthError> {
    let challenge: Challenge = match codec::recv_limited(stream, MAX_HANDSHAKE).await {
        Ok(challenge) => challenge,
        Err(CodecError::Malformed(_) | CodecError::TooLong(..)) => return Err(AuthError::NotSpanvm),
        Err(e) => return Err(e.into()),
    };
    if challenge.magic != MAGIC {
        return Err(AuthError::NotSpanvm);
    }
    if challenge.version != VERSION {
        return Err(AuthError::Version(challenge.version));
    }
    if challenge.secret_required && secret.is_none() {
        return Err(AuthError::SecretAsked);
    }
    let nonce: [u8; 32] = rand::random();
    let nonces: [&[u8]; 2] = [&challenge.nonce, &nonce];
    let proof = secret.map(|secret| secret.mac("client", &nonces));
    let response = Response { version: VERSION, name: name.to_string(), nonce, proof };
    codec::send_limited(stream, &response, MAX_HANDSHAKE).await?;
    match codec::recv_limited(stream, MAX_HANDSHAKE).await? {
        Verdict::Refused { wrong_secret: true, .. } => Err(AuthError::WrongSecret),
        Verdict::Refused { version, .. } if version != VERSION => Err(AuthError::Version(version)),
        Verdict::Refused { reason, .. } => Err(AuthError::Refused(reason)),
        Verdict::Welcome(proof) => match (secret, proof) {
            (None, _) => Ok(challenge.name),
            (Some(secret), Some(proof)) if secret.verify("server", &nonces, &proof) => Ok(challenge.name),
            (Some(_), _) => Err(AuthError::WrongSecret),
        },
    }
}

/// The called side. Returns the caller's name.
///
/// # Errors
/// The caller is refused (and told so), or does not answer within [`HANDSHAKE`].
pub async fn accept(
    stream: &mut TcpStream,
    secret: Option<&Secret>,
    name: &str,
) -> Result<String, AuthError> {
    tokio::time::timeout(HANDSHAKE, answer(stream, secret, name))
        .await
        .unwrap_or(Err(CodecError::Timeout(HANDSHAKE).into()))
}

async fn answer(stream: &mut TcpStream, secret: Option<&Secret>, name: &str) -> Result<String, AuthError> {
    let nonce: [u8; 32] = rand::random();
    let challenge = Challenge {
        magic: MAGIC,
        version: VERSION,
        name: name.to_string(),
        nonce,
        secret_required: secret.is_some(),
    };
    codec::send_limited(stream, &challenge, MAX_HANDSHAKE).await?;
    let response: Response = codec::recv_limited(stream, MAX_HANDSHAKE).await?;
    let nonces: [&[u8]; 2] = [&nonce, &response.nonce];
    let refusal = if response.version != VERSION {
        Some(AuthError::Version(response.version))
    } else {
        match (secret, &response.proof) {
            (None, None) => check_address(stream.peer_addr().map_err(CodecError::from)?, None).err(),
            (None, Some(_)) => Some(AuthError::Refused(format!(
                "{name} was started without --secret-file, the caller has a secret: use the same on both sides"
            ))),
            (Some(secret), Some(proof)) if secret.verify("client", &nonces, proof) => None,
            (Some(_), _) => Some(AuthError::WrongSecret),
        }
    };
    let verdict = match &refusal {
        None => Verdict::Welcome(secret.map(|secret| secret.mac("server", &nonces))),
        Some(why) => Verdict::Refused {
            version: VERSION,
            wrong_secret: matches!(why, AuthError::WrongSecret),
            reason: match why {
                AuthError::Refused(reason) => reason.clone(),
                why => why.to_string(),
            },
        },
    };
    codec::send_limited(stream, &verdict, MAX_HANDSHAKE).await?;
    refusal.map_or(Ok(response.name), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    async fn meet(
        client: Option<&Secret>,
        server: Option<&Secret>,
    ) -> (Result<String, AuthError>, Result<String, AuthError>) {
        let (mut c, mut s) = pair().await;
        tokio::join!(connect(&mut c, client, "c"), async move {
            let result = accept(&mut s, server, "s").await;
            drop(s);
            result
        })
    }

    #[tokio::test]
    async fn who_may_talk_to_whom() {
        let (one, two) = (Secret::random(), Secret::random());
        let (c, s) = meet(None, None).await;
        assert_eq!((c.unwrap(), s.unwrap()), ("s".into(), "c".into()));
        let (c, s) = meet(Some(&one), Some(&one)).await;
        assert_eq!((c.unwrap(), s.unwrap()), ("s".into(), "c".into()));
        let (c, s) = meet(Some(&one), Some(&two)).await;
        assert!(matches!((c, s), (Err(AuthError::WrongSecret), Err(AuthError::WrongSecret))));
        let (c, s) = meet(None, Some(&one)).await;
        assert!(matches!(c, Err(AuthError::SecretAsked)) && s.is_err());
        let (c, s) = meet(Some(&one), None).await;
        assert!(matches!(c, Err(AuthError::Refused(_))) && s.is_err());
    }

    #[tokio::test]
    async fn strangers_are_named_as_such() {
        let (mut c, mut s) = pair().await;
        s.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        assert!(matches!(connect(&mut c, None, "c").await, Err(AuthError::NotSpanvm)));
        let (mut c, mut s) = pair().await;
        let challenge = Challenge {
            magic: MAGIC,
            version: 99,
            name: String::new(),
            nonce: [0; 32],
            secret_required: false,
        };
        codec::send(&mut s, &challenge).await.unwrap();
        assert!(matches!(connect(&mut c, None, "c").await, Err(AuthError::Version(99))));
    }

    #[test]
    fn only_loopback_goes_without() {
        let secret = Secret::random();
        for (addr, fine) in
            [("127.0.0.1:1", true), ("[::1]:1", true), ("10.0.0.1:1", false), ("0.0.0.0:1", false)]
        {
            assert_eq!(check_address(addr.parse().unwrap(), None).is_ok(), fine, "{addr}");
            assert!(check_address(addr.parse().unwrap(), Some(&secret)).is_ok());
        }
    }
}
