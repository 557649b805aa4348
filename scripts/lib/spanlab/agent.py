"""Client of labagent (guest-images/labhost): runs a command in a virtual host."""

import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

GRACE = 20
"""Seconds that the agent may be late with its own timeout's answer: the hosts are emulated and may be starved."""


class Unreachable(Exception):
    """The host does not answer, or stopped answering."""


@dataclass
class Result:
    """How a command ended."""
    code: int = -1
    reason: str = ""
    stdout: bytes = b""
    stderr: bytes = b""
    seconds: float = 0.0

    @property
    def text(self):
        """Standard output as text."""
        return self.stdout.decode(errors="replace")


@dataclass
class Address:
    """Where a host's agent is reached: TCP on loopback, or a Unix socket whose owner forwards by host name."""
    host: str
    token: str
    port: int = 0
    unix: str = ""
    extra: dict = field(default_factory=dict)

    def connect(self, timeout):
        """A connected socket."""
        try:
            if self.unix:
                stream = socket.socket(socket.AF_UNIX)
                stream.settimeout(timeout)
                stream.connect(self.unix)
                stream.sendall(self.host.encode() + b"\n")
            else:
                stream = socket.create_connection(("127.0.0.1", self.port), timeout)
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return stream
        except OSError as error:
            raise Unreachable(f"{self.host}: {error}") from error


def _frame(kind, data=b""):
    return kind + struct.pack("<I", len(data)) + data


def _read(stream, size):
    data = b""
    while len(data) < size:
        part = stream.recv(min(size - len(data), 1 << 16))
        if not part:
            raise Unreachable("the connection ended before the command did")
        data += part
    return data


def run(address, script, timeout, on_output=None, stdin=None, grace=GRACE):
    """Runs a shell script in a host for at most `timeout` seconds; raises `Unreachable` when the host does not answer.

    `on_output(stream, bytes)`, with stream 1 or 2, gets output as it comes; else the result holds it.
    `stdin` is bytes, or a file descriptor to copy from.
    """
    start = time.monotonic()
    deadline = start + timeout + grace
    result = Result()
    with address.connect(min(timeout + grace, 15)) as stream:
        try:
            stream.sendall(_frame(b"T", address.token.encode()))
            stream.sendall(_frame(b"R", struct.pack("<I", max(1, int(timeout))) + script.encode()))
            if isinstance(stdin, int):
                threading.Thread(target=_feed, args=(stream, stdin), daemon=True).start()
            else:
                for offset in range(0, len(stdin or b""), 1 << 19):
                    stream.sendall(_frame(b"I", stdin[offset:offset + (1 << 19)]))
                stream.sendall(_frame(b"E"))
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Unreachable(f"no answer {grace} s after the command's own limit of {timeout} s")
                stream.settimeout(left)
                header = _read(stream, 5)
                data = _read(stream, struct.unpack("<I", header[1:])[0])
                kind = header[:1]
                if kind == b"X":
                    result.code = struct.unpack("<i", data[:4])[0]
                    result.reason = data[4:].decode(errors="replace")
                    result.seconds = time.monotonic() - start
                    return result
                number = 1 if kind == b"O" else 2
                if on_output:
                    on_output(number, data)
                elif number == 1:
                    result.stdout += data
                else:
                    result.stderr += data
        except OSError as error:
            raise Unreachable(f"{address.host}: {error}") from error
        except Unreachable as error:
            raise Unreachable(f"{address.host}: {error}") from error


def _feed(stream, descriptor):
    try:
        while data := os.read(descriptor, 1 << 16):
            stream.sendall(_frame(b"I", data))
        stream.sendall(_frame(b"E"))
    except OSError:
        pass  # The command ended first.
