//! `spanvm bench fanout|stream|contend` without the rest of spanvm: builds in seconds.

use dsm::bench::contend::{self, ContendOptions};
use dsm::bench::fanout::{self, FanoutOptions};
use dsm::bench::group::self_launcher;
use dsm::bench::stream::{self, StreamOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let launcher = self_launcher(&["peer"])?;
    match args.as_slice() {
        ["peer", addr] => dsm::bench::peer_main(addr.parse()?)?,
        ["fanout"] => println!("{}", fanout::run(FanoutOptions::default(), &launcher, |_, _| ())?),
        ["stream"] => println!("{}", stream::run(StreamOptions::default(), &launcher, |_, _| ())?),
        ["contend"] => println!("{}", contend::run(ContendOptions::default(), &launcher, |_, _| ())?),
        _ => println!("bench fanout|stream|contend"),
    }
    Ok(())
}
