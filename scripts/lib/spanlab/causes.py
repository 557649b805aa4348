"""Where remote page faults come from: what a guest page holds, by the kernel's symbols and the guest's own page-table frames."""

import bisect
import re
from dataclasses import dataclass, field

PAGE = 4096
KERNEL_VIRTUAL = 0xFFFFFFFF80000000
"""With `nokaslr` the kernel's image is mapped from here, physical address zero."""
STATIC_TABLES = re.compile(r"^(init_top_pgt|level\d_\w+_pgt|early_dynamic_pgts|early_top_pgt|swapper_pg_dir|bm_pte)$")


@dataclass
class Guest:
    """What is known of a guest's physical memory."""
    symbols: list = field(default_factory=list)
    """(virtual address, name), ascending; of the kernel's image only."""
    tables: set = field(default_factory=set)
    """Frame numbers that held page tables when the guest was asked."""

    def address(self, name):
        """Virtual address of a symbol, or None."""
        return next((address for address, known in self.symbols if known == name), None)

    def names(self, gpa, most=3):
        """Symbols on the page of a guest-physical address, and the one that reaches into it."""
        start = KERNEL_VIRTUAL + gpa - gpa % PAGE
        addresses = [address for address, _ in self.symbols]
        first = bisect.bisect_right(addresses, start) - 1
        last = bisect.bisect_left(addresses, start + PAGE)
        found = []
        for _, name in self.symbols[max(first, 0):last]:
            if name not in found and not name.startswith(("__pfx_", "__ksymtab", "__kstrtab", "__already_done")):
                found.append(name)
        return found[:most] + (["..."] if len(found) > most else [])

    def cause(self, gpa):
        """(`walk` for a page table, `code`, or `data`; what is there)."""
        virtual = KERNEL_VIRTUAL + gpa
        text, end_text = self.address("_text"), self.address("_etext")
        end = self.address("_end")
        if text and end and text <= virtual < end:
            names = self.names(gpa)
            label = ", ".join(names)
            if any(STATIC_TABLES.match(name) for name in names):
                return "walk", f"page tables of the kernel image: {label}"
            return ("code" if virtual < end_text else "data"), label
        if gpa // PAGE in self.tables:
            return "walk", "page table"
        if gpa < 1 << 20:
            return "data", "first MiB (boot parameters, trampoline)"
        return "data", "allocated page (slab, per-CPU, page cache, user)"


def parse_symbols(text):
    """Symbols of the kernel's image from the text of /proc/kallsyms."""
    found = []
    for line in text.splitlines():
        words = line.split()
        # Modules have a fourth word; per-CPU symbols are offsets.
        if len(words) == 3 and words[0].startswith("ffffffff8"):
            found.append((int(words[0], 16), words[2]))
    return sorted(found)


def parse_tables(text):
    """Frame numbers from guest-images/linux/pagetables' line."""
    frames = set()
    found = re.search(r"SPANVM-PT ([0-9a-f,-]*)", text)
    for part in (found.group(1) if found else "").split(","):
        if part:
            first, _, last = part.partition("-")
            frames.update(range(int(first, 16), int(last or first, 16) + 1))
    return frames


def split(guest, pages):
    """Sums pages {gpa: count} by cause, and lists them by count: ({cause: count}, [row])."""
    causes = {"walk": 0, "data": 0, "code": 0}
    rows = []
    for gpa, count in sorted(pages.items(), key=lambda item: -item[1]):
        cause, what = guest.cause(gpa)
        causes[cause] += count
        rows.append({"gpa": f"{gpa:#x}", "count": count, "cause": cause, "what": what})
    return causes, rows
