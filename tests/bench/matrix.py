"""The cells that peers measures: operations in setups, a setup being a size of requests, their depth, queues and VMs."""

import collections

from common import PAGE_BYTES, Failed, say

# What one setup measures, in the order of the bench's phases.
OPERATIONS = ("store", "load", "mixed", "discard")

# Block, depth.
SHAPES = (("4KiB", 1), ("4KiB", 32), ("4KiB", 128), ("128KiB", 32))
QUEUES = (1, 2, 4)
VMS = (1, 16, 256)


class Setup(collections.namedtuple("Setup", "block depth queues vms")):
    """One way to ask. `str` is its key in the JSON."""

    def __str__(self):
        return f"{self.block}, depth {self.depth}, {self.queues} queue{'s' * (self.queues > 1)}, " \
               f"{self.vms} VM{'s' * (self.vms > 1)}"

    def label(self):
        """The same for below a bar, in two lines."""
        return f"{self.block}, depth {self.depth}\n{self.queues} q, {self.vms} VM{'s' * (self.vms > 1)}"


USUAL = Setup("4KiB", 32, 1, 1)
ONE_BY_ONE = Setup("4KiB", 1, 1, 1)
LARGE = Setup("128KiB", 32, 1, 1)
CROWD = Setup("4KiB", 32, 1, 256)


def setups(full):
    """All of them; or each shape, number of queues and number of VMs with everything else as usual."""
    if full:
        return [Setup(*shape, queues, vms) for shape in SHAPES for queues in QUEUES for vms in VMS]
    found = [Setup(*shape, 1, 1) for shape in SHAPES]
    found += [USUAL._replace(queues=queues) for queues in QUEUES[1:]]
    return found + [USUAL._replace(vms=vms) for vms in VMS[1:]]


def pages_of(setup, pages):
    """One by one, a quarter of the pages says as much."""
    return max(pages // 4, min(pages, 256)) if setup.depth == 1 else pages


def measure(backend, setup, bench, pages):
    """The figures of each operation, and what the pages took in memory, by part, where the back end can say so."""
    with backend.up(setup.vms, setup.queues) as up:
        run = lambda phases: bench(up.sockets, pages_of(setup, pages), phases, setup.block, depth=setup.depth,
                                   queues=setup.queues)
        found = run("store,load")
        memory = up.memory() if up.memory else None
        # Those that can't discard have no figures for it.
        found |= run("mixed,discard")
        return {operation: found[operation] for operation in OPERATIONS if operation in found}, memory


def turn(backend, wanted, bench, pages):
    """All setups with one back end: cells and memory by setup, and why a setup has none. A setup that can't be had leaves
    its cells empty."""
    cells, memory, reasons = {}, {}, {}
    for setup in wanted:
        try:
            cells[str(setup)], memory[str(setup)] = measure(backend, setup, bench, pages)
        except Failed as failed:
            reasons[str(setup)] = str(failed)
            say(f"  {backend.name}, {setup}: {failed}")
            continue
        figures = ", ".join(f"{operation} {cell['pages_per_second'] / 1000:.0f}"
                            for operation, cell in cells[str(setup)].items())
        say(f"  {backend.name}, {setup}: {figures} k pages/s")
    return {"cells": cells, "memory_parts_bytes": memory, "reasons": reasons}


def pages_max(disks_bytes):
    """What can be stored when 256 VMs share the disks, whose first slot and last part of a block stay empty."""
    block_pages = (128 << 10) // PAGE_BYTES
    return disks_bytes // PAGE_BYTES - max(VMS) * block_pages
