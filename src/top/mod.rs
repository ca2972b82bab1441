//! `ballast top`: what the VMs do, once a second, on a terminal or as lines. A client of the control socket like any
//! other; a thread asks, so that a daemon that takes its time doesn't keep a key from being heard.

mod columns;
mod rows;
mod screen;
mod signals;

use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde::Serialize;

pub use self::columns::Column;
use self::rows::History;
pub use self::rows::Row;
use self::screen::View;
use self::signals::Signals;
use crate::control::api::Status;
use crate::control::client::{Client, ClientError};
use crate::control::table;

/// How long a key may take to be heard.
const KEYS_EVERY: Duration = Duration::from_millis(50);

/// How `ballast top` is asked for.
#[derive(Clone, Debug, clap::Args)]
pub struct TopArgs {
    /// Seconds from one look to the next, 0.1 to 3600.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    pub interval: Duration,
    /// What the VMs are sorted by.
    #[arg(long, value_name = "COLUMN", default_value = "loads")]
    pub sort: Column,
    /// Looks after which it ends; by default none.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
}

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// On the whole terminal, with colours or without.
    Screen {
        /// Whether there may be colours.
        colours: bool,
    },
    /// As lines for people.
    Lines,
    /// As a line of JSON for each look.
    Json,
}

/// Why it ended.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// There is no daemon, and was none since the start.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The terminal, or what the lines go to, can't be written.
    #[error("the output can't be written")]
    Output(#[from] io::Error),
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "must be a number of seconds from 0.1 to 3600".to_owned())
}

/// An answer, and when it came.
type Look = (Instant, Result<Status, ClientError>);

/// Shows until it is ended, by a key or by `args.count`.
///
/// # Errors
/// When no daemon answers the first time, or the output can't be written.
pub fn run(args: &TopArgs, client: Client, shown: Shown) -> Result<(), TopError> {
    let mut history = History::default();
    let start = Instant::now();
    history.add(start.elapsed(), client.status()?);
    let signals = matches!(shown, Shown::Screen { .. }).then(|| Signals::watch(io::stdout())).transpose()?;
    // One answer ahead at most: who reads slowly gets fewer.
    let (told, looks) = mpsc::sync_channel(0);
    let interval = args.interval;
    std::thread::Builder::new().name("asking".to_owned()).spawn(move || ask(&client, interval, &told))?;
    let Shown::Screen { colours } = shown else { return print_lines(args, shown, history, start, &looks) };
    let mut terminal = ratatui::try_init()?;
    let view = View { sort: args.sort, from: 0, help: false, colours, lost: None };
    let mut screen = Screen { history, view, start, answered: start, left: args.count };
    let ended = || signals.as_ref().is_some_and(Signals::came);
    let result = screen.run(&mut terminal, &looks, ended);
    let restored = ratatui::try_restore();
    if let Some(signals) = signals {
        signals.die();
    }
    restored?;
    Ok(result?)
}

/// Asks again and again, until nobody listens.
fn ask(client: &Client, interval: Duration, told: &SyncSender<Look>) {
    let mut next = Instant::now();
    loop {
        next = (next + interval).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let status = client.status();
        if told.send((Instant::now(), status)).is_err() {
            return;
        }
    }
}

/// What a line of JSON has.
#[derive(Serialize)]
struct Line<'a> {
    /// Bytes of the pool that are used, and may be.
    pool_used_bytes: u64,
    pool_max_bytes: u64,
    pool_full: bool,
    /// The writeback file's state, if there is one.
    writeback: Option<&'static str>,
    vms: Vec<&'a Row>,
}

fn print_lines(
    args: &TopArgs,
    shown: Shown,
    mut history: History,
    start: Instant,
    looks: &Receiver<Look>,
) -> Result<(), TopError> {
    let (mut left, mut lost) = (args.count, false);
    while left != Some(0) {
        let Ok((at, status)) = looks.recv() else { break };
        match status {
            Ok(status) => {
                lost = false;
                history.add(at.saturating_duration_since(start), status);
                match print(&history, args.sort, shown) {
                    // A reader that has seen enough is no failure.
                    Err(err) if err.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                    printed => printed?,
                }
            }
            Err(err) if !lost => {
                lost = true;
                writeln!(io::stderr(), "ballast: {err}; it is asked again")?;
            }
            Err(_) => {}
        }
        left = left.map(|left| left - 1);
    }
    Ok(())
}

fn print(history: &History, sort: Column, shown: Shown) -> io::Result<()> {
    let Some(status) = history.status() else { return Ok(()) };
    let rows = sort.sorted(history.rows());
    let mut stdout = io::stdout().lock();
    if shown == Shown::Json {
        let line = Line {
            pool_used_bytes: status.pool.used_bytes,
            pool_max_bytes: status.pool.max_bytes,
            pool_full: status.pool.full,
            writeback: status.writeback.as_ref().map(|file| file.state.as_str()),
            vms: rows,
        };
        serde_json::to_writer(&mut stdout, &line)?;
        return writeln!(stdout);
    }
    for line in table::totals(status) {
        writeln!(stdout, "{line}")?;
    }
    let name_width = rows.iter().map(|row| Column::Vm.text(row).chars().count()).max().unwrap_or(0);
    let mut write_row = |of: &dyn Fn(Column) -> String| {
        let cells = Column::ALL.map(|column| match column {
            Column::Vm => format!("{:<width$}", of(column), width = name_width.max(2)),
            _ => format!("{:>width$}", of(column), width = usize::from(column.width())),
        });
        writeln!(stdout, "{}", cells.join(" "))
    };
    write_row(&|column| column.heading().to_owned())?;
    for row in rows {
        write_row(&|column| column.text(row))?;
    }
    stdout.flush()
}

/// The terminal's side.
struct Screen {
    history: History,
    view: View,
    start: Instant,
    /// When the last answer came.
    answered: Instant,
    left: Option<u64>,
}

impl Screen {
    fn run(
        &mut self,
        terminal: &mut DefaultTerminal,
        looks: &Receiver<Look>,
        ended: impl Fn() -> bool,
    ) -> io::Result<()> {
        while self.left != Some(0) {
            terminal.draw(|frame| screen::draw(frame, &self.history, &self.view))?;
            // Whatever comes first: an answer, or a key. Keys are looked for often, answers come rarely.
            loop {
                match looks.recv_timeout(Duration::ZERO) {
                    Ok(look) => {
                        self.take(look);
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
                if ended() {
                    return Ok(());
                }
                if event::poll(KEYS_EVERY)? {
                    match event::read()? {
                        Event::Key(key) if self.press(key) => return Ok(()),
                        _ => break,
                    }
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, (at, status): Look) {
        self.left = self.left.map(|left| left - 1);
        match status {
            Ok(status) => {
                self.answered = at;
                self.view.lost = None;
                self.history.add(at.saturating_duration_since(self.start), status);
            }
            Err(err) => self.view.lost = Some((err.to_string(), at.saturating_duration_since(self.answered))),
        }
    }

    /// Does what a key says. True for the end.
    fn press(&mut self, key: KeyEvent) -> bool {
        if key.kind == KeyEventKind::Release {
            return false;
        }
        let rows = self.history.rows().len();
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Down => self.view.from = (self.view.from + 1).min(rows.saturating_sub(1)),
            KeyCode::Up => self.view.from = self.view.from.saturating_sub(1),
            KeyCode::Home => self.view.from = 0,
            KeyCode::Char('?') => self.view.help = !self.view.help,
            KeyCode::Char(key) => {
                if let Some(column) = Column::ALL.into_iter().find(|column| column.key() == key) {
                    (self.view.sort, self.view.from, self.view.help) = (column, 0, false);
                }
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::VmStatus;

    fn screen(vms: usize) -> Screen {
        let mut history = History::default();
        let vms = (0..vms).map(|n| VmStatus { name: n.to_string(), ..VmStatus::default() }).collect();
        history.add(Duration::ZERO, Status { vms, ..Status::default() });
        let view = View { sort: Column::Loads, from: 0, help: false, colours: false, lost: None };
        let start = Instant::now();
        Screen { history, view, start, answered: start, left: Some(5) }
    }

    fn press(screen: &mut Screen, code: KeyCode) -> bool {
        screen.press(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn keys_sort_scroll_and_quit() {
        let mut screen = screen(3);
        for column in Column::ALL {
            assert!(!press(&mut screen, KeyCode::Char(column.key())));
            assert_eq!(screen.view.sort, column);
        }
        for expected in [1, 2, 2] {
            press(&mut screen, KeyCode::Down);
            assert_eq!(screen.view.from, expected);
        }
        press(&mut screen, KeyCode::Up);
        assert_eq!(screen.view.from, 1);
        press(&mut screen, KeyCode::Char('?'));
        assert!(screen.view.help);
        press(&mut screen, KeyCode::Char('n'));
        assert!(!screen.view.help);
        assert_eq!(screen.view.from, 0, "another order begins at its top");
        assert!(!press(&mut screen, KeyCode::Char('z')) && !press(&mut screen, KeyCode::Char('c')));
        assert!(press(&mut screen, KeyCode::Char('q')) && press(&mut screen, KeyCode::Esc));
        assert!(screen.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn a_daemon_that_is_away_is_waited_for() {
        let mut screen = screen(1);
        let gone = || ClientError::NotRunning { socket: "/run/ballast/control.sock".into() };
        let at = |seconds| screen_time(seconds);
        let start = screen.start;
        screen.take((start + at(3), Err(gone())));
        screen.take((start + at(4), Err(gone())));
        let (reason, since) = screen.view.lost.clone().unwrap();
        assert!(reason.contains("/run/ballast/control.sock") && since == at(4), "{reason} {since:?}");
        assert_eq!(screen.history.rows().len(), 1, "what was seen stays");
        screen.take((start + at(5), Ok(Status::default())));
        assert!(screen.view.lost.is_none() && screen.history.rows().is_empty());
        assert_eq!(screen.left, Some(2));
    }

    fn screen_time(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn intervals_are_seconds() {
        assert_eq!(parse_interval("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "0.05", "-1", "3601", "nan", "inf", "1s", ""] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }
}
