//! `ballast report` for people: a text that fills a screen for each VM, and a picture of all of them. Pure functions from
//! an answer to what is written; what both say is said in [`sentences`].

mod canvas;
mod charts;
mod sentences;
mod svg;
mod text;
mod words;

pub use svg::picture;
pub use text::text;

/// What a test shows: a VM in use with pages everywhere, one without pages, and one out of service.
#[cfg(test)]
fn example() -> crate::control::api::Report {
    let text = include_str!("tests/example.json");
    serde_json::from_str(text).expect("a report")
}
