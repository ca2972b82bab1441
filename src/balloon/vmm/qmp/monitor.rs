//! One connection to a QMP monitor: its greeting, a command at a time, and the answer that has the command's number.
//! What comes in between is skipped: events, of which QEMU sends as many as it likes, and answers to others' commands, as
//! a proxy that joins several monitors may let through. QEMU takes a command at its closing brace and looks no further, so
//! each is written at once, with its line end.

use std::path::Path;

use serde_json::{Value, json};

use super::super::Unreachable;
use super::super::socket::{Deadline, Socket};
use super::super::unreachable::quoted;
use super::objects::Objects;

/// What QEMU says of a command that it didn't carry out.
#[derive(Debug)]
pub(super) struct Refusal {
    /// A word that doesn't change from version to version, mostly `GenericError`.
    pub(super) class: String,
    /// Its words.
    why: String,
}

impl Refusal {
    /// The state that it comes to.
    pub(super) fn of(self, request: &'static str) -> Unreachable {
        Unreachable::Refused { request, why: self.why }
    }
}

/// An open connection that takes commands.
#[derive(Debug)]
pub(super) struct Monitor {
    socket: Socket,
    objects: Objects,
    last_id: u64,
}

impl Monitor {
    /// Connects and comes to terms: without the capabilities' negotiation QEMU takes no other command.
    pub(super) fn connect(path: &Path, deadline: Deadline) -> Result<Self, Unreachable> {
        let socket = Socket::connect(path, deadline)?;
        let mut monitor = Self { socket, objects: Objects::default(), last_id: 0 };
        let greeting = monitor.receive(
            deadline,
            "its greeting, which a monitor has for one client at a time: Ballast needs one of its own",
        )?;
        if greeting.get("QMP").is_none() {
            let words = quoted(&greeting.to_string());
            return Err(Unreachable::nonsense(format!("{words} is no greeting of QMP")));
        }
        let agreed = monitor.execute("qmp_capabilities", &json!({}), deadline)?;
        agreed.map_err(|refusal| refusal.of("qmp_capabilities"))?;
        Ok(monitor)
    }

    /// Has QEMU carry a command out, and gives what it returns or why it didn't.
    ///
    /// # Errors
    /// When no such answer came; the connection is of no more use then.
    pub(super) fn execute(
        &mut self,
        command: &'static str,
        arguments: &Value,
        deadline: Deadline,
    ) -> Result<Result<Value, Refusal>, Unreachable> {
        self.last_id += 1;
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": self.last_id }));
        self.socket.send(line.as_bytes(), deadline, command)?;
        loop {
            let mut answer = self.receive(deadline, command)?;
            let is_ours = answer.get("id").and_then(Value::as_u64) == Some(self.last_id);
            if let Some(value) = answer.get_mut("return").filter(|_| is_ours) {
                return Ok(Ok(value.take()));
            }
            // What QEMU could not even read has no number.
            if let Some(error) = answer.get("error").filter(|_| is_ours || answer.get("id").is_none()) {
                return Ok(Err(refusal(error)));
            }
            let known = ["event", "return", "error"].iter().any(|key| answer.get(key).is_some());
            if !known || (is_ours && answer.get("event").is_none()) {
                let words = quoted(&answer.to_string());
                return Err(Unreachable::nonsense(format!("{words} in answer to {command}")));
            }
        }
    }

    /// The next object that QEMU sends.
    fn receive(&mut self, deadline: Deadline, waited_for: &'static str) -> Result<Value, Unreachable> {
        let mut bytes = [0; 16 << 10];
        loop {
            if let Some(object) = self.objects.next()? {
                return serde_json::from_slice(&object).map_err(|error| {
                    let words = quoted(&String::from_utf8_lossy(&object));
                    Unreachable::nonsense(format!("{words} is no JSON: {error}"))
                });
            }
            let received = self.socket.receive(&mut bytes, deadline, waited_for)?;
            if received == 0 {
                return Err(Unreachable::hung_up(self.socket.path()));
            }
            self.objects.push(&bytes[..received]);
        }
    }
}

fn refusal(error: &Value) -> Refusal {
    let word = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or_default();
    Refusal { class: word("class").to_owned(), why: quoted(word("desc")) }
}
