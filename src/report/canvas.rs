//! Shapes and words of an SVG picture, in whole pixels. Whatever a text holds, the picture is well-formed.

use std::fmt::Write;

/// The colours, each to be told from the others by whoever sees few, on a white ground that the picture brings along.
pub(super) const GROUND: &str = "#ffffff";
pub(super) const INK: &str = "#1a1a1a";
pub(super) const PALE: &str = "#d5d5d5";
pub(super) const MEMORY: &str = "#1f6fb4";
pub(super) const OTHER: &str = "#8a8a8a";
pub(super) const FILE: &str = "#e08a00";

/// Where a text begins, or ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// How a text looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Font {
    pub pixels: u32,
    pub bold: bool,
}

/// What most is written in.
pub(super) const SMALL: Font = Font { pixels: 11, bold: false };
pub(super) const NORMAL: Font = Font { pixels: 13, bold: false };
pub(super) const HEADING: Font = Font { pixels: 13, bold: true };
pub(super) const TITLE: Font = Font { pixels: 18, bold: true };

/// What was drawn so far.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    shapes: String,
}

impl Canvas {
    /// A filled rectangle; nothing when it has no area.
    pub fn rect(&mut self, (x, y): (u32, u32), (width, height): (u32, u32), fill: &str) {
        if width > 0 && height > 0 {
            self.add(format_args!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{fill}\"/>"
            ));
        }
    }

    /// A line.
    pub fn line(&mut self, (x1, y1): (u32, u32), (x2, y2): (u32, u32), stroke: &str) {
        self.add(format_args!("<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" stroke=\"{stroke}\"/>"));
    }

    /// A line through several points.
    pub fn curve(&mut self, points: &[(u32, u32)], stroke: &str) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x},{y}")).collect();
        let points = points.join(" ");
        self.add(format_args!(
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"2\"/>"
        ));
    }

    /// A line of text, whose base is at `y`.
    pub fn text(&mut self, (x, y): (u32, u32), anchor: Anchor, font: Font, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if font.bold { " font-weight=\"bold\"" } else { "" };
        let (pixels, text) = (font.pixels, escaped(text));
        self.add(format_args!(
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{pixels}\" text-anchor=\"{anchor}\"{weight}>{text}</text>"
        ));
    }

    fn add(&mut self, shape: std::fmt::Arguments<'_>) {
        // Writing to a string can't fail.
        let _ = writeln!(self.shapes, "{shape}");
    }

    /// The picture, of this size and with this name.
    pub fn picture(self, width: u32, height: u32, title: &str) -> String {
        let (shapes, title) = (self.shapes, escaped(title));
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"Noto Sans, DejaVu Sans, Arial, sans-serif\" fill=\"{INK}\" \
             role=\"img\">\n<title>{title}</title>\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"{GROUND}\"/>\n{shapes}</svg>\n"
        )
    }
}

/// A text as XML has it. A character that no XML may hold is replaced.
fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut escaped, c| {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&apos;"),
            '\t' | '\n' | '\r' => escaped.push(' '),
            '\0'..'\u{20}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_can_not_break_the_picture() {
        assert_eq!(
            escaped("a<b>&\"c\"'\u{1}\n\u{ffff}é"),
            "a&lt;b&gt;&amp;&quot;c&quot;&apos;\u{fffd} \u{fffd}é"
        );
    }

    #[test]
    fn what_has_no_area_is_not_drawn() {
        let mut canvas = Canvas::default();
        canvas.rect((1, 2), (0, 5), INK);
        canvas.rect((1, 2), (5, 0), INK);
        assert_eq!(canvas.shapes, "");
        canvas.rect((1, 2), (3, 4), INK);
        assert_eq!(canvas.shapes, "<rect x=\"1\" y=\"2\" width=\"3\" height=\"4\" fill=\"#1a1a1a\"/>\n");
    }
}
