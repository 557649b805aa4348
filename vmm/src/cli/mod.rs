//! The command line. [`launch`] starts a VM, [`vms`] looks at and ends those that run, [`ops`] changes them, [`place`] lets a
//! policy do so, [`events`] says what happened, [`node`] is a host's
//! daemon, [`doctor`] says what a host can do, [`bench`] measures, [`sim`] simulates. [`output`] prints,
//! [`terminal`] is the user's terminal.

pub mod bench;
pub mod checkpoint;
pub mod doctor;
pub mod events;
pub mod launch;
pub mod member;
pub mod node;
pub mod ops;
pub mod output;
pub mod place;
pub mod sim;
pub mod terminal;
pub mod vms;

use crate::control::end::{EXIT_CODES, End};
use clap::{Parser, Subcommand};

/// One virtual machine over several hosts.
#[derive(Debug, Parser)]
#[command(name = "spanvm", version, about, propagate_version = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM and stay with it until it ends.
    Launch(Box<launch::LaunchArgs>),
    /// List the VMs of this host, or of other hosts.
    Ps(vms::PsArgs),
    /// Show one VM: members, vCPUs, memory, page faults.
    Info(vms::InfoArgs),
    /// Show what happened to a VM: moves, drains, additions, pauses, checkpoints, decisions of its placement policy.
    Events(events::EventsArgs),
    /// Connect to a VM's serial console; Ctrl-] leaves it.
    Console(vms::ConsoleArgs),
    /// Let a VM stand still: vCPUs, devices and, where the host can, its clock.
    Pause(ops::PauseArgs),
    /// Let a paused VM go on.
    Resume(ops::PauseArgs),
    /// Move vCPUs between members.
    Vcpu(ops::VcpuArgs),
    /// Add members to a running VM, and take them out.
    #[command(name = "member")]
    Members(member::MemberArgs),
    /// Bring a whole VM to other hosts while the guest runs.
    Migrate(member::MigrateArgs),
    /// Save a VM to disk while it runs, or to end it.
    Checkpoint(checkpoint::CheckpointArgs),
    /// Bring a VM back from its newest checkpoint, on whatever members.
    Restore(checkpoint::RestoreArgs),
    /// Bring a VM that lost a member back from its newest checkpoint, on the hosts that are left.
    Recover(checkpoint::RecoverArgs),
    /// End a VM on all of its hosts.
    Stop(vms::StopArgs),
    /// Serve this host to launchers on other hosts.
    Node(node::NodeArgs),
    /// Say what this host can do, and what to change.
    Doctor(doctor::DoctorArgs),
    /// Measure, with the floor of the same run beside it.
    Bench(bench::BenchArgs),
    /// Run the page engine in simulated clusters, from seeds. Needs no KVM.
    Sim(sim::SimArgs),
    /// A child process of the control plane.
    #[command(name = "member-process", hide = true)]
    Member,
}

/// Runs one command to its end; returns the exit code.
pub fn run(cli: Cli) -> u8 {
    init_log();
    let command = match cli.command {
        // Benchmarks time threads of their own: no runtime beside them.
        Command::Bench(args) => return report(bench::run(&args)),
        Command::Sim(args) => return report(sim::run(&args)),
        command => command,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return report(Err(End::Failed(format!("can't start threads: {e}")))),
    };
    runtime.block_on(async {
        match command {
            Command::Launch(args) => launch::run(*args).await,
            Command::Ps(args) => report(vms::ps(args).await),
            Command::Info(args) => report(vms::info(args).await),
            Command::Events(args) => report(events::events(args).await),
            Command::Console(args) => report(vms::console(args).await),
            Command::Checkpoint(args) => report(checkpoint::checkpoint(args).await),
            Command::Restore(args) => report(checkpoint::restore(args).await),
            Command::Recover(args) => report(checkpoint::recover(args).await),
            Command::Stop(args) => report(vms::stop(args).await),
            Command::Vcpu(args) => report(ops::vcpu(args).await),
            Command::Members(args) => report(member::member(args).await),
            Command::Migrate(args) => report(member::migrate(args).await),
            Command::Pause(args) => report(ops::pause(args).await),
            Command::Resume(args) => report(ops::resume(args).await),
            Command::Node(args) => report(node::run(args).await),
            Command::Doctor(args) => report(doctor::run(args).await),
            Command::Bench(args) => report(bench::run(&args)),
            Command::Sim(args) => report(sim::run(&args)),
            Command::Member => crate::control::child::main().await,
        }
    })
}

/// Prints an error once, and turns it into an exit code.
fn report(result: Result<u8, End>) -> u8 {
    match result {
        Ok(code) => code,
        Err(end) => {
            output::error(&end.to_string());
            end.exit_code()
        }
    }
}

/// Log lines go to standard error; `SPANVM_LOG=debug` (or a filter such as `vmm::control=debug`) shows more.
fn init_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("SPANVM_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }
}
