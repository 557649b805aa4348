use super::*;
use crate::devices::{DeviceSpec, spec::windows};
use crate::topology::MemberDesc;
use dsm::addr::{Epoch, HomeRange, MemberId};
use std::collections::BTreeMap;
use std::process::Command;

fn topology(members: u16, vcpus: u16) -> Topology {
    let share = 64 << 20;
    Topology {
        epoch: Epoch(1),
        members: (0..members)
            .map(|n| MemberDesc {
                id: MemberId(n),
                host: format!("h{n}"),
                addr: "127.0.0.1:1".parse().unwrap(),
            })
            .collect(),
        vcpus: (0..vcpus).map(|n| MemberId(n % members)).collect(),
        memory: (0..members)
            .map(|n| HomeRange { start: u64::from(n) * share, len: share, home: MemberId(n) })
            .collect(),
        distances: (0..members)
            .map(|from| (0..members).map(|to| if from == to { 10 } else { 40 }).collect())
            .collect(),
    }
}

fn devices() -> Vec<DeviceWindow> {
    windows(&[
        DeviceSpec::Serial { member: MemberId(0), log: None },
        DeviceSpec::Blk { member: MemberId(1), path: "/x".into(), readonly: false },
        DeviceSpec::Rng { member: MemberId(0) },
    ])
    .unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// All tables by signature, found as an operating system does: from the RSDP on.
fn walk(tables: &AcpiTables) -> BTreeMap<String, Vec<u8>> {
    let at = |gpa: u64| &tables.bytes[usize::try_from(gpa - tables.gpa).unwrap()..];
    let table = |gpa: u64| {
        let bytes = at(gpa);
        let bytes = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(bytes), 0, "checksum of {:?}", &bytes[..4]);
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes.to_vec())
    };
    let rsdp = &at(tables.rsdp)[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15]), (0, 0, 2));
    let (_, xsdt) = table(u64_at(rsdp, 24));
    let mut found: BTreeMap<_, _> = (36..xsdt.len()).step_by(8).map(|n| table(u64_at(&xsdt, n))).collect();
    let dsdt = u64_at(&found["FACP"], 140);
    found.extend([table(dsdt)]);
    found
}

#[test]
fn every_table_is_linked_and_sums_to_zero() {
    let found = walk(&build(&topology(2, 4), &devices()).unwrap());
    assert_eq!(found.keys().collect::<Vec<_>>(), ["APIC", "DSDT", "FACP", "SLIT", "SRAT"]);
    let fadt = &found["FACP"];
    assert_eq!(fadt.len(), 276);
    assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(fadt[116..120], [1, 8, 0, 1]);
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0x602, 1));
    assert_eq!((u64_at(fadt, 248), u64_at(fadt, 260)), (0x600, 0x601));
    let slit = &found["SLIT"];
    assert_eq!((u64_at(slit, 36), &slit[44..]), (2, &[10, 40, 40, 10][..]));
}

#[test]
fn processors_beyond_254_use_x2apic_structures() {
    let found = walk(&build(&topology(3, 300), &devices()).unwrap());
    let entries = |table: &[u8], mut at: usize| {
        let mut list = Vec::new();
        while at < table.len() {
            let len = usize::from(table[at + 1]);
            list.push(table[at..at + len].to_vec());
            at += len;
        }
        list
    };
    let madt = entries(&found["APIC"], 44);
    assert_eq!(madt.len(), 301);
    assert_eq!(madt[254], [0, 8, 254, 254, 1, 0, 0, 0]);
    assert_eq!(madt[255], [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]);
    assert_eq!(madt[300], [1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0]);
    assert_eq!(u32_at(&found["APIC"], 40), 0);
    let srat = entries(&found["SRAT"], 48);
    assert_eq!(srat.len(), 303);
    assert_eq!(srat[4], [0, 16, 1, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((u32_at(&srat[256], 4), u32_at(&srat[256], 8), u32_at(&srat[256], 12)), (1, 256, 1));
    assert_eq!((srat[302][0], u32_at(&srat[302], 2), u64_at(&srat[302], 8)), (1, 2, 128 << 20));
}

#[test]
fn impossible_machines_are_refused() {
    let mut t = topology(2, 2);
    t.distances[1][0] = 10;
    assert_eq!(build(&t, &[]).unwrap_err(), AcpiError::Distance { from: 1, to: 0 });
    t.distances.pop();
    assert_eq!(build(&t, &[]).unwrap_err(), AcpiError::Distance { from: 1, to: 0 });
    assert!(matches!(build(&topology(1, 4096), &[]), Err(AcpiError::TooLarge { .. })));
    assert_eq!(build(&topology(1, 5000), &[]), Err(AcpiError::TooManyCpus(5000)));
    assert!(build(&topology(64, 1024), &devices()).is_ok());
}

/// The reference implementation's disassembler accepts every table.
#[test]
fn iasl_accepts_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl (package acpica-tools) is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in walk(&build(&topology(2, 300), &devices()).unwrap()) {
        let path = dir.path().join(format!("{name}.dat"));
        std::fs::write(&path, bytes).unwrap();
        let out = Command::new("iasl").arg("-d").arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{name}: {text}");
        let bad = text.lines().find(|l| l.contains("Error") || l.contains("Warning") || l.contains("nvalid"));
        assert!(bad.is_none(), "{name}: {text}");
        let dsl = std::fs::read_to_string(path.with_extension("dsl")).unwrap();
        if name == "DSDT" {
            for want in
                ["PNP0501", "LNRO0005", "ACPI0007", "_S5", "0xD0000000", "Interrupt (ResourceConsumer, Edge"]
            {
                assert!(dsl.contains(want), "{want} is missing in\n{dsl}");
            }
            // And it compiles again.
            let mut compile = Command::new("iasl");
            compile.arg("-p").arg(dir.path().join("again")).arg(path.with_extension("dsl"));
            let out = compile.output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        }
    }
}
