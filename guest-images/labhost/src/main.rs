//! Runs commands in a virtual host of the lab, one per TCP connection.
//!
//! ```text
//! client                         agent
//!   T token, R timeout + script ->        `sh -c script` in a process group of its own
//!   I bytes, E (end of input)   ->        standard input
//!                               <- O      standard output
//!                               <- S      standard error
//!                               <- X      exit code + reason; the connection ends
//! ```
//!
//! A frame is one byte of kind, a little-endian `u32` length, and that many bytes. When the timeout passes or the client goes
//! away, the whole process group is killed; a daemon that shall live on calls `setsid`.

mod entropy;
mod frame;

use frame::{Kind, read_frame, write_frame};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a client has to say who it is and what it wants.
const HELLO: Duration = Duration::from_secs(10);
/// How long output may trail the end of the command: a daemon left behind holds the pipes open for ever.
const DRAIN: Duration = Duration::from_millis(500);
/// Exit code for a command that outlived its time, as of timeout(1).
const TIMED_OUT: i32 = 124;

/// What the threads of a connection tell the one that decides.
enum Event {
    Exited(io::Result<ExitStatus>),
    OutputEnded,
    ClientGone,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, token] = args.as_slice() else {
        eprintln!("usage: labagent ADDRESS:PORT TOKEN");
        return ExitCode::from(2);
    };
    if let Err(error) = entropy::add(token) {
        eprintln!("labagent: no entropy for the kernel: {error}");
    }
    let listener = match TcpListener::bind(address.as_str()) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("labagent: cannot listen on {address}: {error}");
            return ExitCode::FAILURE;
        }
    };
    for stream in listener.incoming() {
        let token = token.clone();
        match stream {
            Ok(stream) => drop(thread::spawn(move || {
                if let Err(error) = serve(stream, &token) {
                    eprintln!("labagent: {error}");
                }
            })),
            // Out of descriptors, most likely: wait for some to close rather than spin.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
    ExitCode::SUCCESS
}

/// Serves one connection: one command.
fn serve(mut stream: TcpStream, token: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HELLO))?;
    let hello = read_frame(&mut stream)?;
    if hello.kind != Kind::Token || hello.bytes != token.as_bytes() {
        return Err(io::Error::other("a client without the token"));
    }
    let run = read_frame(&mut stream)?;
    let Some((seconds, script)) = run.bytes.split_first_chunk::<4>().filter(|_| run.kind == Kind::Run) else {
        return Err(io::Error::other("a client that asks for nothing"));
    };
    let limit = Duration::from_secs(u64::from(u32::from_le_bytes(*seconds)));
    let script = String::from_utf8_lossy(script).into_owned();
    stream.set_read_timeout(None)?;

    let out = Arc::new(Mutex::new(stream.try_clone()?));
    let (code, reason) = match spawn(&script) {
        Ok(child) => watch(child, stream, &out, limit),
        Err(error) => (127, format!("cannot start sh: {error}")),
    };
    let mut bytes = code.to_le_bytes().to_vec();
    bytes.extend_from_slice(reason.as_bytes());
    let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
    write_frame(&mut *out, Kind::Exit, &bytes)?;
    out.shutdown(std::net::Shutdown::Both)
}

fn spawn(script: &str) -> io::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
}

/// Lets the command run to its end, its limit, or the client's; returns its exit code and what there is to say about it.
fn watch(mut child: Child, stream: TcpStream, out: &Arc<Mutex<TcpStream>>, limit: Duration) -> (i32, String) {
    let group = child.id();
    let (events, inbox) = mpsc::channel();
    let mut streams = 0;
    if let Some(pipe) = child.stdout.take() {
        streams += 1;
        pump(pipe, Kind::Output, out, events.clone());
    }
    if let Some(pipe) = child.stderr.take() {
        streams += 1;
        pump(pipe, Kind::Error, out, events.clone());
    }
    feed(stream, child.stdin.take(), events.clone());
    thread::spawn(move || events.send(Event::Exited(child.wait())));

    let mut wait = limit;
    let deadline = std::time::Instant::now() + limit;
    let mut end: Option<(i32, String)> = None;
    loop {
        match inbox.recv_timeout(wait) {
            Ok(Event::Exited(status)) => {
                end = Some(describe(status));
                wait = DRAIN;
            }
            Ok(Event::OutputEnded) => streams -= 1,
            Ok(Event::ClientGone) => {
                kill(group);
                return (TIMED_OUT, "the client went away".into());
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => match end {
                Some(end) => return end,
                None => {
                    kill(group);
                    return (TIMED_OUT, format!("killed after {} s", limit.as_secs()));
                }
            },
        }
        match end {
            Some(end) if streams == 0 => return end,
            Some(_) => {}
            None => wait = deadline.saturating_duration_since(std::time::Instant::now()),
        }
    }
}

fn describe(status: io::Result<ExitStatus>) -> (i32, String) {
    match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => (code, String::new()),
            (None, Some(signal)) => (128 + signal, format!("killed by signal {signal}")),
            (None, None) => (1, "ended in an unknown way".into()),
        },
        Err(error) => (1, format!("lost the command: {error}")),
    }
}

/// Copies a pipe of the command to the client until it ends.
fn pump(
    mut pipe: impl Read + Send + 'static,
    kind: Kind,
    out: &Arc<Mutex<TcpStream>>,
    events: Sender<Event>,
) {
    let out = Arc::clone(out);
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            if write_frame(&mut *out, kind, buffer.get(..count).unwrap_or_default()).is_err() {
                break;
            }
        }
        // The receiver is gone when the command has been given up: nobody is left to tell.
        let _ = events.send(Event::OutputEnded);
    });
}

/// Copies the client's input to the command, and says when the client is gone.
fn feed(mut stream: TcpStream, mut stdin: Option<ChildStdin>, events: Sender<Event>) {
    thread::spawn(move || {
        while let Ok(frame) = read_frame(&mut stream) {
            // A command that closed its input is no reason to kill it.
            let open = match (frame.kind, stdin.as_mut()) {
                (Kind::Input, Some(pipe)) => pipe.write_all(&frame.bytes).is_ok(),
                (kind, _) => kind != Kind::EndOfInput,
            };
            if !open {
                stdin = None;
            }
        }
        let _ = events.send(Event::ClientGone);
    });
}

/// Kills a process group of ours.
fn kill(group: u32) {
    let Ok(group) = libc::pid_t::try_from(group) else { return };
    // SAFETY: killpg touches no memory of this process; `group` is the pid of a child that we made a group leader.
    unsafe { libc::killpg(group, libc::SIGKILL) };
}
