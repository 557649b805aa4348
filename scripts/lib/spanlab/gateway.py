"""Runs in the network namespace of a Bochs lab: starts the hosts, is their switch, and lets the machine's side in.

    machine                         | namespace
    client -- Unix socket "gateway" -- TCP to 10.77.0.N:7077 -- tap -- switch -- UDP -- Bochs N

A client first sends the host's name and a newline. Everything started here dies with this process.
"""

import contextlib
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import bochs
from .common import die_with_parent

AGENT_PORT = 7077


def _tap():
    """A tap interface with the machine's address on the lab's wire."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    set_interface, tap, no_header = 0x400454CA, 0x0002, 0x1000
    fcntl.ioctl(descriptor, set_interface, struct.pack("16sH14x", b"machine", tap | no_header))
    for command in ("ip link set lo up", "ip addr add 10.77.0.254/24 dev machine", "ip link set machine up"):
        subprocess.run(command.split(), check=True, timeout=10)
    return descriptor


def _switch(tap, count):
    """A learning switch between the tap and the hosts, for ever.

    Bochs N (from 0) listens at UDP port base + 2 N and sends to the port above; one datagram is one frame.
    """
    ports = {}
    for number in range(count):
        port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        port.bind(("127.0.0.1", bochs.WIRE_BASE + 2 * number + 1))
        ports[port.fileno()] = (port, ("127.0.0.1", bochs.WIRE_BASE + 2 * number))
    places = {}

    def send(to, frame):
        with contextlib.suppress(OSError):  # A host that is not listening yet, or no longer, loses its frames.
            if to == tap:
                os.write(tap, frame)
            else:
                # Ethernet's shortest frame: the emulated card drops shorter ones.
                ports[to][0].sendto(frame.ljust(60, b"\0"), ports[to][1])

    poll = select.poll()
    for descriptor in (tap, *ports):
        poll.register(descriptor, select.POLLIN)
    while True:
        for source, _ in poll.poll():
            try:
                frame = os.read(tap, 2048) if source == tap else ports[source][0].recv(2048)
            except OSError:
                continue
            places[frame[6:12]] = source
            to = places.get(frame[:6])
            for other in [to] if to is not None else [tap, *ports]:
                if other != source:
                    send(other, frame)


def _pump(source, sink):
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def _forward(client, count):
    """Connects one client with the agent it names."""
    with client:
        client.settimeout(10)
        name = b""
        while not name.endswith(b"\n") and len(name) < 16:
            byte = client.recv(1)
            if not byte:
                return
            name += byte
        number = int(name[1:]) if name[1:].strip().isdigit() else 0
        if not 1 <= number <= count:
            return
        try:
            # An emulated host that works is slow to answer.
            agent = socket.create_connection((f"10.77.0.{number}", AGENT_PORT), 60)
        except OSError:
            return
        with agent:
            agent.settimeout(None)
            client.settimeout(None)
            agent.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(agent, client), daemon=True)
            back.start()
            _pump(client, agent)
            back.join()


def _serve(path, count):
    with socket.socket(socket.AF_UNIX) as listener:
        old = os.umask(0o077)
        listener.bind(path)
        os.umask(old)
        listener.listen(64)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_forward, args=(client, count), daemon=True).start()


def _main():
    directory, count = Path(sys.argv[1]), int(sys.argv[2])
    tap = _tap()
    threading.Thread(target=_switch, args=(tap, count), daemon=True).start()
    children = {}
    for number in range(1, count + 1):
        with open(directory / f"h{number}.log", "wb") as log:
            children[f"h{number}"] = subprocess.Popen(
                bochs.command(f"h{number}"), cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_parent)
    threading.Thread(target=_serve, args=(str(directory / "gateway"), count), daemon=True).start()
    while True:
        for name, child in children.items():
            if child.poll() is not None:
                sys.exit(f"{name} ended with code {child.returncode}")
        time.sleep(0.2)


if __name__ == "__main__":
    _main()
