//! `spanvm events`.

use super::output;
use super::vms::PlaceArgs;
use crate::control::client::VmClient;
use crate::control::end::End;
use crate::control::events::Event;
use clap::Args;
use std::io::Write;

/// Longest wait of one request for the next event, seconds.
const WAIT: u32 = 10;

/// Flags of `events`.
#[derive(Args, Debug)]
pub struct EventsArgs {
    /// Name of the VM.
    pub vm: String,
    /// Stay, and show what happens, until the VM is over.
    #[arg(long)]
    pub follow: bool,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print JSON; with --follow one event on each line.
    #[arg(long)]
    pub json: bool,
}

/// Shows what happened to a VM.
///
/// # Errors
/// No such VM, or it does not answer.
pub async fn events(args: EventsArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    let mut all: Vec<Event> = client.get("/vm/events").await?;
    if !args.follow {
        if args.json {
            output::json(&all)?;
        } else {
            all.iter().for_each(|event| output::line(&line(event)));
        }
        return Ok(0);
    }
    let mut last = 0;
    loop {
        for event in &all {
            last = last.max(event.seq);
            let text = if args.json {
                serde_json::to_string(event).map_err(|e| End::Failed(format!("JSON: {e}")))?
            } else {
                line(event)
            };
            let mut out = std::io::stdout().lock();
            // Nobody reads any more.
            if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
                return Ok(0);
            }
        }
        all = match client.get(&format!("/vm/events?after={last}&wait_s={WAIT}")).await {
            Ok(all) => all,
            // It was there a moment ago, so it is over.
            Err(_) => return Ok(0),
        };
    }
}

/// `HH:MM:SS.mmm KIND TEXT`, UTC.
fn line(event: &Event) -> String {
    let (s, ms) = (event.at_ms / 1000, event.at_ms % 1000);
    let (hours, minutes, seconds) = (s / 3600 % 24, s / 60 % 60, s % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}.{ms:03}  {:<10}  {}", event.kind, event.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let event = Event {
            seq: 1,
            at_ms: 86_400_000 * 3 + 3_723_004,
            kind: "move".into(),
            text: "vCPU 1".into(),
            data: serde_json::Value::Null,
        };
        assert_eq!(line(&event), "01:02:03.004  move        vCPU 1");
    }
}
