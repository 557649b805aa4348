//! Bad input and sudden deaths, over the real binary. Nothing here needs /dev/kvm; what would behave
//! differently with it is written to pass both ways.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A runtime directory of its own, files to name, and processes that die with it.
struct Lab {
    dir: tempfile::TempDir,
    nodes: Vec<Child>,
}

impl Lab {
    fn new() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("kernel"), kernel(0)).unwrap();
        fs::write(at("truncated"), kernel(100_000)).unwrap();
        fs::write(at("text"), "this is no kernel\n".repeat(100)).unwrap();
        fs::create_dir(at("folder")).unwrap();
        fs::write(at("bad.toml"), "kernle = 'x'\n").unwrap();
        for (name, secret) in
            [("secret", "one secret of enough bytes"), ("other", "another one of enough bytes")]
        {
            fs::write(at(name), secret).unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        fs::write(at("open"), "a secret that all can read").unwrap();
        fs::set_permissions(at("open"), fs::Permissions::from_mode(0o644)).unwrap();
        Lab { dir, nodes: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn runtime(&self) -> PathBuf {
        self.path("run")
    }

    /// The binary with arguments in which `@/` stands for the folder.
    fn command(&self, args: &[&str]) -> Command {
        let folder = format!("{}/", self.dir.path().display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_spanvm"));
        command
            .args(args.iter().map(|arg| arg.replace("@/", &folder)))
            .env("SPANVM_RUNTIME_DIR", self.runtime())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        finish(self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(), 60)
    }

    /// A node daemon on a free port of loopback.
    fn node(&mut self, args: &[&str]) -> SocketAddr {
        let mut command = self.command(&["node", "--listen", "127.0.0.1:0"]);
        let mut child = command.args(self.command(args).get_args()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let mut text = String::new();
        while !text.contains('\n') {
            let mut byte = [0];
            assert_eq!(stderr.read(&mut byte).unwrap(), 1, "the node ended: {text}");
            text.push(char::from(byte[0]));
        }
        // Keep the pipe empty, so that the node never waits for us.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        self.nodes.push(child);
        text.trim().rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Nobody is left who was started with this runtime directory.
    fn nothing_runs(&self) {
        let since = Instant::now();
        loop {
            let left = processes_with(&self.runtime());
            if left.is_empty() {
                return;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "still there: {left:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.kill();
            let _ = node.wait();
        }
    }
}

/// A bzImage's header whose syssize is so many paragraphs.
fn kernel(paragraphs: u32) -> Vec<u8> {
    let mut image = vec![0u8; 8192];
    image[0x1F1] = 4;
    image[0x1F4..0x1F8].copy_from_slice(&paragraphs.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image
}

/// Waits with a deadline; kills what does not end.
fn finish(mut child: Child, seconds: u64) -> Output {
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if since.elapsed() > Duration::from_secs(seconds) {
            child.kill().unwrap();
            panic!("no end after {seconds} s: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

/// Processes of `spanvm member` whose environment names this runtime directory.
fn processes_with(runtime: &Path) -> Vec<(u32, String)> {
    let needle = format!("SPANVM_RUNTIME_DIR={}", runtime.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        if environ.split(|b| *b == 0).any(|var| var == needle.as_bytes()) && cmdline.contains(" member") {
            found.push((pid, cmdline));
        }
    }
    found
}

fn check(output: &Output, code: i32, named: &[&str], what: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
    let errors = stderr.matches("error:").count();
    assert_eq!(errors, 1, "{what}: {errors} errors in {stderr}");
    for word in named {
        assert!(stderr.contains(word), "{what}: {stderr:?} does not name {word:?}");
    }
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
}

#[test]
fn bad_input_is_refused() {
    let lab = Lab::new();
    let k = "--kernel=@/kernel";
    let table: &[(&[&str], &[&str])] = &[
        (&["launch"], &["--kernel is missing"]),
        (&["launch", "--kernel=@/none"], &["--kernel", "none", "no such file"]),
        (&["launch", "--kernel=@/folder"], &["--kernel", "is a directory"]),
        (&["launch", "--kernel=@/text"], &["--kernel", "neither a bzImage"]),
        (&["launch", "--kernel=@/truncated"], &["--kernel", "truncated"]),
        (&["launch", k, "--initrd=@/none"], &["--initrd", "no such file"]),
        (&["launch", k, "--initrd=@/folder"], &["--initrd", "is a directory"]),
        (&["launch", k, "--cpus=0"], &["--cpus 0"]),
        (&["launch", k, "--cpus=1", "--members=2"], &["--cpus 1", "2 members"]),
        (&["launch", k, "--cpus=x"], &["--cpus"]),
        (&["launch", k, "--memory=0M"], &["--memory 0M"]),
        (&["launch", k, "--memory=512"], &["--memory 512", "unit"]),
        (&["launch", k, "--members=2", "--on=a,b,c"], &["--members 2", "--on a,b,c"]),
        (&["launch", k, "--on=a,a"], &["--on a", "given twice"]),
        (&["launch", k, "--member=host=a", "--on=a"], &["--member", "--on"]),
        (&["launch", k, "--member=cpu=1"], &["--member", "\"cpu\""]),
        (&["launch", k, "--disk=@/none"], &["--disk", "no such file"]),
        (&["launch", k, "--disk=@/folder"], &["--disk", "is a directory"]),
        (&["launch", k, "--disk=@/text,member=2"], &["--disk", "member=2"]),
        (&["launch", k, "--rng=9"], &["--rng", "9"]),
        (&["launch", k, "--secret-file=@/open"], &["--secret-file", "open to other users"]),
        (&["launch", k, "--name=../x"], &["--name"]),
        (&["launch", "--config=@/none"], &["--config", "no such file"]),
        (&["launch", "--config=@/bad.toml"], &["--config", "kernle"]),
        (&["launch", k, "--unknown"], &["--unknown"]),
        (&["info", "none"], &["\"none\"", "no VM"]),
        (&["info", "../x"], &["no VM"]),
        (&["stop", "none"], &["no VM"]),
        (&["console", "none"], &["no VM"]),
        (&["ps", "--on=:x"], &["--on"]),
        (&["node", "--listen=nowhere"], &["--listen nowhere"]),
        (&["node", "--listen=0.0.0.0:0"], &["--secret-file"]),
        (&["node", "--listen=127.0.0.1:0", "--secret-file=@/open"], &["--secret-file", "chmod 600"]),
        (&["node", "--listen=127.0.0.1:0", "--secret-file=@/none"], &["--secret-file"]),
    ];
    for (args, named) in table {
        check(&lab.run(args), 2, named, &args.join(" "));
    }
    lab.nothing_runs();
    assert!(!lab.runtime().exists() || fs::read_dir(lab.runtime()).unwrap().next().is_none());
}

#[test]
fn hosts_that_do_not_answer() {
    let mut lab = Lab::new();
    let good = lab.node(&["--secret-file=@/secret"]).to_string();
    let open = lab.node(&[]).to_string();
    // Takes connections and says nothing; and a port on which nobody listens.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = mute.local_addr().unwrap().to_string();
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let secret = "--secret-file=@/secret";
    let table: &[(&str, &[&str], &[&str])] = &[
        (&closed, &[], &["refused", "spanvm node"]),
        (&mute, &[], &["said nothing", "spanvm node"]),
        (&good, &["--secret-file=@/other"], &["same secret"]),
        (&good, &[], &["asks for a secret"]),
        (&open, &[secret], &["without --secret-file"]),
        ("203.0.113.1:1", &[], &["not a loopback address", "--secret-file"]),
        ("no.such.host.invalid", &[], &["can't be resolved"]),
    ];
    for (host, flags, named) in table {
        let on = format!("--on={host}");
        let mut args = vec!["launch", "--kernel=@/kernel", on.as_str()];
        args.extend(*flags);
        check(&lab.run(&args), 4, &[&[*host], *named].concat(), &args.join(" "));
    }
    // The second host is called by the coordinator, which says the same.
    let on = format!("--on={good},{closed}");
    check(&lab.run(&["launch", "--kernel=@/kernel", &on, secret]), 4, &[&closed, "refused"], &on);
    check(&lab.run(&["ps", "--on", &good]), 4, &["asks for a secret"], "ps without secret");
    check(&lab.run(&["info", "x", "--on", &good, secret]), 3, &["no VM named"], "info elsewhere");
    let ps = lab.run(&["ps", "--json", "--on", &good, secret]);
    assert_eq!((ps.status.code(), ps.stdout.as_slice()), (Some(0), &b"[]\n"[..]));
    lab.nothing_runs();
}

#[test]
fn what_a_killed_vm_left_is_cleaned() {
    let lab = Lab::new();
    let folder = lab.runtime().join("dead");
    fs::create_dir_all(&folder).unwrap();
    for name in ["lock", "api.sock", "log"] {
        fs::write(folder.join(name), "").unwrap();
    }
    let ps = lab.run(&["ps", "--json"]);
    assert_eq!((ps.status.code(), ps.stdout.as_slice()), (Some(0), &b"[]\n"[..]));
    assert!(!folder.exists());
}

#[test]
fn a_member_needs_its_parent() {
    let lab = Lab::new();
    let output = lab.run(&["member"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn doctor_and_help() {
    let lab = Lab::new();
    let doctor = lab.run(&["doctor", "--json"]);
    assert!(matches!(doctor.status.code(), Some(0 | 3)));
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("\"usable\""));
    let help = lab.run(&["launch", "--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes"));
}
