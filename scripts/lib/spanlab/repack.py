"""Repacks Debian's kernel as a bzImage with an LZ4 payload, for virtual hosts whose CPU is emulated instruction by instruction.

The kernel's code is the same, byte for byte; only the packing and the small program that undoes it are ours.
"""

import struct
import subprocess

from .common import ROOT, call, packages

LOAD_ADDRESS = 0x6000000
"""As in guest-images/labhost/unpack/link.ld."""
SETUP_SECTORS, LOADFLAGS, RELOCATABLE, PREFERRED, INIT_SIZE = 0x1F1, 0x211, 0x234, 0x258, 0x260


def lz4_bzimage(kernel, work):
    """Builds the bzImage in directory `work` (kept for the next time) and returns its path."""
    image = work / f"vmlinuz-lz4-{kernel.release}"
    sources = ROOT / "guest-images" / "labhost" / "unpack"
    newest = max(path.stat().st_mtime for path in [*sources.iterdir(), kernel.vmlinux])
    if image.exists() and image.stat().st_mtime > newest:
        return image
    packages("lz4", "gcc", "binutils")
    work.mkdir(parents=True, exist_ok=True)
    packed, elf, flat = work / "vmlinux.lz4", work / "unpack.elf", work / "unpack.bin"
    call(["lz4", "-l", "-9", "-q", "-f", kernel.vmlinux, packed], 300, "lz4")
    call(["gcc", "-m64", "-O2", "-ffreestanding", "-fno-pic", "-no-pie", "-nostdlib", "-static", "-mno-red-zone",
          "-mgeneral-regs-only", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
          "-fno-tree-loop-distribute-patterns", f"-DPAYLOAD=\"{packed}\"", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments",
          "-T", sources / "link.ld", "-o", elf, sources / "entry.S", sources / "unpack.c"], 120, "gcc", quiet=True)
    call(["objcopy", "-O", "binary", elf, flat], 120)
    setup = bytearray(kernel.vmlinuz.read_bytes())
    setup = setup[:((setup[SETUP_SECTORS] or 4) + 1) * 512]
    # The boot loader puts us at our preferred address, with room for .bss behind.
    struct.pack_into("<B", setup, RELOCATABLE, 1)
    struct.pack_into("<Q", setup, PREFERRED, LOAD_ADDRESS)
    struct.pack_into("<I", setup, INIT_SIZE, _memory_size(elf))
    code = flat.read_bytes()
    struct.pack_into("<I", setup, 0x1F4, (len(code) + 15) // 16)
    image.write_bytes(bytes(setup) + code + b"\0" * (-len(code) % 16))
    return image


def _memory_size(elf):
    """Bytes from the load address to the end of .bss, whole pages."""
    symbols = subprocess.run(["nm", str(elf)], stdout=subprocess.PIPE, check=True, text=True, timeout=30).stdout
    end = next(int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(" bss_end"))
    return (end - LOAD_ADDRESS + 0xFFF) & ~0xFFF
