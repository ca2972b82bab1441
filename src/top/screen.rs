//! Drawing: a few lines about all VMs, a table of them, the keys. What doesn't fit is left out, the least important
//! first: columns from the right, the sparkline, the keys, the lines at the top but for the first. A long name is cut
//! before the columns that 80 cells have room for.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Paragraph, Row as TableRow, Table};

use clap::ValueEnum;

use super::columns::Column;
use super::rows::{History, Row};
use crate::control::api::{Status, WritebackState};
use crate::control::table::totals;

/// Rows of a screen that has room for everything.
const ROOMY: u16 = 12;
/// Cells that a sparkline needs to be worth it.
const SPARKLINE_MIN: u16 = 8;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What is drawn, beside what was seen.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) sort: Column,
    /// The first row that is shown.
    pub(super) from: usize,
    /// Whether what the keys do is shown instead of the VMs.
    pub(super) help: bool,
    /// Whether there may be colours.
    pub(super) colours: bool,
    /// Why there is nothing newer, since when.
    pub(super) lost: Option<(String, Duration)>,
}

impl View {
    fn style(&self, colour: Color) -> Style {
        if self.colours { Style::new().fg(colour) } else { Style::new() }
    }
}

pub(super) fn draw(frame: &mut Frame<'_>, history: &History, view: &View) {
    let area = frame.area();
    let mut top = header(history.status(), view);
    if area.height < ROOMY {
        top.truncate(1);
    }
    if let Some((reason, since)) = &view.lost {
        let text = format!("no answer for {} s: {reason}", since.as_secs());
        top.insert(0, Line::styled(text, view.style(Color::Red).add_modifier(Modifier::BOLD)));
    }
    let keys = u16::from(area.height >= ROOMY);
    let top_height = u16::try_from(top.len()).unwrap_or(u16::MAX).min(area.height);
    let parts = [Constraint::Length(top_height), Constraint::Fill(1), Constraint::Length(keys)];
    let [top_area, table_area, keys_area] = Layout::vertical(parts).areas(area);
    frame.render_widget(Paragraph::new(top), top_area);
    if view.help {
        frame.render_widget(Paragraph::new(help()), table_area);
    } else {
        draw_table(frame, table_area, history, view);
    }
    frame.render_widget(Line::from(key_names(area.width)), keys_area);
}

/// The lines about all VMs. The first is the most important one.
fn header(status: Option<&Status>, view: &View) -> Vec<Line<'static>> {
    let Some(status) = status else { return vec![Line::from("asking the daemon")] };
    let lines = totals(status);
    let file_failed = status.writeback.as_ref().is_some_and(|file| {
        matches!(
            file.state,
            WritebackState::Failed | WritebackState::Missing | WritebackState::NoSpace | WritebackState::Slow
        )
    });
    let style = |line: &str| match line.split(' ').next() {
        Some("full:") => view.style(Color::Yellow),
        Some("writeback:") if file_failed => view.style(Color::Red),
        _ => Style::new(),
    };
    lines.into_iter().map(|line| Line::styled(line.clone(), style(&line))).collect()
}

/// The keys, as many as there is room for.
fn key_names(width: u16) -> String {
    let mut text = "q quit  ? keys  sort:".to_owned();
    for column in Column::ALL {
        let name = column.heading().trim_end_matches("/s").to_lowercase();
        let between = if column == Column::Vm { " " } else { "  " };
        let more = format!("{between}{} {name}", column.key());
        if text.len() + more.len() > usize::from(width) {
            break;
        }
        text.push_str(&more);
    }
    text
}

/// All keys, with what they do.
fn help() -> Vec<Line<'static>> {
    let sort = Column::ALL.into_iter().map(|column| {
        // What is said of a column where it is named as an option.
        let what = column.to_possible_value();
        let what = what.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default();
        format!("{}     sort by {:<9} {what}", column.key(), column.heading())
    });
    let others = ["q     quit", "?     these keys, or the VMs again", "↑ ↓   scroll; Home: to the first"];
    others.map(str::to_owned).into_iter().chain(sort).map(Line::from).collect()
}

/// Columns that wider terminals have beside a sparkline.
const IN_WIDE: [Column; 5] = [Column::P99, Column::Stored, Column::Memory, Column::Target, Column::Why];
/// Cells that all others and the shortest sparkline take behind the name.
const SHOWN: u16 = 68;

/// The columns that there is room for, and what is left for a sparkline.
fn fitting(width: u16, name_width: u16) -> (Vec<(Column, u16)>, u16) {
    let mut left = width;
    let mut columns = Vec::new();
    for column in Column::ALL {
        let wanted = match column {
            Column::Vm => name_width.min(width.saturating_sub(SHOWN)).max(Column::Vm.width().min(width)),
            _ => column.width().saturating_add(1),
        };
        // These only where a sparkline has room beside them.
        let beside = IN_WIDE.contains(&column).then_some(SPARKLINE_MIN.saturating_add(1));
        let Some(rest) = left.checked_sub(wanted).filter(|rest| *rest >= beside.unwrap_or(0)) else { break };
        left = rest;
        columns.push((column, if column == Column::Vm { wanted } else { column.width() }));
    }
    (columns, left.saturating_sub(1))
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, history: &History, view: &View) {
    let rows = view.sort.sorted(history.rows());
    if rows.is_empty() {
        let text = if history.status().is_some() { "no VM is configured" } else { "" };
        frame.render_widget(Line::from(text), area);
        return;
    }
    let names = rows.iter().map(|row| Column::Vm.text(row).chars().count());
    let longest = u16::try_from(names.max().unwrap_or(0)).unwrap_or(u16::MAX);
    let (columns, left) = fitting(area.width, longest.max(Column::Vm.width()));
    let trail = if left >= SPARKLINE_MIN { left } else { 0 };
    let headings = columns.iter().map(|(column, _)| {
        let style =
            if *column == view.sort { Style::new().add_modifier(Modifier::BOLD) } else { Style::new() };
        cell(*column, column.heading().to_owned(), style)
    });
    let headings = headings.chain((trail > 0).then(|| Cell::from("PAGES/s")));
    let headings = TableRow::new(headings).style(Style::new().add_modifier(Modifier::REVERSED));
    let shown = rows.iter().skip(view.from.min(rows.len().saturating_sub(1)));
    let lines = shown.map(|row| {
        let cells =
            columns.iter().map(|(column, _)| cell(*column, column.text(row), style_of(*column, row, view)));
        let bars =
            (trail > 0).then(|| Cell::from(Span::styled(bars(&row.trail, trail), view.style(Color::Cyan))));
        TableRow::new(cells.chain(bars))
    });
    let widths = columns.iter().map(|(_, width)| *width).chain((trail > 0).then_some(trail));
    let table = Table::new(lines, widths.map(Constraint::Length)).header(headings).column_spacing(1);
    frame.render_widget(table, area);
}

fn cell(column: Column, text: String, style: Style) -> Cell<'static> {
    let alignment = if column == Column::Vm { Alignment::Left } else { Alignment::Right };
    Cell::from(Line::styled(text, style).alignment(alignment))
}

fn style_of(column: Column, row: &Row, view: &View) -> Style {
    match column {
        Column::Vm if row.state != "ready" => view.style(Color::Red),
        Column::Waiting if row.waiting_stores > 0 => view.style(Color::Yellow),
        Column::Limit if row.limit_used.is_some_and(|used| used > 0.9) => view.style(Color::Yellow),
        _ => Style::new(),
    }
}

/// The newest intervals that fit, against the busiest of them.
fn bars(trail: &[u64], width: u16) -> String {
    let shown = &trail[trail.len().saturating_sub(usize::from(width))..];
    let most = shown.iter().copied().max().unwrap_or(0).max(1);
    let bar = |value: &u64| {
        let height = u128::from(*value) * (BARS.len() as u128 - 1) / u128::from(most);
        usize::try_from(height).ok().and_then(|height| BARS.get(height)).copied().unwrap_or(' ')
    };
    shown.iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{PoolStatus, VmState, VmStatus, WritebackStatus};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn vm(name: &str, n: u64) -> VmStatus {
        VmStatus {
            name: name.to_owned(),
            stores: 1000 * n,
            loads: 100 * n,
            stored_pages: 256 * n,
            payload_bytes: 300_000 * n,
            pool_bytes: 1 << 19,
            limit_bytes: 1 << 20,
            ..VmStatus::default()
        }
    }

    fn status(n: u64) -> Status {
        let pool = PoolStatus {
            max_bytes: 1 << 30,
            used_bytes: 1 << 29,
            stored_pages: 1 << 20,
            ..PoolStatus::default()
        };
        let file = WritebackStatus { state: WritebackState::Failed, ..WritebackStatus::default() };
        let vms = vec![vm("web1", n), vm("db", 3 * n)];
        Status { pool, vms, writeback: Some(file), ..Status::default() }
    }

    fn view() -> View {
        View { sort: Column::Stores, from: 0, help: false, colours: true, lost: None }
    }

    fn history() -> History {
        let mut history = History::default();
        for second in 1..6 {
            history.add(Duration::from_secs(second), status(second));
        }
        history
    }

    fn drawn(width: u16, height: u16, history: &History, view: &View) -> Terminal<TestBackend> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, history, view)).unwrap();
        terminal
    }

    /// The screen as lines without what is empty at their ends.
    fn lines(terminal: &Terminal<TestBackend>) -> Vec<String> {
        let text = terminal.backend().to_string();
        text.lines().map(|line| line.trim_matches('"').trim_end().to_owned()).collect()
    }

    #[test]
    fn a_wide_screen_has_every_column_and_a_sparkline() {
        let terminal = drawn(172, 14, &history(), &view());
        let lines = lines(&terminal);
        assert!(lines[0].starts_with("pool: 512MiB of 1GiB used"), "{lines:#?}");
        assert!(lines.iter().any(|line| line.starts_with("writeback: failed")), "{lines:#?}");
        let heading = lines.iter().position(|line| line.starts_with("VM ")).unwrap();
        for column in Column::ALL {
            assert!(lines[heading].contains(column.heading()), "{}", lines[heading]);
        }
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let db = [
            "db",
            "3000",
            "300",
            "0",
            "3.50",
            "14.5MiB",
            "50%",
            "0",
            "0.0%",
            "-",
            "15MiB",
            "-",
            "-",
            "-",
            "████",
        ];
        assert_eq!(words(&lines[heading + 1]), db);
        assert_eq!(words(&lines[heading + 2])[..3], ["web1", "1000", "100"]);
        let keys = lines.last().unwrap();
        assert!(
            keys.starts_with("q quit  ? keys  sort: n vm  s stores") && keys.ends_with("y why"),
            "{keys}"
        );
    }

    #[test]
    fn eighty_columns_have_room_for_what_is_looked_for_most() {
        let mut long = History::default();
        for second in 1..20 {
            let mut status = status(second);
            status.vms[0].name = "a-name-of-twenty-nine-letters".to_owned();
            long.add(Duration::from_secs(second), status);
        }
        for history in [history(), long] {
            let screen = lines(&drawn(80, 24, &history, &view()));
            let heading = screen.iter().position(|line| line.starts_with("VM ")).unwrap();
            let words: Vec<_> = screen[heading].split_whitespace().collect();
            let expected = [
                "VM", "STORES/s", "LOADS/s", "FILE/s", "RATIO", "SAVED", "LIMIT", "WAITS", "PRESSURE",
                "PAGES/s",
            ];
            assert_eq!(words, expected);
            let bars = screen[heading + 1].chars().filter(|cell| BARS.contains(cell)).count();
            assert_eq!(bars, usize::from(SPARKLINE_MIN).min(history.rows()[0].trail.len()), "{screen:#?}");
            assert!(screen.last().unwrap().ends_with("u limit"), "{screen:#?}");
        }
    }

    #[test]
    fn every_key_is_explained_when_that_is_asked_for() {
        let screen = lines(&drawn(80, 24, &history(), &View { help: true, ..view() }));
        for column in Column::ALL {
            let line = format!("{}     sort by {}", column.key(), column.heading());
            assert!(
                screen.iter().any(|other| other.starts_with(&line) && other.len() > line.len() + 10),
                "{line}: {screen:#?}"
            );
        }
        assert!(!screen.iter().any(|line| line.starts_with("web1")));
    }

    #[test]
    fn the_order_is_that_of_the_column_and_scrolling_leaves_one_row() {
        let by_name = |view: &View| {
            let lines = lines(&drawn(100, 14, &history(), view));
            let at = lines.iter().position(|line| line.starts_with("VM ")).unwrap();
            lines[at + 1..]
                .iter()
                .filter_map(|line| line.split(' ').next().map(str::to_owned))
                .collect::<Vec<_>>()
        };
        assert_eq!(by_name(&View { sort: Column::Vm, ..view() })[..2], ["db", "web1"]);
        assert_eq!(by_name(&View { sort: Column::Limit, from: 1, ..view() })[0], "web1");
        assert_eq!(by_name(&View { sort: Column::Limit, from: 99, ..view() })[0], "web1");
    }

    #[test]
    fn small_screens_keep_what_matters_most() {
        let small = lines(&drawn(32, 4, &history(), &view()));
        assert!(small[0].starts_with("pool: 512MiB of 1GiB used"), "{small:?}");
        assert_eq!(small[1].split_whitespace().collect::<Vec<_>>(), ["VM", "STORES/s", "LOADS/s"]);
        assert!(small[2].starts_with("db") && small[3].starts_with("web1"), "{small:?}");
        for (width, height) in [(1, 1), (3, 2), (200, 1), (1, 50), (12, 3), (13, 3)] {
            drawn(width, height, &history(), &view());
            drawn(width, height, &History::default(), &view());
        }
    }

    #[test]
    fn a_daemon_that_is_away_is_told_of_and_what_was_seen_stays() {
        let view = View { lost: Some(("no daemon answers".to_owned(), Duration::from_secs(7))), ..view() };
        let lines = lines(&drawn(100, 14, &history(), &view));
        assert_eq!(lines[0], "no answer for 7 s: no daemon answers");
        assert!(lines.iter().any(|line| line.starts_with("web1")), "{lines:?}");
    }

    #[test]
    fn without_vms_or_an_answer_that_is_said() {
        let mut history = History::default();
        assert_eq!(lines(&drawn(40, 5, &history, &view()))[0], "asking the daemon");
        history.add(Duration::ZERO, Status::default());
        assert!(lines(&drawn(40, 5, &history, &view())).iter().any(|line| line == "no VM is configured"));
    }

    #[test]
    fn colours_are_where_something_is_wrong_and_only_where_they_are_wanted() {
        let mut history = history();
        let mut status = status(9);
        status.vms[0].state = VmState::Quarantined;
        status.vms[0].waiting_stores = 3;
        history.add(Duration::from_secs(9), status);
        let coloured = |colours| {
            let terminal = drawn(110, 14, &history, &View { colours, ..view() });
            let cells = terminal.backend().buffer().content().to_vec();
            cells
                .into_iter()
                .filter(|cell| cell.fg != Color::Reset)
                .map(|cell| cell.symbol().to_owned())
                .collect::<String>()
        };
        assert!(coloured(true).contains("web1 (quarantined)"), "{}", coloured(true));
        assert_eq!(coloured(false), "");
    }
}
