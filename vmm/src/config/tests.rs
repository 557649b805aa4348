//! One table over all that can be wrong, and one over what is right.

use super::keys::{DeviceKey, DiskKeys, LaunchKeys, MemberKeys};
use super::resolve::resolve;
use super::spec::VmSpec;
use super::{ConfigError, files};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder with a kernel that passes the checks, a disk, and things that are not.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Files {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("kernel"), bzimage(8)).unwrap();
        fs::write(at("truncated"), &bzimage(8)[..2048]).unwrap();
        fs::write(at("text"), b"not a kernel, only text that is long enough".repeat(100)).unwrap();
        fs::write(at("empty"), b"").unwrap();
        fs::write(at("disk"), vec![0; 4096]).unwrap();
        fs::write(at("odd"), vec![0; 1000]).unwrap();
        fs::write(at("qcow2"), [&b"QFI\xfb"[..], &[0; 508]].concat()).unwrap();
        fs::write(at("secret"), b"0123456789abcdef").unwrap();
        fs::create_dir(at("folder")).unwrap();
        Files { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Parses TOML in which `@/` stands for the folder.
    fn resolve(&self, toml: &str) -> Result<VmSpec, ConfigError> {
        let text = toml.replace("@/", &format!("{}/", self.dir.path().display()));
        let file = self.path("vm.toml");
        fs::write(&file, text).unwrap();
        resolve(LaunchKeys::from_file(&file)?)
    }
}

/// The start of a bzImage whose header says that `paragraphs` of 16 bytes follow one setup sector.
fn bzimage(paragraphs: u32) -> Vec<u8> {
    let mut image = vec![0u8; 1024 + 8 * 16 + 2048];
    image[0x1F1] = 4;
    image[0x1F4..0x1F8].copy_from_slice(&paragraphs.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image
}

#[test]
fn bad_input_is_refused_and_named() {
    let files = Files::new();
    let k = "kernel = '@/kernel'\n";
    // TOML after the kernel's line (or a whole file where it says kernel), then what the message must name.
    let table: &[(&str, &[&str])] = &[
        ("", &[]),
        ("name = ''", &["--name", "empty"]),
        ("name = '../x'", &["--name", "../x"]),
        ("name = 'a b'", &["--name", "' '"]),
        ("name = 'a234567890123456789012345678901234567890123456789'", &["48"]),
        ("initrd = '@/none'", &["--initrd", "none", "no such file"]),
        ("initrd = '@/folder'", &["--initrd", "is a directory"]),
        ("initrd = '@/empty'", &["--initrd", "is empty"]),
        ("cmdline = \"a\\nb\"", &["--cmdline"]),
        ("cpus = 0", &["--cpus 0", "no CPU"]),
        ("cpus = -1", &["--cpus -1", "out of range"]),
        ("cpus = 255", &["--cpus 255", "254"]),
        ("cpus = 'two'", &["vm.toml", "cpus", "expected"]),
        ("cpus = 1\nmembers = 2", &["--cpus 1", "2 members"]),
        ("memory = '0M'", &["--memory 0M", "too little"]),
        ("memory = '8M'", &["--memory 8M", "16M"]),
        ("memory = '100T'", &["--memory 100T", "16T"]),
        ("memory = '512'", &["--memory 512", "unit"]),
        ("memory = '1.5G'", &["--memory 1.5G"]),
        ("memory = 'much'", &["--memory much", "not a size"]),
        ("memory = '17M'", &["--memory 17M", "multiple of 2M"]),
        ("members = 0", &["--members 0"]),
        ("members = 65", &["--members 65", "64"]),
        ("members = -3", &["--members -3"]),
        ("members = []", &["--members"]),
        ("members = 'two'", &["vm.toml", "number of members"]),
        ("on = []", &["--on"]),
        ("on = ['a', 'b', 'a']", &["--on a", "given twice"]),
        ("on = ['a', 'a:7410']", &["--on a:7410", "given twice"]),
        ("on = ['a:0']", &["a:0", "port"]),
        ("on = ['a', '']", &["--on", "HOST"]),
        ("on = ['a', 'b']\nmembers = 3", &["--members 3", "--on a,b", "twice"]),
        ("on = ['a', 'b']\n[[members]]\nhost = 'a'", &["--on a,b", "[[members]]", "twice"]),
        ("[[members]]\nhost = 'a'\n[[members]]", &["every member a host, or none"]),
        ("[[members]]\nhost = 'a'\n[[members]]\nhost = 'a'", &["given twice"]),
        ("[[members]]\ncpus = 0", &["--member", "no CPU"]),
        ("[[members]]\nmemory = '1M'", &["--member", "1M", "too little"]),
        ("[[members]]\nmemory = '3M'", &["--member", "3M", "multiple"]),
        ("cpus = 4\n[[members]]\ncpus = 1\n[[members]]\ncpus = 2", &["--cpus 4", "sum", "3"]),
        ("cpus = 2\n[[members]]\ncpus = 2\n[[members]]", &["--cpus 2", "leaves 0"]),
        (
            "memory = '64M'\n[[members]]\nmemory = '32M'\n[[members]]\nmemory = '16M'",
            &["--memory 64M", "48M"],
        ),
        ("memory = '64M'\n[[members]]\nmemory = '64M'\n[[members]]", &["--memory 64M", "leaves"]),
        ("[[members]]\nhots = 'a'", &["vm.toml", "hots", "host"]),
        ("kernle = 'x'", &["vm.toml", "kernle", "kernel"]),
        ("[[disks]]\npath = '@/none'", &["--disk", "none", "no such file"]),
        ("[[disks]]\npath = '@/folder'", &["--disk", "is a directory"]),
        ("[[disks]]\npath = '@/odd'", &["--disk", "1000 bytes", "512"]),
        ("[[disks]]\npath = '@/empty'", &["--disk", "0 bytes"]),
        ("[[disks]]\npath = '@/qcow2'", &["--disk", "qcow2", "qemu-img"]),
        ("[[disks]]\npath = '/dev/null'", &["--disk", "/dev/null", "neither"]),
        ("[[disks]]\npath = '@/disk'\nmember = 2", &["--disk", "member=2", "0 to 1"]),
        ("[[disks]]\npath = '@/disk'\nmember = -1", &["--disk", "member=-1"]),
        ("[[disks]]\npath = '@/disk'\n[[disks]]\npath = '@/disk'", &["--disk", "given twice"]),
        ("[[disks]]\nreadonly = true", &["vm.toml", "path"]),
        ("[[disks]]\npath = '@/disk'\nread_only = true", &["vm.toml", "read_only"]),
        ("on = ['a']\n[[disks]]\npath = 'disk'", &["--disk", "absolute"]),
        ("rng = 2", &["--rng", "member=2"]),
        ("rng = 'x'", &["vm.toml", "rng", "member's number"]),
        ("console = 7", &["--console", "member=7"]),
        ("hold_us = -1", &["--hold-us", "-1"]),
        ("shards = 0", &["--shards", "0"]),
        ("busy_poll = 'x'", &["vm.toml", "busy_poll", "boolean"]),
        ("reconnect = -1", &["--reconnect", "-1"]),
        ("reconnect = 0", &[]),
        ("[[members]]\nbudget = '64M'\n[[members]]", &["--member", "budget=64M", "256M", "272M"]),
        ("[[members]]\nbudget = 'x'", &["--member", "not a size"]),
        ("[[members]]\nbudget = '272M'\n[[members]]", &[]),
        ("policy = 'best'", &["--policy best", "balance"]),
        ("policy = 'follow'\nmembers = 1", &["--policy follow", "one member"]),
        ("policy = 'follow'\nmembers = 2", &[]),
        ("start_timeout = 0", &["--start-timeout", "0"]),
        ("secret_file = '@/none'", &["--secret-file", "none"]),
        ("secret_file = '@/secret'", &["--secret-file", "open to other users", "chmod 600"]),
        ("memory = ", &["vm.toml"]),
    ];
    for (toml, named) in table {
        let result = files.resolve(&format!("{k}{toml}"));
        if named.is_empty() {
            result.unwrap();
            continue;
        }
        let message = result.expect_err(toml).to_string();
        for word in *named {
            assert!(message.contains(word), "{toml:?} gave {message:?}, which does not name {word:?}");
        }
    }
}

#[test]
fn bad_kernels_are_refused_and_named() {
    let files = Files::new();
    for (toml, named) in [
        ("cpus = 1", "--kernel is missing"),
        ("kernel = '@/none'", "no such file"),
        ("kernel = '@/folder'", "is a directory"),
        ("kernel = '@/empty'", "is empty"),
        ("kernel = '/dev/null'", "not a regular file"),
    ] {
        let message = files.resolve(toml).unwrap_err().to_string();
        assert!(message.contains("--kernel") && message.contains(named), "{toml:?} gave {message:?}");
    }
    let check = |name: &str| {
        let path = files.path(name);
        files::check_kernel(&path, &files::read_image("kernel", &path)?)
    };
    check("kernel").unwrap();
    for (name, named) in [("truncated", "truncated"), ("text", "neither a bzImage")] {
        let message = check(name).unwrap_err().to_string();
        assert!(message.contains(named) && message.contains(name), "{message}");
    }
    let elf = |bytes: &[u8]| files::check_kernel(Path::new("elf"), bytes).unwrap_err().to_string();
    assert!(elf(b"\x7fELF").contains("complete"));
    assert!(elf(&[&b"\x7fELF\x01\x01"[..], &[0; 100]].concat()).contains("x86-64"));
    assert!(elf(&[&b"\x7fELF\x02\x01"[..], &[0xFF; 100]].concat()).contains("x86-64"));
}

#[test]
fn config_file_that_is_none() {
    let files = Files::new();
    for (name, named) in [("none", "no such file"), ("folder", "is a directory"), ("empty", "is empty")] {
        let message = LaunchKeys::from_file(&files.path(name)).unwrap_err().to_string();
        assert!(message.contains("--config") && message.contains(named), "{message}");
    }
}

#[test]
fn defaults_and_shares() {
    let files = Files::new();
    let shares = |toml: &str| {
        let spec = files.resolve(&format!("kernel = 'kernel'\n{toml}")).unwrap();
        assert_eq!(spec.cpus, spec.members.iter().map(|m| m.cpus).sum::<u32>());
        assert_eq!(spec.memory, spec.members.iter().map(|m| m.memory).sum::<u64>());
        spec.members.iter().map(|m| (m.cpus, m.memory >> 20)).collect::<Vec<_>>()
    };
    assert_eq!(shares(""), [(1, 256), (1, 256)]);
    assert_eq!(shares("cpus = 1"), [(1, 512)]);
    assert_eq!(shares("cpus = 5\nmemory = '1G'"), [(3, 512), (2, 512)]);
    assert_eq!(shares("members = 3"), [(1, 172), (1, 170), (1, 170)]);
    assert_eq!(shares("cpus = 4\nmemory = '64M'\n[[members]]\ncpus = 3\n[[members]]"), [(3, 32), (1, 32)]);
    assert_eq!(
        shares("[[members]]\ncpus = 2\nmemory = '32M'\n[[members]]\nmemory = '96M'"),
        [(2, 32), (1, 96)]
    );
    assert_eq!(shares("on = ['a', 'b:1', 'c']").len(), 3);
}

#[test]
fn flags_win_over_the_file() {
    let files = Files::new();
    fs::write(
        files.path("vm.toml"),
        "kernel = 'kernel'\nname = 'x'\ncpus = 3\non = ['a', 'b']\nrng = false\nbusy_poll = false",
    )
    .unwrap();
    let file = LaunchKeys::from_file(&files.path("vm.toml")).unwrap();
    let flags = LaunchKeys {
        cpus: Some(4),
        on: Some(vec!["c".into()]),
        rng: Some(DeviceKey::On(true)),
        ..LaunchKeys::default()
    };
    let spec = resolve(flags.over(file)).unwrap();
    assert_eq!((spec.name.as_str(), spec.cpus, spec.rng), ("x", 4, Some(0)));
    assert_eq!(spec.pages.busy_poll, Some(false));
    assert_eq!(spec.members[0].host.as_ref().unwrap().to_string(), "c:7410");
    assert_eq!(spec.members.len(), 1);
    assert_eq!(spec.kernel, files.path("kernel"));
}

#[test]
fn member_and_disk_flags() {
    let member = MemberKeys::from_flag("host=a:1,cpus=2,memory=1G").unwrap();
    assert_eq!(
        (member.host.as_deref(), member.cpus, member.memory.as_deref()),
        (Some("a:1"), Some(2), Some("1G"))
    );
    for text in ["", "host", "host=", "cpus=x", "cpu=1", "cpus=1,cpus=2"] {
        let message = MemberKeys::from_flag(text).unwrap_err().to_string();
        assert!(message.contains("--member"), "{message}");
    }
    let disk = DiskKeys::from_flag("/a.img,readonly,member=1").unwrap();
    assert_eq!(disk, DiskKeys { path: "/a.img".into(), readonly: true, member: 1 });
    for text in ["", ",readonly", "a,readwrite", "a,member=x", "a,member"] {
        let message = DiskKeys::from_flag(text).unwrap_err().to_string();
        assert!(message.contains("--disk"), "{message}");
    }
    assert_eq!(DeviceKey::from_flag("rng", "1"), Ok(DeviceKey::Member(1)));
    assert!(DeviceKey::from_flag("rng", "maybe").is_err());
}
