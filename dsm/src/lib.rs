//! Coherent memory over several processes: a home-based, single-writer-or-many-readers page protocol on
//! userfaultfd. Knows nothing of KVM: any process can share any mapping with it.
//!
//! The life of a page fault, by folder: [`region`] sees it, [`node`] turns it into an event, [`protocol`]
//! decides, [`transport`] carries what was decided, and [`region`] installs the page that comes back.

pub mod addr;
pub mod bench;
mod clock;
#[doc(hidden)]
pub mod hostile;
pub mod layout;
pub mod node;
pub mod priority;
pub mod protocol;
pub mod region;
pub mod seeded;
pub mod sim;
pub mod stats;
pub mod transport;
