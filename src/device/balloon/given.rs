//! Which pages a guest has given up and not taken back: a bit for each, in pieces that are there only where some are.
//! It serves counting alone. What is given up is returned to the host each time it is said, whatever this says, so that a
//! bit that is wrong costs nobody memory.

use std::collections::BTreeMap;

/// Pages of a piece: 128 MiB of guest memory in 4 KiB.
const PIECE_PAGES: u32 = 32768;
const PIECE_WORDS: usize = 512;
/// Pieces at most: for 1 TiB of guest memory, in 32 MiB. Pages beyond are returned and not counted.
const PIECES_MAX: usize = 8192;

/// Pages by their number.
#[derive(Debug, Default)]
pub struct Given {
    pieces: BTreeMap<u32, Box<[u64; PIECE_WORDS]>>,
    pages: u64,
}

fn place(page: u32) -> (u32, usize, u64) {
    let within = page % PIECE_PAGES;
    (page / PIECE_PAGES, (within / 64) as usize, 1 << (within % 64))
}

impl Given {
    /// How many there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Notes a page. False when it was noted before, or is one too many to note.
    pub fn add(&mut self, page: u32) -> bool {
        let (piece, word, bit) = place(page);
        if !self.pieces.contains_key(&piece) && self.pieces.len() >= PIECES_MAX {
            return false;
        }
        let words = self.pieces.entry(piece).or_insert_with(|| Box::new([0; PIECE_WORDS]));
        let Some(word) = words.get_mut(word) else { return false };
        let is_new = *word & bit == 0;
        *word |= bit;
        self.pages = self.pages.saturating_add(u64::from(is_new));
        is_new
    }

    /// Forgets a page. False when it was not noted.
    pub fn remove(&mut self, page: u32) -> bool {
        let (piece, word, bit) = place(page);
        let Some(words) = self.pieces.get_mut(&piece) else { return false };
        let Some(word) = words.get_mut(word).filter(|word| **word & bit != 0) else { return false };
        *word &= !bit;
        self.pages = self.pages.saturating_sub(1);
        if *word == 0 && words.iter().all(|word| *word == 0) {
            self.pieces.remove(&piece);
        }
        true
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 0u32..200, any::<bool>()), 0..400)) {
            let (mut given, mut model) = (Given::default(), HashSet::new());
            for (add, page, far) in steps {
                let page = if far { u32::MAX - page * 40_000 } else { page };
                if add {
                    prop_assert_eq!(given.add(page), model.insert(page));
                } else {
                    prop_assert_eq!(given.remove(page), model.remove(&page));
                }
                prop_assert_eq!(given.pages(), model.len() as u64);
            }
            for page in model {
                prop_assert!(given.remove(page));
            }
            prop_assert!(given.pieces.is_empty(), "what is empty takes no memory");
        }
    }

    #[test]
    fn so_many_pieces_and_no_more() {
        let mut given = Given::default();
        let noted = (0..=8192).filter(|piece| given.add(piece * PIECE_PAGES)).count();
        assert_eq!(noted, 8192);
        assert_eq!((given.pages(), given.pieces.len()), (8192, 8192));
        given.remove(0);
        assert!(given.add(8192 * PIECE_PAGES));
        given.clear();
        assert_eq!(given.pages(), 0);
    }
}
