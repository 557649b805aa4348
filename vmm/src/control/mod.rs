//! Control plane: messages, the node daemon, the coordinator, the HTTP API.

pub mod secret;
