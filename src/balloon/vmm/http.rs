//! One request of HTTP/1.1 over a Unix socket, as small as the servers in VMMs are: a connection a request, an answer with a
//! length or none. It blocks, with the same deadline as everything that is said to a VMM, which is why it isn't the
//! commands' client; the answer's head is read by that one's parser.

use std::path::Path;

use super::Unreachable;
use super::socket::{Deadline, Socket};
use super::unreachable::quoted;

/// The description of a VM with hundreds of devices has some hundred thousand bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// cloud-hypervisor sends four.
const HEADERS_MAX: usize = 32;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub(super) method: &'a str,
    pub(super) path: &'a str,
    /// JSON, or nothing.
    pub(super) body: &'a str,
    /// What it is called when no answer comes.
    pub(super) name: &'static str,
}

/// What is answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Sends a request to `socket` and waits for the whole answer.
pub(super) fn ask(socket: &Path, request: Request<'_>, deadline: Deadline) -> Result<Answer, Unreachable> {
    let mut socket = Socket::connect(socket, deadline)?;
    let Request { method, path, body, name } = request;
    // The servers in VMMs are particular; this is what cloud-hypervisor's own client sends, and the type.
    let content = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
    };
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n{content}\r\n{body}"
    );
    socket.send(text.as_bytes(), deadline, name)?;
    let (mut received, mut bytes) = (Vec::new(), [0; 16 << 10]);
    loop {
        let count = socket.receive(&mut bytes, deadline, name)?;
        received.extend_from_slice(&bytes[..count]);
        match parse(&received, count == 0)? {
            Some(answer) => return Ok(answer),
            None if count == 0 => return Err(Unreachable::hung_up(socket.path())),
            None if received.len() > ANSWER_BYTES_MAX => {
                return Err(Unreachable::nonsense(format!(
                    "more than {ANSWER_BYTES_MAX} bytes in answer to {name}"
                )));
            }
            None => {}
        }
    }
}

/// The answer, if these bytes are all of it; `ended` when no more can come.
fn parse(received: &[u8], ended: bool) -> Result<Option<Answer>, Unreachable> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let nonsense = |what: &str| {
        let words = quoted(&String::from_utf8_lossy(received));
        Unreachable::nonsense(format!("{words} is no answer of HTTP: {what}"))
    };
    let length = match head.parse(received) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(nonsense(&error.to_string())),
    };
    let header = |name: &str| {
        let found = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| String::from_utf8_lossy(header.value).trim().to_owned())
    };
    let status = head.code.unwrap_or_default();
    if header("transfer-encoding").is_some() {
        return Err(nonsense("it comes in chunks"));
    }
    let rest = &received[length..];
    let body_bytes = match header("content-length") {
        // There is never a body behind these.
        _ if status == 204 || status == 304 => 0,
        Some(text) => text.parse().map_err(|_| nonsense("its length is no number"))?,
        None if ended => rest.len(),
        None => return Ok(None),
    };
    if body_bytes > ANSWER_BYTES_MAX {
        return Err(nonsense("it is too long"));
    }
    Ok(rest.get(..body_bytes).map(|body| Answer { status, body: body.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balloon::Word;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status, body: body.as_bytes().to_owned() }
    }

    #[test]
    fn an_answer_is_whole_when_its_length_says_so() {
        let text = b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nContent-Length: 5\r\n\r\n{\"a\"}";
        for length in 0..text.len() {
            assert_eq!(parse(&text[..length], false), Ok(None), "{length}");
        }
        assert_eq!(parse(text, false), Ok(Some(answer(200, "{\"a\"}"))));
        // Cut short it is none, also at its end.
        assert_eq!(parse(&text[..text.len() - 1], true), Ok(None));
    }

    #[test]
    fn without_a_length_it_ends_with_the_connection_unless_it_has_no_body() {
        let text = b"HTTP/1.1 404 Not Found\r\n\r\nno";
        assert_eq!(parse(text, false), Ok(None));
        assert_eq!(parse(text, true), Ok(Some(answer(404, "no"))));
        assert_eq!(parse(b"HTTP/1.1 204 \r\n\r\n", false), Ok(Some(answer(204, ""))));
    }

    #[test]
    fn what_is_no_answer_is_nonsense() {
        for text in [
            "{\"QMP\": 1}\r\n",
            "HTTP/1.1 twohundred\r\n\r\n",
            "HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 \r\nContent-Length: 1048577\r\n\r\n",
            "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ] {
            let state = parse(text.as_bytes(), false).unwrap_err();
            assert_eq!(state.word(), Word::VmmNonsense, "{text}");
        }
    }
}
