//! What the tests over the real binary share.
#![allow(dead_code, missing_debug_implementations, missing_docs, reason = "each test file uses a part")]

pub mod loops;

use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Path of the bare-metal guest, or `None` where it can't run.
pub fn guest() -> Option<&'static str> {
    static GUEST: OnceLock<Option<String>> = OnceLock::new();
    GUEST
        .get_or_init(|| {
            if let Err(e) = vmm::member::HostFacts::probe() {
                println!("skipped: {e}");
                return None;
            }
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/bare/build.sh");
            let output = Command::new(&script).output().expect("build.sh runs");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(String::from_utf8(output.stdout).unwrap().trim().to_string())
        })
        .as_deref()
}

/// A runtime directory of its own, files to name, and processes that die with it.
pub struct Lab {
    dir: tempfile::TempDir,
    pub nodes: Vec<Child>,
}

impl Lab {
    pub fn new() -> Lab {
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn runtime(&self) -> PathBuf {
        self.path("run")
    }

    /// The binary with arguments in which `@/` stands for the folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let folder = format!("{}/", self.dir.path().display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_spanvm"));
        command
            .args(args.iter().map(|arg| arg.replace("@/", &folder)))
            .env("SPANVM_RUNTIME_DIR", self.runtime())
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        finish(self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap(), 60)
    }

    /// A node daemon on a free port of loopback.
    pub fn node(&mut self, args: &[&str]) -> SocketAddr {
        let listen: &[&str] = if args.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let mut command = self.command(&[&["node"], listen].concat());
        let mut child = command
            .args(self.command(args).get_args().map(ToOwned::to_owned).collect::<Vec<_>>())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
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
    pub fn nothing_runs(&self) {
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
        if std::thread::panicking() {
            // What a failed test leaves would be in the way of those that come after it.
            loops::kill_all(self);
        }
    }
}

/// A bzImage's header whose syssize is so many paragraphs.
pub fn kernel(paragraphs: u32) -> Vec<u8> {
    let mut image = vec![0u8; 8192];
    image[0x1F1] = 4;
    image[0x1F4..0x1F8].copy_from_slice(&paragraphs.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image
}

/// Waits with a deadline; kills what does not end.
pub fn finish(mut child: Child, seconds: u64) -> Output {
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

/// Processes of `spanvm member-process` whose environment names this runtime directory.
pub fn processes_with(runtime: &Path) -> Vec<(u32, String)> {
    let needle = format!("SPANVM_RUNTIME_DIR={}", runtime.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
        if environ.split(|b| *b == 0).any(|var| var == needle.as_bytes())
            && cmdline.contains(" member-process")
        {
            found.push((pid, cmdline));
        }
    }
    found
}

pub fn check(output: &Output, code: i32, named: &[&str], what: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{what}: {stderr}");
    let errors = stderr.matches("error:").count();
    assert_eq!(errors, 1, "{what}: {errors} errors in {stderr}");
    for word in named {
        assert!(stderr.contains(word), "{what}: {stderr:?} does not name {word:?}");
    }
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
}
