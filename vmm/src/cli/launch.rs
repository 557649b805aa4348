//! `spanvm launch`.

use super::output;
use super::terminal::{self, RawInput};
use crate::config::keys::{DeviceKey, DiskKeys, LaunchKeys, MemberKeys, MembersKey};
use crate::config::{ConfigError, VmSpec, resolve};
use crate::control::end::{EXIT_CODES, End};
use crate::control::launcher::{self, Launched, Manner, Terminal};
use clap::Args;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;
use tokio::sync::mpsc;

/// Flags. Each but the last few is also a key of the TOML file: `--some-thing` is `some_thing`, repeated
/// `--member` and `--disk` are `[[members]]` and `[[disks]]`.
#[derive(Args, Debug, Default)]
#[command(after_help = EXIT_CODES)]
pub struct LaunchArgs {
    /// TOML file with any of these keys; flags win over it.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the VM [default: made up].
    #[arg(long)]
    pub name: Option<String>,
    /// Kernel on this host: a bzImage (vmlinuz) or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk on this host.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0].
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// vCPUs in all [default: one for each member].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub cpus: Option<i64>,
    /// Memory in all, such as 512M or 2G [default: 512M].
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// So many members, all on this host [default: 2, or 1 with one vCPU].
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub members: Option<i64>,
    /// One member on each of these hosts, through their node daemons; the first one boots the guest.
    #[arg(long, value_name = "HOST[:PORT],..", value_delimiter = ',')]
    pub on: Option<Vec<String>>,
    /// One member with its share, such as host=H:PORT,cpus=2,memory=1G; any part may be left out. With budget=1200M it keeps no
    /// more than that of the guest's memory, wherever that has its home. Repeat it.
    #[arg(long, value_name = "SHARE", conflicts_with_all = ["members", "on"])]
    pub member: Vec<String>,
    /// A disk: a raw image or block device on its member's host. Repeat it.
    #[arg(long, value_name = "PATH[,readonly][,member=N]")]
    pub disk: Vec<String>,
    /// virtio random-number device: on, off, or on that member [default: on].
    #[arg(long, value_name = "on|off|MEMBER")]
    pub rng: Option<String>,
    /// virtio console (hvc0): on, off, or on that member [default: off].
    #[arg(long, value_name = "on|off|MEMBER")]
    pub console: Option<String>,
    /// Longest time that a page is held after it arrived, microseconds.
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    pub hold_us: Option<i64>,
    /// userfaultfds, each with its thread, of each member.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub shards: Option<i64>,
    /// Whether members look for what a quick peer says next, for up to 100 us at a time, instead of sleeping until it comes: pages
    /// come sooner, and processors that others could use are busy [default: on].
    #[arg(long, value_name = "on|off", value_parser = clap::builder::BoolishValueParser::new())]
    pub busy_poll: Option<bool>,
    /// When a connection between members breaks, try so many seconds to make it again before the VM is given up; 0 for not at
    /// all [default: 30].
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub reconnect: Option<i64>,
    /// When a member of a VM that has a checkpoint is lost: keep the VM paused until `spanvm recover`, end it, or restore
    /// the checkpoint on the hosts that answer [default: pause].
    #[arg(long, value_name = "pause|end|restore")]
    pub on_member_loss: Option<String>,
    /// Who decides where vCPUs live while the guest runs: nobody but `spanvm vcpu migrate`, the load of the hosts, or the page
    /// faults of the vCPUs [default: static].
    #[arg(long, value_name = "static|balance|follow")]
    pub policy: Option<String>,
    /// How it is to start.
    #[command(flatten)]
    pub start: StartArgs,
}

/// Flags of everything that starts a VM.
#[derive(Args, Debug, Default)]
pub struct StartArgs {
    /// File with the secret shared with the nodes; needed for all that are not on loopback.
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Longest wait for any one answer during the start, seconds [default: 60].
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub start_timeout: Option<i64>,
    /// Return as soon as the guest runs.
    #[arg(long)]
    pub detach: bool,
    /// Don't show the guest's serial console.
    #[arg(long)]
    pub no_console: bool,
    /// No progress; errors only.
    #[arg(long, short)]
    pub quiet: bool,
}

impl StartArgs {
    /// What the launcher is to do.
    pub fn manner(&self) -> Manner {
        Manner { detach: self.detach, console: !self.no_console }
    }
}

impl LaunchArgs {
    /// Flags over file, checked.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn spec(&self) -> Result<VmSpec, ConfigError> {
        let file = self.config.as_deref().map(LaunchKeys::from_file).transpose()?.unwrap_or_default();
        resolve::resolve(self.keys()?.over(file))
    }

    fn keys(&self) -> Result<LaunchKeys, ConfigError> {
        let each =
            self.member.iter().map(|text| MemberKeys::from_flag(text)).collect::<Result<Vec<_>, _>>()?;
        let disks = self.disk.iter().map(|text| DiskKeys::from_flag(text)).collect::<Result<Vec<_>, _>>()?;
        let device = |key, text: &Option<String>| {
            text.as_deref().map(|text| DeviceKey::from_flag(key, text)).transpose()
        };
        Ok(LaunchKeys {
            name: self.name.clone(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            cmdline: self.cmdline.clone(),
            cpus: self.cpus,
            memory: self.memory.clone(),
            members: if each.is_empty() {
                self.members.map(MembersKey::Count)
            } else {
                Some(MembersKey::Each(each))
            },
            on: self.on.clone(),
            disks: (!disks.is_empty()).then_some(disks),
            rng: device("rng", &self.rng)?,
            console: device("console", &self.console)?,
            hold_us: self.hold_us,
            shards: self.shards,
            busy_poll: self.busy_poll,
            reconnect: self.reconnect,
            secret_file: self.start.secret_file.clone(),
            start_timeout: self.start.start_timeout,
            on_member_loss: self.on_member_loss.clone(),
            policy: self.policy.clone(),
        })
    }
}

/// Starts a VM; returns the exit code.
pub async fn run(args: LaunchArgs) -> u8 {
    let spec = match args.spec() {
        Ok(spec) => spec,
        Err(e) => {
            output::error(&e.to_string());
            return End::BadInput(String::new()).exit_code();
        }
    };
    let manner = args.start.manner();
    let (mut session, wishes) = Session::new(&spec, manner, args.start.quiet);
    let launched = launcher::launch(spec, manner, session.terminal(), wishes).await;
    session.over(launched)
}

/// The user's view of a VM that is started here, from the first word to the exit code.
pub(super) struct Session {
    screen: Screen,
    is_local: bool,
}

impl Session {
    /// A session, and what the user wishes while it lasts.
    pub(super) fn new(
        spec: &VmSpec,
        manner: Manner,
        quiet: bool,
    ) -> (Session, mpsc::Receiver<launcher::Wish>) {
        let (wish_tx, wishes) = mpsc::channel(16);
        terminal::watch_signals(wish_tx.clone());
        let screen = Screen {
            name: spec.name.clone(),
            quiet,
            since: Instant::now(),
            ran: None,
            raw: None,
            input: (manner.console && !manner.detach).then_some(wish_tx),
            at_line_start: true,
        };
        (Session { screen, is_local: !spec.uses_nodes() }, wishes)
    }

    pub(super) fn terminal(&mut self) -> &mut dyn Terminal {
        &mut self.screen
    }

    /// Says how it went; returns the exit code.
    pub(super) fn over(mut self, launched: Launched) -> u8 {
        let screen = &mut self.screen;
        let name = screen.name.clone();
        screen.leave();
        match launched {
            Launched::Detached => {
                screen.say(&format!(
                    "runs; look at it with `spanvm info {name}`, end it with `spanvm stop {name}`"
                ));
                0
            }
            Launched::Ended(end) => {
                if end.is_regular() {
                    let after = screen.ran.map_or(String::new(), |at| {
                        format!(" after {}", output::duration(at.elapsed().as_secs_f64()))
                    });
                    screen.say(&format!("{end}{after}"));
                } else {
                    output::error(&format!("{name}: {end}"));
                    let kept = crate::control::rundir::kept_log(&crate::control::rundir::root().join(&name));
                    if self.is_local && kept.exists() {
                        screen.say(&format!("its log is {}", kept.display()));
                    }
                }
                end.exit_code()
            }
        }
    }
}

/// Progress on standard error, the guest's console on standard output.
struct Screen {
    name: String,
    quiet: bool,
    since: Instant,
    ran: Option<Instant>,
    raw: Option<RawInput>,
    input: Option<mpsc::Sender<launcher::Wish>>,
    at_line_start: bool,
}

impl Screen {
    fn say(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        let gap = if std::mem::replace(&mut self.at_line_start, true) { "" } else { "\r\n" };
        let after = self.since.elapsed().as_secs_f64();
        let _ = writeln!(io::stderr().lock(), "{gap}spanvm: [{after:6.1}s] {}: {text}", self.name);
    }

    /// Gives the terminal back.
    fn leave(&mut self) {
        self.raw = None;
    }
}

impl Terminal for Screen {
    fn progress(&mut self, text: &str) {
        self.say(text);
    }

    fn console(&mut self, bytes: &[u8]) {
        let mut out = io::stdout().lock();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
        if let Some(last) = bytes.last() {
            self.at_line_start = *last == b'\n';
        }
    }

    fn running(&mut self, pid: u32, host: &str) {
        self.ran = Some(Instant::now());
        self.say(&format!("the guest runs (coordinator: process {pid} on {host})"));
        if let Some(wishes) = self.input.take() {
            let raw = RawInput::take();
            if raw.is_on() {
                self.say("Ctrl-] ends the VM");
                terminal::read_input(wishes);
            }
            self.raw = Some(raw);
        }
    }
}
