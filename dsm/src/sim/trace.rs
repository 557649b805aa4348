//! What happened, for people: lines of time, member and event, written only when somebody wants to read them.

use crate::layout::Page;
use std::cell::RefCell;
use std::fmt::Write;

#[derive(Debug)]
struct Line {
    at: u64,
    member: Option<u16>,
    page: Option<Page>,
    text: String,
}

/// The lines of one run; nothing if it is off.
#[derive(Debug, Default)]
pub(super) struct Trace(Option<RefCell<Vec<Line>>>);

impl Trace {
    pub(super) fn new(on: bool) -> Trace {
        Trace(on.then(RefCell::default))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    pub(super) fn add(
        &self,
        at: u64,
        member: Option<u16>,
        page: Option<Page>,
        text: impl FnOnce() -> String,
    ) {
        if let Some(lines) = &self.0 {
            lines.borrow_mut().push(Line { at, member, page, text: text() });
        }
    }

    /// The last `most` lines; with a page, only those about it and those about no page at all.
    pub(super) fn tail(&self, page: Option<Page>, most: usize) -> String {
        let Some(lines) = &self.0 else { return String::new() };
        let lines = lines.borrow();
        let is_wanted = |l: &&Line| page.is_none() || l.page.is_none() || l.page == page;
        let wanted: Vec<&Line> = lines.iter().filter(is_wanted).collect();
        let mut out = String::new();
        for line in wanted.get(wanted.len().saturating_sub(most)..).unwrap_or(&[]) {
            let member = line.member.map_or_else(|| "world".into(), |m| format!("member {m}"));
            let page = line.page.map_or_else(String::new, |p| format!("page {}", p.0));
            let (us, ns) = (line.at / 1000, line.at % 1000);
            // Writing to a string can't fail.
            let _ = writeln!(out, "{us:>8}.{ns:03} us  {member:<9} {page:<7} {}", line.text);
        }
        out
    }
}
