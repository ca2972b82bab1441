//! What was probably meant by a key that doesn't exist. serde says in its message which key it did not know and which it
//! does know, each in backquotes, and nowhere else; so does clap for the command line, by itself.

/// The key that is nearest to the unknown one that a message of serde's is about, if it is about one and any is near.
#[must_use]
pub fn to_unknown_key(message: &str) -> Option<&str> {
    let mut quoted = unknown_and_known(message)?;
    let unknown = quoted.next()?;
    nearest(unknown, &quoted.collect::<Vec<_>>())
}

/// The unknown key that a message of serde's is about, if it is about one.
#[must_use]
pub fn unknown_key(message: &str) -> Option<&str> {
    unknown_and_known(message)?.next()
}

fn unknown_and_known(message: &str) -> Option<impl Iterator<Item = &str>> {
    Some(message.split_once("unknown field")?.1.split('`').skip(1).step_by(2))
}

/// The word of these that is nearest to an unknown one, if any is near.
#[must_use]
pub fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let nearest = known.iter().map(|known| (distance(unknown, known), *known)).min()?;
    // Half of it wrong is another word.
    (nearest.0 * 2 <= unknown.chars().count()).then_some(nearest.1)
}

/// How many characters have to be put in, taken out, replaced, or exchanged with their neighbours.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in to.iter().enumerate() {
            let replaced = last[j] + usize::from(a != b);
            let mut best = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == to[j - 1] && from[i - 1] == *b {
                best = best.min(before_last[j - 1] + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_key_is_found_and_a_far_one_is_not() {
        let message =
            |key: &str| format!("unknown field `{key}`, expected one of `size`, `weight`, `writeback`");
        for (unknown, meant) in [
            ("wieght", Some("weight")),
            ("siz", Some("size")),
            ("write_back", Some("writeback")),
            ("colour", None),
        ] {
            assert_eq!(to_unknown_key(&message(unknown)), meant, "{unknown}");
        }
        assert_eq!(to_unknown_key("expected `,` or `]`"), None);
        assert_eq!(to_unknown_key("unknown field `a`, there are no fields"), None);
    }
}
