//! Same-filled pages: pages that repeat one 8-byte word, most often zero. They cost no pool memory (zswap and
//! zram know the same trick). Knows only page contents.

use crate::page::{PAGE_SIZE, Page};

/// Words that are looked at before it is asked whether one differed.
const BLOCK_WORDS: usize = 32;
const _: () = assert!((PAGE_SIZE / 8).is_multiple_of(BLOCK_WORDS), "no word is left over");

/// The word that `page` repeats, or `None` when it holds anything else.
#[must_use]
pub fn word_of(page: &Page) -> Option<u64> {
    let (words, _) = page.as_chunks::<8>();
    let first = words[0];
    // Most pages differ early or at the end; the last word is a cheap second guess before the full scan.
    if words[words.len() - 1] != first {
        return None;
    }
    let first = u64::from_le_bytes(first);
    // A block without a branch is compared in vectors.
    let differs = |differ: u64, word: &[u8; 8]| differ | (u64::from_le_bytes(*word) ^ first);
    let (blocks, _) = words.as_chunks::<BLOCK_WORDS>();
    blocks.iter().all(|block| block.iter().fold(0, differs) == 0).then_some(first)
}

/// Fills `page` with `word`.
pub fn fill(page: &mut Page, word: u64) {
    for target in page.as_chunks_mut::<8>().0 {
        *target = word.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_page_gives_its_word_back() {
        for word in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mut page = [0xaa; PAGE_SIZE];
            fill(&mut page, word);
            assert_eq!(word_of(&page), Some(word));
        }
    }

    #[test]
    fn one_different_byte_is_enough() {
        for at in 0..PAGE_SIZE {
            let mut page = [0x11; PAGE_SIZE];
            page[at] = 0x12;
            assert_eq!(word_of(&page), None, "byte {at}");
        }
    }
}
