//! Cuts what QEMU writes into JSON objects. It ends each by a line end, but for a monitor that was asked to be pretty, where
//! one object has many lines: so braces are counted, each byte looked at once however it arrives, and at most
//! [`OBJECT_BYTES_MAX`] of them are kept.

use super::super::unreachable::quoted;
use crate::balloon::vmm::Unreachable;

/// An answer that we ask for has a few hundred bytes, a list of a thousand devices less than a hundred thousand.
pub(super) const OBJECT_BYTES_MAX: usize = 256 << 10;

/// What has arrived and was not taken yet.
#[derive(Debug, Default)]
pub(super) struct Objects {
    bytes: Vec<u8>,
    /// How many of them were looked at.
    seen: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Objects {
    /// Takes what arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole object, if it has arrived.
    ///
    /// # Errors
    /// When it is longer than any, or what has arrived can't be the beginning of one.
    pub(super) fn next(&mut self) -> Result<Option<Vec<u8>>, Unreachable> {
        while self.seen < self.bytes.len() {
            let byte = self.bytes[self.seen];
            self.seen += 1;
            if self.depth == 0 && !byte.is_ascii_whitespace() && byte != b'{' {
                let words = String::from_utf8_lossy(&self.bytes);
                return Err(Unreachable::nonsense(format!("{} is no QMP", quoted(&words))));
            }
            if self.ends_object(byte) {
                let rest = self.bytes.split_off(self.seen);
                self.seen = 0;
                return Ok(Some(std::mem::replace(&mut self.bytes, rest)));
            }
            if self.seen > OBJECT_BYTES_MAX {
                let what = format!("more than {OBJECT_BYTES_MAX} bytes without an end");
                return Err(Unreachable::nonsense(what));
            }
        }
        Ok(None)
    }

    fn ends_object(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' => self.depth += 1,
            b'}' => self.depth -= 1,
            _ => return false,
        }
        byte == b'}' && self.depth == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All objects of a text that arrives in pieces of that many bytes.
    fn cut(text: &str, piece_bytes: usize) -> Result<Vec<String>, Unreachable> {
        let (mut objects, mut found) = (Objects::default(), Vec::new());
        for piece in text.as_bytes().chunks(piece_bytes) {
            objects.push(piece);
            while let Some(object) = objects.next()? {
                found.push(String::from_utf8(object).unwrap().trim().to_owned());
            }
        }
        Ok(found)
    }

    #[test]
    fn objects_are_whole_however_they_arrive() {
        let one = r#"{"return": {"a": "}{\"\\"}}"#;
        let pretty = "{\n  \"event\": {\n  }\n}";
        let text = format!("{one}\r\n{pretty}\r\n{one}{{\"half\": 1");
        for piece_bytes in 1..text.len() {
            assert_eq!(cut(&text, piece_bytes).unwrap(), [one, pretty, one], "{piece_bytes}");
        }
    }

    #[test]
    fn what_is_no_object_or_has_no_end_is_nonsense() {
        let message = cut("QEMU 7.2 monitor\x1b", 3).unwrap_err().to_string();
        assert!(message.ends_with("QEM is no QMP"), "{message}");
        assert!(cut("{}[", 2).is_err());
        let endless = format!("{{\"a\": \"{}", "x".repeat(OBJECT_BYTES_MAX));
        let message = cut(&endless, 4096).unwrap_err().to_string();
        assert!(message.contains("262144 bytes without an end"), "{message}");
        assert_eq!(cut(&endless[..OBJECT_BYTES_MAX], 4096).unwrap(), [""; 0]);
    }
}
