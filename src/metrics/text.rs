//! The two text formats, line by line. They differ in how a counter's family is called, in whether units are declared,
//! and in how they end. See the OpenMetrics specification 1.0, and Prometheus's "Exposition formats".

use std::fmt::{Display, Write};

use crate::control::api::{Bucket, Exposition};

/// What a family's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// They only grow.
    Counter,
    /// They go up and down.
    Gauge,
    /// They are always 1, and the labels say something.
    Info,
    /// They count by size.
    Histogram,
}

/// Units that a name may end in.
const UNITS: [&str; 3] = ["bytes", "seconds", "ratio"];

/// A text that grows family by family.
pub(super) struct Writer {
    exposition: Exposition,
    text: String,
    /// The name of the samples of the family at hand.
    name: String,
}

impl Writer {
    pub(super) fn new(exposition: Exposition) -> Self {
        Self { exposition, text: String::new(), name: String::new() }
    }

    /// Begins a family. All of its samples come before the next one begins.
    pub(super) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let suffix = match kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        self.name = format!("{name}{suffix}");
        let open = self.exposition == Exposition::OpenMetrics;
        let family = if open { name } else { &self.name };
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Info if open => "info",
            Kind::Gauge | Kind::Info => "gauge",
            Kind::Histogram => "histogram",
        };
        line(&mut self.text, format_args!("# HELP {family} {help}"));
        line(&mut self.text, format_args!("# TYPE {family} {kind}"));
        let unit = name.rsplit('_').next().filter(|unit| open && UNITS.contains(unit));
        if let Some(unit) = unit {
            line(&mut self.text, format_args!("# UNIT {family} {unit}"));
        }
    }

    /// A sample of the family at hand.
    pub(super) fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        line(&mut self.text, format_args!("{}{} {value}", self.name, Labels(labels, None)));
    }

    /// A histogram of the family at hand, with a bucket up to each of `les`. The metric's unit is `per` times as large
    /// as that of the buckets and of `sum`.
    pub(super) fn histogram(
        &mut self,
        labels: &[(&str, &str)],
        buckets: &[Bucket],
        les: impl Iterator<Item = u64>,
        sum: u64,
        per: f64,
    ) {
        let up_to = |le| buckets.iter().filter(|bucket| bucket.le <= le).map(|bucket| bucket.count).sum();
        for le in les {
            self.bucket(labels, &decimal(le as f64 / per), up_to(le));
        }
        let count = up_to(u64::MAX);
        self.bucket(labels, "+Inf", count);
        let labels = Labels(labels, None);
        line(&mut self.text, format_args!("{}_sum{labels} {}", self.name, decimal(sum as f64 / per)));
        line(&mut self.text, format_args!("{}_count{labels} {count}", self.name));
    }

    fn bucket(&mut self, labels: &[(&str, &str)], le: &str, count: u64) {
        line(&mut self.text, format_args!("{}_bucket{} {count}", self.name, Labels(labels, Some(le))));
    }

    /// The whole text.
    pub(super) fn finish(mut self) -> String {
        if self.exposition == Exposition::OpenMetrics {
            self.text.push_str("# EOF\n");
        }
        self.text
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{line}");
}

/// The same label in both formats and for every reader: a whole number has a point.
fn decimal(number: f64) -> String {
    if number.fract() == 0.0 { format!("{number:.1}") } else { number.to_string() }
}

/// Labels in braces, a bucket's last; nothing when there are none.
struct Labels<'a>(&'a [(&'a str, &'a str)], Option<&'a str>);

impl Display for Labels<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(labels, le) = self;
        let mut before = '{';
        for (name, value) in labels.iter().copied().chain(le.map(|le| ("le", le))) {
            write!(f, "{before}{name}=\"{}\"", escape(value))?;
            before = ',';
        }
        if before == '{' { Ok(()) } else { f.write_char('}') }
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
