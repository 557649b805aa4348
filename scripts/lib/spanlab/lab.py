"""Several virtual hosts on one switch: up, exec, down. The state of a lab is in target/lab/NAME/."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import agent, images, qemu
from . import kernel as debian
from .common import TARGET, Failure, Step, die_with_parent, kill_group, replace_file, say, start_time

LABS = TARGET / "lab"
LIFETIME = 4 * 3600
"""Seconds after which a forgotten host is killed."""


@dataclass
class Host:
    """One virtual host."""
    number: int
    name: str
    ip: str
    console: str
    port: int = 0
    unix: str = ""


@dataclass
class Process:
    """A process that belongs to the lab; `started` tells it from a later one with the same number."""
    what: str
    pid: int
    started: int

    def alive(self):
        """Whether it still runs."""
        return start_time(self.pid) == self.started


@dataclass
class Lab:
    """A lab: options, hosts, and the processes behind them."""
    name: str = "default"
    cpu: str = "amd"
    accel: str = ""
    count: int = 2
    memory: int = 1024
    smp: int = 1
    boot_deadline: int = 0
    token: str = ""
    hosts: list = field(default_factory=list)
    processes: list = field(default_factory=list)

    @property
    def directory(self):
        """Where its state, consoles and sockets are."""
        return LABS / self.name

    def host(self, name):
        """A host by name or number."""
        for host in self.hosts:
            if name in (host.name, str(host.number), host.ip):
                return host
        raise Failure(f"lab {self.name} has no host {name}: it has {', '.join(h.name for h in self.hosts)}")

    def address(self, host):
        """Where a host's agent is reached."""
        return agent.Address(host.name, self.token, host.port, host.unix)

    def run(self, host, script, timeout=60, **options):
        """Runs a script in one host (by name or itself) and returns its `agent.Result`."""
        host = host if isinstance(host, Host) else self.host(host)
        try:
            return agent.run(self.address(host), script, timeout, **options)
        except agent.Unreachable as error:
            raise Failure(f"host {error}; its console: {host.console}") from error

    def run_all(self, script, timeout=60, **options):
        """Runs a script in all hosts at once: host name -> result."""
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            futures = {host.name: pool.submit(self.run, host, script, timeout, **options) for host in self.hosts}
            return {name: future.result() for name, future in futures.items()}

    def save(self):
        """Writes the state for later commands."""
        replace_file(self.directory / "state.json", json.dumps(asdict(self), indent=1).encode() + b"\n")


def load(name):
    """A lab that was left up."""
    try:
        known = json.loads((LABS / name / "state.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise Failure(f"no lab {name} is up: start one with 'scripts/lab up -n 2'") from error
    except ValueError as error:
        raise Failure(f"{LABS / name / 'state.json'} is damaged: run 'scripts/lab down'") from error
    known["hosts"] = [Host(**host) for host in known["hosts"]]
    known["processes"] = [Process(**process) for process in known["processes"]]
    return Lab(**known)


def names():
    """Labs that have state."""
    return sorted(path.parent.name for path in LABS.glob("*/state.json"))


@contextlib.contextmanager
def _locked(name):
    """One `up` or `down` of a lab at a time."""
    LABS.mkdir(parents=True, exist_ok=True)
    with open(LABS / f"{name}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Failure(f"lab {name}: another 'up' or 'down' is at work") from error
        yield


def prepare(cpu):
    """Builds and installs all that hosts need; returns (kernel, host initramfs)."""
    if cpu == "amd":
        qemu.prepare()
    else:
        from . import bochs
        bochs.prepare()
    kernel = debian.get()
    return kernel, images.host(kernel, images.build_static("labagent"), cpu)


def up(lab, keep=True):
    """Boots the hosts, with one retry; on any failure nothing is left running.

    With `keep` false the hosts die with this process.
    """
    with _locked(lab.name):
        if (lab.directory / "state.json").exists():
            known = load(lab.name)
            if any(process.alive() for process in known.processes):
                raise Failure(f"lab {lab.name} is up already: 'scripts/lab down', or choose another --name")
            _stop(known)
        lab.accel = (qemu.accelerator() if lab.cpu == "amd" else "bochs") if not lab.accel else lab.accel
        kernel, initramfs = prepare(lab.cpu)
        images.payload_directory()
        deadline = lab.boot_deadline or {"kvm": 60, "tcg": 120, "bochs": 420}[lab.accel]
        for attempt in (1, 2):
            try:
                with Step(f"booting {lab.count} virtual host{'s'[:lab.count > 1]} ({_describe(lab, kernel)})") as step:
                    _boot(lab, initramfs, keep, deadline)
                for host in lab.hosts:
                    say(f"    {host.name} {host.ip}")
                return step
            except Failure as failure:
                _stop(lab, keep_logs=True)
                if attempt == 2:
                    raise
                say(f"    {failure}; trying once more")
            except BaseException:
                _stop(lab)
                raise
    return None


def _describe(lab, kernel):
    how = {"kvm": "nested KVM", "tcg": "QEMU TCG, emulated AMD-V", "bochs": "Bochs, emulated VT-x"}[lab.accel]
    return f"{how}; {lab.smp} CPU, {lab.memory} MiB each; Linux {kernel.release}"


def _boot(lab, initramfs, keep, deadline):
    shutil.rmtree(lab.directory, ignore_errors=True)
    lab.directory.mkdir(parents=True)
    lab.token = secrets.token_hex(32)
    lab.processes = []
    lab.hosts = [Host(n, f"h{n}", f"10.77.0.{n}", str(lab.directory / f"h{n}.console")) for n in range(1, lab.count + 1)]
    end = time.monotonic() + deadline
    if lab.accel == "bochs":
        from . import bochs
        bochs.start(lab, initramfs, lambda what, argv: _spawn(lab, what, argv, keep))
    else:
        hosts, helpers = qemu.wires(lab.directory, lab.count)
        for helper in helpers:
            _spawn(lab, "switch", helper, keep)
        for host, wire in zip(lab.hosts, hosts):
            host.port = qemu.free_port()
            qemu.wait_for_sockets(lab.directory, lab.count, host.number)
            _spawn(lab, host.name, qemu.command(lab, host, wire, initramfs, lab.accel), keep)
    pool = ThreadPoolExecutor(len(lab.hosts))
    given_up = threading.Event()
    try:
        for waiting in [pool.submit(_wait, lab, host, end, deadline, given_up) for host in lab.hosts]:
            waiting.result()
    finally:
        given_up.set()
        pool.shutdown(wait=False)
    lab.save()


def _wait(lab, host, end, deadline, given_up):
    """Waits until a host runs commands and has a /dev/kvm with nested paging, or until nobody wants to know any more."""
    check = "cat /sys/module/kvm_amd/parameters/npt /sys/module/kvm_intel/parameters/ept 2>/dev/null; test -c /dev/kvm"
    while True:
        for process in lab.processes:
            if not process.alive():
                log = Path(lab.directory / f"{process.what}.log").read_text(errors="replace").strip()[-500:]
                raise Failure(f"{process.what} of the lab ended during the boot: {log or 'it said nothing'}")
        # A connection from before the host listens is repeated by the emulator's network at ever longer intervals.
        if "lab: ready" in _console(host):
            try:
                result = agent.run(lab.address(host), check, 15)
                break
            except agent.Unreachable:
                pass
        if time.monotonic() > end or given_up.is_set():
            raise Failure(f"host {host.name} was not up after {deadline} s; its console: {host.console}")
        given_up.wait(0.1)
    if result.code:
        raise Failure(f"host {host.name} has no /dev/kvm; its console: {host.console}")
    if not any(word in ("1", "Y") for word in result.text.split()):
        raise Failure(f"host {host.name} has no nested paging; its console: {host.console}")


def _console(host):
    """What a host's console says so far."""
    try:
        return Path(host.console).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _come_first():
    """A host that is starved looks dead to the others. Without the right to come first, it takes its chances."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)


def _spawn(lab, what, argv, keep):
    log = open(lab.directory / f"{what}.log", "wb")
    with log:
        child = subprocess.Popen(
            ["timeout", "-s", "KILL", str(LIFETIME), *map(str, argv)] if keep else [str(a) for a in argv],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_come_first if keep else die_with_parent)
    lab.processes.append(Process(what, child.pid, start_time(child.pid) or 0))
    # Reaped as soon as it ends, so that a dead host looks dead.
    threading.Thread(target=child.wait, daemon=True).start()
    lab.save()


def down(name):
    """Ends a lab; fine if there is none."""
    with _locked(name):
        with contextlib.suppress(Failure):
            _stop(load(name))
        shutil.rmtree(LABS / name, ignore_errors=True)


def _stop(lab, keep_logs=False):
    for process in reversed(lab.processes):
        if process.alive():
            kill_group(process.pid)
    end = time.monotonic() + 10
    while any(process.alive() for process in lab.processes) and time.monotonic() < end:
        time.sleep(0.05)
    lab.processes = []
    (lab.directory / "state.json").unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(lab.directory, ignore_errors=True)


@contextlib.contextmanager
def running(lab):
    """A lab for the time of a `with` block."""
    up(lab, keep=False)
    try:
        yield lab
    finally:
        # A second ^C must not leave hosts behind.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _stop(lab)
            (LABS / f"{lab.name}.lock").unlink(missing_ok=True)
        finally:
            signal.signal(signal.SIGINT, previous)
