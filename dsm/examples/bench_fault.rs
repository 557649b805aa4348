//! Runs the fault benchmark without the command line around it: `cargo run --release --example bench_fault [--json]`.

use dsm::bench::{fault, group, peer_main};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [word, addr] = args.as_slice()
        && word == "peer"
    {
        return Ok(peer_main(addr.parse()?)?);
    }
    let launcher = group::self_launcher(&["peer"])?;
    let report = fault::run(fault::FaultOptions::default(), &launcher, |n, of| eprintln!("run {n} of {of}"))?;
    if args.iter().any(|a| a == "--json") {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}
