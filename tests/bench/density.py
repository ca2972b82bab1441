"""What makes pages small, in more detail than one figure: what each compressor takes and gives, with a dictionary and
without, and what equal pages of a VM save by being kept once. Measured once: the times are of a single run."""

import pathlib

from backends import DISKS_BYTES, Ballast
from common import MIB, PAGE_BYTES, Bench, Failed, say
from matrix import pages_max
from tables import line, number

COMPRESSORS = ("lz4", "zstd:-1", "zstd:1", "zstd:3", "zstd:9", "zstd:15")
# Enough for times, and soon done by the slowest of them.
CODEC_PAGES_MAX = 20480


def pages_of(files):
    return sum(pathlib.Path(file).stat().st_size // PAGE_BYTES for file in files)


def check(corpus):
    """Refuses what would fail after all rounds."""
    if pages_of(corpus) > pages_max(DISKS_BYTES):
        raise Failed(f"--rest stores each page of --corpus once in one VM of {DISKS_BYTES // MIB} MiB: give fewer files")


def levels(binary, corpus, pages):
    """A table of compressors: the time a page takes, and its object's bytes, without a dictionary and with one."""
    pages = min(pages, CODEC_PAGES_MAX)

    def alone(compressor):
        say(f"Codec alone, {compressor}")
        found = Bench([binary, "bench"], corpus).codec_alone(pages, compressor)
        micros = [number(found[way]["ns_per_page"] / 1000) for way in ("store", "load")]
        return [", ".join(micros), f"{found['object_bytes'] / pages:.0f}"]

    yield line(["compressor", "store, load: µs a page", "bytes", "with a dictionary: µs a page", "bytes"])
    yield line(["---"] * 5)
    for compressor in COMPRESSORS:
        # lz4 takes none.
        learned = alone(f"{compressor}+dictionary") if compressor.startswith("zstd") else ["", ""]
        yield line([compressor, *alone(compressor), *learned])


def equal_pages(binary, directory, corpus):
    """A table of what VMs take at rest, whose pages are each file's and those of all files, each page once, when equal
    ones are kept once and when they aren't."""
    yield line(["pages of", "`deduplicate`", "objects", "bytes a page", "metadata", "equal pages found"])
    yield line(["---"] * 6)
    for files in dict.fromkeys([tuple(corpus), *((file,) for file in corpus)]):
        names, pages = " ".join(pathlib.Path(file).name for file in files), pages_of(files)
        for deduplicate in (False, True):
            say(f"At rest, {names}, deduplicate = {str(deduplicate).lower()}")
            bench = Bench([binary, "bench"], list(files))
            with Ballast(directory, binary, deduplicate).resting(bench, pages) as daemon:
                pool = daemon.status()["pool"]
            found = f"{pool['shared_pages']} of {pages}, as {pool['shared_objects']} objects" if deduplicate else ""
            yield line([names, str(deduplicate).lower(), f"{pool['object_bytes'] / 1000:.0f} kB",
                        number(pool["object_bytes"] / pages), f"{pool['metadata_bytes'] / 1000:.0f} kB", found])
