use super::*;
use crate::acpi::{ACPI_START, AcpiTables};
use crate::layout::HIGH_RAM_START;
use dsm::addr::{HomeRange, MemberId, PAGE_SIZE};
use proptest::prelude::*;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;

fn range(start: u64, len: u64, home: u16) -> HomeRange {
    HomeRange { start, len, home: MemberId(home) }
}

fn tables() -> AcpiTables {
    AcpiTables { rsdp: ACPI_START, gpa: ACPI_START, bytes: vec![0x55; 100] }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of one setup sector with `code` bytes of payload, as Linux 6.1 would say it.
fn bzimage(code: usize) -> Vec<u8> {
    let mut f = vec![0; 1024];
    put(&mut f, 0x1F1, &[1]);
    put(&mut f, 0x1F4, &u32::try_from(code / 16).unwrap().to_le_bytes());
    put(&mut f, 0x1FE, &0xAA55u16.to_le_bytes());
    put(&mut f, 0x200, &[0xEB, 0x6A]);
    put(&mut f, 0x202, b"HdrS");
    put(&mut f, 0x206, &0x020Fu16.to_le_bytes());
    put(&mut f, 0x211, &[1]);
    put(&mut f, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut f, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut f, 0x234, &[1]);
    put(&mut f, 0x236, &0x7Fu16.to_le_bytes());
    put(&mut f, 0x238, &2047u32.to_le_bytes());
    put(&mut f, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut f, 0x260, &(32u32 << 20).to_le_bytes());
    f.resize(1024 + code, 0x90);
    f
}

struct Seg(u64, u64, Vec<u8>);

/// An ELF64 kernel with the given segments (address, bytes in memory, bytes) and optional PVH note.
fn elf(entry: u64, segs: &[Seg], pvh: Option<u32>) -> Vec<u8> {
    let mut f = vec![0; 64];
    put(&mut f, 0, b"\x7fELF\x02\x01\x01");
    put(&mut f, 16, &2u16.to_le_bytes());
    put(&mut f, 18, &62u16.to_le_bytes());
    put(&mut f, 24, &entry.to_le_bytes());
    put(&mut f, 32, &64u64.to_le_bytes());
    put(&mut f, 54, &56u16.to_le_bytes());
    let count = segs.len() + usize::from(pvh.is_some());
    put(&mut f, 56, &u16::try_from(count).unwrap().to_le_bytes());
    let mut at = 64 + 56 * count;
    let mut header = |f: &mut Vec<u8>, n: usize, kind: u32, addr: u64, memsz: u64, data: &[u8]| {
        let ph = 64 + 56 * n;
        put(f, ph, &kind.to_le_bytes());
        put(f, ph + 8, &(at as u64).to_le_bytes());
        put(f, ph + 16, &(addr | 0xFFFF_FFFF_8000_0000).to_le_bytes());
        put(f, ph + 24, &addr.to_le_bytes());
        put(f, ph + 32, &(data.len() as u64).to_le_bytes());
        put(f, ph + 40, &memsz.to_le_bytes());
        put(f, at, data);
        at += data.len();
    };
    for (n, Seg(addr, memsz, data)) in segs.iter().enumerate() {
        header(&mut f, n, 1, *addr, *memsz, data);
    }
    if let Some(pvh) = pvh {
        let mut note = Vec::new();
        for (kind, desc) in [(1u32, 7u32), (18, pvh)] {
            note.extend([4u32, 4, kind].iter().flat_map(|w| w.to_le_bytes()));
            note.extend(b"Xen\0");
            note.extend(desc.to_le_bytes());
        }
        header(&mut f, segs.len(), 4, 0, 0, &note);
    }
    f
}

fn vmlinux(pvh: Option<u32>) -> Vec<u8> {
    elf(
        0x100_0000,
        &[Seg(0x100_0000, 0x3000, vec![1; 0x1800]), Seg(0x100_2000 + 0x2000, 0x100, vec![2; 16])],
        pvh,
    )
}

type Memory = BTreeMap<u64, Vec<u8>>;

fn boot(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    memory: &[HomeRange],
) -> Result<(BootEntry, Memory), BootError> {
    let acpi = tables();
    let request = BootRequest { kernel, initrd, cmdline, memory, loader: MemberId(0), acpi: &acpi };
    let mut written: Memory = BTreeMap::new();
    let entry = load_kernel(&request, &mut |gpa, bytes| {
        assert_eq!(gpa % PAGE_SIZE, 0);
        let end = gpa + bytes.len() as u64;
        assert!(memory.iter().any(|r| r.start <= gpa && end <= r.end()), "{gpa:#x} crosses a home range");
        if let Some((prev, data)) = written.range(..=gpa).next_back() {
            assert!((prev + data.len() as u64).next_multiple_of(PAGE_SIZE) <= gpa, "page of {gpa:#x} twice");
        }
        written.insert(gpa, bytes.to_vec());
        Ok(())
    })?;
    Ok((entry, written))
}

fn read<const N: usize>(memory: &Memory, gpa: u64) -> [u8; N] {
    let (start, data) = memory.range(..=gpa).next_back().unwrap();
    let at = usize::try_from(gpa - start).unwrap();
    data[at..at + N].try_into().unwrap()
}

fn u32_at(memory: &Memory, gpa: u64) -> u32 {
    u32::from_le_bytes(read(memory, gpa))
}

fn u64_at(memory: &Memory, gpa: u64) -> u64 {
    u64::from_le_bytes(read(memory, gpa))
}

#[test]
fn bzimage_boots_through_the_zero_page() {
    let memory = [range(0, 64 * MIB, 0), range(64 * MIB, 64 * MIB, 1)];
    let (entry, mem) = boot(&bzimage(4096), Some(&[7; 5000]), "console=ttyS0", &memory).unwrap();
    assert_eq!(entry, BootEntry { protocol: BootProtocol::Linux64, rip: 0x10_0200 });
    assert_eq!(entry.regs().rsi, ZERO_PAGE);
    assert_eq!(read::<14>(&mem, CMDLINE_START), *b"console=ttyS0\0");
    // mov dx, 0x602; mov al, 1; out dx, al at FFFF:0000.
    assert_eq!(read::<6>(&mem, 0xF_FFF0), [0xBA, 0x02, 0x06, 0xB0, 1, 0xEE]);
    assert_eq!(read::<4>(&mem, KERNEL_START), [0x90; 4]);
    assert_eq!(u64_at(&mem, ZERO_PAGE + 0x70), ACPI_START);
    assert_eq!(u32_at(&mem, ZERO_PAGE + 0x228), 0x2_0000);
    // The initrd is at the top of the loading member's RAM, not of all RAM.
    assert_eq!(u64::from(u32_at(&mem, ZERO_PAGE + 0x218)), 64 * MIB - 8192);
    assert_eq!(u32_at(&mem, ZERO_PAGE + 0x21C), 5000);
    assert_eq!(read::<4>(&mem, 64 * MIB - 8192), [7; 4]);
    // e820: low RAM, reserved, one merged range.
    assert_eq!(read::<1>(&mem, ZERO_PAGE + 0x1E8), [3]);
    assert_eq!(u64_at(&mem, ZERO_PAGE + 0x2D0 + 40), MIB);
    assert_eq!(u64_at(&mem, ZERO_PAGE + 0x2D0 + 48), 127 * MIB);
    // Page tables map 1:1 with 2 MiB pages.
    assert_eq!(u64_at(&mem, PAGE_TABLES) & !0xFFF, PAGE_TABLES + 4096);
    assert_eq!(u64_at(&mem, PAGE_TABLES + 4096 + 24) & !0xFFF, PAGE_TABLES + 5 * 4096);
    assert_eq!(u64_at(&mem, PAGE_TABLES + 2 * 4096 + 8), 0x20_00E3);
    assert_eq!(u64_at(&mem, PAGE_TABLES + 6 * 4096 - 8), (1 << 32) - 0x20_0000 + 0xE3);
}

#[test]
fn initrd_stays_below_the_kernels_limit_and_the_hole() {
    let memory = [range(0, 3 << 30, 0), range(HIGH_RAM_START, 1 << 30, 1)];
    let (_, mem) = boot(&bzimage(4096), Some(&[7; 4096]), "", &memory).unwrap();
    assert_eq!(u32_at(&mem, ZERO_PAGE + 0x218), 0x7FFF_F000);
    let (_, mem) = boot(&vmlinux(None), Some(&[7; 4096]), "", &memory).unwrap();
    assert_eq!(u32_at(&mem, ZERO_PAGE + 0x218), 0xBFFF_F000);
    // The loading member has no RAM beyond the kernel: any RAM will do.
    let memory = [range(0, 20 * MIB, 0), range(20 * MIB, 80 * MIB, 1)];
    let (_, mem) = boot(&bzimage(4096), Some(&[7; 4096]), "", &memory).unwrap();
    assert_eq!(u64::from(u32_at(&mem, ZERO_PAGE + 0x218)), 100 * MIB - 4096);
}

#[test]
fn pvh_boots_through_start_info() {
    let memory = [range(0, 32 * MIB, 0), range(HIGH_RAM_START, 32 * MIB, 1)];
    let (entry, mem) = boot(&vmlinux(Some(0x100_0010)), Some(b"rd"), "x=1", &memory).unwrap();
    assert_eq!(entry, BootEntry { protocol: BootProtocol::Pvh, rip: 0x100_0010 });
    assert_eq!(entry.regs().rbx, START_INFO);
    assert_eq!(u32_at(&mem, START_INFO), 0x336e_c578);
    let modlist = u64_at(&mem, START_INFO + 16);
    assert_eq!((u64_at(&mem, modlist), u64_at(&mem, modlist + 8)), (32 * MIB - 4096, 2));
    assert_eq!(u64_at(&mem, START_INFO + 24), CMDLINE_START);
    assert_eq!(u64_at(&mem, START_INFO + 32), ACPI_START);
    let memmap = u64_at(&mem, START_INFO + 40);
    assert_eq!(u32_at(&mem, START_INFO + 48), 4);
    assert_eq!(u64_at(&mem, memmap + 3 * 24), HIGH_RAM_START);
    assert_eq!(read::<16>(&mem, 0x100_4000), [2; 16]);
}

#[test]
fn segments_that_share_a_page_are_one_write() {
    let segs = [Seg(0x20_0010, 16, vec![1; 16]), Seg(0x20_0100, 8192, vec![2; 16])];
    let (entry, mem) = boot(&elf(0x20_0010, &segs, None), None, "", &[range(0, 8 * MIB, 0)]).unwrap();
    assert_eq!(entry.rip, 0x20_0010);
    assert_eq!(read::<18>(&mem, 0x20_000F)[..2], [0, 1]);
    assert_eq!(read::<2>(&mem, 0x20_00FF), [0, 2]);
}

#[test]
fn virtual_entry_is_translated() {
    let (entry, _) = boot(
        &elf(0xFFFF_FFFF_8100_0008, &[Seg(0x100_0000, 64, vec![1; 64])], None),
        None,
        "",
        &[range(0, 32 * MIB, 0)],
    )
    .unwrap();
    assert_eq!(entry.rip, 0x100_0008);
}

/// Name, kernel, initrd, command line, memory, and what the error says.
type BadCase = (&'static str, Vec<u8>, Option<Vec<u8>>, &'static str, Vec<HomeRange>, &'static str);

#[test]
fn bad_input_gives_one_clear_error() {
    let small = || vec![range(0, 8 * MIB, 0)];
    let first = range(0, 64 * MIB, 0);
    let ram = || vec![first];
    let long: &str = "a".repeat(2048).leak();
    let mut old = bzimage(4096);
    put(&mut old, 0x206, &0x0209u16.to_le_bytes());
    let mut no64 = bzimage(4096);
    put(&mut no64, 0x236, &[0]);
    let mut wild = bzimage(4096);
    put(&mut wild, 0x230, &[0; 4]);
    let mut not_x86 = vmlinux(None);
    put(&mut not_x86, 18, &[183]);
    let one = |addr, memsz, data| elf(addr, &[Seg(addr, memsz, data)], None);
    let overlap = elf(0x20_0000, &[Seg(0x20_0000, 64, vec![1; 64]), Seg(0x20_0020, 64, vec![1; 64])], None);
    let cases: Vec<BadCase> = vec![
        ("empty kernel", vec![], None, "", ram(), "kernel is empty"),
        ("text file", b"#!/bin/sh\necho no kernel".to_vec(), None, "", ram(), "neither a bzImage nor an ELF"),
        ("gzip", vec![0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0], None, "", ram(), "[1f, 8b"),
        (
            "bzImage cut in the header",
            bzimage(4096)[..0x220].to_vec(),
            None,
            "",
            ram(),
            "truncated: setup header",
        ),
        (
            "bzImage cut in the code",
            bzimage(4096)[..3000].to_vec(),
            None,
            "",
            ram(),
            "truncated: protected-mode",
        ),
        (
            "bzImage cut by one",
            bzimage(4096)[..5119].to_vec(),
            None,
            "",
            ram(),
            "needs 5120 bytes, the file has 5119",
        ),
        ("bzImage without code", bzimage(0), None, "", ram(), "its code has 0 bytes"),
        ("bzImage of 2.9", old, None, "", ram(), "boot protocol 2.09"),
        ("bzImage of 32 bit", no64, None, "", ram(), "no 64-bit entry"),
        ("bzImage alignment", wild, None, "", ram(), "alignment 0x0"),
        ("bzImage too large", bzimage(4096), None, "", small(), "needs RAM from 0x100000 to 0x3000000"),
        ("ELF cut in the header", vmlinux(None)[..40].to_vec(), None, "", ram(), "truncated: ELF header"),
        (
            "ELF cut in the table",
            vmlinux(None)[..100].to_vec(),
            None,
            "",
            ram(),
            "truncated: program headers",
        ),
        ("ELF cut in a segment", vmlinux(None)[..0x900].to_vec(), None, "", ram(), "truncated: segment"),
        ("ELF of another machine", not_x86, None, "", ram(), "not for x86-64"),
        ("ELF too large", vmlinux(None), None, "", small(), "needs RAM from 0x1000000"),
        ("ELF in the hole", one(0xD000_0000, 64, vec![1; 64]), None, "", ram(), "needs RAM from 0xd0000000"),
        ("ELF too low", one(0x8000, 64, vec![1; 64]), None, "", ram(), "a segment at 0x8000"),
        ("ELF overflow", one(u64::MAX - 8, 64, vec![1; 64]), None, "", ram(), "overflows"),
        ("ELF file > memory", one(0x20_0000, 8, vec![1; 64]), None, "", ram(), "larger in the file"),
        ("ELF overlap", overlap, None, "", ram(), "segments overlap at 0x200020"),
        (
            "ELF entry",
            elf(0x10, &[Seg(0x20_0000, 8, vec![1; 8])], None),
            None,
            "",
            ram(),
            "entry 0x10 is in no",
        ),
        ("ELF PVH entry", vmlinux(Some(0x10)), None, "", ram(), "PVH note's entry 0x10"),
        ("ELF no segments", elf(0, &[], None), None, "", ram(), "impossible program headers"),
        ("initrd empty", bzimage(4096), Some(vec![]), "", ram(), "initrd is empty"),
        (
            "initrd too large",
            bzimage(4096),
            Some(vec![0; 17 << 20]),
            "",
            ram(),
            "initrd of 17825792 bytes does not fit",
        ),
        ("initrd larger than RAM", bzimage(4096), Some(vec![0; 65 << 20]), "", ram(), "does not fit"),
        ("cmdline bzImage", bzimage(4096), None, long, ram(), "has 2048 bytes, the kernel takes 2047"),
        ("cmdline ELF", vmlinux(None), None, long, ram(), "has 2048 bytes, the kernel takes 2047"),
        ("cmdline NUL", vmlinux(None), None, "a\0b", ram(), "control character '\\0' at byte 1"),
        ("no RAM", vmlinux(None), None, "", vec![], "there must be RAM from 0"),
        (
            "RAM not from 0",
            vmlinux(None),
            None,
            "",
            vec![range(MIB, 64 * MIB, 0)],
            "there must be RAM from 0",
        ),
        ("RAM in the hole", vmlinux(None), None, "", vec![range(0, 0xC100_0000, 0)], "the hole below 4 GiB"),
        (
            "RAM unaligned",
            vmlinux(None),
            None,
            "",
            vec![range(0, 64 * MIB + 5, 0)],
            "not a multiple of a page",
        ),
        ("RAM overlaps", vmlinux(None), None, "", vec![first, range(MIB, MIB, 1)], "overlaps"),
        ("RAM overflows", vmlinux(None), None, "", vec![first, range(!4095, 8192, 1)], "overflows"),
    ];
    for (name, kernel, initrd, cmdline, memory, want) in cases {
        match boot(&kernel, initrd.as_deref(), cmdline, &memory) {
            Ok(_) => panic!("{name}: no error"),
            Err(e) => assert!(e.to_string().contains(want), "{name}: {e}"),
        }
    }
}

#[test]
fn preload_errors_name_the_address() {
    let acpi = tables();
    let memory = [range(0, 64 * MIB, 0)];
    let kernel = vmlinux(None);
    let request = BootRequest {
        kernel: &kernel,
        initrd: None,
        cmdline: "",
        memory: &memory,
        loader: MemberId(0),
        acpi: &acpi,
    };
    let e = load_kernel(&request, &mut |_, _| Err("peer gone".into())).unwrap_err();
    assert_eq!(e.to_string(), "cannot write guest memory at 0x1000: peer gone");
}

#[test]
fn long_mode_registers_are_consistent() {
    let mut sregs = kvm_bindings::kvm_sregs { apic_base: 0xFEE0_0900, ..Default::default() };
    BootEntry { protocol: BootProtocol::Linux64, rip: 0x10_0200 }.apply_sregs(&mut sregs);
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer, sregs.cr3), (0x8000_0011, 0x20, 0x500, PAGE_TABLES));
    assert_eq!(sregs.apic_base, 0xFEE0_0900);
    BootEntry { protocol: BootProtocol::Pvh, rip: 0x100_0000 }.apply_sregs(&mut sregs);
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cr0, sregs.efer), (0, 1, 0x11, 0));
}

/// Set `SPANVM_TEST_KERNEL` to a distribution's vmlinuz to try it; skipped without.
#[test]
fn a_distribution_kernel_is_accepted() {
    let Some(path) = std::env::var_os("SPANVM_TEST_KERNEL") else {
        eprintln!("skipped: SPANVM_TEST_KERNEL is not set");
        return;
    };
    let kernel = std::fs::read(path).unwrap();
    let (entry, mem) =
        boot(&kernel, Some(&[1; 100_000]), "console=ttyS0", &[range(0, 256 * MIB, 0)]).unwrap();
    assert!(entry.rip >= KERNEL_START);
    assert!(mem.len() >= 6);
    let cut = &kernel[..kernel.len() / 2];
    assert!(matches!(boot(cut, None, "", &[range(0, 256 * MIB, 0)]), Err(BootError::Truncated { .. })));
}

proptest! {
    #[test]
    fn damaged_headers_never_panic(at in 0usize..0x280, byte: u8, at2 in 0usize..300, byte2: u8, cut in 0usize..6000) {
        let memory = [range(0, 64 * MIB, 0)];
        let mut image = bzimage(4096);
        image[at] = byte;
        image[at2] = byte2;
        let _ = boot(&image[..cut.min(image.len())], Some(b"x"), "", &memory);
        let _ = boot(&image, Some(b"x"), "", &memory);
        let mut image = vmlinux(Some(0x100_0010));
        let len = image.len();
        image[at % len] = byte;
        image[at2 % len] = byte2;
        let _ = boot(&image[..cut.min(len)], Some(b"x"), "", &memory);
        let _ = boot(&image, Some(b"x"), "", &memory);
    }
}
