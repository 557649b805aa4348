//! Text on COM1.

use crate::machine;
use core::fmt::{self, Write};

/// COM1 as a text sink.
#[derive(Debug)]
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                machine::serial(b'\r');
            }
            machine::serial(byte);
        }
        Ok(())
    }
}

/// A line on COM1. Only the first CPU prints, unless the guest is about to end with a fault.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        // The console never fails.
        let _ = writeln!($crate::console::Console, $($arg)*);
    }};
}

/// The `k=v` part of a result line; what does not fit is cut off.
#[derive(Debug)]
pub struct Line {
    text: [u8; 512],
    len: usize,
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Self { text: [0; 512], len: 0 }
    }

    /// Appends ` key=value`.
    pub fn add(&mut self, key: &str, value: impl fmt::Display) {
        // Cut off at the end of the buffer: see above.
        let _ = write!(self, " {key}={value}");
    }

    /// The text so far.
    pub fn as_str(&self) -> &str {
        self.text.get(..self.len).and_then(|t| core::str::from_utf8(t).ok()).unwrap_or("")
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.text.get_mut(self.len..self.len + text.len()).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}
