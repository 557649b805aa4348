//! What happened to a VM as a whole, in order: a bounded log, kept by its coordinator.

use super::ops::OpError;
use super::ops::add::AddReport;
use super::ops::checkpoint::CheckpointReport;
use super::ops::drain::DrainReport;
use super::ops::moves::MoveReport;
use super::ops::pause::PauseReport;
use super::ops::relocate::RelocateReport;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// Events that are kept; then the oldest goes.
pub const KEPT: usize = 1000;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number, from 1 on, without gaps.
    pub seq: u64,
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// `state`, `pause`, `resume`, `move`, `drain`, `add`, `migrate`, `checkpoint`, `policy`, `decision`, `judgement`.
    pub kind: String,
    /// In words.
    pub text: String,
    /// The report of the operation, or the figures of the decision.
    #[serde(default)]
    pub data: Value,
}

/// The log of one VM.
#[derive(Debug, Default)]
pub struct Events {
    log: Mutex<Log>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Log {
    last: u64,
    events: VecDeque<Event>,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes something down.
    pub fn note(&self, kind: &str, text: impl Into<String>, data: &impl Serialize) {
        let text = text.into();
        tracing::info!("{kind}: {text}");
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut log = self.lock();
        log.last += 1;
        let event = Event {
            seq: log.last,
            at_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            kind: kind.to_owned(),
            text,
            data: serde_json::to_value(data).unwrap_or_default(),
        };
        if log.events.len() >= KEPT {
            log.events.pop_front();
        }
        log.events.push_back(event);
        drop(log);
        self.news.notify_waiters();
    }

    /// How an operation went. One that was refused changed nothing, and is no event.
    pub fn told<T: Tell + Serialize>(&self, kind: &str, result: &Result<T, OpError>) {
        match result {
            Ok(report) => self.note(kind, report.tell(), report),
            Err(OpError::Failed(why)) => self.note(kind, format!("failed: {why}"), &Value::Null),
            Err(OpError::Refused(_) | OpError::NotFound(_)) => {}
        }
    }

    /// Those with a higher number.
    pub fn after(&self, seq: u64) -> Vec<Event> {
        self.lock().events.iter().filter(|event| event.seq > seq).cloned().collect()
    }

    /// The same; waits for one if there is none, but not for longer than `limit`.
    pub async fn wait(&self, seq: u64, limit: Duration) -> Vec<Event> {
        let news = self.news.notified();
        tokio::pin!(news);
        // Before the look, so that none is missed between it and the wait.
        news.as_mut().enable();
        let there = self.after(seq);
        if !there.is_empty() {
            return there;
        }
        let _ = tokio::time::timeout(limit, news).await;
        self.after(seq)
    }
}

/// A report in one line.
pub trait Tell {
    /// The line.
    fn tell(&self) -> String;
}

impl Tell for () {
    fn tell(&self) -> String {
        "the VM runs on".into()
    }
}

impl Tell for PauseReport {
    fn tell(&self) -> String {
        let clock = if self.time_stopped { "stands still" } else { "runs on" };
        format!("paused after {:.1} ms; the guest's clock {clock}", self.pause_ms)
    }
}

impl Tell for MoveReport {
    fn tell(&self) -> String {
        let one = |m: &super::ops::moves::Moved| {
            format!("vCPU {} from member {} to {} in {:.0} us", m.vcpu, m.from, m.to, m.downtime_us)
        };
        self.moves.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl Tell for DrainReport {
    fn tell(&self) -> String {
        let (vcpus, pages) = (self.vcpus.len(), self.pages);
        format!("member {} has left: {vcpus} vCPUs, {pages} pages, {:.0} ms", self.member, self.total_ms)
    }
}

impl Tell for AddReport {
    fn tell(&self) -> String {
        format!("member {} on {} has joined: {:.0} ms", self.member, self.host, self.total_ms)
    }
}

impl Tell for RelocateReport {
    fn tell(&self) -> String {
        let (added, drained) = (self.added.len(), self.drained.len());
        format!("{added} members added, {drained} drained: {:.0} ms", self.total_ms)
    }
}

impl Tell for CheckpointReport {
    fn tell(&self) -> String {
        let kind = if self.full { "full" } else { "incremental" };
        format!("{kind}, {} pages, {}: paused for {:.0} ms", self.pages, self.folder.display(), self.pause_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goes() {
        let events = Events::default();
        for n in 0..KEPT + 5 {
            events.note("state", n.to_string(), &Value::Null);
        }
        let all = events.after(0);
        assert_eq!((all.len(), all[0].seq, all[KEPT - 1].seq), (KEPT, 6, 1005));
        assert_eq!(events.after(1004).len(), 1);
        assert!(events.after(u64::MAX).is_empty());
    }

    #[test]
    fn what_was_refused_did_not_happen() {
        let events = Events::default();
        events.told::<()>("resume", &Err(OpError::Refused("no".into())));
        events.told::<()>("resume", &Err(OpError::NotFound("no".into())));
        assert!(events.after(0).is_empty());
        events.told::<()>("resume", &Err(OpError::Failed("it broke".into())));
        events.told::<()>("resume", &Ok(()));
        let texts: Vec<_> = events.after(0).into_iter().map(|e| e.text).collect();
        assert_eq!(texts, ["failed: it broke", "the VM runs on"]);
    }

    #[tokio::test]
    async fn who_waits_hears_of_the_next() {
        let events = std::sync::Arc::new(Events::default());
        assert!(events.wait(0, Duration::from_millis(1)).await.is_empty());
        let waiting = tokio::spawn({
            let events = events.clone();
            async move { events.wait(0, Duration::from_secs(60)).await }
        });
        tokio::task::yield_now().await;
        events.note("state", "x", &Value::Null);
        assert_eq!(waiting.await.unwrap().len(), 1);
    }
}
