//! DSDT: `\_S5`, the processors, and every device with its window and interrupt.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::devices::{DeviceWindow, WindowKind};
use crate::layout::S5_SLEEP_TYPE;
use crate::topology::Topology;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, aml};

/// Revision 2: 64-bit integers.
const DSDT_REVISION: u8 = 2;
const HEADER_LEN: u32 = 36;

/// The DSDT's bytes.
pub fn dsdt(topology: &Topology, windows: &[DeviceWindow]) -> Vec<u8> {
    let mut aml_bytes = Vec::new();
    let zero = &aml::ZERO;
    Name::new("\\_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, zero, zero]))
        .to_aml_bytes(&mut aml_bytes);

    let cpus: Vec<Cpu> =
        (0u32..).zip(&topology.vcpus).map(|(id, member)| Cpu { id, domain: u32::from(member.0) }).collect();
    let mut virtio = 0;
    let devices: Vec<Peripheral> = windows
        .iter()
        .map(|window| {
            let index = virtio;
            virtio += u32::from(window.kind == WindowKind::Virtio);
            Peripheral { window: *window, index }
        })
        .collect();
    let mut children: Vec<&dyn Aml> = Vec::new();
    children.extend(cpus.iter().map(|c| c as &dyn Aml));
    children.extend(devices.iter().map(|d| d as &dyn Aml));
    Scope::new("\\_SB_".into(), children).to_aml_bytes(&mut aml_bytes);

    let mut sdt = Sdt::new(*b"DSDT", HEADER_LEN, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(&aml_bytes);
    sdt.as_slice().to_vec()
}

/// A processor device (ACPI 6.5, 8.4): `_UID` is the MADT's processor UID.
struct Cpu {
    id: u32,
    domain: u32,
}

impl Aml for Cpu {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let name = format!("C{:03X}", self.id);
        Device::new(
            name.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &self.id),
                &Name::new("_PXM".into(), &self.domain),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A device of a window; `index` counts the virtio windows.
struct Peripheral {
    window: DeviceWindow,
    index: u32,
}

impl Aml for Peripheral {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let DeviceWindow { start, len, gsi, member, kind, .. } = self.window;
        let domain = Name::new("_PXM".into(), &u32::from(member.0));
        // Edge-triggered, active high, exclusive: the extended descriptor, because GSIs are not ISA IRQs here.
        let interrupt = Interrupt::new(true, true, false, false, gsi.unwrap_or_default());
        let first_port = u16::try_from(start).unwrap_or_default();
        let ports = IO::new(first_port, first_port, 0, u8::try_from(len).unwrap_or_default());
        match kind {
            WindowKind::Serial => Device::new(
                "COM1".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &aml::ONE),
                    &domain,
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
                ],
            )
            .to_aml_bytes(sink),
            WindowKind::Virtio => {
                let low = |value: u64| u32::try_from(value).unwrap_or_default();
                let window = Memory32Fixed::new(true, low(start), low(len));
                Device::new(
                    format!("V{:03X}", self.index).as_str().into(),
                    vec![
                        &Name::new("_HID".into(), &"LNRO0005"),
                        &Name::new("_UID".into(), &self.index),
                        &domain,
                        &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window, &interrupt])),
                    ],
                )
                .to_aml_bytes(sink);
            }
            // Without it Linux assumes an RTC with IRQ 8.
            WindowKind::Rtc => Device::new(
                "RTC0".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
                ],
            )
            .to_aml_bytes(sink),
            // Described by the FADT; not described because it is not there.
            WindowKind::Power | WindowKind::Pit => {}
        }
    }
}
