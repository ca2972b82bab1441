//! `GET /metrics`: an answer in the text that the scraper wants. For the control socket, and for the thread that serves
//! nothing else.

use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};

use crate::control::api::Exposition;

/// The text that a request with these headers wants.
pub(super) fn wanted(headers: &HeaderMap) -> Exposition {
    Exposition::wanted(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()))
}

/// An answer in one of the texts.
pub(super) fn answer(exposition: Exposition, text: String) -> Response {
    ([(header::CONTENT_TYPE, exposition.content_type())], text).into_response()
}
