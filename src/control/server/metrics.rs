//! `GET /metrics`: an answer in the text that the scraper wants. For the control socket, and for the thread that serves
//! nothing else.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::failure;
use crate::control::api::{Exposition, Host};

/// The text that a request with these headers wants.
pub(super) fn wanted(headers: &HeaderMap) -> Exposition {
    Exposition::wanted(headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()))
}

/// An answer in one of the texts.
pub(super) fn answer(exposition: Exposition, text: String) -> Response {
    ([(header::CONTENT_TYPE, exposition.content_type())], text).into_response()
}

/// The handler on an event loop that others wait for too.
pub(super) async fn get(State(host): State<Arc<dyn Host>>, headers: HeaderMap) -> Response {
    let exposition = wanted(&headers);
    match tokio::task::spawn_blocking(move || host.metrics(exposition)).await {
        Ok(text) => answer(exposition, text),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}
