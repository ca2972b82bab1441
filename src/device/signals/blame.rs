//! Whom a crash is to be written down for: each thread knows the VM that it works for and the request that it carries
//! out, where the signal handler finds both.

#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ptr::{from_ref, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};

use rustix::time::{ClockId, clock_gettime};

use crate::store::table::Table;

thread_local! {
    static VM: AtomicPtr<Table> = const { AtomicPtr::new(null_mut()) };
    /// The crashes that are noted with the request.
    static REQUEST: AtomicPtr<AtomicU8> = const { AtomicPtr::new(null_mut()) };
}

/// While this lives, the thread works for a VM.
#[derive(Debug)]
#[must_use]
pub struct Working<'vm>(PhantomData<(&'vm Table, *const ())>);

/// The VM's pages are what this thread works for until the answer is dropped.
pub fn working(vm: &Table) -> Working<'_> {
    VM.with(|current| current.store(from_ref(vm).cast_mut(), Ordering::Release));
    Working(PhantomData)
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        VM.with(|current| current.store(null_mut(), Ordering::Release));
    }
}

/// While this lives, the thread carries out a request.
#[derive(Debug)]
#[must_use]
pub struct Executing<'request>(PhantomData<(&'request AtomicU8, *const ())>);

/// The request whose crashes these are is what this thread carries out until the answer is dropped.
pub fn executing(crashes: &AtomicU8) -> Executing<'_> {
    REQUEST.with(|current| current.store(from_ref(crashes).cast_mut(), Ordering::Release));
    Executing(PhantomData)
}

impl Drop for Executing<'_> {
    fn drop(&mut self) {
        REQUEST.with(|current| current.store(null_mut(), Ordering::Release));
    }
}

/// The process is about to end by what this thread does: writes down for whom it worked. For the signal handler.
pub(super) fn note() {
    // The first thread that crashes is the one; an abort after a fault is the same crash.
    static NOTED: AtomicBool = AtomicBool::new(false);
    let vm = VM.with(|current| current.load(Ordering::Acquire));
    let request = REQUEST.with(|current| current.load(Ordering::Acquire));
    // SAFETY: the pointer is null or was made from a reference that its `Working` has borrowed and that is still
    // borrowed: dropping that takes the pointer away first, on this very thread.
    let Some(vm) = (unsafe { vm.as_ref() }) else { return };
    if NOTED.swap(true, Ordering::AcqRel) {
        return;
    }
    // SAFETY: as above, by its `Executing`.
    if let Some(request) = unsafe { request.as_ref() } {
        let crashes = request.load(Ordering::Relaxed).saturating_add(1);
        request.store(crashes, Ordering::Release);
    }
    let seconds = clock_gettime(ClockId::Boottime).tv_sec;
    vm.crashes().add(u32::try_from(seconds).unwrap_or(u32::MAX));
}
