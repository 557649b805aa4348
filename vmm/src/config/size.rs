//! Sizes as people write them: `512M`, `2G`.

/// Parses a size with its unit: `K`, `M`, `G` or `T` (powers of 1024), optionally followed by `iB` or `B`.
/// A bare number is refused: it is bytes to one person and MiB to the next.
///
/// # Errors
/// What is wrong with the text, without the text itself.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("not a size".into());
    }
    let number: u64 = number.parse().map_err(|_| "larger than any memory".to_string())?;
    let unit = unit.trim().to_ascii_uppercase();
    let unit = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
    let shift = match unit {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "" => return Err("has no unit".into()),
        _ => return Err(format!("{unit:?} is no unit")),
    };
    number.checked_mul(1u64 << shift).ok_or_else(|| "larger than any memory".to_string())
}

/// Writes a size in the largest unit that divides it, else in MiB with one decimal.
pub fn format_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
        let one = 1u64 << shift;
        if bytes >= one && bytes % one == 0 {
            return format!("{}{unit}", bytes / one);
        }
    }
    let tenths = bytes / ((1 << 20) / 10);
    format!("{}.{}M", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        for (text, bytes) in
            [("512M", 512 << 20), ("2G", 2 << 30), ("2gib", 2 << 30), (" 64 MiB ", 64 << 20), ("1T", 1 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "512", "12X", "-1G", "1.5G", "99999999999999999999G", "20000000000G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn writes_what_it_reads() {
        for text in ["512M", "2G", "3K", "1T"] {
            assert_eq!(format_size(parse_size(text).unwrap()), text);
        }
        assert_eq!(format_size(1_572_865), "1.5M");
    }
}
