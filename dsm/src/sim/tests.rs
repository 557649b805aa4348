use super::{SimOptions, run};

#[test]
fn a_few_hundred_seeds_are_clean() {
    let report = run(&SimOptions { seeds: 400, first_seed: 1, ..SimOptions::default() });
    for failure in &report.failures {
        println!("seed {}: {}\n{}", failure.seed, failure.what, failure.trace);
    }
    println!("{:?}, {:.1} s", report.tally, report.seconds);
    assert!(report.is_clean());
    let t = report.tally;
    let rare = [
        t.accesses,
        t.faults,
        t.frames,
        t.holds,
        t.pauses,
        t.exists,
        t.again,
        t.full,
        t.fatal,
        t.aheads,
        t.yields,
        t.rests,
        t.evictions,
        t.rehomed,
        t.hints,
        t.declined,
        t.runs,
        t.resumed,
    ];
    assert!(rare.iter().all(|n| *n > 0), "something never happened: {t:?}");
}

#[test]
fn a_seed_is_one_story() {
    let tell = |seed| {
        let one = SimOptions { seeds: 1, first_seed: seed, trace: true, ..SimOptions::default() };
        run(&one).trace
    };
    let story = tell(5);
    assert!(story.lines().count() > 100, "{story}");
    assert_eq!(story, tell(5));
    assert_ne!(story, tell(6));
}
