//! The page: the one unit that guests store and load. Knows nothing but its size.

/// Bytes of a page, and the block size that the device offers.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] in the type that device offsets use.
pub const PAGE_SIZE_U64: u64 = PAGE_SIZE as u64;

/// The contents of one page.
pub type Page = [u8; PAGE_SIZE];

/// A page of zeros: what an empty slot reads as.
pub const ZERO_PAGE: Page = [0; PAGE_SIZE];
