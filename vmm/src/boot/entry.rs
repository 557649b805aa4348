//! The registers with which vCPU 0 enters the kernel, and the GDT and page tables they refer to.

use super::{GDT_START, PAGE_TABLES, START_INFO, ZERO_PAGE};
use dsm::addr::PAGE_SIZE;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use serde::{Deserialize, Serialize};

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootProtocol {
    /// 64-bit mode, identity map of the low 4 GiB, `rsi` = the zero page.
    Linux64,
    /// 32-bit protected mode without paging, `ebx` = `hvm_start_info`.
    Pvh,
}

/// Where and how vCPU 0 starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootEntry {
    /// How.
    pub protocol: BootProtocol,
    /// First instruction, a guest-physical address.
    pub rip: u64,
}

/// Selector of the flat code segment (Linux's `__BOOT_CS`).
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the flat data segment (Linux's `__BOOT_DS`).
const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task-state segment, which VM entry wants busy and present.
const TSS_SELECTOR: u16 = 0x20;
/// Top of a stack that some kernels use before they have their own.
const STACK_TOP: u64 = 0x8FF0;

// SDM vol. 3, 2.5 and 2.2.1.
const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

// Page-table entry bits (SDM vol. 3, 4.5). Accessed and dirty are set so that no walk has to write them.
const PTE_TABLE: u64 = 0x01 | 0x02 | 0x20;
const PTE_LARGE: u64 = PTE_TABLE | 0x40 | 0x80;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = PAGE_SIZE / 8;
/// Page directories: one per GiB of the identity map.
const DIRECTORIES: u64 = 4;

impl BootEntry {
    /// General registers.
    pub fn regs(&self) -> kvm_regs {
        let mut regs = kvm_regs { rflags: 2, rip: self.rip, rsp: STACK_TOP, ..Default::default() };
        match self.protocol {
            BootProtocol::Linux64 => regs.rsi = ZERO_PAGE,
            BootProtocol::Pvh => {
                regs.rbx = START_INFO;
                regs.rsp = 0;
            }
        }
        regs
    }

    /// Sets segments, tables and control registers in what KVM_GET_SREGS returned for a reset vCPU; the APIC
    /// base stays.
    pub fn apply_sregs(&self, sregs: &mut kvm_sregs) {
        let long = self.protocol == BootProtocol::Linux64;
        let data = segment(DATA_SELECTOR, 0x3, 1, false);
        sregs.cs = segment(CODE_SELECTOR, 0xB, 1, long);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, g: 0, db: 0, ..segment(TSS_SELECTOR, 0xB, 0, false) };
        sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
        sregs.gdt = kvm_dtable { base: GDT_START, limit: 6 * 8 - 1, ..Default::default() };
        sregs.idt = kvm_dtable::default();
        (sregs.cr2, sregs.cr3, sregs.cr4, sregs.cr8) = (0, 0, 0, 0);
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.efer = 0;
        if long {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }

    /// The GDT's bytes, for [`GDT_START`]: null, null, code, data and a TSS descriptor of two slots.
    pub(super) fn gdt(&self) -> Vec<u8> {
        let code = if self.protocol == BootProtocol::Linux64 {
            0x00AF_9B00_0000_FFFF
        } else {
            0x00CF_9B00_0000_FFFF
        };
        let entries: [u64; 6] = [0, 0, code, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067, 0];
        entries.iter().flat_map(|e| e.to_le_bytes()).collect()
    }
}

/// A flat segment; `kind` is its type, `s` 1 for code and data.
fn segment(selector: u16, kind: u8, s: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The pages of an identity map of the low 4 GiB with 2 MiB pages, for [`PAGE_TABLES`]. 1 GiB pages would be
/// fewer entries, but need the guest's `pdpe1gb` bit and some hypervisors refuse them.
pub(super) fn page_tables() -> Vec<u8> {
    let pdpt = PAGE_TABLES + PAGE_SIZE;
    let directory = |n: u64| pdpt + (1 + n) * PAGE_SIZE;
    let pml4 = (0..ENTRIES).map(|n| if n == 0 { pdpt | PTE_TABLE } else { 0 });
    let pdpt_entries = (0..ENTRIES).map(|n| if n < DIRECTORIES { directory(n) | PTE_TABLE } else { 0 });
    let leaves = (0..DIRECTORIES * ENTRIES).map(|n| (n * LARGE_PAGE) | PTE_LARGE);
    pml4.chain(pdpt_entries).chain(leaves).flat_map(u64::to_le_bytes).collect()
}
