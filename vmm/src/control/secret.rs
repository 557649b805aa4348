//! The secret that node daemons, launchers and members of one installation share, and what is made of it.

use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Shortest secret that is accepted, bytes.
pub const MIN_SECRET: usize = 16;
/// Longest secret file that is read, bytes.
pub const MAX_SECRET: u64 = 4096;

/// Key material. Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Why a secret file is refused.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It can't be read.
    #[error("can't be read: {0}")]
    Io(#[from] io::Error),
    /// It is no regular file.
    #[error("is not a file")]
    NotAFile,
    /// Users other than the owner can read or write it.
    #[error("is open to other users (mode {0:03o})")]
    Permissions(u32),
    /// Too short to resist guessing, or too long to be one.
    #[error("holds {0} bytes, {MIN_SECRET} to {MAX_SECRET} are accepted")]
    Length(u64),
}

impl SecretError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            SecretError::Permissions(_) => "run `chmod 600` on it",
            _ => {
                "make one with `(umask 077; head -c 32 /dev/urandom | base64 > FILE)` and copy it to every host"
            }
        }
    }
}

/// Reads a secret; white space around it does not count.
///
/// # Errors
/// Unreadable, open to other users, too short or too long.
pub fn load(path: &Path) -> Result<Secret, SecretError> {
    let file = std::fs::File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(SecretError::NotAFile);
    }
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(SecretError::Permissions(mode));
    }
    let mut bytes = Vec::new();
    file.take(MAX_SECRET + 1).read_to_end(&mut bytes)?;
    let secret = bytes.trim_ascii().to_vec();
    if secret.len() < MIN_SECRET || bytes.len() as u64 > MAX_SECRET {
        return Err(SecretError::Length(bytes.len() as u64));
    }
    Ok(Secret(secret))
}

impl Secret {
    /// A new random secret.
    pub fn random() -> Secret {
        Secret(rand::random::<[u8; 32]>().to_vec())
    }

    /// From key material that came over a private channel.
    pub fn from_bytes(bytes: Vec<u8>) -> Secret {
        Secret(bytes)
    }

    /// The key material.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// HMAC-SHA256 over a label and parts of fixed length, so that a proof for one purpose is none for
    /// another.
    pub fn mac(&self, label: &str, parts: &[&[u8]]) -> Mac256 {
        let mut mac = self.keyed(label);
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// Compares a proof in constant time.
    pub fn verify(&self, label: &str, parts: &[&[u8]], proof: &[u8]) -> bool {
        let mut mac = self.keyed(label);
        for part in parts {
            mac.update(part);
        }
        mac.verify_slice(proof).is_ok()
    }

    /// The key with which the members of one VM prove to each other that they belong together; both sides
    /// derive it, so it never travels.
    pub fn mesh_key(&self, vm: &str, nonce: &[u8; 32]) -> Vec<u8> {
        self.mac("spanvm mesh", &[nonce, vm.as_bytes()]).to_vec()
    }

    fn keyed(&self, label: &str) -> Hmac<Sha256> {
        // RFC 2104: a key of any length will do, so this is no error that input can reach.
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes any key");
        mac.update(label.as_bytes());
        mac.update(&[0]);
        mac
    }
}

/// An HMAC-SHA256 result.
pub type Mac256 = [u8; 32];

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn file(content: &[u8], mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[test]
    fn a_private_file_of_some_length() {
        let good = file(b"0123456789abcdef\n", 0o600);
        assert_eq!(load(good.path()).unwrap().bytes(), b"0123456789abcdef");
        assert!(matches!(
            load(file(b"0123456789abcdef", 0o640).path()),
            Err(SecretError::Permissions(0o640))
        ));
        assert!(matches!(
            load(file(b"0123456789abcdef", 0o604).path()),
            Err(SecretError::Permissions(0o604))
        ));
        assert!(matches!(load(file(b"short", 0o600).path()), Err(SecretError::Length(5))));
        assert!(matches!(load(file(&[b'x'; 5000], 0o600).path()), Err(SecretError::Length(_))));
        assert!(matches!(load(Path::new("/nonexistent")), Err(SecretError::Io(_))));
        assert!(matches!(load(Path::new("/")), Err(SecretError::NotAFile)));
    }

    #[test]
    fn proofs_are_bound_to_label_and_parts() {
        let secret = Secret::random();
        let proof = secret.mac("a", &[b"x"]);
        assert!(secret.verify("a", &[b"x"], &proof));
        assert!(!secret.verify("b", &[b"x"], &proof));
        assert!(!secret.verify("a", &[b"y"], &proof));
        assert!(!Secret::random().verify("a", &[b"x"], &proof));
        assert_ne!(secret.mesh_key("v", &[0; 32]), secret.mesh_key("v", &[1; 32]));
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }
}
