use super::*;
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use crate::protocol::MemberSet;
use crate::protocol::{Served, Terms, Token, Want};

const TO: MemberId = MemberId(1);

fn send(page: u32, msg: Msg<PageBuf>) -> Command<PageBuf> {
    Command::Send { to: TO, page: Page(page), msg }
}

fn get(page: u32, write: bool) -> Command<PageBuf> {
    send(page, Msg::Get { write, token: Token(u64::from(page) * 7), hint: true })
}

fn give(page: u32, acks: MemberSet, drop: bool) -> Command<PageBuf> {
    let terms = Terms { token: Token(u64::from(page)), right: Right::Modified, acks, done: true };
    Command::Give { to: TO, page: Page(page), terms, protect: true, drop }
}

fn install(page: u32, contents: Contents<PageBuf>) -> Command<PageBuf> {
    let served = Served { want: Want::Read, remote: true, from: MemberId(1), since: 0, ahead: true };
    Command::Install { page: Page(page), right: Right::Shared, contents, served }
}

#[test]
fn what_is_alike_and_next_to_each_other_is_done_together() {
    let range = |start, pages| HomeRange { start, len: pages * PAGE_SIZE, home: TO };
    let layout = Layout::new(&[range(0, 20), range(21 * PAGE_SIZE, 100)]).unwrap();
    let follows = |a: &_, b: &_| follows(&layout, a, b);
    let nth = |n| Contents::Bytes(PageBuf::Nth(n));
    let own = || Contents::Bytes(PageBuf::Own(Box::new([0; PAGE])));
    let nobody = MemberSet::EMPTY;
    let alike = [
        (get(3, false), get(4, false)),
        (give(3, nobody, true), give(4, nobody, true)),
        (install(3, nth(1)), install(4, nth(2))),
        (install(3, Contents::Zero), install(4, Contents::Zero)),
    ];
    let different = [
        (get(3, false), get(4, true)),
        (get(3, false), get(5, false)),
        (get(63, false), get(64, false)),
        (get(19, false), get(20, false)),
        (get(119, false), get(120, false)),
        (get(u32::MAX, false), get(0, false)),
        (give(3, nobody, true), give(4, nobody, false)),
        (give(3, MemberSet::only(TO), true), give(4, MemberSet::only(TO), true)),
        (install(3, nth(1)), install(4, nth(3))),
        (install(3, own()), install(4, own())),
        (install(3, Contents::Keep), install(4, Contents::Keep)),
        (install(3, nth(1)), install(4, Contents::Zero)),
        (send(3, Msg::InvAck { token: Token(1) }), send(4, Msg::InvAck { token: Token(1) })),
        (get(3, false), give(4, nobody, true)),
    ];
    assert!(alike.iter().all(|(a, b)| follows(a, b)));
    for (a, b) in different {
        assert!(!follows(&a, &b), "{a:?} and {b:?}");
    }
}

#[test]
fn commands_about_a_page_keep_their_order() {
    let done = |page| send(page, Msg::Done { token: Token(0) });
    let timer = |page| Command::Timer { page: Page(page), at: 5 };
    let zero = |page| install(page, Contents::Zero);
    let mut commands = vec![zero(1), done(1), timer(3), zero(4), done(4), timer(4)];
    let mut order = Vec::new();
    // The event about page 2 commanded nothing.
    let result: Result<(), ()> = in_turns(&mut commands, &[2, 2, 3, 6], |command| {
        order.push(command);
        Ok(())
    });
    assert_eq!(result, Ok(()));
    assert_eq!(order, [zero(1), timer(3), zero(4), done(1), done(4), timer(4)]);
}
