//! A map from pages to what is under way about them: few entries that come and go with every fault. Sorted in one
//! allocation that stays: the nodes of a tree would be allocated and freed for each.
//!
//! Runs of pages come in ascending order and go in it, so both ends are looked at first, and cost nothing to change.

use crate::layout::Page;
use std::collections::VecDeque;

/// A map with pages as keys, ascending.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PageMap<T>(VecDeque<(Page, T)>);

impl<T> Default for PageMap<T> {
    fn default() -> PageMap<T> {
        PageMap(VecDeque::new())
    }
}

impl<T> PageMap<T> {
    fn find(&self, page: Page) -> Result<usize, usize> {
        let (Some((first, _)), Some((last, _))) = (self.0.front(), self.0.back()) else { return Err(0) };
        if page <= *first {
            return if page == *first { Ok(0) } else { Err(0) };
        }
        if page >= *last {
            return if page == *last { Ok(self.0.len() - 1) } else { Err(self.0.len()) };
        }
        self.0.binary_search_by_key(&page, |(key, _)| *key)
    }

    /// Nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Is there something about the page?
    pub(super) fn contains_key(&self, page: Page) -> bool {
        self.find(page).is_ok()
    }

    /// What there is about the page.
    pub(super) fn get(&self, page: Page) -> Option<&T> {
        self.find(page).ok().and_then(|at| self.0.get(at)).map(|(_, value)| value)
    }

    /// The same to be changed.
    pub(super) fn get_mut(&mut self, page: Page) -> Option<&mut T> {
        self.find(page).ok().and_then(|at| self.0.get_mut(at)).map(|(_, value)| value)
    }

    /// Puts it in, in place of what there was.
    pub(super) fn insert(&mut self, page: Page, value: T) {
        match self.find(page) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.0.insert(at, (page, value)),
        }
    }

    /// Takes it out.
    pub(super) fn remove(&mut self, page: Page) -> Option<T> {
        self.find(page).ok().and_then(|at| self.0.remove(at)).map(|(_, value)| value)
    }

    /// The pages, ascending.
    pub(super) fn keys(&self) -> impl Iterator<Item = Page> + '_ {
        self.0.iter().map(|(page, _)| *page)
    }

    /// All of it, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Page, &T)> + '_ {
        self.0.iter().map(|(page, value)| (*page, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn is_a_map(steps in proptest::collection::vec((0u32..12, any::<Option<u8>>()), 0..200)) {
            let (mut map, mut model) = (PageMap::default(), BTreeMap::new());
            for (page, value) in steps {
                let page = Page(page);
                prop_assert_eq!(map.get(page), model.get(&page));
                prop_assert_eq!(map.contains_key(page), model.contains_key(&page));
                match value {
                    Some(value) => {
                        map.insert(page, value);
                        model.insert(page, value);
                    }
                    None => prop_assert_eq!(map.remove(page), model.remove(&page)),
                }
                prop_assert_eq!(map.get_mut(page), model.get_mut(&page));
                prop_assert_eq!(map.is_empty(), model.is_empty());
                prop_assert!(map.keys().eq(model.keys().copied()));
                prop_assert!(map.iter().eq(model.iter().map(|(p, v)| (*p, v))));
            }
        }
    }
}
