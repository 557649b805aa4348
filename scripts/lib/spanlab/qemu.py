"""Virtual hosts in QEMU: emulated AMD-V with nested paging, or nested KVM where the machine has VT-x or AMD-V."""

import os
import socket
import time
from pathlib import Path

from . import kernel as debian
from .common import ROOT, Failure, packages

PACKAGES = ["qemu-system-x86"]
CMDLINE = "console=ttyS0 panic=-1 mitigations=off nokaslr random.trust_cpu=on tsc=reliable no_timer_check quiet nopti"


def prepare():
    """Installs what the hosts need."""
    packages(*PACKAGES)


def accelerator():
    """`kvm` where this machine can nest virtual machines in hardware, else `tcg`."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[-1].split("\n", 1)[0].split()
    if not {"vmx", "svm"} & set(flags) or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    for module in ("kvm_intel", "kvm_amd"):
        try:
            nested = Path(f"/sys/module/{module}/parameters/nested").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if nested in ("Y", "1"):
            return "kvm"
    return "tcg"


def cpu_options(accel, smp):
    """The CPU and its number.

    With QEMU 7.2, emulated EPYC-Milan CPUs livelock now and then when there is more than one (multi-threaded TCG against
    kernel code patching); `max` without five-level paging does not.

    Without XSAVE: a guest of such a host reads the size of the XSAVE area from before its XSETBV, and Linux warns of it.
    """
    if accel == "kvm":
        return ["-accel", "kvm", "-cpu", "host", "-smp", str(smp)]
    cpu = "EPYC-Milan,-xsave" if smp == 1 else "max,-la57"
    return ["-accel", "tcg,thread=multi", "-cpu", cpu, "-smp", str(smp)]


def free_port():
    """A TCP port on loopback that is free now; a boot that loses the race for it is retried."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wires(directory, count):
    """How the hosts' network cards meet: per host its -netdev options, and the commands of helper processes.

    Two hosts share one stream socket. More meet in a QEMU without a machine that repeats every frame to all others.
    """
    if count == 1:
        return [["-netdev", "hubport,id=wire,hubid=1"]], []
    if count == 2:
        options = f"addr.type=unix,addr.path={directory}/wire"
        return [["-netdev", f"stream,id=wire,server={server},{options}"] for server in ("on", "off")], []
    hub = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
           "-monitor", "none", "-serial", "none"]
    hosts = []
    for number in range(1, count + 1):
        options = f"addr.type=unix,addr.path={directory}/wire{number}"
        hub += ["-netdev", f"stream,id=w{number},server=on,{options}",
                "-netdev", f"hubport,id=p{number},hubid=1,netdev=w{number}"]
        hosts.append(["-netdev", f"stream,id=wire,server=off,{options}"])
    return hosts, [hub]


def wait_for_sockets(directory, count, number):
    """Waits until host `number` (from 1) can connect its end of the wire."""
    name = "wire" if count == 2 else f"wire{number}"
    if count == 1 or (count == 2 and number == 1):
        return
    end = time.monotonic() + 20
    while not (directory / name).exists():
        if time.monotonic() > end:
            raise Failure(f"the switch of the lab did not start within 20 s ({directory / name})")
        time.sleep(0.02)


def command(lab, host, wire, initramfs, accel):
    """The command line of one virtual host."""
    append = f"{CMDLINE} lab.name={host.name} lab.ip={host.ip} lab.token={lab.token}"
    image = debian.get().vmlinux
    # Read-only, and without device nodes: what runs in a host cannot touch the machine's files.
    share = f"local,path={_escape(ROOT)},mount_tag=host0,security_model=none,readonly=on,multidevs=remap"
    return ["qemu-system-x86_64", "-name", f"spanvm-lab-{lab.name}-{host.name}", "-M", "pc",
            *cpu_options(accel, lab.smp), "-m", str(lab.memory), "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-monitor", "none", "-serial", f"file:{_escape(host.console)}",
            "-kernel", image, "-initrd", initramfs, "-append", append, "-virtfs", share,
            "-netdev", f"user,id=control,restrict=on,hostfwd=tcp:127.0.0.1:{host.port}-:7077",
            "-device", f"virtio-net-pci,netdev=control,romfile=,mac=52:54:00:77:01:{host.number:02x}",
            *wire, "-device", f"virtio-net-pci,netdev=wire,romfile=,mac=52:54:00:77:00:{host.number:02x}"]


def _escape(path):
    """QEMU's option syntax wants commas doubled."""
    return str(path).replace(",", ",,")
