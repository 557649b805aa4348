//! COM1: a 16550A (National Semiconductor PC16550D) whose transmitter is always empty.
//!
//! Cost on another member: every write is posted, every read is a network round trip. Linux's console driver
//! reads LSR once per FIFO of 16 bytes (from 5.19; once per byte before), so early boot output from a vCPU far
//! away is slow; `console=hvc0` (virtio) is the console for anything that prints much.

use super::BusDevice;
use super::console::{ConsoleInput, Output};
use crate::interrupts::IrqLines;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_DATA: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IIR_NONE: u8 = 0x01;
const IIR_THRE: u8 = 0x02;
const IIR_DATA: u8 = 0x04;
const IIR_FIFO: u8 = 0xC0;
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
/// DTR, RTS, OUT1, OUT2, loopback.
const MCR_MASK: u8 = 0x1F;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA: u8 = 1 << 0;
const LSR_IDLE: u8 = 0x60;
/// CTS, DSR and DCD: somebody is at the other end.
const MSR_CONNECTED: u8 = 0xB0;

/// Input that waits for the guest, in bytes.
const INPUT_BYTES: usize = 4096;

/// All of the port's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SerialState {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: [u8; 2],
    fifo: bool,
    /// The transmitter became empty and the guest has not been told yet.
    thre_pending: bool,
    input: VecDeque<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        SerialState {
            ier: 0,
            lcr: 3,
            mcr: MCR_OUT2,
            scr: 0,
            divisor: [12, 0],
            fifo: false,
            thre_pending: false,
            input: VecDeque::new(),
        }
    }
}

impl SerialState {
    /// The pending interrupt of highest priority, as IIR reports it.
    fn interrupt(&self) -> u8 {
        if self.ier & IER_DATA != 0 && !self.input.is_empty() {
            IIR_DATA
        } else if self.ier & IER_THRE != 0 && self.thre_pending {
            IIR_THRE
        } else {
            IIR_NONE
        }
    }

    /// The interrupt line; OUT2 gates it on a PC.
    fn line(&self) -> bool {
        self.interrupt() != IIR_NONE && self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
    }

    fn read(&mut self, offset: u64) -> u8 {
        match offset {
            DATA | IER if self.lcr & LCR_DLAB != 0 => self.divisor[usize::from(offset == IER)],
            DATA => self.input.pop_front().unwrap_or(0),
            IER => self.ier,
            IIR_FCR => {
                let interrupt = self.interrupt();
                if interrupt == IIR_THRE {
                    self.thre_pending = false;
                }
                interrupt | if self.fifo { IIR_FIFO } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => LSR_IDLE | if self.input.is_empty() { 0 } else { LSR_DATA },
            // In loopback the modem outputs drive the modem inputs: RTS, DTR, OUT1, OUT2.
            MSR if self.mcr & MCR_LOOP != 0 => {
                (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
            }
            MSR => MSR_CONNECTED,
            SCR => self.scr,
            _ => 0xFF,
        }
    }

    /// A write; returns a byte that goes out.
    fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        match offset {
            DATA | IER if self.lcr & LCR_DLAB != 0 => self.divisor[usize::from(offset == IER)] = value,
            DATA => {
                self.thre_pending = true;
                if self.mcr & MCR_LOOP == 0 {
                    return Some(value);
                }
                if self.input.len() < INPUT_BYTES {
                    self.input.push_back(value);
                }
            }
            IER => {
                // Enabling the transmitter's interrupt while it is empty raises it at once.
                self.thre_pending |= value & !self.ier & IER_THRE != 0;
                self.ier = value & 0x0F;
            }
            IIR_FCR => {
                self.fifo = value & FCR_ENABLE != 0;
                if value & FCR_CLEAR_RX != 0 {
                    self.input.clear();
                }
            }
            LCR => self.lcr = value,
            MCR => self.mcr = value & MCR_MASK,
            SCR => self.scr = value,
            _ => {}
        }
        None
    }
}

/// The serial port.
pub struct Serial {
    state: Mutex<SerialState>,
    output: Arc<Output>,
    irq: Arc<dyn IrqLines>,
    gsi: u32,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Serial {
    /// A port after reset.
    pub fn new(output: Arc<Output>, irq: Arc<dyn IrqLines>, gsi: u32) -> Serial {
        Serial { state: Mutex::default(), output, irq, gsi }
    }

    fn lock(&self) -> MutexGuard<'_, SerialState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` and drives the line as it left it. The line is set under the lock, or two threads could set
    /// it in the wrong order; `IrqLines` does not call back.
    fn with_state<T>(&self, f: impl FnOnce(&mut SerialState) -> T) -> T {
        let mut state = self.lock();
        let before = state.line();
        let result = f(&mut state);
        if state.line() != before {
            self.irq.set_level(self.gsi, !before);
        }
        result
    }
}

impl BusDevice for Serial {
    fn name(&self) -> &str {
        "com1"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        match data {
            [value] => *value = self.with_state(|s| s.read(offset)),
            _ => data.fill(0xFF),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // A string instruction of bytes arrives as several writes; wider accesses are no 16550's.
        if let [value] = data {
            if let Some(byte) = self.with_state(|s| s.write(offset, *value)) {
                self.output.write(&[byte]);
            }
        }
    }

    fn is_posted(&self, offset: u64) -> bool {
        super::WindowKind::Serial.is_posted(offset)
    }

    fn save(&self) -> String {
        serde_json::to_string(&*self.lock()).unwrap_or_default()
    }

    fn restore(&self, state: &str) -> Result<(), String> {
        let state: SerialState = serde_json::from_str(state).map_err(|e| e.to_string())?;
        if state.input.len() > INPUT_BYTES {
            return Err("it has more input than room for it".into());
        }
        // The line is the IOAPIC's to remember.
        *self.lock() = state;
        Ok(())
    }
}

impl ConsoleInput for Serial {
    fn push(&self, bytes: &[u8]) -> usize {
        self.with_state(|s| {
            // In loopback the line is cut.
            if s.mcr & MCR_LOOP != 0 {
                return 0;
            }
            let n = bytes.len().min(INPUT_BYTES.saturating_sub(s.input.len()));
            s.input.extend(&bytes[..n]);
            n
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ConsoleHandle;
    use std::time::Duration;

    #[derive(Default)]
    struct Lines(Mutex<Vec<(u32, bool)>>);
    impl IrqLines for Lines {
        fn set_level(&self, gsi: u32, high: bool) {
            self.0.lock().unwrap().push((gsi, high));
        }
    }
    impl Lines {
        fn take(&self) -> Vec<(u32, bool)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn port() -> (Arc<Serial>, Arc<Lines>, ConsoleHandle) {
        let (output, lines) = (Arc::new(Output::default()), Arc::new(Lines::default()));
        let serial = Arc::new(Serial::new(output.clone(), lines.clone(), 4));
        (serial.clone(), lines, ConsoleHandle::new(output, serial))
    }

    fn get(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_goes_to_the_console() {
        let (serial, lines, console) = port();
        for byte in b"hi\n" {
            assert_eq!(get(&serial, LSR), 0x60);
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(console.reader().read(10, Duration::ZERO).bytes, b"hi\n");
        assert_eq!(lines.take(), []);
    }

    #[test]
    fn transmit_interrupt_is_told_once() {
        let (serial, lines, _) = port();
        serial.write(IER, &[IER_THRE]);
        assert_eq!(lines.take(), [(4, true)]);
        assert_eq!(get(&serial, IIR_FCR), IIR_THRE);
        assert_eq!(lines.take(), [(4, false)]);
        assert_eq!(get(&serial, IIR_FCR), IIR_NONE);
        serial.write(DATA, b"x");
        assert_eq!(lines.take(), [(4, true)]);
        serial.write(IER, &[0]);
        assert_eq!(lines.take(), [(4, false)]);
    }

    #[test]
    fn input_interrupts_until_it_is_read() {
        let (serial, lines, console) = port();
        serial.write(IER, &[IER_DATA]);
        assert_eq!(console.try_input(b"ab"), 2);
        assert_eq!(lines.take(), [(4, true)]);
        assert_eq!(get(&serial, IIR_FCR), IIR_DATA);
        assert_eq!((get(&serial, LSR), get(&serial, DATA)), (0x61, b'a'));
        assert_eq!(lines.take(), []);
        assert_eq!((get(&serial, DATA), get(&serial, LSR)), (b'b', 0x60));
        assert_eq!(lines.take(), [(4, false)]);
        assert_eq!(console.try_input(&[0; 10_000]), INPUT_BYTES);
        assert_eq!(console.try_input(b"x"), 0);
    }

    #[test]
    fn a_driver_finds_a_16550a() {
        let (serial, _, console) = port();
        serial.write(SCR, &[0x5A]);
        assert_eq!(get(&serial, SCR), 0x5A);
        serial.write(LCR, &[LCR_DLAB | 3]);
        serial.write(DATA, &[1]);
        serial.write(IER, &[0]);
        assert_eq!((get(&serial, DATA), get(&serial, IER)), (1, 0));
        serial.write(LCR, &[3]);
        serial.write(IIR_FCR, &[FCR_ENABLE]);
        assert_eq!(get(&serial, IIR_FCR), 0xC1);
        // Linux's loopback test (autoconfig): OUT2 and RTS come back as DCD and CTS.
        serial.write(MCR, &[MCR_LOOP | 0x0A]);
        assert_eq!(get(&serial, MSR) & 0xF0, 0x90);
        serial.write(DATA, b"q");
        assert_eq!(get(&serial, DATA), b'q');
        assert_eq!(console.try_input(b"x"), 0);
        assert_eq!(console.reader().read(1, Duration::ZERO).bytes, b"");
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let (serial, _, _) = port();
        let mut wide = [0; 4];
        serial.read(DATA, &mut wide);
        assert_eq!(wide, [0xFF; 4]);
        serial.write(DATA, &wide);
        serial.write(100, &[1]);
        assert_eq!(get(&serial, 100), 0xFF);
    }
}
