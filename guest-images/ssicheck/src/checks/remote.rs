//! Doing something in a process on another CPU and getting the answer back.

use std::io::{Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::PATIENCE;
use crate::failure::{During, Failure};
use crate::sys::{self, process};
use crate::topology::Cpu;

/// Runs `body` in a new process on `cpu` and returns what it returns.
pub fn on_cpu<T: Serialize + DeserializeOwned>(
    cpu: Cpu,
    what: &str,
    body: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let (mut reader, mut writer) = sys::io::pipe()?;
    let place = format!("{what} on CPU {} (node {})", cpu.id, cpu.node);
    let task = process::spawn(cpu.id, || {
        let answer = body().map_err(|f| f.to_string());
        let Ok(bytes) = serde_json::to_vec(&answer) else { return 1 };
        i32::from(writer.write_all(&bytes).is_err())
    })?;
    drop(writer);
    let mut answer = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        sys::io::wait_readable(&reader, PATIENCE, &place)?;
        match reader.read(&mut chunk).during(&place)? {
            0 => break,
            n => answer.extend_from_slice(chunk.get(..n).unwrap_or_default()),
        }
    }
    task.finish(&place)?;
    let answer: Result<T, String> = serde_json::from_slice(&answer)
        .map_err(|e| Failure::Other(format!("{place}: garbled answer: {e}")))?;
    answer.map_err(|why| Failure::Other(format!("{place}: {why}")))
}

/// Names a pair of CPUs in a sub-check: `cpu0@node0-cpu2@node1`.
pub fn pair_name((a, b): (Cpu, Cpu)) -> String {
    format!("{}@{}-{}@{}", a.id, a.node, b.id, b.node)
}
