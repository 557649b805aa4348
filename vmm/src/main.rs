//! The spanvm command.

use clap::Parser;

fn main() {
    let code = vmm::cli::run(vmm::cli::Cli::parse());
    // Threads that block in a read, or in a guest that could not be stopped, must not hold up the end.
    std::process::exit(code.into());
}
