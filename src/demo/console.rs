//! What a guest says on its serial console, as `images/init` and `images/workload.rs` write it. Pure.

/// The mark of the guest's own lines among the kernel's.
const MARK: &str = "BALLAST-GUEST ";

/// How a guest judged its own pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Every page was right; the counts that the guest printed.
    Pass(String),
    /// Wrong pages, or no result; what the guest printed.
    Fail(String),
}

/// All that matters of a console so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The guest's init was reached: a Linux guest boots here.
    pub booted: bool,
    /// Progress lines so far.
    pub steps: usize,
    /// The last of them.
    pub progress: Option<String>,
    /// Lines about single wrong pages.
    pub bad: Vec<String>,
    /// How long single pages took that took long, in milliseconds.
    pub pauses_ms: Vec<u64>,
    /// The verdict; one that failed beats one that passed.
    pub verdict: Option<Verdict>,
}

impl Report {
    /// Reads a console from its start. A line that isn't at its end yet is not read: half a verdict is none.
    #[must_use]
    pub fn parse(console: &str) -> Self {
        let mut report = Self::default();
        for line in console.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            // The kernel may have begun the line.
            if let Some((_, said)) = line.split_once(MARK) {
                report.note(said.trim_end());
            }
        }
        report
    }

    fn note(&mut self, said: &str) {
        let (word, rest) = said.split_once(' ').unwrap_or((said, ""));
        match word {
            "INIT" => self.booted = true,
            "PROGRESS" => {
                self.steps += 1;
                self.progress = Some(rest.to_owned());
            }
            "PAUSE" => self.pauses_ms.extend(rest.parse::<u64>()),
            "BAD" => self.bad.push(rest.to_owned()),
            "FAIL" => self.verdict = Some(Verdict::Fail(rest.to_owned())),
            "PASS" if self.verdict.is_none() => self.verdict = Some(Verdict::Pass(rest.to_owned())),
            _ => {}
        }
    }

    /// One phrase for a table.
    #[must_use]
    pub fn phrase(&self) -> String {
        match (&self.verdict, &self.progress) {
            (Some(Verdict::Pass(_)), _) => "PASS".to_owned(),
            (Some(Verdict::Fail(_)), _) => "FAIL".to_owned(),
            (None, Some(progress)) => progress.clone(),
            (None, None) if self.booted => "booted".to_owned(),
            (None, None) => "booting".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_read_to_its_last_progress_and_verdict() {
        let console = "SeaBIOS\r\nBALLAST-GUEST INIT 6.1\r\nBALLAST-GUEST PROGRESS round 0/2 fill 10% bad=0\r\n\
            [    3.1] noise BALLAST-GUEST PROGRESS round 1/2 check 90% bad=0\r\nBALLAST-GUEST PASS pages=2 bad=0\r\n";
        let report = Report::parse(console);
        assert!(report.booted);
        assert_eq!(report.steps, 2);
        assert_eq!(report.progress.as_deref(), Some("round 1/2 check 90% bad=0"));
        assert_eq!(report.verdict, Some(Verdict::Pass("pages=2 bad=0".to_owned())));
        assert_eq!(report.phrase(), "PASS");
    }

    #[test]
    fn a_failure_beats_a_pass_in_either_order() {
        for console in
            ["BALLAST-GUEST PASS a\nBALLAST-GUEST FAIL b\n", "BALLAST-GUEST FAIL b\nBALLAST-GUEST PASS a\n"]
        {
            assert_eq!(Report::parse(console).verdict, Some(Verdict::Fail("b".to_owned())));
        }
    }

    #[test]
    fn a_guest_without_a_word_is_booting() {
        assert_eq!(Report::parse("").phrase(), "booting");
        assert_eq!(Report::parse("BALLAST-GUEST INIT 6.1\n").phrase(), "booted");
        assert_eq!(Report::parse("BALLAST-GUEST BAD page 1\n").bad, ["page 1"]);
        assert_eq!(Report::parse("BALLAST-GUEST PASS pages=1 pla").verdict, None);
    }
}
