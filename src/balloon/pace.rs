//! What all guests together push out in a tick: no more than the store takes. Each one's step is small for it, and a host has
//! hundreds of guests. How fast the store is nobody has to know: what guests were told to give up and haven't given yet is
//! still to be taken, and so much less is asked for. A compressor that takes ten times as long is so asked for a tenth. Who
//! was squeezed longest ago goes first, so that each has its turn however little there is; shares of it would become steps
//! too small to be taken.

use std::cmp::Reverse;

use super::decision::{Hold, Reason};
use super::share::Guest;
use super::snapshot::Host;

/// Bytes that guests are made to push out in a second at most: 32768 pages, which a third of a core compresses with zstd:-1, and nearly three with
/// zstd:9.
const OUT_BYTES_PER_SECOND: u64 = 128 << 20;
/// And within a tick, in parts of the most that the pool may take. Nobody is squeezed above 90 % of that where nothing leaves;
/// this is what is left, should nothing of it shrink.
const POOL_PART: u64 = 10;

/// Cuts the steps of those who are to wait.
pub(super) fn pace(host: &Host, guests: &mut [Guest<'_>]) {
    let underway_bytes = guests.iter().map(|guest| guest.wish.underway_bytes).fold(0, u64::saturating_add);
    let mut room_bytes = room_bytes(host).saturating_sub(underway_bytes);
    guests.sort_by_key(|guest| Reverse(guest.wish.waited_ticks));
    for guest in guests.iter_mut().filter(|guest| guest.is_driven()) {
        let over_bytes = out_bytes(guest).saturating_sub(room_bytes);
        if over_bytes > 0 {
            cut(host, guest, over_bytes);
        }
        room_bytes = room_bytes.saturating_sub(out_bytes(guest));
    }
}

/// What the store may have before it, in bytes of guests' memory.
fn room_bytes(host: &Host) -> u64 {
    if host.is_stuck() {
        return 0;
    }
    let rate_bytes = OUT_BYTES_PER_SECOND.saturating_mul(host.interval_ms) / 1000;
    rate_bytes.min(host.pool_max_bytes / POOL_PART)
}

/// What a guest would push out of its memory for its target: what it doesn't use costs the store nothing.
fn out_bytes(guest: &Guest<'_>) -> u64 {
    let decision = &guest.wish.decision;
    let step_bytes = guest.wish.begin_bytes().saturating_sub(decision.target_bytes);
    let unused_bytes = match decision.reason {
        Reason::TookFree(_) => step_bytes,
        Reason::TookForHost(_) => guest.wish.available_bytes,
        _ => 0,
    };
    step_bytes.saturating_sub(unused_bytes)
}

/// Lets a guest keep so much of what was to be taken, and what is less than a unit.
fn cut(host: &Host, guest: &mut Guest<'_>, over_bytes: u64) {
    let (from_bytes, begin_bytes) = (guest.wish.from_bytes, guest.wish.begin_bytes());
    let before_bytes = guest.wish.decision.target_bytes;
    let step_bytes = begin_bytes.saturating_sub(before_bytes).saturating_sub(over_bytes);
    let to_bytes = guest.bounds.below(begin_bytes, step_bytes);
    let (taken_bytes, decision) = (begin_bytes - to_bytes, &mut guest.wish.decision);
    let for_host = matches!(decision.reason, Reason::TookForHost(_));
    (decision.target_bytes, decision.reason) = match taken_bytes {
        0 => {
            let hold = if host.is_stuck() { Hold::PoolBusy } else { Hold::OthersFirst };
            // What it was promised and doesn't have yet is the host's all the same.
            (if for_host { begin_bytes } else { from_bytes }, Reason::Held(hold))
        }
        _ if for_host => (to_bytes, Reason::TookForHost(taken_bytes)),
        _ => (to_bytes, Reason::Squeezed(from_bytes - to_bytes)),
    };
}
