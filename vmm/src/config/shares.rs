//! Splitting a total over members, some of which say how much they take.

/// Why a split does not work out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShareError {
    /// Everyone says how much, and it is not the total: the sum.
    Sum(u64),
    /// What is given leaves less than one unit for each of the others: what is left, and for how many.
    TooLittleLeft(u64, usize),
}

/// Gives each member a multiple of `unit`: what it asks for, else an even part of what is left (the first
/// ones get one unit more when it does not divide). `total` and every wish are multiples of `unit`.
///
/// # Errors
/// The wishes don't fit the total.
pub fn split(total: u64, unit: u64, wishes: &[Option<u64>]) -> Result<Vec<u64>, ShareError> {
    let given = wishes.iter().flatten().fold(0u64, |sum, wish| sum.saturating_add(*wish));
    let open = wishes.iter().filter(|wish| wish.is_none()).count();
    if open == 0 {
        return if given == total {
            Ok(wishes.iter().flatten().copied().collect())
        } else {
            Err(ShareError::Sum(given))
        };
    }
    let left = total.saturating_sub(given);
    let units = left / unit;
    let open_units = u64::try_from(open).unwrap_or(u64::MAX);
    if units < open_units {
        return Err(ShareError::TooLittleLeft(left, open));
    }
    let mut extra = units % open_units;
    Ok(wishes
        .iter()
        .map(|wish| {
            wish.unwrap_or_else(|| {
                let more = u64::from(extra > 0);
                extra -= more;
                (units / open_units + more) * unit
            })
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn even_and_uneven() {
        assert_eq!(split(4, 1, &[None, None]), Ok(vec![2, 2]));
        assert_eq!(split(5, 1, &[None, None]), Ok(vec![3, 2]));
        assert_eq!(split(8, 2, &[Some(2), None, None]), Ok(vec![2, 4, 2]));
        assert_eq!(split(3, 1, &[Some(1), Some(2)]), Ok(vec![1, 2]));
        assert_eq!(split(4, 1, &[Some(1), Some(2)]), Err(ShareError::Sum(3)));
        assert_eq!(split(2, 1, &[Some(2), None]), Err(ShareError::TooLittleLeft(0, 1)));
        assert_eq!(split(2, 1, &[Some(9), None]), Err(ShareError::TooLittleLeft(0, 1)));
        assert_eq!(split(1, 1, &[None, None]), Err(ShareError::TooLittleLeft(1, 2)));
    }

    proptest! {
        #[test]
        fn parts_sum_up(units in 1u64..1000, wishes in proptest::collection::vec(proptest::option::of(1u64..20), 1..9)) {
            let wishes: Vec<_> = wishes.into_iter().map(|wish| wish.map(|w| w * 8)).collect();
            if let Ok(parts) = split(units * 8, 8, &wishes) {
                prop_assert_eq!(parts.iter().sum::<u64>(), units * 8);
                prop_assert!(parts.iter().all(|part| *part > 0 && part % 8 == 0));
                prop_assert!(parts.iter().zip(&wishes).all(|(part, wish)| wish.is_none_or(|w| w == *part)));
            }
        }
    }
}
