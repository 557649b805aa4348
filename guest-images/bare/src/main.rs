//! A guest without an operating system: starts its CPUs, runs the tests that `test=` names, reports on COM1 as lines
//! `BARE <test> PASS|FAIL key=value ...`, and powers off. See the README in this folder.
#![no_std]
#![no_main]

mod apic;
mod boot;
mod console;
mod disk;
mod env;
mod machine;
mod mem_functions;
mod smp;
mod tests;

use console::Line;
use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::Ordering;
use env::{Env, Failure, bad};

/// First Rust code of every CPU, at CPL 3.
#[unsafe(no_mangle)]
extern "C" fn rust_main(cpu: u64) -> ! {
    if cpu != 0 {
        smp::serve(bare_support::cast::index(cpu));
    }
    if let Err(failure) = first_cpu() {
        say!("BARE start FAIL cpu={} error=\"{}\"", failure.cpu, failure.what);
    }
    machine::power_off()
}

/// Holds the environment for the life of the guest.
struct Place(UnsafeCell<MaybeUninit<Env>>);

// SAFETY: written once, by the first CPU, before any other runs.
unsafe impl Sync for Place {}

fn first_cpu() -> Result<(), Failure> {
    static ENV: Place = Place(UnsafeCell::new(MaybeUninit::uninit()));
    let read = Env::read(boot::start_info.load(Ordering::Relaxed).into())?;
    // SAFETY: see `Place`; this is that one write.
    let env: &'static Env = unsafe { (*ENV.0.get()).write(read) };
    boot::xapic_mode.store((env.apic == apic::Mode::X).into(), Ordering::Relaxed);
    env.apic.enable();
    let started = machine::tsc();
    smp::start(env)?;
    say!(
        "BARE start PASS cpus={} apic={} id={} tsc_khz={} tsc_from={} us={}",
        env.cpus,
        env.apic.name(),
        env.apic.id(),
        env.khz,
        env.khz_from,
        env.us(machine::tsc().saturating_sub(started))
    );
    let names = env.cmdline.text("test").ok_or(bad("no test= on the command line"))?;
    for name in names.split(',') {
        let mut line = Line::new();
        let verdict = match tests::find(name) {
            Some(test) => test(env, &mut line),
            None => Err(bad("no such test")),
        };
        match verdict {
            Ok(true) => say!("BARE {name} PASS cpus={}{}", env.cpus, line.as_str()),
            Ok(false) => say!("BARE {name} FAIL cpus={}{}", env.cpus, line.as_str()),
            // Some CPU may still be busy with it: nothing that follows could be trusted.
            Err(f) => {
                say!("BARE {name} FAIL cpu={} error=\"{}\"{}", f.cpu, f.what, line.as_str());
                break;
            }
        }
    }
    Ok(())
}

/// Where `traps.s` sends an exception that nobody asked for.
#[unsafe(no_mangle)]
extern "C" fn rust_fault(vector: u64, error: u64, rip: u64, cr2: u64, cs: u64) -> ! {
    say!("BARE fault FAIL vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x} cs={cs:#x}");
    machine::power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    say!("BARE panic FAIL {info}");
    machine::power_off()
}
