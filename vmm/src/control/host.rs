//! What the control plane needs of a host: facts, and a member. A trait, so that the whole control plane can be
//! tested where there is no KVM.

use crate::devices::ConsoleHandle;
use crate::member::{
    BootImages, HostError, HostFacts, Member, MemberEvent, MemberPlan, MemberReply, MemberStats, MemberTask,
    PagesSaved, SaveRequest,
};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// A host that can run members. All calls may block.
pub trait Host: Send + Sync + 'static {
    /// What it can do.
    ///
    /// # Errors
    /// Why it can't be a member of anything.
    fn facts(&self) -> Result<HostFacts, HostError>;

    /// Starts a member and connects it to its peers.
    ///
    /// # Errors
    /// What went wrong, in words.
    fn join(
        &self,
        plan: MemberPlan,
        listener: TcpListener,
        events: Sender<MemberEvent>,
    ) -> Result<Arc<dyn Guest>, String>;
}

/// A joined member, as [`Member`] is one.
pub trait Guest: Send + Sync + 'static {
    /// See [`Member::load`].
    ///
    /// # Errors
    /// In words.
    fn load(&self, images: BootImages) -> Result<(), String>;
    /// See [`Member::run`].
    ///
    /// # Errors
    /// In words.
    fn run(&self) -> Result<(), String>;
    /// See [`Member::stop`].
    fn stop(&self, reason: &str);
    /// See [`Member::stats`].
    fn stats(&self) -> MemberStats;
    /// See [`Member::task`].
    ///
    /// # Errors
    /// In words.
    fn task(&self, task: MemberTask) -> Result<MemberReply, String>;
    /// See [`Member::save_pages`].
    ///
    /// # Errors
    /// In words.
    fn save(&self, request: SaveRequest, out: &mut dyn FnMut(Vec<u8>) -> bool) -> Result<PagesSaved, String> {
        let _ = (request, out);
        Err("this member can't be saved".into())
    }
    /// See [`Member::console`].
    fn console(&self) -> Option<ConsoleHandle>;
}

/// This host.
#[derive(Clone, Copy, Debug)]
pub struct RealHost;

impl Host for RealHost {
    fn facts(&self) -> Result<HostFacts, HostError> {
        HostFacts::probe()
    }

    fn join(
        &self,
        plan: MemberPlan,
        listener: TcpListener,
        events: Sender<MemberEvent>,
    ) -> Result<Arc<dyn Guest>, String> {
        let member = Member::join(plan, listener, events).map_err(|e| chain(&e))?;
        Ok(Arc::new(member))
    }
}

impl Guest for Member {
    fn load(&self, images: BootImages) -> Result<(), String> {
        Member::load(self, images).map_err(|e| chain(&e))
    }
    fn run(&self) -> Result<(), String> {
        Member::run(self).map_err(|e| chain(&e))
    }
    fn stop(&self, reason: &str) {
        Member::stop(self, reason);
    }
    fn stats(&self) -> MemberStats {
        Member::stats(self)
    }
    fn task(&self, task: MemberTask) -> Result<MemberReply, String> {
        Member::task(self, task)
    }
    fn save(&self, request: SaveRequest, out: &mut dyn FnMut(Vec<u8>) -> bool) -> Result<PagesSaved, String> {
        self.save_pages(request, out)
    }
    fn console(&self) -> Option<ConsoleHandle> {
        Member::console(self)
    }
}

/// An error and its sources in one line, without repeating what a source's text already says.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}
