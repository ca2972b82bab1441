//! The least of HTTP: one request a connection, over whatever stream, and the answer as text.

use std::io::{Read, Write};

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    pub body: String,
}

/// Asks for `path`. HTTP/1.0, so that the answer comes in one piece and the connection then ends.
pub fn get(mut stream: impl Read + Write, path: &str, accept: &str) -> std::io::Result<Answer> {
    write!(stream, "GET {path} HTTP/1.0\r\nHost: test\r\nAccept: {accept}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let content_type = lines.find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-type").then(|| value.to_owned())
    });
    let content_type = content_type.unwrap_or_default();
    Ok(Answer { status: status.unwrap_or(0), content_type, body: body.to_owned() })
}
