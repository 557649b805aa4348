"""The initramfs images of the guest and of the virtual hosts, and the static programs inside them."""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from . import kernel as debian
from .common import ROOT, TARGET, Failure, Step, call, main, need_tool, packages, replace_file
from .cpio import Archive

IMAGES = TARGET / "images"
TRIPLE = "x86_64-unknown-linux-gnu"
GUEST_MODULES = ["virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng"]
HOST_MODULES = {
    "amd": ["kvm_amd", "kvm_intel", "virtio_pci", "virtio_net", "virtio_blk", "9p", "9pnet_virtio", "tun"],
    # A second each to load there.
    "intel": ["kvm_intel", "e1000"],
}
LINKS = TARGET / "lab" / "payload"
"""What the virtual hosts see as /opt/spanvm."""


def target_directory():
    """Where cargo builds."""
    return Path(os.environ.get("CARGO_TARGET_DIR") or TARGET)


def build_static(*names):
    """Builds programs of the workspace without shared libraries, and returns the stripped files' directory.

    An explicit target keeps the flag away from build scripts, which load libclang.
    """
    need_tool("cargo", "install Rust from https://rustup.rs")
    packages("gcc", "libc6-dev", "libclang-dev", "binutils")
    with Step(f"building {', '.join(names)} (static)"):
        env = dict(os.environ, RUSTFLAGS="-C target-feature=+crt-static")
        options = [option for name in names for option in ("-p", name)]
        call(["cargo", "build", "--release", "--locked", "--target", TRIPLE, *options], 1800, "cargo build", env=env)
    out = IMAGES / "bin"
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        built = target_directory() / TRIPLE / "release" / name
        partial = out / f".{name}.{os.getpid()}"
        call(["strip", "-o", partial, built], 120, quiet=True)
        os.replace(partial, out / name)
    return out


def bare(timeout=300):
    """Builds the bare-metal guest, and returns the path of its ELF."""
    script = ROOT / "guest-images" / "bare" / "build.sh"
    built = subprocess.run([str(script)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False, timeout=timeout)
    if built.returncode:
        raise Failure("build of the bare-metal guest: see above")
    return built.stdout.strip()


def busybox():
    """Debian's static busybox: its bytes and the names of its applets."""
    packages("busybox-static")
    path = Path(shutil.which("busybox") or "/bin/busybox")
    applets = subprocess.run([str(path), "--list"], stdout=subprocess.PIPE, check=True, timeout=30, text=True).stdout
    return path.read_bytes(), applets.split()


def base(kernel, init, modules):
    """What both images share: busybox, device nodes that exist before devtmpfs, modules in load order, init."""
    archive = Archive()
    for directory in ("/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/etc", "/mnt"):
        archive.directory(directory)
    # The kernel opens /dev/console for init before anything is mounted.
    archive.char_device("/dev/console", 5, 1)
    archive.char_device("/dev/null", 1, 3, 0o666)
    binary, applets = busybox()
    archive.file("/bin/busybox", binary)
    for applet in applets:
        if applet != "busybox":
            archive.link(f"/bin/{applet}", "busybox")
    order = []
    for path in kernel.load_order(modules):
        name = path.name.split(".ko")[0]
        archive.file(f"/lib/modules/{name}.ko", debian.module_bytes(path), 0o644)
        order.append(f"/lib/modules/{name}.ko\n")
    archive.file("/etc/modules", "".join(order).encode(), 0o644)
    archive.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)
    archive.file("/etc/group", b"root:x:0:\n", 0o644)
    archive.file("/init", init.read_bytes())
    return archive


def guest(kernel, programs=None):
    """Writes target/images/{vmlinuz,vmlinux,initramfs.cpio,guest.json}; returns the directory."""
    programs = programs or build_static("ssicheck")
    archive = base(kernel, ROOT / "guest-images" / "linux" / "init", GUEST_MODULES)
    for script in ("pagetables", "load"):
        archive.file(f"/bin/{script}", (ROOT / "guest-images" / "linux" / script).read_bytes())
    archive.file("/bin/ssicheck", (programs / "ssicheck").read_bytes())
    data = archive.bytes()
    replace_file(IMAGES / "initramfs.cpio", data)
    _place(kernel.vmlinuz, IMAGES / "vmlinuz")
    _place(kernel.vmlinux, IMAGES / "vmlinux")
    facts = {
        "kernel": kernel.release,
        "package": kernel.package,
        "vmlinuz_sha256": hashlib.sha256(kernel.vmlinuz.read_bytes()).hexdigest(),
        "initramfs_sha256": hashlib.sha256(data).hexdigest(),
    }
    replace_file(IMAGES / "guest.json", json.dumps(facts, indent=1).encode() + b"\n")
    return IMAGES


def host(kernel, programs, cpu):
    """Writes the virtual host's initramfs and returns its path."""
    archive = base(kernel, ROOT / "guest-images" / "labhost" / "init", HOST_MODULES[cpu])
    archive.file("/bin/labagent", (programs / "labagent").read_bytes())
    archive.directory("/repo")
    archive.directory("/opt")
    path = IMAGES / f"labhost-{cpu}.cpio"
    replace_file(path, archive.bytes())
    return path


PAYLOAD = {"spanvm": "bin/spanvm", "ssicheck": "bin/ssicheck", "kernel": "vmlinux", "vmlinuz": "vmlinuz",
           "initramfs": "initramfs.cpio"}
"""Names below /opt/spanvm in a virtual host, and where they come from below target/images."""


def payload_directory():
    """Refreshes the directory that virtual hosts see as /opt/spanvm."""
    for name, source in PAYLOAD.items():
        if (IMAGES / source).is_file():
            _place(IMAGES / source, LINKS / name)
    return LINKS


def payload_archive():
    """The same files as an archive, for a virtual host that cannot mount a directory of the machine.

    The kernel is packed again, by gzip: the archive has to be loaded by a BIOS, and the host's init unpacks it.
    """
    archive = Archive()
    for name, source in PAYLOAD.items():
        if name in ("spanvm", "ssicheck", "initramfs") and (IMAGES / source).is_file():
            archive.file(f"/opt/spanvm/{name}", (IMAGES / source).read_bytes())
    vmlinux, packed = IMAGES / "vmlinux", IMAGES / "vmlinux.gz"
    if vmlinux.is_file():
        if not packed.is_file() or packed.stat().st_mtime < vmlinux.stat().st_mtime:
            replace_file(packed, gzip.compress(vmlinux.read_bytes(), 9, mtime=0))
        archive.file("/opt/spanvm/kernel.gz", packed.read_bytes())
    return archive.bytes()


def _place(source, to):
    """Puts a file at a second path: a hard link where possible, else a copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
        shutil.copymode(source, partial)
    os.replace(partial, to)
    # rename(2) of one link onto another of the same file leaves both.
    partial.unlink(missing_ok=True)


def _main():
    parser = argparse.ArgumentParser(prog="guest-images/linux/build", description="Builds the Linux guest: Debian's "
                                     "stock kernel and an initramfs with busybox, virtio modules and ssicheck.")
    parser.add_argument("--print", action="store_true", help="print the images' facts as JSON")
    arguments = parser.parse_args()
    kernel = debian.get()
    with Step("packing the guest's initramfs"):
        directory = guest(kernel)
    if not (directory / "initramfs.cpio").is_file():
        raise Failure("no initramfs was written")
    if arguments.print:
        print((directory / "guest.json").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main(_main)
