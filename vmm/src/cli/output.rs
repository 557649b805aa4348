//! Printing for people and for programs. A closed pipe ends output, not the program.

use crate::control::end::End;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::io::{self, Write};

/// Prints text and a line end.
pub fn line(text: &str) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// Prints an error the way all of them look.
pub fn error(text: &str) {
    let _ = writeln!(io::stderr().lock(), "spanvm: error: {text}");
}

/// Prints a JSON document.
///
/// # Errors
/// A value that JSON can't hold.
pub fn json(value: &impl Serialize) -> Result<(), End> {
    let text = serde_json::to_string_pretty(value).map_err(|e| End::Failed(format!("JSON: {e}")))?;
    line(&text);
    Ok(())
}

/// A table with these heads and nothing drawn but white space; columns named in `right` are right-aligned.
pub fn table(heads: &[&str], right: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(heads);
    for row in rows {
        table.add_row(row);
    }
    for (index, head) in heads.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if right.contains(head) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>().join("\n")
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1}s");
    }
    // Non-negative and far below 2^53, so whole seconds fit.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = seconds as u64;
    match whole {
        0..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86400, whole % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain() {
        let text =
            table(&["A", "N"], &["N"], [vec!["x".into(), "1".into()], vec!["yyy".into(), "100".into()]]);
        assert_eq!(text, "A      N\nx      1\nyyy  100");
    }

    #[test]
    fn durations() {
        for (seconds, text) in [(1.25, "1.2s"), (61.0, "1m01s"), (3720.0, "1h02m"), (90000.0, "1d01h")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
