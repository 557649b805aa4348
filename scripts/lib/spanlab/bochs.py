"""Virtual hosts in Bochs: VT-x with EPT and no accessed/dirty bits, so that a guest's page walks do not count as writes.

Bochs boots from media only, and its network is UDP on loopback. All of a lab's processes live in a network namespace of their
own; the `gateway` there is the switch, and a Unix socket that the machine's side can reach.
"""

import os
import shutil
import subprocess
import sys

from . import images, repack
from . import kernel as debian
from .common import Failure, call, packages

PACKAGES = ["bochs", "bochs-wx", "bochsbios", "vgabios", "grub-pc-bin", "grub-common", "xorriso", "mtools", "lz4", "gcc",
            "iproute2", "util-linux"]
# A processor with pause-loop exiting (SDM vol. 3, 25.1.3): Bochs 2.7 does not leave a guest that has interrupts off when one comes for the
# host. A second CPU that starts waits for the first one so, and its host would stand still for ever, its network too. Its EPT has
# accessed and dirty bits, which KVM is told not to use.
MODEL = "corei7_haswell_4770"
CMDLINE = ("console=ttyS0 panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check quiet nopti "
           "random.trust_cpu=on")
WIRE_BASE = 40000
WINDOW = 32768
"""Bytes that a TCP connection may have under way. The emulated card takes one frame of 1500 bytes in a millisecond of its own time,
and what does not fit into its socket's buffer (some 90 frames) is lost: a few connections at full speed would wait for
retransmissions most of the time."""


def prepare():
    """Installs what the hosts need."""
    packages(*PACKAGES)


def start(lab, initramfs, spawn):
    """Starts the gateway and, in it, the hosts of a lab."""
    if lab.smp != 1:
        raise Failure(f"--smp {lab.smp}: hosts have one CPU with --cpu intel")
    if lab.memory < 512:
        raise Failure(f"--memory {lab.memory}: at least 512 MiB with --cpu intel")
    kernel = repack.lz4_bzimage(debian.get(), images.IMAGES / "bochs")
    for host in lab.hosts:
        host.unix = str(lab.directory / "gateway")
        _media(lab, host, kernel, initramfs)
        _config(lab, host)
    python = [sys.executable, "-B", "-m", "spanlab.gateway", str(lab.directory), str(lab.count)]
    spawn("gateway", ["unshare", "-n", *python] if os.geteuid() == 0 else ["unshare", "-rn", *python])


def command(name):
    """The command line of one host, for the gateway to run in the lab's directory.

    All paths are relative: Bochs copies some of them into short buffers.
    """
    return ["bochs", "-q", "-f", f"{name}.bochsrc", "-rc", "debugger"]


def _media(lab, host, kernel, initramfs):
    """A CD with GRUB, the kernel and the initramfs of one host."""
    tree = lab.directory / host.name
    (tree / "boot" / "grub").mkdir(parents=True)
    shutil.copy(kernel, tree / "boot" / "kernel")
    (tree / "boot" / "initramfs").write_bytes(initramfs.read_bytes() + images.payload_archive())
    append = f"{CMDLINE} lab.name={host.name} lab.ip={host.ip} lab.token={lab.token} lab.window={WINDOW}"
    (tree / "boot" / "grub" / "grub.cfg").write_text(
        f"linux /boot/kernel {append}\ninitrd /boot/initramfs\nboot\n", encoding="utf-8")
    call(["grub-mkrescue", "-d", "/usr/lib/grub/i386-pc", "--compress=xz", "--fonts=", "--locales=", "--themes=",
          "--install-modules=linux normal iso9660 biosdisk part_msdos part_gpt", "-o", lab.directory / f"{host.name}.iso", tree],
         120, quiet=True)
    shutil.rmtree(tree)


def _config(lab, host):
    # Without the dummy driver Debian's build overruns a buffer where the machine has no sound card.
    directory = lab.directory
    wire = WIRE_BASE + 2 * (host.number - 1)
    (directory / "debugger").write_text("c\n", encoding="utf-8")
    (directory / f"{host.name}.bochsrc").write_text(f"""\
display_library: rfb, options="timeout=0"
config_interface: textconfig
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
megs: {lab.memory}
cpu: model={MODEL}, count=1, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=slowdown, time0=local
pci: enabled=1, chipset=i440fx, slot1=e1000
e1000: enabled=1, mac=52:54:00:77:00:{host.number:02x}, ethmod=socket, ethdev={wire}
ata0: enabled=1
ata0-master: type=cdrom, path="{host.name}.iso", status=inserted
boot: cdrom
sound: waveoutdrv=dummy
plugin_ctrl: speaker=0
com1: enabled=1, mode=file, dev="{host.name}.console"
log: {host.name}.bochslog
panic: action=report
error: action=ignore
info: action=ignore
debug: action=ignore
""", encoding="utf-8")


def available():
    """Whether network namespaces work here."""
    flags = ["-n"] if os.geteuid() == 0 else ["-rn"]
    return subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False, timeout=10).returncode == 0
