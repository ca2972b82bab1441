//! The swap header: what `mkswap` would write to the disk's first page. It is stored in slot 0 of a new VM, so that a
//! guest needs one fstab line and nothing else. The layout is `union swap_header` of Linux's `include/linux/swap.h`.

#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "no number here is a guest's")]

use crate::page::{PAGE_SIZE, Page};

/// The longest label, in bytes.
pub const LABEL_BYTES_MAX: usize = 16;

const INFO_AT: usize = 1024;
const UUID_AT: usize = INFO_AT + 12;
const LABEL_AT: usize = UUID_AT + 16;
const SIGNATURE: &[u8; 10] = b"SWAPSPACE2";

/// The header of a swap area that fills a disk of `slots` pages. A label that is too long is cut.
#[must_use]
pub fn encode(slots: u32, label: &str, uuid: &[u8; 16]) -> Page {
    let mut page = [0; PAGE_SIZE];
    page[INFO_AT..INFO_AT + 4].copy_from_slice(&1u32.to_le_bytes()); // version
    page[INFO_AT + 4..INFO_AT + 8].copy_from_slice(&slots.saturating_sub(1).to_le_bytes()); // last page
    page[UUID_AT..UUID_AT + 16].copy_from_slice(uuid);
    let label = &label.as_bytes()[..label.len().min(LABEL_BYTES_MAX)];
    page[LABEL_AT..LABEL_AT + label.len()].copy_from_slice(label);
    page[PAGE_SIZE - SIGNATURE.len()..].copy_from_slice(SIGNATURE);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_says_what_mkswap_would() {
        let page = encode(1000, "ballast", &[7; 16]);
        assert_eq!(&page[4086..], b"SWAPSPACE2");
        assert_eq!(page[1024..1032], [1, 0, 0, 0, 0xe7, 3, 0, 0]);
        assert_eq!((&page[1036..1052], &page[1052..1060]), (&[7; 16][..], &b"ballast\0"[..]));
    }
}
