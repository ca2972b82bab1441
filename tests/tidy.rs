//! What keeps the tree tidy: files that can be read in one go, imports that go downwards only, a map that names every
//! place, and numbers that are not only declared but shown. By its text alone; `ARCHITECTURE.md` is the authority.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const LINES_MAX: usize = 500;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|err| panic!("{path}: {err}"))
}

/// Names in a directory of the tree, in order.
fn names_in(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(root().join(dir)).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All Rust files below a directory, by their paths from the root.
fn rust_files(dir: &str) -> Vec<String> {
    let mut files = Vec::new();
    for name in names_in(dir) {
        let path = format!("{dir}/{name}");
        if root().join(&path).is_dir() {
            files.extend(rust_files(&path));
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    files
}

/// A line of the tree in `ARCHITECTURE.md` and the lines below it that belong to it.
struct Place {
    path: String,
    /// What is in there: the words of the left column in the lines below, and those before a colon in the right one.
    parts: BTreeSet<String>,
    /// All of its text.
    text: String,
}

fn tree() -> Vec<Place> {
    let text = read("ARCHITECTURE.md");
    let block = text.split("```").nth(1).unwrap();
    let mut places: Vec<Place> = Vec::new();
    for line in block.lines().skip(1) {
        let (left, right) = line.trim_start().split_once("  ").unwrap_or((line, ""));
        let names = left.split(' ').chain(right.split(' ').filter_map(|word| word.strip_suffix(':')));
        let mut names = names.map(|name| name.trim_end_matches('/').to_owned());
        match places.last_mut() {
            Some(place) if line.starts_with(' ') => {
                place.parts.extend(names);
                place.text.push_str(line);
            }
            _ => places.push(Place {
                path: names.next().unwrap(),
                parts: BTreeSet::new(),
                text: line.to_owned(),
            }),
        }
    }
    assert!(places.len() > 10, "the tree is the first block of ARCHITECTURE.md");
    places
}

/// The rooms of `src` by name, numbered from the topmost down.
fn rooms() -> BTreeMap<String, usize> {
    let paths = tree().into_iter().map(|place| place.path);
    let names = paths.filter_map(|path| Some(path.strip_prefix("src/")?.trim_end_matches(".rs").to_owned()));
    names.zip(0..).collect()
}

#[test]
fn every_file_can_be_read_in_one_go() {
    let mut files = rust_files("src");
    files.extend(rust_files("tests"));
    files.push("images/workload.rs".to_owned());
    for path in files {
        let lines = read(&path).lines().count();
        assert!(lines <= LINES_MAX, "{path} has {lines} lines; {LINES_MAX} is the limit");
    }
}

#[test]
fn every_file_says_what_it_is_for() {
    for path in rust_files("src").into_iter().filter(|path| !path.contains("/tests")) {
        assert!(read(&path).starts_with("//! "), "{path} doesn't open with a //! paragraph");
    }
}

#[test]
fn imports_go_downwards() {
    let rooms = rooms();
    for path in rust_files("src") {
        let below_src = path.trim_start_matches("src/");
        let room = below_src.split('/').next().unwrap().trim_end_matches(".rs");
        if room == "lib" {
            continue;
        }
        let level = rooms[room];
        for line in read(&path).lines().filter(|line| !line.trim_start().starts_with("//")) {
            for used in line.split("crate::").skip(1) {
                let end = used.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(used.len());
                // Whatever is no room is a macro or an item of the crate's root.
                let Some(other) = rooms.get(&used[..end]) else { continue };
                assert!(*other > level || &used[..end] == room, "{path} imports upwards: {line}");
            }
            assert!(!line.contains("crate::{"), "{path}: one room an import: {line}");
        }
    }
}

#[test]
fn the_map_names_every_room_and_no_other() {
    let rooms = rooms();
    for name in names_in("src") {
        assert!(rooms.contains_key(name.trim_end_matches(".rs")), "ARCHITECTURE.md doesn't name src/{name}");
    }
    for room in rooms.keys() {
        let src = root().join("src");
        let exists = src.join(room).is_dir() || src.join(format!("{room}.rs")).is_file();
        assert!(exists, "ARCHITECTURE.md names src/{room}, which is not there");
    }
    let lib = read("src/lib.rs");
    for room in rooms.keys().filter(|room| !["main", "lib", "cli"].contains(&room.as_str())) {
        assert!(lib.contains(&format!("[`{room}`]")), "src/lib.rs doesn't name {room}");
    }
}

#[test]
fn a_room_that_lists_its_parts_lists_all_of_them() {
    for place in tree().iter().filter(|place| !place.parts.is_empty()) {
        let dir = &place.path;
        if !dir.starts_with("src/") {
            continue;
        }
        for name in names_in(dir) {
            let part = name.trim_end_matches(".rs");
            let named = ["mod", "tests"].contains(&part) || place.parts.contains(part);
            assert!(named, "ARCHITECTURE.md doesn't name {dir}/{name}");
        }
    }
}

#[test]
fn the_map_names_everything_else_that_is_kept() {
    let tree = tree();
    let named = |path: &str| tree.iter().find(|place| place.path == path);
    for dir in ["images", "vmm-configs", "tests", ".ci/run"] {
        assert!(named(dir).is_some() && root().join(dir).exists(), "{dir}");
    }
    let tests = &named("tests").unwrap().text;
    let words: BTreeSet<&str> = tests.split(|c: char| c.is_whitespace() || ",:;".contains(c)).collect();
    let names = |stem: &str| {
        words.iter().any(|word| match word.strip_suffix('*') {
            Some(start) => stem.starts_with(start),
            None => word.trim_end_matches('/') == stem,
        })
    };
    for name in names_in("tests") {
        assert!(names(name.trim_end_matches(".rs")), "ARCHITECTURE.md doesn't name tests/{name}");
    }
    for name in names_in("tests/bench").iter().filter(|name| *name != "__pycache__") {
        assert!(tests.contains(name.as_str()), "ARCHITECTURE.md doesn't name tests/bench/{name}");
    }
}

#[test]
fn every_limit_has_a_test() {
    let text = read("ARCHITECTURE.md");
    let rows = text.split("\n| what | bound | where | test |\n").nth(1).expect("the table of limits");
    let rows: Vec<_> = rows.lines().skip(1).take_while(|row| row.starts_with('|')).collect();
    assert!(rows.len() > 30);
    let sources = rust_files("src").join("\n");
    for row in rows {
        let tests = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        assert!(tests.starts_with('`'), "no test is named: {row}");
        for test in tests.split(", ").map(|test| test.trim_matches('`').rsplit("::").next().unwrap()) {
            let there = root().join(format!("tests/{test}.rs")).exists()
                || [format!("/{test}.rs"), format!("/{test}/mod.rs")]
                    .iter()
                    .any(|path| sources.contains(path));
            assert!(there, "there is no {test}: {row}");
        }
    }
}

/// A constant's value as a table has it: whole MiB and KiB, no underscores.
fn value_of(expression: &str) -> String {
    let number = |text: &str| text.replace('_', "");
    match expression.split_once(" << ") {
        Some((left, "20")) => format!("{} MiB", number(left)),
        Some((left, "10")) => format!("{} KiB", number(left)),
        _ => number(expression),
    }
}

#[test]
fn every_number_of_the_balloon_policy_stands_in_its_table() {
    let text = read("ARCHITECTURE.md");
    let rows = text
        .split("\n| name | value | what it bounds |\n")
        .nth(1)
        .expect("the table of the policy's numbers");
    let rows = rows.lines().skip(1).take_while(|row| row.starts_with('|'));
    let cells = rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect::<Vec<_>>());
    let told: BTreeMap<String, String> =
        cells.map(|row| (row[0].trim_matches('`').to_owned(), row[1].to_owned())).collect();
    let mut there = BTreeMap::new();
    for name in names_in("src/balloon").iter().filter(|name| name.ends_with(".rs")) {
        let text = read(&format!("src/balloon/{name}"));
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let lines = text.lines().filter_map(|line| {
            line.trim_start_matches("pub").trim_start_matches("(super)").trim_start().strip_prefix("const ")
        });
        for (name, rest) in lines.filter_map(|line| line.split_once(": ")) {
            let (_, expression) = rest.trim_end_matches(';').split_once(" = ").expect("a value");
            // A format's version bounds nothing.
            if !name.starts_with("VERSION") {
                there.insert(name.to_owned(), value_of(expression));
            }
        }
    }
    assert!(there.len() > 40, "{there:?}");
    assert_eq!(told, there, "ARCHITECTURE.md has other numbers than src/balloon");
}

/// The public fields of a file's structs, by struct.
fn fields(path: &str) -> Vec<(String, String)> {
    let (text, mut owner, mut fields) = (read(path), String::new(), Vec::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("pub struct ") {
            owner = name.split([' ', '(', '{']).next().unwrap().to_owned();
        } else if let Some((name, _)) = line.strip_prefix("    pub ").and_then(|line| line.split_once(": "))
            && !name.contains(' ')
        {
            fields.push((owner.clone(), name.to_owned()));
        }
    }
    assert!(fields.len() > 10, "{path}");
    fields
}

#[test]
fn every_number_of_the_status_is_filled_in() {
    let paths = ["src/control/api/status.rs", "src/control/api/counters.rs"].map(fields);
    let mut wanted: BTreeMap<String, usize> = BTreeMap::new();
    for (_, field) in paths.into_iter().flatten().filter(|(owner, _)| owner != "Bucket") {
        *wanted.entry(field).or_default() += 1;
    }
    let text = read("src/runtime/status.rs");
    let text = text.split("#[cfg(test)]").next().unwrap();
    for (field, structs) in wanted {
        let forms = [format!("{field}: "), format!("{field},"), format!("status.{field} = ")];
        let filled = text.lines().filter(|line| forms.iter().any(|form| line.trim_start().starts_with(form)));
        let filled = filled.count();
        assert!(filled >= structs, "{structs} parts of the status have {field}, and {filled} are filled in");
    }
}

#[test]
fn every_number_that_is_kept_is_shown() {
    let shown = read("src/runtime/status.rs");
    let numbers = fields("src/store/accounting.rs");
    for (owner, field) in numbers.iter().filter(|(owner, _)| ["Held", "Events"].contains(&owner.as_str())) {
        let shows = ["held", "events"].iter().any(|from| shown.contains(&format!("{from}.{field}")));
        assert!(shows, "{owner}::{field} is in no status");
    }
    for (path, from) in [("src/reclaim/stats.rs", "done"), ("src/writeback/status.rs", "now")] {
        let public =
            fields(path).into_iter().filter(|(owner, _)| ["Reclaimed", "Status"].contains(&&**owner));
        for (owner, field) in public {
            assert!(shown.contains(&format!("{from}.{field}")), "{path}: {owner}::{field} is in no status");
        }
    }
}
