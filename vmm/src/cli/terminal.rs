//! The user's terminal: raw while a console is connected, itself again afterwards.

use crate::control::launcher::Wish;
use std::io::{IsTerminal, Read};
use tokio::sync::mpsc;
use vmm_sys_util::terminal::Terminal;

/// Ctrl-], as in telnet: leaves a console.
pub const ESCAPE: u8 = 0x1D;

/// Standard input in raw mode as long as this lives; nothing when it is no terminal.
#[derive(Debug)]
pub struct RawInput(bool);

impl RawInput {
    /// Takes the terminal if there is one.
    pub fn take() -> RawInput {
        let stdin = std::io::stdin();
        RawInput(stdin.is_terminal() && stdin.lock().set_raw_mode().is_ok())
    }

    /// True when there is a terminal to read from.
    pub fn is_on(&self) -> bool {
        self.0
    }
}

impl Drop for RawInput {
    fn drop(&mut self) {
        if self.0 {
            let _ = std::io::stdin().lock().set_canon_mode();
        }
    }
}

/// Reads standard input from a thread of its own until it ends or [`ESCAPE`] comes, which is a [`Wish::Stop`].
pub fn read_input(wishes: mpsc::Sender<Wish>) {
    // A thread that blocks in read can't be ended: it goes with the process.
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = std::io::stdin().read(&mut buffer) {
            let bytes = buffer.get(..n).unwrap_or_default();
            let (typed, left) = match bytes.iter().position(|byte| *byte == ESCAPE) {
                Some(at) => (bytes.get(..at).unwrap_or_default(), true),
                None => (bytes, false),
            };
            if !typed.is_empty() && wishes.blocking_send(Wish::Input(typed.to_vec())).is_err() {
                return;
            }
            if left {
                let _ = wishes.blocking_send(Wish::Stop);
                return;
            }
        }
    });
}

/// Ctrl-C and SIGTERM are a [`Wish::Stop`]; the second one ends this process at once.
pub fn watch_signals(wishes: mpsc::Sender<Wish>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return;
    };
    tokio::spawn(async move {
        for again in [false, true] {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            if again {
                std::process::exit(130);
            }
            let _ = wishes.send(Wish::Stop).await;
        }
    });
}
