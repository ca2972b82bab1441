//! `ballast check`: begins a check, follows it until it is done, and says what came out.

use std::time::Duration;

use super::api::{CheckOrder, CheckState, CheckStatus};
use super::client::{Client, ClientError};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

/// Bytes of pages a second, unless another rate is asked for: a fraction of a core.
pub const RATE_DEFAULT: Bytes = Bytes(256 << 20);

const ASK_EVERY: Duration = Duration::from_millis(100);

/// Why nothing came out.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The daemon did not answer, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Somebody else began one.
    #[error("another check was begun and took this one's place: wait for it, and begin again")]
    Replaced,
}

/// Begins a check and waits for its end; `progress` is shown how far it is.
///
/// # Errors
/// When there is no daemon, no such VM, or another check takes the place of this one.
pub fn run(
    client: &Client,
    order: &CheckOrder,
    mut progress: impl FnMut(&CheckStatus),
) -> Result<CheckStatus, CheckError> {
    let mut status = client.begin_check(order)?;
    let number = status.number;
    while status.state == CheckState::Running {
        progress(&status);
        std::thread::sleep(ASK_EVERY);
        status = client.check()?;
        if status.number != number {
            return Err(CheckError::Replaced);
        }
    }
    progress(&status);
    Ok(status)
}

/// What came out, for people, with a newline at its end.
#[must_use]
pub fn summary(status: &CheckStatus) -> String {
    let bytes = |pages: u64| Bytes(pages.saturating_mul(PAGE_SIZE_U64));
    let mut text = format!(
        "checked {} pages ({}): {} same-filled, {} in memory, {} in the file, {} bad\n",
        status.checked_pages(),
        bytes(status.checked_pages()),
        status.same_filled_pages,
        status.memory_pages,
        status.file_pages,
        status.bad_pages,
    );
    for page in &status.bad {
        text.push_str(&format!("bad: {} slot {}: {}\n", page.vm, page.slot, page.reason));
    }
    let more = status.bad_pages.saturating_sub(status.bad.len() as u64);
    if more > 0 {
        text.push_str(&format!("bad: and {more} more\n"));
    }
    if status.missing_pages > 0 {
        let pages = status.missing_pages;
        text.push_str(&format!(
            "not checked: {pages} pages in a writeback file that is missing, see `ballast status`\n"
        ));
    }
    for vm in &status.not_checked {
        text.push_str(&format!("not checked: {vm} is out of service, see `ballast status`\n"));
    }
    text
}

/// What is wrong, if anything is, in a few words.
#[must_use]
pub fn verdict(status: &CheckStatus) -> Option<String> {
    match (status.bad_pages, status.missing_pages, status.not_checked.len()) {
        (0, 0, 0) => None,
        (0, 0, _) => Some("not all VMs could be checked".to_owned()),
        (0, _, _) => Some("not all pages could be checked: a writeback file is missing".to_owned()),
        (pages, _, _) => Some(format!(
            "{pages} stored pages are bad: reading them is an error until their guests write them again"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::BadPage;
    use super::*;

    #[test]
    fn the_summary_counts_by_place_and_lists_what_is_bad() {
        let mut status = CheckStatus {
            same_filled_pages: 3,
            memory_pages: 1000,
            file_pages: 20,
            ..CheckStatus::default()
        };
        let text = summary(&status);
        assert!(text.starts_with("checked 1023 pages ("), "{text}");
        assert!(text.ends_with("3 same-filled, 1000 in memory, 20 in the file, 0 bad\n"), "{text}");
        assert_eq!(verdict(&status), None);
        status.not_checked = vec!["db".to_owned()];
        assert!(verdict(&status).unwrap().contains("VMs"));
        status.missing_pages = 9;
        assert!(verdict(&status).unwrap().contains("missing"));
        status.bad_pages = 102;
        status.bad =
            vec![BadPage { vm: "web1".to_owned(), slot: 7, reason: "the checksum differs".to_owned() }];
        let text = summary(&status);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        let expected = [
            "bad: web1 slot 7: the checksum differs",
            "bad: and 101 more",
            "not checked: 9 pages in a writeback file that is missing, see `ballast status`",
            "not checked: db is out of service, see `ballast status`",
        ];
        assert_eq!(lines, expected);
        assert!(verdict(&status).unwrap().starts_with("102 stored pages are bad"));
    }
}
