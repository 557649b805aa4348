//! vCPUs that move between members while the bare-metal guest works: its results are exact.

mod cluster;

use cluster::Cluster;
use dsm::addr::MemberId;
use std::time::{Duration, Instant};
use vmm::member::pause::PauseError;
use vmm::member::travel::Departed;
use vmm::member::{MemberEvent, VmExit};

const LIMIT: Duration = Duration::from_secs(10);

/// Where the vCPUs are, and the next placement epoch: what a coordinator keeps.
struct Places {
    at: Vec<u16>,
    epoch: u64,
}

/// Moves vCPUs to a member as the coordinator does; `None` once the guest is over. Returns downtimes in nanoseconds.
fn migrate(cluster: &Cluster, places: &mut Places, vcpus: &[u32], to: u16) -> Option<Vec<u64>> {
    let members = &cluster.members;
    members[usize::from(to)].expect(vcpus).ok()?;
    let (epoch, mut news) = (places.epoch, Vec::new());
    places.epoch += 2;
    let was = places.at.clone();
    for from in 0u16..u16::try_from(members.len()).unwrap() {
        let here: Vec<_> = vcpus.iter().copied().filter(|v| was[*v as usize] == from).collect();
        for (vcpu, how) in members[usize::from(from)].depart(&here, MemberId(to), epoch, LIMIT) {
            match how {
                Departed::Moved { .. } => {
                    places.at[vcpu as usize] = to;
                    news.push((vcpu, MemberId(to), epoch));
                }
                _ if over(cluster) => return None,
                other => panic!("vCPU {vcpu}: {other:?}"),
            }
        }
    }
    Some(members.iter().flat_map(|m| m.placed(&news)).map(|(_, ns)| ns).collect())
}

/// The guest has powered off: its vCPUs' threads have ended.
fn over(cluster: &Cluster) -> bool {
    std::thread::sleep(Duration::from_millis(300));
    cluster.members.iter().any(|m| matches!(m.pause(LIMIT), Err(PauseError::Ended(_))))
}

fn moves_while(vcpus: &[u16], tests: &str, more: &str, every: Duration) {
    let Some(cluster) = Cluster::start(vcpus) else { return };
    let mut places = Places { at: vcpus.to_vec(), epoch: 1 };
    let mhz = cluster.members[0].plan().tsc_khz / 1000;
    let count = vcpus.len();
    cluster.boot(&format!("cpus={count} deadline=60 timer_mhz={mhz} test={tests} {more}"));
    let mut downtimes = Vec::new();
    let (mut round, start) = (0usize, Instant::now());
    while start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(every);
        let members = u16::try_from(cluster.members.len()).unwrap();
        let first = round % count;
        let to = (places.at[first] + 1 + u16::try_from(round / count % 2).unwrap() % (members - 1).max(1))
            % members;
        // Now one, now all that are elsewhere at once.
        let wanted = if round % 5 == 4 { (0..count).collect() } else { vec![first] };
        let group: Vec<u32> =
            wanted.iter().filter(|v| places.at[**v] != to).map(|v| u32::try_from(*v).unwrap()).collect();
        round += 1;
        match migrate(&cluster, &mut places, &group, to) {
            Some(times) => downtimes.extend(times),
            None => break,
        }
    }
    let ended = cluster.wait(Duration::from_secs(60));
    for test in tests.split(',') {
        let want = format!("BARE {test} PASS");
        assert!(
            ended.output.contains(&want),
            "no {want:?} after {} moves in\n{}\n{:?}",
            downtimes.len(),
            ended.output,
            ended.last
        );
    }
    assert!(ended.last.iter().all(|e| *e == MemberEvent::Exit(VmExit::PowerOff)), "{:?}", ended.last);
    downtimes.sort_unstable();
    let at = |part: usize| downtimes.get(downtimes.len() * part / 100).map_or(0, |ns| ns / 1000);
    eprintln!("{vcpus:?} {tests}: {} moves, downtime p50 {} us, p90 {} us", downtimes.len(), at(50), at(90));
    assert!(downtimes.len() > 5, "only {} moves", downtimes.len());
}

#[test]
fn between_two_members() {
    moves_while(
        &[0, 1],
        "counter,ipi,ipimodes,pages,private,tsc",
        "iterations=1000 rounds=20",
        Duration::from_millis(10),
    );
}

#[test]
fn timers_move_along() {
    for mode in ["deadline", "oneshot", "periodic"] {
        moves_while(&[0, 1], "timer", &format!("mode={mode} count=400"), Duration::from_millis(7));
    }
}

#[test]
fn among_three_members() {
    moves_while(
        &[0, 1, 2, 0],
        "ipimodes,counter,ipi,tsc",
        "iterations=1000 rounds=20",
        Duration::from_millis(10),
    );
}

#[test]
fn in_xapic_mode() {
    moves_while(
        &[0, 1],
        "ipi,ipimodes,timer",
        "apic=xapic iterations=700 rounds=10 count=100",
        Duration::from_millis(10),
    );
}

#[test]
fn the_memory_model_holds() {
    moves_while(
        &[0, 1],
        "litmus,litmus,litmus,litmus,litmus,litmus,litmus,litmus",
        "iterations=8000",
        Duration::from_millis(10),
    );
}
