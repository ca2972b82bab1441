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
    Ok(parse(&answer))
}

/// Puts a JSON document to `path`. The server may keep the connection: what the answer says of its length counts.
pub fn put(mut stream: impl Read + Write, path: &str, document: &str) -> std::io::Result<Answer> {
    let head = format!("PUT {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json");
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{document}", document.len())?;
    let (mut answer, mut byte) = (Vec::new(), [0]);
    while !answer.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? > 0 {
        answer.extend(byte);
    }
    let length = value_of(&String::from_utf8_lossy(&answer), "content-length");
    let mut body = vec![0; length.and_then(|length| length.parse().ok()).unwrap_or(0)];
    stream.read_exact(&mut body)?;
    answer.extend(body);
    Ok(parse(&String::from_utf8_lossy(&answer)))
}

fn value_of(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(": ")?;
        found.eq_ignore_ascii_case(name).then(|| value.to_owned())
    })
}

fn parse(answer: &str) -> Answer {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let content_type = value_of(head, "content-type").unwrap_or_default();
    Answer { status: status.unwrap_or(0), content_type, body: body.to_owned() }
}
