//! The VM's specification: flags, TOML, and what is checked before anything starts.
