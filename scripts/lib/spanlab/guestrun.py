"""One run of the Linux guest: `spanvm launch` on virtual hosts or on this machine, and what its console and `spanvm info` say."""

import json
import os
import secrets
import shlex
import subprocess
import threading
import time
from dataclasses import dataclass, field

from . import agent, console, images
from .common import TARGET, Failure, die_with_parent, kill_group, say

LEAN = ("lsm= psi=0 numa_balancing=disable audit=0 cgroup_disable=memory transparent_hugepage=never "
        "initcall_blacklist=tracer_init_tracefs relax_domain_level=3 sysctl.vm.stat_interval=60 sysctl.vm.compaction_proactiveness=0")
"""What a guest on emulated processors does without: work at boot and in the background that has nothing to do with its
being one machine. It boots with all of that, too, only later; the watchdogs stay."""
PORT = 7410
"""TCP port of the node daemons."""
VM = "guest"


@dataclass
class Plan:
    """What to boot."""
    members: int = 2
    cpus: int = 2
    memory_mib: int = 512
    run: str = "poweroff"
    linger: int = 0
    """Seconds that the guest waits before it powers off, so that it can be looked at."""
    disk_mib: int = 0
    all_cpus_boot: bool = False
    """The kernel starts all CPUs itself; else the guest's init brings up all but the first (in the lab)."""
    extra: str = ""
    """More of the kernel command line."""
    options: list = field(default_factory=list)
    """More options of `spanvm launch`."""
    timeout: int = 600
    slow_clock: int = 0
    """Of the hosts' seconds, how many are one of the guest's; 0: what suits the hosts (`fitting_clock`)."""
    mark: str = ""
    """What the guest says when the counters of its boot are to be read (`Outcome.boot_info`)."""

    def cmdline(self, where):
        """The guest's kernel command line."""
        words = ["console=ttyS0", "quiet", "panic=-1", "mitigations=off", "random.trust_cpu=on", f'spanvm.run="{self.run}"']
        if where.mode == "lab":
            words.append(LEAN)
            if not self.all_cpus_boot:
                words.append("maxcpus=1")
        if self.linger:
            words.append(f"spanvm.linger={max(self.linger // where.slow_clock(self), 5)}")
        if (slow := where.slow_clock(self)) > 1:
            # The guest believes that its time stamp counter is so much faster: all of its clocks and timers follow from that.
            words.append(f"tsc_early_khz={where.tsc_khz() * slow}")
        return " ".join(words + ([self.extra] if self.extra else []))


@dataclass
class Outcome:
    """What came of it."""
    code: int = -1
    reason: str = ""
    text: str = ""
    """The guest's console (and spanvm's own standard output)."""
    errors: str = ""
    """spanvm's standard error."""
    init_s: float = None
    """Seconds from the launch to the guest's first process, by this machine's clock."""
    ready_s: float = None
    """Seconds from the launch until all CPUs are up and the guest's command begins."""
    total_s: float = 0.0
    info: dict = field(default_factory=dict)
    """The newest `spanvm info --json`."""
    info_text: str = ""
    """`spanvm info`, for people."""
    boot_info: dict = field(default_factory=dict)
    """The first `spanvm info --json` after `Plan.mark` was on the console."""

    @property
    def facts(self):
        """What the guest sees (console.facts)."""
        return console.facts(self.text)

    @property
    def remote_faults(self):
        """Page faults that another member had to answer."""
        names = ("read_remote", "write_remote", "upgrade_remote")
        return sum(member.get("faults", {}).get(name, 0) for member in self.info.get("members", []) for name in names)

    def check(self):
        """Raises `Failure` unless the guest booted, ran its command with success, and powered off without a complaint."""
        tail = "\n".join((self.text + self.errors).strip().splitlines()[-15:])
        if self.init_s is None:
            raise Failure(f"the guest did not reach its init (exit code {self.code} {self.reason}); last lines:\n{tail}")
        if not self.facts:
            raise Failure(f"the guest did not say what it is (exit code {self.code} {self.reason}); last lines:\n{tail}")
        if "SPANVM-BEGIN" in self.text:
            _, status = console.run_output(self.text)
            if status is None:
                raise Failure(f"the guest's command did not end (exit code {self.code} {self.reason}); last lines:\n{tail}")
            if status:
                raise Failure(f"the guest's command failed with {status}; last lines:\n{tail}")
        if self.code:
            raise Failure(f"spanvm launch ended with exit code {self.code} {self.reason}; last lines:\n{tail}")
        if complaints := console.complaints(self.text):
            raise Failure("the guest's kernel complains:\n" + "\n".join(complaints[:10]))


def fitting_clock(cpu, members):
    """By how much the clock of a guest over so many virtual hosts is best slower than theirs.

    A fault between emulated hosts takes milliseconds, ten on Intel's: as long as the time between two ticks of a CPU,
    whose handlers alone need several pages that all CPUs use. With a clock as slow as all the rest a guest ticks as
    rarely, measured in what it does, as on hardware, and comes to something between two ticks.
    """
    if members == 1:
        return 1
    return 10 if cpu == "intel" else 4 if members > 2 else 1


class Virtual:
    """The machines of a lab: member n runs on host n + 1. Every `look_s` seconds a running guest's counters are read."""

    mode = "lab"

    def __init__(self, lab):
        self.lab = lab
        self.look_s = 60 if lab.cpu == "intel" else 10
        self.command = "spanvm"
        self.images = "/opt/spanvm"

    def slow_clock(self, plan):
        """By how much the clock of the guest goes slower than the hosts'."""
        return plan.slow_clock or fitting_clock(self.lab.cpu, plan.members)

    def tsc_khz(self):
        """The frequency of the hosts' time stamp counters, as KVM has it."""
        result = self.sh("spanvm doctor --json", 60)
        try:
            return json.loads(result.text)["facts"]["tsc_khz"]
        except (ValueError, KeyError, TypeError) as error:
            raise Failure(f"spanvm doctor on h1 does not say how fast its time stamp counter is: {result.text[-300:]}") from error

    def sh(self, script, timeout, on_output=None):
        """Runs a script on the first host."""
        return self.lab.run("h1", script, timeout, on_output=on_output)

    def prepare(self, plan):
        """Starts the node daemons and makes the disk; returns launch's options for the members."""
        if plan.members > len(self.lab.hosts):
            raise Failure(f"{plan.members} members need as many hosts; the lab has {len(self.lab.hosts)}")
        hosts = self.lab.hosts[:plan.members]
        start_nodes(self.lab)
        options = on(hosts)
        if plan.disk_mib:
            # On the last member, so that the first one's CPUs use a disk elsewhere.
            self.lab.run(hosts[-1], f"truncate -s {plan.disk_mib}M /tmp/disk.img", 30)
            options += ["--disk", f"/tmp/disk.img,member={plan.members - 1}"]
        return options


class Local:
    """This machine: all members on loopback."""

    mode = "kvm"
    look_s = 10

    @staticmethod
    def slow_clock(plan):
        """See `Virtual.slow_clock`."""
        return plan.slow_clock or 1

    @staticmethod
    def tsc_khz():
        """See `Virtual.tsc_khz`."""
        raise Failure("a slow clock is for virtual hosts")

    def __init__(self, binary):
        self.command = str(binary)
        self.images = str(images.IMAGES)
        self.environment = dict(os.environ)

    def sh(self, script, timeout, on_output=None):
        """Runs a script here."""
        result = agent.Result()
        child = subprocess.Popen(["sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, start_new_session=True, preexec_fn=die_with_parent,
                                 env=self.environment)

        def pump(number, pipe):
            while data := os.read(pipe.fileno(), 1 << 16):
                if on_output:
                    on_output(number, data)
                elif number == 1:
                    result.stdout += data
                else:
                    result.stderr += data
        pumps = [threading.Thread(target=pump, args=pair, daemon=True) for pair in ((1, child.stdout), (2, child.stderr))]
        for thread in pumps:
            thread.start()
        try:
            result.code = child.wait(timeout)
            for thread in pumps:
                thread.join(2)
        except subprocess.TimeoutExpired:
            result.code, result.reason = 124, f"killed after {timeout} s"
        finally:
            kill_group(child.pid)
        return result

    def prepare(self, plan):
        """Makes the disk; returns launch's options for the members."""
        options = ["--members", str(plan.members)]
        if plan.disk_mib:
            disk = TARGET / "quickstart-disk.img"
            with open(disk, "wb") as image:
                image.truncate(plan.disk_mib << 20)
            options += ["--disk", f"{disk},member={plan.members - 1}"]
        return options


def on(hosts):
    """Options of spanvm for a VM on these virtual hosts."""
    return ["--on", ",".join(f"{host.ip}:{PORT}" for host in hosts), "--secret-file", "/run/secret"]


def start_nodes(lab):
    """Starts `spanvm node` on every host where none runs."""
    secret = secrets.token_hex(32)
    known = lab.run("h1", "cat /run/secret 2>/dev/null", 30)
    secret = known.text.strip() or secret
    for host in lab.hosts:
        script = f"""
            umask 077; echo {secret} >/run/secret
            if [ -s /run/node.pid ] && kill -0 "$(cat /run/node.pid)" 2>/dev/null; then exit 0; fi
            setsid spanvm node --listen {host.ip}:{PORT} --secret-file /run/secret </dev/null >/run/node.log 2>&1 &
            echo $! >/run/node.pid
            for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
                grep -qi ':{PORT:04X} 00000000:0000 0A ' /proc/net/tcp && exit 0  # 0A: it listens
                kill -0 "$(cat /run/node.pid)" || break
                sleep 0.5
            done
            cat /run/node.log >&2; exit 1"""
        result = lab.run(host, script, 60)
        if result.code:
            raise Failure(f"spanvm node on {host.name}: {result.stderr.decode(errors='replace').strip()}")


def spanvm(lab, words, limit):
    """`spanvm WORDS` on the first host; returns its `agent.Result`, raises `Failure` with what it said unless it ends with 0."""
    result = lab.run("h1", f"spanvm {words}", limit)
    if result.code:
        raise Failure(f"spanvm {words}: exit code {result.code} {result.reason} {result.stderr.decode(errors='replace').strip()}")
    return result


def boot(where, plan, show=None):
    """Boots the guest, waits for its end, and returns the outcome; the caller judges it (`Outcome.check`)."""
    options = ["--name", VM, "--kernel", f"{where.images}/{'kernel' if where.mode == 'lab' else 'vmlinuz'}",
               "--initrd", f"{where.images}/{'initramfs' if where.mode == 'lab' else 'initramfs.cpio'}",
               "--cmdline", plan.cmdline(where), "--cpus", str(plan.cpus), "--memory", f"{plan.memory_mib}M",
               *where.prepare(plan), *plan.options]
    return attend(where, ["launch", *options], plan, show)


def attend(where, argv, plan, show=None, outcome=None):
    """Runs a guest with `spanvm ARGV` in the foreground until its end; returns the outcome.

    `outcome` is that of the guest so far, when it goes on from a checkpoint: what comes is added to it.
    """
    start = time.monotonic()
    if outcome is None:
        outcome = Outcome()
    elif not outcome.text.endswith("\n"):
        # It was cut off in the middle of a line.
        outcome.text += "\n"
    lock = threading.Lock()
    ended = threading.Event()
    finished = threading.Event()
    shown = [len(console.clean(outcome.text).split("\n")) - 1]

    def on_output(number, data):
        with lock:
            text = data.decode(errors="replace")
            if number == 2:
                outcome.errors += text
            else:
                outcome.text += text
            if outcome.init_s is None and "SPANVM-INIT uptime_s=" in outcome.text:
                outcome.init_s = time.monotonic() - start
            if outcome.ready_s is None and "SPANVM-GUEST nproc=" in outcome.text:
                outcome.ready_s = time.monotonic() - start
            if "SPANVM-END status=" in outcome.text:
                ended.set()
            if show:
                *lines, _ = console.clean(outcome.text).split("\n")
                for line in lines[shown[0]:]:
                    show(line)
                shown[0] = len(lines)

    def look():
        """Asks for the counters now and then, and once more when the guest's command has ended."""
        while not finished.is_set():
            last = ended.wait(where.look_s)
            try:
                is_marked = bool(plan.mark) and plan.mark in outcome.text
                result = where.sh(f"{shlex.quote(where.command)} info {VM} --json", 60)
                if result.code == 0:
                    outcome.info = json.loads(result.text)
                    if is_marked and not outcome.boot_info:
                        outcome.boot_info = outcome.info
                if last:
                    outcome.info_text = where.sh(f"{shlex.quote(where.command)} info {VM}", 60).text
            except (Failure, ValueError) as failure:
                say(f"    spanvm info: {failure}")
            if last:
                return

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    try:
        result = where.sh(f"exec {shlex.join([where.command, *argv])}", plan.timeout, on_output)
        outcome.code, outcome.reason = result.code, result.reason
    finally:
        finished.set()
        ended.set()
    looker.join(90 if plan.linger else 5)
    outcome.total_s = time.monotonic() - start
    return outcome
