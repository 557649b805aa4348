//! The serial console of a VM whose serial port is not in the coordinator's process any more. What people see and type stays
//! the coordinator's: output is fetched from the member that has the port, and what is typed is sent there.
//!
//! ```text
//!                 ReadConsole(from, wait)
//!  ring  <---------------------------------- the port's own ring      so far that nothing is lost: the port keeps a megabyte
//!  typed ----------------------------------> the port, as much as it takes
//!                 TypeIn(bytes)
//! ```
//!
//! While the port goes to another member the VM is paused, so it says nothing: what it has said is fetched before it goes.

use crate::control::crew::{Crew, GRACE};
use crate::control::shared::Shared;
use crate::devices::ConsoleHandle;
use crate::devices::console::ConsoleInput;
use crate::devices::spec::{self, BOARD_WINDOW};
use crate::member::devices::Said;
use crate::member::{MemberReply, MemberTask};
use dsm::addr::MemberId;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// The member whose process is the coordinator's, and whose console is what people see.
const HERE: MemberId = MemberId(0);
/// Longest wait of one question for output.
const WAIT: Duration = Duration::from_millis(500);
/// After a member did not answer, or took nothing.
const RETRY: Duration = Duration::from_millis(50);
/// What is typed and not sent yet, bytes.
const TYPED: usize = 4096;
/// Longest time in which what a port has said is fetched before it goes.
const LAST: Duration = Duration::from_secs(5);

/// Where the far console is, if there is one.
#[derive(Debug, Default)]
pub struct Slot(Mutex<Option<Far>>);

/// The console of a port at another member.
#[derive(Debug)]
struct Far {
    member: MemberId,
    next: Next,
    /// Its output is fetched.
    lives: bool,
    tasks: [AbortHandle; 2],
}

/// Where a port's next output begins. Held while a piece is put behind the others.
type Next = Arc<Mutex<u64>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Far {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Far>> {
        lock(&self.0)
    }
}

/// What waits to be sent to the port.
#[derive(Debug, Default)]
struct Typed {
    waiting: Mutex<VecDeque<u8>>,
    more: Notify,
}

impl Typed {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<u8>> {
        lock(&self.waiting)
    }
}

impl ConsoleInput for Typed {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.waiting();
        let n = bytes.len().min(TYPED.saturating_sub(waiting.len()));
        waiting.extend(bytes.iter().take(n));
        drop(waiting);
        self.more.notify_one();
        n
    }
}

/// The console is where the table says that the port is.
pub(super) fn follow(shared: &Arc<Shared>) {
    let Some(roster) = shared.ops().roster() else { return };
    let windows = spec::windows(&roster.devices).unwrap_or_default();
    let Some(member) = windows.get(BOARD_WINDOW).map(|window| window.member) else { return };
    let mut far = shared.ops().far.lock();
    if member == HERE {
        // The member has connected the two itself.
        *far = None;
        return;
    }
    if far.as_ref().is_some_and(|far| far.member == member && far.lives) {
        return;
    }
    let Some(console) = shared.console() else { return };
    // One that let go of it, and has it still, goes on where it was.
    let next = far.take().filter(|far| far.member == member).map(|far| far.next.clone()).unwrap_or_default();
    let typed = Arc::new(Typed::default());
    console.redirect(typed.clone());
    let fetch = tokio::spawn(fetch(Arc::downgrade(shared), member, console, next.clone()));
    let send = tokio::spawn(send(Arc::downgrade(shared), member, typed));
    *far = Some(Far { member, next, lives: true, tasks: [fetch.abort_handle(), send.abort_handle()] });
}

/// Fetches what the port has said before it goes elsewhere. While the VM is paused.
pub(super) async fn let_go(shared: &Arc<Shared>) {
    let (member, next) = match &mut *shared.ops().far.lock() {
        Some(far) => {
            far.lives = false;
            far.tasks.iter().for_each(AbortHandle::abort);
            (far.member, far.next.clone())
        }
        None => return,
    };
    let (Some(crew), Some(console)) = (shared.ops().crew(), shared.console()) else { return };
    let all = async {
        loop {
            let from = *lock(&next);
            match ask(crew, member, from, Duration::ZERO).await {
                Ok(said) if said.next != from => take(&console, &next, from, &said),
                Ok(_) => return,
                // A host that is busy; it is waited for, but not for ever.
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    };
    if tokio::time::timeout(LAST, all).await.is_err() {
        tracing::warn!("the end of what the console said at {member} is lost");
    }
}

/// Puts a piece behind the others, unless somebody has done so.
fn take(console: &ConsoleHandle, next: &Next, from: u64, said: &Said) {
    let mut next = lock(next);
    if *next != from {
        return;
    }
    if said.lost > 0 {
        console.feed(format!("\r\n[{} bytes of console output lost]\r\n", said.lost).as_bytes());
    }
    console.feed(&said.bytes);
    *next = said.next;
}

async fn ask(crew: &Crew, member: MemberId, from: u64, wait: Duration) -> Result<Said, String> {
    let task = MemberTask::ReadConsole { from, wait };
    match crew.ask(member, task, wait + GRACE).await {
        Ok(MemberReply::Said(said)) => Ok(said),
        Ok(_) => Err("an answer that does not fit".into()),
        Err(e) => Err(e.to_string()),
    }
}

async fn fetch(shared: Weak<Shared>, member: MemberId, console: ConsoleHandle, next: Next) {
    while let Some(shared) = shared.upgrade() {
        let Some(crew) = shared.ops().crew() else { return };
        let from = *lock(&next);
        match ask(crew, member, from, WAIT).await {
            Ok(said) => take(&console, &next, from, &said),
            Err(e) => {
                tracing::debug!("console: {e}");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn send(shared: Weak<Shared>, member: MemberId, typed: Arc<Typed>) {
    loop {
        let bytes: Vec<u8> = typed.waiting().iter().copied().collect();
        if bytes.is_empty() {
            typed.more.notified().await;
            continue;
        }
        let Some(shared) = shared.upgrade() else { return };
        let Some(crew) = shared.ops().crew() else { return };
        let len = bytes.len();
        let taken = match crew.ask(member, MemberTask::TypeIn { bytes }, GRACE).await {
            Ok(MemberReply::Typed(taken)) => taken.min(len),
            _ => 0,
        };
        typed.waiting().drain(..taken);
        if taken < len {
            tokio::time::sleep(RETRY).await;
        }
    }
}
