//! What the manual says, section by section.

use super::registers::{X2APIC_MSR_FIRST, X2APIC_MSR_ICR};
use super::*;
use crate::interrupts::{DeliveryMode, Destination};
use proptest::prelude::*;

const NOW: u64 = 1_000_000;

fn xapic(id: u32) -> LocalApic {
    let mut apic = LocalApic::new(id, id == 0);
    assert_eq!(write(&mut apic, 0xF0, 0x1FF), ApicAction::None);
    apic
}

fn x2apic(id: u32) -> LocalApic {
    let mut apic = xapic(id);
    assert_eq!(apic.set_base(apic.base() | BASE_X2APIC), Ok(ApicAction::None));
    apic
}

fn write(apic: &mut LocalApic, offset: u64, value: u32) -> ApicAction {
    apic.mmio_write(offset, &value.to_le_bytes(), NOW)
}

fn read(apic: &mut LocalApic, offset: u64) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset, &mut data, NOW);
    u32::from_le_bytes(data)
}

fn sent(action: ApicAction) -> InterruptMessage {
    match action {
        ApicAction::Send(message) => message,
        other => panic!("no message but {other:?}"),
    }
}

/// 11.4.7.1: state after power-up.
#[test]
fn power_up_state() {
    let mut apic = LocalApic::new(3, false);
    assert_eq!(read(&mut apic, 0x20), 3 << 24);
    assert_eq!(read(&mut apic, 0x30), 0x0005_0014);
    assert_eq!(read(&mut apic, 0xE0), u32::MAX);
    assert_eq!(read(&mut apic, 0xF0), 0xFF);
    for entry in (0x320..=0x370).step_by(0x10) {
        assert_eq!(read(&mut apic, entry), 0x1_0000, "LVT {entry:#x}");
    }
    assert!(!apic.accept(0x40, false), "software-disabled");
}

/// 11.8.3, 11.8.4: the higher class interrupts the lower, not the other way round, and EOI lets the rest in.
#[test]
fn priority_and_service() {
    let mut apic = xapic(0);
    apic.accept(0x45, false);
    assert_eq!(apic.pending_vector(), Some(0x45));
    apic.start_service(0x45);
    assert_eq!(apic.ppr(), 0x40);
    apic.accept(0x4F, false);
    assert_eq!(apic.pending_vector(), None, "same class");
    apic.accept(0x51, false);
    assert_eq!(apic.pending_vector(), Some(0x51));
    apic.start_service(0x51);
    assert_eq!(read(&mut apic, 0x100 + 0x20), 1 << (0x51 - 0x40) | 1 << 5);
    assert_eq!(write(&mut apic, 0xB0, 0), ApicAction::None);
    assert_eq!(apic.ppr(), 0x40);
    let _ = write(&mut apic, 0xB0, 0);
    assert_eq!(apic.pending_vector(), Some(0x4F));
}

/// 11.8.3.1, 11.8.6: TPR and CR8 are one register.
#[test]
fn task_priority_masks_and_cr8_is_its_class() {
    let mut apic = xapic(0);
    apic.accept(0x45, false);
    apic.set_cr8(4);
    assert_eq!((apic.tpr(), apic.ppr(), apic.pending_vector()), (0x40, 0x40, None));
    let _ = write(&mut apic, 0x80, 0x3F);
    assert_eq!(apic.pending_vector(), Some(0x45));
    apic.set_cr8(3);
    assert_eq!(apic.tpr(), 0x3F, "same class: the low bits stay");
}

/// 11.8.5: only a level-triggered vector is told to the IOAPIC.
#[test]
fn eoi_of_a_level_triggered_vector_is_broadcast() {
    let mut apic = xapic(0);
    for (level, expected) in [(true, ApicAction::Eoi(0x60)), (false, ApicAction::None)] {
        apic.accept(0x60, level);
        apic.start_service(0x60);
        assert_eq!(write(&mut apic, 0xB0, 0), expected);
    }
    assert_eq!(write(&mut apic, 0xB0, 0), ApicAction::None, "nothing in service");
}

/// 11.6.1: ICR in xAPIC mode; the low half sends.
#[test]
fn xapic_ipis() {
    let mut apic = xapic(2);
    assert_eq!(write(&mut apic, 0x310, 5 << 24), ApicAction::None);
    let message = sent(write(&mut apic, 0x300, 0x4030));
    assert_eq!(message.destination, Destination::Physical(5));
    assert_eq!((message.vector, message.mode, message.source), (0x30, DeliveryMode::Fixed, Some(2)));
    let cases = [
        (0x0004_4030, Destination::Physical(2)),
        (0x0008_4030, Destination::All),
        (0x000C_4030, Destination::AllButSelf),
        (0x0000_4830, Destination::Logical(5)),
    ];
    for (icr, destination) in cases {
        assert_eq!(sent(write(&mut apic, 0x300, icr)).destination, destination, "{icr:#x}");
    }
    let _ = write(&mut apic, 0x310, 0xFF00_0000);
    assert_eq!(sent(write(&mut apic, 0x300, 0x4030)).destination, Destination::Physical(u32::MAX));
    assert_eq!(sent(write(&mut apic, 0x300, 0x4500)).mode, DeliveryMode::Init);
    assert!(sent(write(&mut apic, 0x300, 0xC500)).asserted);
    assert!(!sent(write(&mut apic, 0x300, 0x8500)).asserted, "INIT level de-assert");
    assert_eq!(sent(write(&mut apic, 0x300, 0x4699)).mode, DeliveryMode::Startup);
    assert_eq!(sent(write(&mut apic, 0x300, 0x4400)).mode, DeliveryMode::Nmi);
    assert_eq!(read(&mut apic, 0x300), 0x4400, "reads back, delivery status idle");
}

/// 11.12.9, 11.12.11: ICR is one 64-bit register in x2APIC mode, and SELF IPI is a register of its own.
#[test]
fn x2apic_ipis() {
    let mut apic = x2apic(2);
    let icr = |apic: &mut LocalApic, value| apic.msr_write(X2APIC_MSR_ICR, value, NOW);
    let message = sent(icr(&mut apic, 0x0001_0203_0000_00FD).expect("valid"));
    assert_eq!(message.destination, Destination::Physical(0x1_0203));
    let message = sent(icr(&mut apic, 0x0001_000F_0000_08FD).expect("valid"));
    assert_eq!(message.destination, Destination::Logical(0x1_000F));
    assert_eq!(apic.msr_read(X2APIC_MSR_ICR, NOW), Ok(0x0001_000F_0000_08FD));
    assert_eq!(icr(&mut apic, 1 << 20), Err(GeneralProtection));
    let message = sent(apic.msr_write(0x83F, 0x55, NOW).expect("valid"));
    assert_eq!((message.destination, message.vector), (Destination::Physical(2), 0x55));
    assert_eq!(apic.msr_read(X2APIC_MSR_ICR, NOW), Ok(0x0001_000F_0000_08FD), "SELF IPI leaves ICR alone");
}

/// 11.12.1.2: what is a fault in x2APIC mode.
#[test]
fn x2apic_faults() {
    let mut apic = x2apic(1);
    for msr in [0x800, 0x80C, 0x80E, 0x831, 0x83F, 0x80B, 0x8FF, 0x840] {
        assert_eq!(apic.msr_read(msr, NOW), Err(GeneralProtection), "read {msr:#x}");
    }
    for (msr, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x80B, 1),
        (0x80D, 0),
        (0x80E, 0),
        (0x810, 0),
        (0x820, 0),
        (0x828, 1),
        (0x839, 0),
        (0x808, 0x100),
        (0x80F, 1 << 32),
        (0x832, 1 << 20),
        (0x900, 0),
    ] {
        assert_eq!(apic.msr_write(msr, value, NOW), Err(GeneralProtection), "write {msr:#x}");
    }
    let mut apic = xapic(1);
    assert_eq!(apic.msr_read(0x802, NOW), Err(GeneralProtection), "not in x2APIC mode");
}

/// 11.12.10.2: LDR follows from the id; 11.6.2.2: flat and cluster models of xAPIC.
#[test]
fn logical_destinations() {
    let mut apic = x2apic(0x23);
    assert_eq!(apic.msr_read(0x80D, NOW), Ok(0x2_0008));
    for (mda, expected) in
        [(0x2_0008, true), (0x2_FFFF, true), (0x2_0004, false), (0x1_0008, false), (u32::MAX, true)]
    {
        assert_eq!(apic.matches_logical(mda), expected, "{mda:#x}");
    }
    let mut apic = xapic(1);
    let _ = write(&mut apic, 0xD0, 0x0200_0000);
    assert!(apic.matches_logical(0x02) && apic.matches_logical(0xFF) && !apic.matches_logical(0x01));
    let _ = write(&mut apic, 0xE0, 0x0FFF_FFFF);
    let _ = write(&mut apic, 0xD0, 0x3200_0000);
    assert!(apic.matches_logical(0x32) && apic.matches_logical(0xF2) && apic.matches_logical(0x3F));
    assert!(!apic.matches_logical(0x22) && !apic.matches_logical(0x31));
}

/// 11.12.5: mode transitions.
#[test]
fn mode_transitions() {
    let base = LAPIC_START;
    let (off, x, x2, bad) = (base, base | BASE_ENABLE, base | BASE_ENABLE | BASE_X2APIC, base | BASE_X2APIC);
    let cases = [
        (x, x2, true),
        (x, off, true),
        (x2, off, true),
        (off, x, true),
        (x2, x, false),
        (off, x2, false),
        (x, bad, false),
        (x2, bad, false),
        (x, x | 1 << 9, false),
        (x, x | 1 << 40, false),
        (x, x + 0x1000, false),
    ];
    for (from, to, allowed) in cases {
        let mut apic = LocalApic::new(1, false);
        apic.base = from;
        assert_eq!(apic.set_base(to).is_ok(), allowed, "{from:#x} -> {to:#x}");
    }
    let mut apic = x2apic(1);
    apic.accept(0x40, false);
    let _ = apic.set_base(off);
    assert_eq!(apic.pending_vector(), None);
    assert!(apic.irr.is_empty(), "switching off resets");
}

/// 11.4.7.2: software disable masks the LVT and stops acceptance.
#[test]
fn software_disable() {
    let mut apic = xapic(0);
    let _ = write(&mut apic, 0x350, 0x700);
    let _ = write(&mut apic, 0xF0, 0xFF);
    assert_eq!(read(&mut apic, 0x350), 0x1_0700);
    let _ = write(&mut apic, 0x350, 0x700);
    assert_eq!(read(&mut apic, 0x350), 0x1_0700, "can't be unmasked");
}

/// 11.5.3: errors latch on a write to ESR and raise the error LVT once.
#[test]
fn errors() {
    let mut apic = xapic(0);
    let _ = write(&mut apic, 0x370, 0xFE);
    assert_eq!(write(&mut apic, 0x300, 0x4005), ApicAction::None, "illegal vector is not sent");
    assert_eq!(read(&mut apic, 0x280), 0);
    let _ = write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 1 << 5);
    assert_eq!(apic.pending_vector(), Some(0xFE));
    read(&mut apic, 0x3F0);
    apic.accept(3, false);
    let _ = write(&mut apic, 0x280, 0);
    assert_eq!(read(&mut apic, 0x280), 1 << 6 | 1 << 7);
}

/// 11.5.4: one-shot and periodic counts, divide configuration (Figure 11-10).
#[test]
fn counting_timer() {
    let mut apic = xapic(0);
    for (encoding, divisor) in
        [(0b1011u32, 1u64), (0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128)]
    {
        let _ = write(&mut apic, 0x3E0, encoding);
        let _ = write(&mut apic, 0x320, 0x40);
        assert_eq!(write(&mut apic, 0x380, 100), ApicAction::TimerChanged);
        assert_eq!(apic.timer_deadline(), Some(NOW + 100 * divisor), "divide by {divisor}");
    }
    let _ = write(&mut apic, 0x3E0, 0b1011);
    let _ = write(&mut apic, 0x380, 100);
    assert_eq!(apic.current_count(NOW + 30), 70);
    assert!(!apic.timer_expire(NOW + 99));
    assert!(apic.timer_expire(NOW + 100));
    assert_eq!(apic.pending_vector(), Some(0x40));
    assert_eq!((apic.timer_deadline(), apic.current_count(NOW + 200)), (None, 0));

    let _ = write(&mut apic, 0x320, 0x2_0040);
    let _ = write(&mut apic, 0x380, 100);
    assert!(apic.timer_expire(NOW + 350));
    assert_eq!(apic.timer_deadline(), Some(NOW + 400), "late, but in phase");
    assert_eq!(apic.current_count(NOW + 420), 80);
    let _ = write(&mut apic, 0x380, 0);
    assert_eq!(apic.timer_deadline(), None);
}

/// 11.5.4.1: TSC-deadline mode.
#[test]
fn deadline_timer() {
    let mut apic = x2apic(0);
    assert_eq!(apic.set_tsc_deadline(5), ApicAction::None, "other mode: ignored");
    assert_eq!(apic.msr_write(0x832, 0x4_00EC, NOW), Ok(ApicAction::TimerChanged));
    assert_eq!(apic.set_tsc_deadline(NOW + 5), ApicAction::TimerChanged);
    assert_eq!((apic.timer_deadline(), apic.tsc_deadline()), (Some(NOW + 5), NOW + 5));
    assert_eq!(apic.msr_write(0x838, 77, NOW), Ok(ApicAction::None), "initial count is ignored");
    assert!(apic.timer_expire(NOW + 5));
    assert_eq!((apic.tsc_deadline(), apic.pending_vector()), (0, Some(0xEC)));
    let _ = apic.set_tsc_deadline(NOW + 9);
    let _ = apic.msr_write(0x832, 0x0_00EC, NOW);
    assert_eq!((apic.timer_deadline(), apic.tsc_deadline()), (None, 0), "leaving the mode disarms");
}

#[test]
fn masked_timer_that_expired_does_not_fire_when_unmasked() {
    let mut apic = xapic(0);
    let _ = write(&mut apic, 0x320, 0x1_0040);
    let _ = write(&mut apic, 0x380, 10);
    assert_eq!(apic.timer_deadline(), None);
    let _ = apic.mmio_write(0x320, &0x40u32.to_le_bytes(), NOW + 1000);
    assert_eq!(apic.timer_deadline(), None);
    assert!(!apic.timer_expire(NOW + 1001));
}

/// 11.4.7.3: INIT keeps the id and the mode, nothing else.
#[test]
fn init_reset() {
    let mut apic = x2apic(9);
    apic.accept(0x80, true);
    apic.init();
    assert!(apic.is_x2apic());
    assert_eq!((apic.id(), apic.pending_vector(), apic.svr), (9, None, 0xFF));
}

proptest! {
    /// Any sequence of accesses: no panic, PPR rules hold, and both views show the same state.
    #[test]
    fn any_access_keeps_the_rules(
        x2 in any::<bool>(),
        ops in proptest::collection::vec((0u8..6, any::<u16>(), any::<u64>()), 0..300),
    ) {
        let mut apic = if x2 { x2apic(5) } else { xapic(5) };
        let mut now = NOW;
        for (op, at, value) in ops {
            now = now.wrapping_add(value & 0xFFFF);
            let vector = u8::try_from(at & 0xFF).unwrap_or(0);
            match op {
                0 => { let _ = apic.mmio_write(u64::from(at & 0xFF0), &value.to_le_bytes()[..4], now); }
                1 => { let _ = apic.msr_write(X2APIC_MSR_FIRST + u32::from(at & 0xFF), value, now); }
                2 => { apic.accept(vector, value & 1 != 0); }
                3 => { apic.timer_expire(now); }
                4 => { let mut data = [0; 8]; apic.mmio_read(u64::from(at & 0xFFF), &mut data, now); }
                _ => { let _ = apic.set_tsc_deadline(value); }
            }
            if let Some(pending) = apic.pending_vector() {
                prop_assert!(pending >= 16 && pending >> 4 > apic.ppr() >> 4);
                if value & 2 != 0 {
                    apic.start_service(pending);
                    prop_assert_eq!(apic.ppr() >> 4, pending >> 4);
                    prop_assert!(apic.pending_vector().is_none_or(|next| next >> 4 > pending >> 4));
                }
            }
            prop_assert!(apic.timer_deadline().is_none() || apic.lvt[lvt::TIMER] & LVT_MASKED == 0);
        }
        // Every interrupt that is in service can be finished.
        let _ = apic.set_base(apic.base());
        for _ in 0..256 {
            let _ = apic.end_of_interrupt();
        }
        prop_assert!(apic.isr.is_empty());
    }
}
