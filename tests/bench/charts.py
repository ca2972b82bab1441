"""Shapes and words as SVG, and charts of bars."""

from xml.sax.saxutils import escape

GREY, BLACK, LINES = "#333", "#000", "#ddd"
COLOURS = ["#1f6fb4", "#d9822b", "#7b5ea7", "#3a8f4d", "#b03a48", "#8a8a3a"]


def text(x, y, words, anchor="start", colour=GREY):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def polyline(points, to_x, to_y, colour, dash):
    path = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dash} points="{path}"/>'


def rule(x1, x2, y):
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{LINES}"/>'


def picture(width, height, body):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
            'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(body) + "\n</svg>\n")


def round_up(value):
    """The next of 1, 2, 5, 10, 20, ..., so that quarters of an axis have short numbers."""
    step = 1.0
    while True:
        for factor in (1, 2, 4, 5, 8, 10):
            if value <= step * factor:
                return step * factor
        step *= 10


# A chart's measures in pixels: all of it, what is left of the axis, a row of bars, what is between two rows.
WIDTH, LEFT, ROW, GAP = 1100, 64, 200, 64
GROUPS_PER_ROW = 9


def bars(title, unit, series, groups):
    """A picture of bars: in each group one for every one of `series`, which are names. `groups` are (label, values), a
    value being a number or None for a bar that is not there."""
    most = round_up(max((value for _, values in groups for value in values if value is not None), default=1))
    body = [text(LEFT, 22, f"{title}, {unit}", colour=BLACK)]
    for n, name in enumerate(series):
        body.append(f'<rect x="{LEFT}" y="{34 + 18 * n}" width="12" height="12" fill="{COLOURS[n % len(COLOURS)]}"/>')
        body.append(text(LEFT + 18, 45 + 18 * n, name))
    top = 34 + 18 * len(series) + 24
    for start in range(0, len(groups), GROUPS_PER_ROW):
        body += row(groups[start:start + GROUPS_PER_ROW], len(series), top, most)
        top += ROW + GAP
    return picture(WIDTH, top - GAP + 44, body)


def row(groups, count, top, most):
    inner = WIDTH - LEFT - 20
    out = []
    for quarter in range(5):
        y = top + ROW * (1 - quarter / 4)
        out += [rule(LEFT, LEFT + inner, y), text(LEFT - 6, y + 4, f"{most * quarter / 4:g}", "end")]
    room = inner / min(GROUPS_PER_ROW, max(len(groups), 4))
    width = room * 0.8 / count
    for n, (label, values) in enumerate(groups):
        left = LEFT + room * n + room * 0.1
        for place, value in enumerate(values):
            x = left + width * place
            if value is None:
                out.append(text(x + width / 2, top + ROW - 4, "–", "middle"))
                continue
            height = ROW * value / most
            colour = COLOURS[place % len(COLOURS)]
            out.append(f'<rect x="{x:.1f}" y="{top + ROW - height:.1f}" width="{max(width - 1, 1):.1f}" '
                       f'height="{height:.1f}" fill="{colour}"/>')
        for line, words in enumerate(label.split("\n")):
            out.append(text(left + room * 0.4, top + ROW + 16 + 14 * line, words, "middle"))
    return out
