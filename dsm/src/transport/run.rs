//! Messages of one kind about neighbouring pages, in one frame: what a member says about 64 pages costs one header, and
//! the pages themselves lie behind each other, ready to be put in place in one go.
//!
//! ```text
//!  header (flag RUN, gpa of the first page, count in the token field) | pages, if any | one token of 8 bytes per page
//! ```
//!
//! To the protocol it is as many messages, each with its token: a run is nothing but a way to carry them.

use super::frame::PAGE_LEN;
use crate::layout::Page;
use crate::protocol::pages::BLOCK;
use crate::protocol::{Msg, Token};

/// Most messages in one frame. All are about pages of one block, hence one core's.
pub const MAX_RUN: u32 = BLOCK;
/// Bytes of one message's token.
pub(super) const TOKEN_LEN: usize = 8;

/// A run of messages that came in one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub page: Page,
    /// Number of pages, 2 to [`MAX_RUN`]. They exist, behind each other and in one block.
    pub count: u32,
    /// What is said about each; the token says nothing.
    pub msg: Msg<()>,
}

impl Run {
    /// The messages, one page after the other. `payload` is what lay behind the header.
    pub fn messages(&self, payload: &[u8]) -> impl Iterator<Item = (Page, Msg<()>)> {
        let count = usize::try_from(self.count).unwrap_or(0);
        let at = payload.len().saturating_sub(count * TOKEN_LEN);
        let tokens = payload.get(at..).unwrap_or(&[]).chunks_exact(TOKEN_LEN);
        (self.page.0..).map(Page).zip(tokens).map(|(page, token)| {
            let token = token.try_into().map_or(0, u64::from_le_bytes);
            (page, self.msg.clone().with_token(Token(token)))
        })
    }
}

/// Length of what lies behind the header of a run, in bytes; `None` for a run that nobody sends.
pub(super) fn payload_len(count: u64, has_pages: bool) -> Option<usize> {
    let count = u32::try_from(count).ok().filter(|n| (2..=MAX_RUN).contains(n))?;
    let each = TOKEN_LEN + if has_pages { PAGE_LEN } else { 0 };
    usize::try_from(count).ok()?.checked_mul(each)
}

/// Whether two messages may follow each other in a run.
pub(crate) fn is_alike(a: &Msg<()>, b: &Msg<()>) -> bool {
    let may_run = match a {
        Msg::Get { .. } | Msg::Decline { .. } | Msg::Done { .. } | Msg::Put { .. } => true,
        Msg::Forward { terms, .. } | Msg::Grant { terms, .. } => terms.acks.is_empty(),
        Msg::Invalidate { .. } | Msg::InvAck { .. } | Msg::Release { .. } | Msg::Awaited { .. } => false,
    };
    may_run && *a == b.clone().with_token(a.token())
}
