//! Same-filled pages: pages that repeat one 8-byte word, most often zero. They cost no pool memory (zswap and
//! zram know the same trick). Knows only page contents.

use crate::page::Page;

/// The word that `page` repeats, or `None` when it holds anything else.
#[must_use]
pub fn word_of(page: &Page) -> Option<u64> {
    let (words, _) = page.as_chunks::<8>();
    let first = words[0];
    // Most pages differ early or at the end; the last word is a cheap second guess before the full scan.
    if words[words.len() - 1] != first {
        return None;
    }
    words.iter().all(|word| *word == first).then(|| u64::from_le_bytes(first))
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
    use crate::page::PAGE_SIZE;

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
        for at in [0, 7, 8, 2048, PAGE_SIZE - 1] {
            let mut page = [0x11; PAGE_SIZE];
            page[at] = 0x12;
            assert_eq!(word_of(&page), None, "byte {at}");
        }
    }
}
