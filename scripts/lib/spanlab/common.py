"""Paths, deadlines, progress and child processes: what every script needs."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TARGET = ROOT / "target"
"""Everything that scripts write lives below this directory."""


class Failure(Exception):
    """Something that the user should read as one line: what failed, why, what to do."""


def say(text):
    """Prints a line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


class Step:
    """A long step: says when it starts, how long it took, and whether it failed."""

    def __init__(self, what):
        self.what = what

    def __enter__(self):
        self.start = time.monotonic()
        say(f"==> {self.what} ...")
        return self

    def __exit__(self, kind, _value, _trace):
        self.seconds = time.monotonic() - self.start
        say(f"    {self.what}: {'FAILED after ' if kind else ''}{self.seconds:.1f} s")


def packages(*names):
    """Installs the Debian packages that are missing."""
    script = ROOT / "scripts" / "lib" / "packages.sh"
    if subprocess.run([str(script), *names], stdin=subprocess.DEVNULL, check=False).returncode:
        raise Failure(f"could not install {' '.join(names)}: see above")


def die_with_parent():
    """In a child between fork and exec: let the kernel kill it when this process dies, even by SIGKILL."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def call(argv, timeout, what=None, env=None, cwd=None, quiet=False):
    """Runs a program to its end; raises `Failure` when it fails or outlives `timeout` seconds.

    Its output goes to our standard error, or with `quiet` is shown only when it fails.
    """
    what = what or Path(argv[0]).name
    child = subprocess.Popen(
        [str(a) for a in argv], stdin=subprocess.DEVNULL, cwd=cwd or ROOT, env=env, start_new_session=True,
        stdout=subprocess.PIPE if quiet else sys.stderr, stderr=subprocess.STDOUT if quiet else None)
    try:
        output, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        kill_group(child.pid)
        raise Failure(f"{what}: no end after {timeout} s") from late
    except BaseException:
        kill_group(child.pid)
        raise
    if child.returncode:
        if output:
            sys.stderr.write(output.decode(errors="replace"))
        raise Failure(f"{what}: exit code {child.returncode}")
    return output


def kill_group(pid):
    """Kills a process group that we started, and reaps its leader if it is our child."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass


def start_time(pid):
    """When a process started (clock ticks since boot), or None if it is gone: tells a recycled pid from the old one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2:].split()
    return None if fields[0] == "Z" else int(fields[19])


def replace_file(path, data):
    """Writes a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def need_tool(name, hint):
    """Fails when a program is not there."""
    if not shutil.which(name):
        raise Failure(f"{name} is missing: {hint}")


def main(function):
    """Runs a script's main function: one clear line for an expected failure, exit codes 1 and 130."""
    # So that `kill` and a closed terminal clean up like ^C does.
    def interrupt(number, _frame):
        raise KeyboardInterrupt(signal.Signals(number).name)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        sys.exit(function())
    except Failure as failure:
        say(f"error: {failure}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
