"""Debian's stock kernel: the package `linux-image-amd64` depends on, unpatched, unpacked below target/kernel."""

import hashlib
import json
import lzma
import re
import shutil
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .common import TARGET, Failure, Step, call, packages, replace_file

CACHE = TARGET / "kernel"


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel package."""
    release: str
    """`uname -r`, such as 6.1.0-44-amd64."""
    package: str
    """Name, version and SHA-256 of the package, for reports."""
    directory: Path

    @property
    def vmlinuz(self):
        """The bzImage, byte for byte as in the package."""
        return self.directory / "root" / "boot" / f"vmlinuz-{self.release}"

    @property
    def vmlinux(self):
        """The ELF kernel that is packed inside `vmlinuz`: boots faster, because nothing has to be decompressed."""
        return self.directory / "vmlinux"

    def load_order(self, names):
        """Paths of modules and of all that they depend on, each after what it needs. A module that is built in is left out."""
        modules = self.directory / "root" / "lib" / "modules" / self.release
        built_in = {_name(line) for line in (modules / "modules.builtin").read_text(encoding="utf-8").split()}
        paths = {_name(path.name): path for path in modules.rglob("*.ko*")}
        order = {}

        def add(name, wanted_by):
            name = _name(name)
            if name in built_in or name in order:
                return
            if name not in paths:
                raise Failure(f"kernel {self.release} has no module {name} ({wanted_by})")
            for dependency in _depends(paths[name]):
                add(dependency, f"needed by {name}")
            order[name] = paths[name]

        for name in names:
            add(name, "asked for")
        return list(order.values())


def _name(file):
    """Module name of a file name: the kernel treats - and _ alike."""
    return Path(file).name.split(".ko")[0].replace("-", "_")


def module_bytes(path):
    """A module's ELF file, decompressed (Debian 13 compresses them)."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return _zstd(data)
    return data


def _depends(path):
    """The modules that a module needs, from its .modinfo."""
    found = re.search(rb"\0depends=([^\0]*)\0", module_bytes(path))
    return [name for name in found.group(1).decode().split(",") if name] if found else []


def _zstd(data):
    packages("zstd")
    return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True, timeout=120).stdout


def _lz4(data):
    packages("lz4")
    return subprocess.run(["lz4", "-dcq"], input=data, stdout=subprocess.PIPE, check=True, timeout=120).stdout


def unpack_bzimage(image):
    """The ELF vmlinux inside a bzImage (Documentation/arch/x86/boot.rst: payload_offset, payload_length)."""
    if len(image) < 0x250 or image[0x202:0x206] != b"HdrS":
        raise Failure("the kernel image is not a bzImage")
    setup = ((image[0x1F1] or 4) + 1) * 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup + offset:setup + offset + length]
    # The last four bytes are the unpacked size; only xz's own trailer follows nothing else, so cut by format.
    if payload.startswith(b"\xfd7zXZ\0"):
        vmlinux = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        vmlinux = _zstd(payload[:-4])
    elif payload.startswith(b"\x02\x21\x4c\x18"):
        vmlinux = _lz4(payload[:-4])
    else:
        raise Failure(f"unknown compression of the kernel's payload (starts with {payload[:6].hex()})")
    if vmlinux[:4] != b"\x7fELF":
        raise Failure("the kernel's payload is not an ELF file")
    return vmlinux


def get():
    """The kernel, downloaded and unpacked when it is not there yet."""
    recorded = CACHE / "kernel.json"
    try:
        known = json.loads(recorded.read_text(encoding="utf-8"))
        kernel = Kernel(known["release"], known["package"], CACHE / known["release"])
        if kernel.vmlinuz.is_file() and kernel.vmlinux.is_file():
            return kernel
    except (OSError, ValueError, KeyError):
        pass
    with Step("downloading and unpacking Debian's kernel package"):
        return _download(recorded)


def _package_name():
    """The package that the metapackage linux-image-amd64 depends on."""
    depends = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], stdout=subprocess.PIPE, text=True,
                             check=False, timeout=60).stdout
    found = re.search(r"Depends: (linux-image-(\S+-amd64))", depends)
    return found.groups() if found else None


def _download(recorded):
    name = _package_name()
    if not name:
        packages("ca-certificates")
        # A fresh container has no package lists at all.
        root = [] if not shutil.which("sudo") else ["sudo"]
        call([*root, "apt-get", "-qq", "update"], 300, "apt-get update")
        name = _package_name()
    if not name:
        raise Failure("apt does not know linux-image-amd64: this needs Debian on amd64 (see /etc/apt/sources.list)")
    package, release = name
    work = CACHE / f"{release}.new"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for attempt in (1, 2, 3):
        try:
            # apt checks the file against the signed package lists.
            call(["apt-get", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3", "-q", "download", package],
                 600, "apt-get download", cwd=work, quiet=True)
            break
        except Failure:
            if attempt == 3:
                raise
            time.sleep(2 * attempt)
            # The lists may be older than the mirror.
            root = [] if not shutil.which("sudo") else ["sudo"]
            call([*root, "apt-get", "-qq", "update"], 300, "apt-get update")
    archive = next(work.glob("*.deb"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    call(["dpkg", "-x", archive, work / "root"], 300, "dpkg -x")
    image = (work / "root" / "boot" / f"vmlinuz-{release}").read_bytes()
    (work / "vmlinux").write_bytes(unpack_bzimage(image))
    # Debian 12 says /lib, Debian 13 /usr/lib.
    if not (work / "root" / "lib").exists():
        (work / "root" / "lib").symlink_to("usr/lib")
    final = CACHE / release
    shutil.rmtree(final, ignore_errors=True)
    archive_name = archive.name
    archive.unlink()
    work.rename(final)
    label = f"{archive_name} sha256:{digest}"
    replace_file(recorded, json.dumps({"release": release, "package": label}, indent=1).encode() + b"\n")
    return Kernel(release, label, final)
