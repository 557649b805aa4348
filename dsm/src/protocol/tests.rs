//! One transaction at a time: how many messages it takes, who sends what, and what is refused.

use super::cluster::{Cluster, Wrong, layout};
use super::hold::HoldConfig;
use super::pages::Share;
use super::properties::settle;
use super::{Command, Contents, Core, CoreConfig, Event, MemberSet, Msg, Right, Terms, Token};
use crate::addr::MemberId;
use crate::layout::Page;
use std::sync::Arc;
use std::time::Duration;

const P: Page = Page(0);

/// Delivers everything, counting the messages.
fn count(cluster: &mut Cluster) -> usize {
    let mut messages = 0;
    while let Some((from, to)) = cluster.network.keys().next().copied() {
        cluster.deliver(from, to);
        messages += 1;
    }
    cluster.check().unwrap();
    messages
}

fn touched(cluster: &mut Cluster, member: u16, write: bool) -> usize {
    cluster.touch(member, P, write);
    let messages = count(cluster);
    assert!(cluster.has(member, P, write));
    messages
}

#[test]
fn first_touch_moves_no_data_and_grants_the_right_to_write() {
    let mut cluster = Cluster::new(3, &[0], false);
    assert_eq!(touched(&mut cluster, 1, false), 2);
    assert!(cluster.has(1, P, true));
    assert_eq!(cluster.transfers.0, 0);
    let mut cluster = Cluster::new(3, &[0], false);
    assert_eq!(touched(&mut cluster, 0, true), 0);
}

#[test]
fn a_page_that_is_still_zero_is_sent_as_zero() {
    let mut cluster = Cluster::new(3, &[0], false);
    touched(&mut cluster, 1, true);
    touched(&mut cluster, 2, false);
    assert_eq!(cluster.transfers.0, 0);
}

#[test]
fn two_hops_when_the_home_answers_three_when_the_owner_does() {
    let mut cluster = Cluster::new(3, &[0], false);
    touched(&mut cluster, 0, true);
    cluster.store(0, P);
    // Get, Grant.
    assert_eq!(touched(&mut cluster, 1, true), 2);
    cluster.store(1, P);
    // Get, Forward, Grant, Done.
    assert_eq!(touched(&mut cluster, 2, true), 4);
    // Forward, Grant: the home asks for itself.
    assert_eq!(touched(&mut cluster, 0, false), 2);
    assert_eq!(cluster.transfers.0, 3);
}

#[test]
fn an_upgrade_moves_no_data_and_invalidates_in_one_round() {
    let mut cluster = Cluster::new(8, &[0], false);
    touched(&mut cluster, 0, true);
    cluster.store(0, P);
    (1..8).for_each(|m| assert_eq!(touched(&mut cluster, m, false), 2));
    let before = cluster.transfers.0;
    cluster.touch(7, P, true);
    cluster.deliver(7, 0);
    // The home has dropped its own copy; all six others are told at once and answer the requester.
    assert_eq!(cluster.network.len(), 7);
    assert_eq!(count(&mut cluster), 6 + 1 + 6 + 1);
    assert!(cluster.has(7, P, true));
    assert_eq!(cluster.transfers.0, before);
}

#[test]
fn the_last_sharer_upgrades_without_anybody() {
    let mut cluster = Cluster::new(2, &[0], false);
    touched(&mut cluster, 0, true);
    cluster.store(0, P);
    touched(&mut cluster, 1, false);
    assert_eq!(touched(&mut cluster, 0, true), 2);
    assert_eq!(touched(&mut cluster, 1, true), 2);
}

#[test]
fn an_upgrade_that_lost_its_copy_gets_data() {
    let mut cluster = Cluster::new(3, &[0], false);
    touched(&mut cluster, 0, true);
    cluster.store(0, P);
    touched(&mut cluster, 1, false);
    touched(&mut cluster, 2, false);
    // Both ask; member 2's request reaches the home first, so member 1's copy goes while its upgrade waits.
    cluster.touch(1, P, true);
    cluster.touch(2, P, true);
    cluster.deliver(2, 0);
    cluster.deliver(1, 0);
    cluster.deliver(0, 1);
    assert!(!cluster.has(1, P, false));
    let before = cluster.transfers.0;
    settle(&mut cluster).unwrap();
    assert!(cluster.has(1, P, true));
    assert_eq!(cluster.transfers.0, before + 1);
}

#[test]
fn a_writer_joins_a_read_on_its_way() {
    let mut cluster = Cluster::new(2, &[0], false);
    touched(&mut cluster, 0, true);
    cluster.store(0, P);
    cluster.touch(1, P, false);
    cluster.touch(1, P, true);
    cluster.touch(1, P, false);
    // One request for the three threads, then the upgrade by itself.
    assert_eq!(cluster.network[&(1, 0)].len(), 1);
    assert_eq!(count(&mut cluster), 4);
    assert!(cluster.has(1, P, true) && cluster.waiting.is_empty());
}

#[test]
fn requests_are_served_in_the_order_they_came() {
    let mut cluster = Cluster::new(5, &[0], false);
    touched(&mut cluster, 1, true);
    cluster.store(1, P);
    for member in [4, 2, 3] {
        cluster.touch(member, P, true);
        cluster.deliver(member, 0);
    }
    let mut order = Vec::new();
    while let Some((from, to)) = cluster.network.keys().next().copied() {
        cluster.deliver(from, to);
        let writer = (0..5).find(|m| cluster.has(*m, P, true));
        if let Some(writer) = writer.filter(|w| order.last() != Some(w)) {
            order.push(writer);
        }
    }
    assert_eq!(order, [4, 2, 3]);
}

#[test]
fn a_page_that_just_came_is_held() {
    let mut cluster = Cluster::new(2, &[0], true);
    touched(&mut cluster, 0, true);
    cluster.store(0, P);
    touched(&mut cluster, 1, true);
    cluster.store(1, P);
    cluster.touch(0, P, true);
    assert_eq!(count(&mut cluster), 1);
    assert!(cluster.has(1, P, true) && !cluster.has(0, P, false));
    assert_eq!(cluster.timers.len(), 1);
    settle(&mut cluster).unwrap();
    assert!(cluster.has(0, P, true));
}

/// Lets member 1, which has nothing to say, say something to member 0.
fn refused(prepare: impl Fn(&mut Cluster), msg: Msg<u8>) -> &'static str {
    let mut cluster = Cluster::new(3, &[0, 1], false);
    prepare(&mut cluster);
    let mut out = Vec::new();
    let event = Event::Message { from: MemberId(1), page: P, msg };
    let violation = cluster.cores[0].handle(0, event, &mut out).unwrap_err();
    assert_eq!(violation.from, MemberId(1));
    assert!(!out.iter().any(|c| matches!(c, Command::Give { .. } | Command::Install { .. })));
    violation.what
}

fn terms(token: u64, right: Right) -> Terms {
    Terms { token: Token(token), right, acks: MemberSet::EMPTY, done: true }
}

#[test]
fn who_has_no_right_to_answer_is_refused() {
    let grant = |token, right| Msg::Grant { terms: terms(token, right), contents: Contents::Bytes(9) };
    let idle = |_: &mut Cluster| ();
    let reading = |c: &mut Cluster| {
        touched(c, 2, true);
        c.touch(0, P, false);
    };
    let writing = |c: &mut Cluster| {
        touched(c, 2, true);
        c.touch(0, P, true);
    };
    assert!(refused(idle, grant(1, Right::Shared)).contains("nobody asked"));
    assert!(refused(reading, grant(77, Right::Shared)).contains("without the right"));
    assert!(refused(writing, grant(1, Right::Shared)).contains("a write was asked"));
    assert!(refused(idle, Msg::Done { token: Token(1) }).contains("not its own"));
    assert!(refused(reading, Msg::Done { token: Token(1) }).contains("not its own"));
    assert!(refused(idle, Msg::InvAck { token: Token(1) }).contains("nobody waits"));
    assert!(refused(writing, Msg::InvAck { token: Token(77) }).contains("without the right"));
    let forward = Msg::Forward { requester: MemberId(1), terms: terms(5, Right::Modified), data: true };
    assert!(refused(writing, forward).contains("home that it is not"));
    let invalidate = Msg::Invalidate { requester: MemberId(1), token: Token(5) };
    assert!(refused(idle, invalidate).contains("home that it is not"));
    let unasked =
        Msg::Grant { terms: Terms { done: false, ..terms(1, Right::Shared) }, contents: Contents::Bytes(9) };
    // Member 0 is the page's home itself, so nobody else may end the transaction for it.
    assert!(refused(reading, unasked).contains("behind its home's back"));
}

#[test]
fn who_asks_out_of_turn_is_refused() {
    let get = |write| Msg::Get { write, token: Token(9), hint: false };
    let owns = |c: &mut Cluster| {
        touched(c, 1, true);
    };
    let shares = |c: &mut Cluster| {
        touched(c, 1, true);
        touched(c, 2, false);
    };
    let asked = |c: &mut Cluster| {
        touched(c, 2, true);
        c.touch(1, P, true);
        c.deliver(1, 0);
    };
    assert!(refused(owns, get(false)).contains("only it has"));
    assert!(refused(shares, get(false)).contains("that it has"));
    assert!(refused(asked, get(true)).contains("asked again"));
}

#[test]
fn a_home_that_asks_for_what_is_not_there_is_refused() {
    let cluster = Cluster::new(2, &[0], false);
    let mut core = cluster.cores[1].clone();
    let forward = Msg::Forward { requester: MemberId(0), terms: terms(5, Right::Modified), data: true };
    let event = Event::Message { from: MemberId(0), page: P, msg: forward };
    let violation = core.handle(0, event, &mut Vec::new()).unwrap_err();
    assert!(violation.what.contains("not here"));
    let get = Msg::Get { write: true, token: Token(1), hint: false };
    let event = Event::Message { from: MemberId(0), page: P, msg: get };
    assert!(cluster.cores[1].clone().handle(0, event, &mut Vec::new()).is_err());
}

#[test]
fn a_violation_is_seen_by_the_cluster() {
    let mut cluster = Cluster::new(2, &[0], false);
    cluster.network.entry((1, 0)).or_default().push_back((P, Msg::Done { token: Token(3) }));
    cluster.deliver(1, 0);
    assert!(matches!(cluster.wrong, Some(Wrong::Violation(_))));
    assert!(cluster.check().is_err());
}

#[test]
fn first_touch_brings_untouched_neighbours_of_the_same_range() {
    let layout = Arc::new(layout(&[0, 0, 0, 1, 0]));
    let mut core = Core::<u8>::new(CoreConfig {
        me: MemberId(0),
        layout,
        share: Share::WHOLE,
        hold: HoldConfig { min: Duration::ZERO, ..HoldConfig::NONE },
        token_key: 0,
        first_touch: 8,
    });
    assert_eq!(core.preload(Page(2), 5), 1);
    assert_eq!((core.preload(Page(2), 1), core.preload(Page(3), 1)), (0, 0));
    let mut out = Vec::new();
    core.handle(0, Event::Fault { page: Page(0), write: false }, &mut out).unwrap();
    assert!(matches!(out.as_slice(), [Command::Zero { page: Page(0), count: 2, .. }]));
}
