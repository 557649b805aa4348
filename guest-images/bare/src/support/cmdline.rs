//! The guest's command line: words `key=value`, separated by blanks; unknown words (the VMM adds some) are ignored.

/// A command line that lives as long as the guest.
#[derive(Clone, Copy, Debug)]
pub struct Cmdline<'a>(&'a str);

impl<'a> Cmdline<'a> {
    /// Takes the text as the loader left it.
    pub const fn new(text: &'a str) -> Self {
        Self(text)
    }

    /// The value of the last `key=value`, or `None`.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.0.split_ascii_whitespace().rev().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// The value of `key` as a number, decimal or `0x` hexadecimal; `default` if absent.
    ///
    /// # Errors
    /// The text that is no number.
    pub fn number(&self, key: &str, default: u64) -> Result<u64, &'a str> {
        let Some(text) = self.text(key) else { return Ok(default) };
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => text.parse(),
        };
        parsed.map_err(|_| text)
    }
}

#[cfg(test)]
mod tests {
    use super::Cmdline;

    #[test]
    fn last_word_wins_and_keys_match_whole() {
        let line = Cmdline::new("console=ttyS0 cpus=2  test=counter xcpus=9 cpus=3");
        assert_eq!(line.text("cpus"), Some("3"));
        assert_eq!(line.text("cpu"), None);
        assert_eq!(line.text("test"), Some("counter"));
    }

    #[test]
    fn numbers() {
        let line = Cmdline::new("a=12 b=0x1f c=-1 d= e");
        assert_eq!(line.number("a", 0), Ok(12));
        assert_eq!(line.number("b", 0), Ok(31));
        assert_eq!(line.number("c", 0), Err("-1"));
        assert_eq!(line.number("d", 0), Err(""));
        assert_eq!(line.number("e", 7), Ok(7));
    }
}
