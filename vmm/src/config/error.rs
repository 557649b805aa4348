//! Why a configuration is refused.

use std::path::PathBuf;

/// A configuration that can't be used. Each says which flag or key, which value, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A required key is missing.
    #[error("{} is missing: {hint}", both(key))]
    Missing {
        /// The key.
        key: &'static str,
        /// What to do.
        hint: String,
    },
    /// A value is not usable.
    #[error("{} {value}: {problem}; {hint}", both(key))]
    Value {
        /// The key.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// Two keys contradict each other.
    #[error("{first} and {second}: {problem}; {hint}")]
    Conflict {
        /// One flag with its value.
        first: String,
        /// The other.
        second: String,
        /// Why they don't go together.
        problem: String,
        /// What to do.
        hint: String,
    },
    /// The TOML file can't be read or parsed.
    #[error("--config {}: {problem}; {hint}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: String,
    },
}

/// A key as flag and as TOML: both, because one message serves both.
fn both(key: &str) -> String {
    match key {
        "config" => "--config".into(),
        "disks" => "--disk ([[disks]])".into(),
        "member" => "--member ([[members]])".into(),
        key if key.contains('_') => format!("--{} ({key})", key.replace('_', "-")),
        key => format!("--{key}"),
    }
}

impl ConfigError {
    /// A value that is not usable.
    pub fn value(
        key: &'static str,
        value: impl ToString,
        problem: impl Into<String>,
        hint: impl Into<String>,
    ) -> ConfigError {
        ConfigError::Value { key, value: value.to_string(), problem: problem.into(), hint: hint.into() }
    }
}
