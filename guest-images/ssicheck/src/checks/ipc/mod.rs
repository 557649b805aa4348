//! Shared memory and IPC between tasks on CPUs of different nodes.
//!
//! Every mechanism carries the same conversation: one side sends messages of several sizes, the other answers each with
//! the message turned around, and both check every byte.
//!
//! - `channel`: what a mechanism must do, and the conversation (no mechanism in it)
//! - `memory`: messages in shared memory, announced by futex, eventfd or signal
//! - `stream`: pipes and Unix sockets

mod channel;
mod memory;
mod stream;

use std::fs::File;
use std::time::Duration;

use serde_json::json;

use crate::checks::remote::pair_name;
use crate::context::{Context, Note, posix_shm_path};
use crate::failure::{During, Failure};
use crate::sys::shared::{PAGE, Shared};
use crate::sys::{cpu, io, process};
use crate::topology::Cpu;
use channel::{Channel, answer_all, ask};
use memory::{ByEventfd, ByFutex, BySignal, Mailbox, Side};

/// Sub-checks per pair of CPUs.
const MECHANISMS: usize = 10;

/// Runs the check.
pub fn run(context: &Context) {
    let links = context.topology().links();
    let slice = context.slice(links.len() * MECHANISMS);
    for (a, b) in links {
        let pair = pair_name((a, b));
        let link = Link { a, b, slice };
        context.sub(format!("threads {pair}"), || threads(&link));
        context.sub(format!("sysv_shm {pair}"), || by_futex(&link, Shared::sysv(Mailbox::PAGES)?));
        context.sub(format!("posix_shm {pair}"), || posix_shm(&link));
        context.sub(format!("futex {pair}"), || by_futex(&link, Shared::anonymous(Mailbox::PAGES)?));
        context.sub(format!("eventfd {pair}"), || eventfd(&link));
        context.sub(format!("signals {pair}"), || signals(&link));
        context.sub(format!("pipe {pair}"), || pipe(&link));
        context.sub(format!("unix_stream {pair}"), || stream::unix_stream(&link, &context.file("socket")));
        context.sub(format!("unix_seqpacket {pair}"), || stream::unix_seqpacket(&link));
        context.sub(format!("unix_datagram {pair}"), || stream::unix_datagram(&link));
    }
}

/// The two CPUs that talk, and for how long.
#[derive(Debug)]
pub struct Link {
    a: Cpu,
    b: Cpu,
    slice: Duration,
}

impl Link {
    /// Talks to a process on CPU `b` from CPU `a`. Each side makes its own end; the asking one is told the other's PID.
    pub fn talk<A: Channel, B: Channel>(
        &self,
        answerer: impl FnOnce() -> Result<B, Failure>,
        asker: impl FnOnce(i32) -> Result<A, Failure>,
    ) -> Result<Note, Failure> {
        cpu::pin(self.a.id)?;
        let task = process::spawn(self.b.id, || match answerer().and_then(|mut c| answer_all(&mut c)) {
            Ok(()) => 0,
            Err(failure) => {
                eprintln!("ssicheck: answering on CPU {}: {failure}", self.b.id);
                1
            }
        })?;
        let rounds = asker(task.pid).and_then(|mut c| ask(&mut c, self.slice))?;
        task.finish(&format!("the answering process on CPU {}", self.b.id))?;
        Ok(talked(rounds))
    }
}

fn talked(rounds: u64) -> Note {
    Note::with_data(format!("{rounds} messages each way"), json!({ "rounds": rounds }))
}

/// Two threads of one process, by a mutex and a condition variable.
fn threads(link: &Link) -> Result<Note, Failure> {
    let (to_b, from_a) = channel::queue();
    let (to_a, from_b) = channel::queue();
    std::thread::scope(|scope| {
        let answerer = scope.spawn(move || {
            cpu::pin(link.b.id)?;
            answer_all(&mut channel::Queues { send: to_a, receive: from_a })
        });
        cpu::pin(link.a.id)?;
        let rounds = ask(&mut channel::Queues { send: to_b, receive: from_b }, link.slice);
        answerer.join().unwrap_or_else(|_| Err(Failure::Other("a thread panicked".into())))?;
        Ok(talked(rounds?))
    })
}

fn by_futex(link: &Link, memory: Shared) -> Result<Note, Failure> {
    let memory = &memory;
    link.talk(|| Ok(ByFutex::new(memory, Side::B)), |_| Ok(ByFutex::new(memory, Side::A)))
}

/// A segment in /dev/shm, which the other process opens by its name.
fn posix_shm(link: &Link) -> Result<Note, Failure> {
    let path = posix_shm_path(std::process::id());
    let what = format!("POSIX shared memory {} (is a tmpfs mounted on /dev/shm?)", path.display());
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .during(format!("making {what}"))?;
    let result = (|| {
        file.set_len((Mailbox::PAGES * PAGE) as u64).during(format!("sizing {what}"))?;
        let memory = Shared::of_file(&file, Mailbox::PAGES)?;
        let open_by_name = || {
            let file =
                File::options().read(true).write(true).open(&path).during(format!("opening {what}"))?;
            Shared::of_file(&file, Mailbox::PAGES)
        };
        link.talk(|| Ok(ByFutex::new(open_by_name()?, Side::B)), |_| Ok(ByFutex::new(memory, Side::A)))
    })();
    std::fs::remove_file(&path).during(format!("removing {what}"))?;
    result
}

fn eventfd(link: &Link) -> Result<Note, Failure> {
    let memory = &Shared::anonymous(Mailbox::PAGES)?;
    let (to_a, to_b) = (&io::eventfd()?, &io::eventfd()?);
    link.talk(
        || Ok(ByEventfd::new(memory, Side::B, to_b, to_a)),
        |_| Ok(ByEventfd::new(memory, Side::A, to_a, to_b)),
    )
}

fn signals(link: &Link) -> Result<Note, Failure> {
    // Before the fork: a signal that arrives early must wait, not kill.
    process::block_sigusr1()?;
    let memory = &Shared::anonymous(Mailbox::PAGES)?;
    link.talk(
        || Ok(BySignal::new(memory, Side::B, process::parent())),
        |pid| Ok(BySignal::new(memory, Side::A, pid)),
    )
}

fn pipe(link: &Link) -> Result<Note, Failure> {
    let (read_a, write_b) = io::pipe()?;
    let (read_b, write_a) = io::pipe()?;
    let (a, b) = ((&read_a, &write_a), (&read_b, &write_b));
    link.talk(|| Ok(stream::Framed::new(b.0, b.1)), |_| Ok(stream::Framed::new(a.0, a.1)))
}
