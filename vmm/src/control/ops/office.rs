//! What operations on members tell the coordinator: it alone has the connections, and knows whose end is news.

use super::Ops;
use crate::control::coordinator::link::Link;
use dsm::addr::MemberId;
use tokio::sync::{mpsc, oneshot};

/// Who comes and who goes.
#[derive(Debug)]
pub enum Notice {
    /// It has nothing any more: its end is no news.
    Excuse(MemberId),
    /// End its process; say when it has ended.
    Dismiss(MemberId, oneshot::Sender<()>),
    /// It has become a member: its end is news. Say when this was heard.
    Admit(Link, oneshot::Sender<()>),
}

impl Ops {
    /// Where the coordinator hears who comes and goes.
    pub fn open_office(&self, office: mpsc::Sender<Notice>) {
        // Once, at the start.
        let _ = self.office.set(office);
    }

    pub(super) async fn tell_office(&self, notice: Notice) {
        if let Some(office) = self.office.get() {
            // A coordinator that does not listen any more ends the VM.
            let _ = office.send(notice).await;
        }
    }
}
