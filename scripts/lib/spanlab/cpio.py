"""Initramfs archives in the kernel's newc format (Documentation/driver-api/early-userspace/buffer-format.rst).

Written here because cpio(1) would need root to put device nodes in. The same input gives the same bytes.
"""

import stat
from pathlib import Path


class Archive:
    """An archive in memory; paths are absolute, as in the guest, and parents are made as needed."""

    def __init__(self):
        self._parts = []
        self._seen = set()
        self._inode = 0

    def _entry(self, path, mode, data=b"", device=(0, 0)):
        name = path.strip("/").encode() + b"\0"
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % f for f in fields)
        self._parts += [header + name, b"\0" * (-(len(header) + len(name)) % 4), data, b"\0" * (-len(data) % 4)]

    def directory(self, path, mode=0o755):
        """Adds a directory and its parents."""
        path = "/" + path.strip("/")
        if path == "/" or path in self._seen:
            return
        self.directory(str(Path(path).parent))
        self._seen.add(path)
        self._entry(path, stat.S_IFDIR | mode)

    def file(self, path, data, mode=0o755):
        """Adds a regular file with these bytes."""
        self.directory(str(Path(path).parent))
        self._entry(path, stat.S_IFREG | mode, data)

    def link(self, path, to):
        """Adds a symbolic link."""
        self.directory(str(Path(path).parent))
        self._entry(path, stat.S_IFLNK | 0o777, to.encode())

    def char_device(self, path, major, minor, mode=0o600):
        """Adds a character device."""
        self.directory(str(Path(path).parent))
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def bytes(self):
        """The finished archive, padded to 512 bytes so that another one may follow."""
        parts = list(self._parts)
        self._entry("TRAILER!!!", 0)
        data = b"".join(self._parts)
        self._parts = parts
        return data + b"\0" * (-len(data) % 512)
