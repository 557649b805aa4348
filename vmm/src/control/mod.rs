//! Control plane: how a VM is brought up over several hosts, looked at, and ended everywhere.
//!
//! [`wire`] says who tells whom what, [`codec`] how it looks on a connection, [`auth`] with [`secret`] who may.
//! [`launcher`] is the side of `spanvm launch`; [`coordinator`] is member 0's process; [`member_task`] is
//! every member's end of its connection; [`node`] is a host's daemon and [`node_client`] its caller; [`child`]
//! and [`spawn`] are the processes between them. [`shared`] is the picture of the VM that [`api`] serves over
//! the socket in [`rundir`], [`events`] its log, [`view`] its JSON, [`client`] its caller. [`ops`] are the
//! operations on a running VM, which [`crew`] asks of its members. [`restore`] makes a VM of a checkpoint, [`recovery`]
//! knows which one when a member was lost. [`end`] is how it all ends.

pub mod api;
pub mod auth;
pub mod child;
pub mod client;
pub mod codec;
pub mod coordinator;
pub mod crew;
pub mod end;
pub mod events;
pub mod fit;
pub mod host;
pub mod launcher;
pub mod member_task;
pub mod node;
pub mod node_client;
pub mod ops;
pub mod recovery;
pub mod restore;
pub mod rtt;
pub mod rundir;
pub mod secret;
pub mod shared;
pub mod spawn;
pub mod view;
pub mod wire;
