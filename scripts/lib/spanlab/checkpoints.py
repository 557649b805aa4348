"""Checkpoints of the bare-metal guest on this machine, restored on other numbers of members after all its processes were killed."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time

from . import beats
from .common import Failure


class _Vm:
    """A detached VM that runs the loop."""

    def __init__(self, binary, name, deadline):
        self.binary, self.name, self.deadline = binary, name, deadline

    def run(self, *argv):
        left = max(5, self.deadline - time.monotonic())
        done = subprocess.run([str(self.binary), *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, check=False, timeout=min(left, 120))
        if done.returncode:
            raise Failure(f"spanvm {' '.join(argv[:2])}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def beat(self, least):
        """Waits for a heartbeat with more passes than `least`; returns them."""
        while True:
            text = self.run("console", self.name, "--dump")
            said = beats.read(text)
            if said and said[-1].least > least:
                return said[-1].least
            if time.monotonic() > self.deadline:
                raise Failure(f"no heartbeat above {least}:\n{text}")
            time.sleep(0.2)

    def kill(self):
        for member in json.loads(self.run("info", self.name, "--json"))["members"]:
            # Members go by themselves when their coordinator does.
            with contextlib.suppress(ProcessLookupError):
                os.kill(member["pid"], signal.SIGKILL)


def there_and_back(binary, elf, name, left):
    """Saves a guest on two members while it works, kills it, and goes on from the cut on three, on one, and recovered."""
    vm = _Vm(binary, name, time.monotonic() + left)
    with tempfile.TemporaryDirectory() as folder:
        vm.run("launch", "--name", name, "--kernel", elf, "--members", "2", "--cpus", "3", "--memory", "64M", "--rng", "off",
               "--detach", "--cmdline", "cpus=3 test=loop pages=40 shared=1 deadline=300")
        pauses = []
        try:
            for again in (["restore", folder, "--members", "3"], ["restore", folder, "--members", "1"], ["recover", name]):
                passes = vm.beat(0)
                for _ in range(2):
                    pauses.append(json.loads(vm.run("checkpoint", name, "--to", folder, "--json"))["pause_ms"])
                vm.kill()
                vm.run(*again, "--detach")
                vm.beat(vm.beat(passes - 1))
        finally:
            subprocess.run([str(binary), "stop", name], stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60)
    return f"{len(pauses)} checkpoints, median pause {sorted(pauses)[len(pauses) // 2]:.0f} ms"
