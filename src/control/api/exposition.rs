//! The two texts that numbers are told to Prometheus in, and which of them a scraper wants.

/// `GET`: all numbers of the status, as text in the [`Exposition`] that the request's `Accept` asks for.
pub const METRICS_PATH: &str = "/metrics";

/// A text format of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus's own, 0.0.4, which came before: what promtool reads, and what is easiest on the eye.
    Text,
}

impl Exposition {
    /// The one for an `Accept` header: OpenMetrics for whoever names it and likes nothing better, else the plain text.
    #[must_use]
    pub fn wanted(accept: Option<&str>) -> Self {
        let quality = |range: &str| {
            let ranges = accept.unwrap_or_default().split(',').map(parse_range);
            ranges.filter(|(name, _)| name.eq_ignore_ascii_case(range)).map(|(_, quality)| quality).max()
        };
        match quality("application/openmetrics-text") {
            Some(wanted @ 1..) if wanted >= quality("text/plain").unwrap_or(0) => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    /// What the answer's `Content-Type` says.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// A media range without its parameters, and its quality in thousandths.
fn parse_range(range: &str) -> (&str, u32) {
    let mut parts = range.split(';').map(str::trim);
    let name = parts.next().unwrap_or_default();
    let given = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
    (name, given.map_or(1000, thousandths))
}

/// `0.75` as 750, and 0 for what is no quality.
fn thousandths(quality: &str) -> u32 {
    let quality: f64 = quality.parse().unwrap_or(0.0);
    (0..=1000).rev().find(|n| f64::from(*n) <= quality * 1000.0).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scraper_gets_the_text_that_it_likes_best() {
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;\
                            q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let cases = [
            (None, Exposition::Text),
            (Some("*/*"), Exposition::Text),
            (Some("text/plain"), Exposition::Text),
            (Some("text/html, text/plain;q=0.9"), Exposition::Text),
            (Some(prometheus_2), Exposition::OpenMetrics),
            (Some("Application/OpenMetrics-Text"), Exposition::OpenMetrics),
            (Some("application/openmetrics-text; q=0.6 , text/plain;q=0.3"), Exposition::OpenMetrics),
            (Some("application/openmetrics-text;q=0.3,text/plain;version=0.0.4;q=0.6"), Exposition::Text),
            (Some("application/openmetrics-text;q=0"), Exposition::Text),
            (Some("application/openmetrics-text;q=x,,;"), Exposition::Text),
        ];
        for (accept, expected) in cases {
            assert_eq!(Exposition::wanted(accept), expected, "{accept:?}");
        }
    }
}
