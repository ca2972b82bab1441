//! How long each step of a page's way takes, on one core: `cargo bench --bench steps`. tests/cost counts the instructions of
//! the same steps.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a bench says what went wrong by failing")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use support::steps::STEPS;

fn steps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("steps");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
    for (name, make) in STEPS {
        let mut step = make();
        group.bench_function(name, |bencher| bencher.iter(&mut step));
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
