"""What peers prints and draws of its rounds: Markdown tables with ratios to each peer, and a chart for each operation."""

import pathlib
import statistics

import charts
from common import MIB
from matrix import LARGE, ONE_BY_ONE, OPERATIONS, USUAL

# What must hold against the first peer, as the ratio of Ballast to it: the side to be on, and of what.
BARS = {
    "store 4 KiB, QD32": (">=", 2.0),
    "load 4 KiB, QD32": (">=", 2.0),
    "load 4 KiB, QD1, p50": ("<=", 0.2),
    "memory for these pages": ("<=", 1.05),
    "the same at rest": ("<=", 0.55),
    "load 4 KiB at rest, QD1, p99": ("<=", 1.0),
}


def throughput(setup, operation):
    return lambda turn: turn["cells"][str(setup)][operation]["pages_per_second"] / 1000


MEASURES = [
    ("store 4 KiB, QD32", "k pages/s", throughput(USUAL, "store")),
    ("load 4 KiB, QD32", "k pages/s", throughput(USUAL, "load")),
    ("load 4 KiB, QD1, p50", "µs", lambda turn: turn["cells"][str(ONE_BY_ONE)]["load"]["latency_us_p50"]),
    ("store 128 KiB, QD32", "k pages/s", throughput(LARGE, "store")),
    ("load 128 KiB, QD32", "k pages/s", throughput(LARGE, "load")),
    ("memory for these pages", "MiB", lambda turn: sum(turn["memory_parts_bytes"][str(USUAL)].values()) / MIB),
    ("the same at rest", "MiB", lambda turn: sum(turn["rest"]["memory_parts_bytes"].values()) / MIB),
    ("load 4 KiB at rest, QD1, p99", "µs", lambda turn: turn["rest"]["loads"]["load_depth_1"]["latency_us_p99"]),
]


def median_of(turns, measure):
    """`None` where no round has it."""
    values = []
    for turn in turns:
        try:
            values.append(measure(turn))
        except (KeyError, AttributeError):
            continue
    return statistics.median(values) if values else None


def cleared(value, goal):
    """Whether a value is on the right side of its goal; what could not be measured is not."""
    if goal is None:
        return True
    if value is None:
        return False
    side, bar = goal
    return value >= bar if side == ">=" else value <= bar


def written(goal):
    return "" if goal is None else f"{goal[0]} {goal[1]}".replace(">=", "≥").replace("<=", "≤")


def number(value):
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def line(cells):
    return "| " + " | ".join(cells) + " |"


def compared(names, results, rows, first, goals=None):
    """A table of rows (label, unit, measure): each back end's median, and the ratio of the last one, Ballast, to each of
    the others; and whether all of the goals against the first peer are met."""
    peers = names[:-1]
    header = [first, *names, *(f"ratio to {name.split(' over ')[-1]}" for name in peers)]
    lines = [line(header + ["goal"] * bool(goals)), line(["---"] * (len(header) + bool(goals)))]
    met = True
    for label, unit, measure in rows:
        values = [median_of(results[name], measure) for name in names]
        if all(value is None for value in values):
            continue
        cells = [label] + [f"{number(value)} {unit}" if value is not None else "" for value in values]
        goal = (goals or {}).get(label)
        for place, value in enumerate(values[:-1]):
            ratio = values[-1] / value if value and values[-1] is not None else None
            missed = not cleared(ratio, goal) and (ratio is not None or place == 0)
            met = met and not (missed and place == 0)
            cells.append(("" if ratio is None else f"{ratio:.2f}") + " (missed)" * missed)
        lines.append(line(cells + [written(goal)] * bool(goals)))
    return lines, met


def summary(names, results):
    return compared(names, results, MEASURES, "", BARS)


def operations(names, results, setups):
    """A table for each operation, and one of the latencies one by one."""
    for operation in OPERATIONS:
        rows = [(str(setup), "k pages/s", throughput(setup, operation)) for setup in setups]
        yield compared(names, results, rows, f"**{operation}**")[0]
    rows = [(f"{operation}, {at.replace('p999', 'p99.9')}", "µs",
             lambda turn, operation=operation, at=at: turn["cells"][str(ONE_BY_ONE)][operation][f"latency_us_{at}"])
            for operation in OPERATIONS for at in ("p50", "p99", "p999")]
    yield compared(names, results, rows, f"**latency**, {ONE_BY_ONE}")[0]


def targets(rounds):
    """A table of the targets' medians, and whether all are met; `rounds` are lists of (what, value, goal, note)."""
    lines, met = [line(["Ballast by itself", "ratio", "goal", ""]), line(["---"] * 4)], True
    whats = list(dict.fromkeys(what for found in rounds for what, *_ in found))
    for what in whats:
        all_found = [entry for found in rounds for entry in found if entry[0] == what]
        values = [value for _, value, _, _ in all_found if value is not None]
        value = statistics.median(values) if values else None
        goal, note = all_found[0][2:]
        met = met and value is not None and cleared(value, goal)
        shown = "" if value is None else f"{value:.2f}" + " (missed)" * (not cleared(value, goal))
        lines.append(line([what, shown or "not measured", written(goal), note]))
    return lines, met


def memory_notes(names, results):
    for name in names:
        parts = [turn["memory_parts_bytes"].get(str(USUAL)) for turn in results[name]]
        parts = sorted((part for part in parts if part), key=lambda part: sum(part.values()))
        if parts:
            listed = "; ".join(f"{label} {size / MIB:.2f} MiB" for label, size in parts[len(parts) // 2].items())
            yield f"- {name}, memory: {listed}."


def empty_notes(names, results):
    for name in names:
        reasons = {setup: reason for turn in results[name] for setup, reason in turn["reasons"].items()}
        for setup, reason in reasons.items():
            yield f"- {name}, {setup}: no figures: {reason.splitlines()[0]}."


def draw(directory, names, results, setups):
    """Writes the charts; returns their paths."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for operation in OPERATIONS:
        groups = [(setup.label(), [median_of(results[name], throughput(setup, operation)) for name in names])
                  for setup in setups]
        pictures[operation] = charts.bars(operation, "thousands of pages a second", names, groups)
    at = lambda operation, at: lambda turn: turn["cells"][str(ONE_BY_ONE)][operation][f"latency_us_{at}"]
    groups = [(f"{operation}\n{name}", [median_of(results[of], at(operation, key)) for of in names])
              for operation in OPERATIONS for key, name in (("p50", "p50"), ("p99", "p99"))]
    pictures["latency"] = charts.bars(f"latency, {ONE_BY_ONE}", "µs", names, groups)
    paths = []
    for name, picture in pictures.items():
        paths.append(directory / f"peers-{name}.svg")
        paths[-1].write_text(picture)
    return paths
