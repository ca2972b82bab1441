"""What Ballast is to reach by itself, measured in the same run as its peers: against its own codec, with more VMs, with
another worker, the evenness of its service times, and what its shrinker and the recompression of cold pages cost those who load."""

import concurrent.futures
import contextlib
import functools
import pathlib
import tempfile
import time

from backends import Ballast
from common import MIB, PAGE_BYTES, Failed, ballast_daemon, wait_for
from matrix import CROWD, USUAL


def throughput(cells, setup, operation):
    return cells[str(setup)][operation]["pages_per_second"]


def service_times(before, now):
    """How many requests of the first VM ended in which bucket between two statuses, by path and the bucket's end in ns."""
    def counts(status):
        vm = status["vms"][0]
        by_path = {"stores": vm["store_latency_ns"]["pool"], "loads": vm["load_latency_ns"]["pool"]}
        return {path: {bucket["le"]: bucket["count"] for bucket in histogram["buckets"]}
                for path, histogram in by_path.items()}
    before, now = counts(before), counts(now)
    return {path: {le: count - before[path].get(le, 0) for le, count in now[path].items()} for path in now}


def quantile_ns(counts, wanted):
    """Within a bucket, which is an eighth of a power of two wide, as if all were spread evenly."""
    left = wanted * sum(counts.values())
    for le, count in sorted(counts.items()):
        if count and left <= count:
            width = max((1 << (le - 1).bit_length() - 1) // 8, 1) if le > 256 else le
            return le - width * (1 - left / count)
        left -= count
    raise Failed("the daemon served no requests")


def of_codec(alone, cells):
    """Store and load at depth 32 beside compressor, checksum and one copy alone."""
    alone = alone()
    for operation in ("store", "load"):
        ratio = throughput(cells, USUAL, operation) / alone[operation]["pages_per_second"]
        note = f"alone {alone[operation]['pages_per_second'] / 1000:.0f} k pages/s in the first round"
        yield f"{operation} at depth 32, of the codec, checksum and one copy alone", ratio, (">=", 0.85), note


def of_crowd(cells):
    """The same load over 256 VMs."""
    for operation in ("store", "load", "mixed"):
        ratio = throughput(cells, CROWD, operation) / throughput(cells, USUAL, operation)
        yield f"{operation}, 256 VMs, of one VM's", ratio, (">=", 0.9), ""


def of_workers(bench, directory, binary, pages):
    """Two workers beside one, with a queue each."""
    found = []
    for workers in (1, 2):
        with Ballast(directory, binary, workers=workers).up(queues=2) as up:
            found.append(bench(up.sockets, pages, "store,load", queues=2))
    one, two = found
    for operation in ("store", "load"):
        ratio = two[operation]["pages_per_second"] / one[operation]["pages_per_second"]
        idle = [run[operation]["front_end_idle_percent"] for run in found]
        note = f"the front end waited for answers {idle[0]:.0f} % of the time with one, {idle[1]:.0f} % with two"
        yield f"{operation}, two workers, of one's", ratio, (">=", 1.8), note
    # A front end that polls takes a core. Two that sleep between answers, of a VM each, leave both to the workers of a
    # small machine.
    for block in ("4KiB", "128KiB"):
        one, two = (asleep(bench, Ballast(directory, binary, workers=workers), pages, block) for workers in (1, 2))
        for operation in ("store", "load"):
            yield f"{operation}, two workers, of one's, {block}, two VMs whose front ends sleep", \
                  one[operation] / two[operation], (">=", 1.8), f"{pages / two[operation] / 1000:.0f} k pages/s by two"


def asleep(bench, ballast, pages, block):
    """Seconds in which two VMs at once store and then load half of the pages each."""
    with ballast.up(vms=2) as up, concurrent.futures.ThreadPoolExecutor() as both:
        def seconds(operation):
            one = lambda socket: bench(socket, pages // 2, operation, block, options=("--no-poll",))
            return max(found[operation]["seconds"] for found in both.map(one, up.sockets))
        return {operation: seconds(operation) for operation in ("store", "load")}


def of_evenness(bench, directory, binary, pages, alone):
    """p99.9 beside p50 of the time inside the daemon, mixed load, one request at a time."""
    with Ballast(directory, binary).up() as up:
        bench(up.sockets, pages, "store")
        before = up.daemon.status()
        bench(up.sockets, pages, "mixed", depth=1)
        times = service_times(before, up.daemon.status())
    both = {le: sum(counts.get(le, 0) for counts in times.values()) for counts in times.values() for le in counts}
    for what, counts in (("stores and loads", both), *times.items()):
        p50, p999 = quantile_ns(counts, 0.5), quantile_ns(counts, 0.999)
        goal = ("<=", 4.0) if counts is both else None
        yield f"service time of {what}, depth 1, mixed, p99.9 of p50", p999 / p50, goal, \
              f"{p50 / 1000:.1f} and {p999 / 1000:.1f} µs"
    alone = alone()
    for operation in ("store", "load"):
        p50, p999 = (alone[operation][key] for key in ("ns_p50", "ns_p999"))
        yield f"the same of the codec, checksum and one copy alone, {operation}, for comparison", p999 / p50, None, \
              f"{p50 / 1000:.1f} and {p999 / 1000:.1f} µs"


@contextlib.contextmanager
def crowded(binary, directory, file, quiet_pages):
    """A daemon with a file, a VM with a reserve of twice what heaps of `quiet_pages` compress to, and another."""
    reserve = f'reserve = "{max(quiet_pages * PAGE_BYTES // 2 // MIB, 1)}MiB"\n'
    config = 'workers = 1\n[pool]\nmax = "4GiB"\n' + f'[writeback]\npath = "{file}"\nsize = "2GiB"\n'
    config += f'[[vm]]\nname = "quiet"\nsize = "512MiB"\n{reserve}[[vm]]\nname = "bulk"\nsize = "1GiB"\n'
    with ballast_daemon(binary, directory, config, ["quiet", "bulk"]) as daemon:
        yield daemon


def of_shrinker(bench, directory, binary, pages, file_dir):
    """p50 of loads one by one while the shrinker empties the pool of another VM's pages, beside nothing else going on."""
    quiet_pages = pages // 8
    with tempfile.TemporaryDirectory(prefix="ballast-peers-", dir=file_dir) as files, \
            crowded(binary, directory, pathlib.Path(files) / "writeback", quiet_pages) as daemon:
        loads = lambda: bench(daemon.socket("quiet"), quiet_pages, "latency")["load_depth_1"]["latency_us_p50"]
        bench(daemon.socket("quiet"), quiet_pages, "store")
        bench(daemon.socket("bulk"), pages, "store")
        alone = loads()
        in_file = lambda: daemon.status()["pool"]["file_pages"]
        # Room for what is reserved and little more.
        daemon.reload('max = "4GiB"', f'max = "{max(quiet_pages * PAGE_BYTES // MIB, 2)}MiB"')
        deadline = time.monotonic() + 10
        while in_file() == 0 and time.monotonic() < deadline:
            pass
        begun = in_file()
        beside = loads()
        if not 0 < begun < in_file():
            raise Failed("the shrinker didn't run while pages were loaded: store more with --pages")
    yield "p50 of loads at depth 1 while the shrinker runs, of alone", beside / alone, ("<=", 1.2), \
          f"{beside:.1f} and {alone:.1f} µs"


def of_recompression(bench, directory, binary, pages):
    """p50 and p99 of loads one by one while cold pages of another VM are compressed anew, beside nothing else going on."""
    usual, cold = 'cold_after = "1h"\n', 'cold_after = "5s"\n'
    with Ballast(directory, binary).daemon(vms=2, pool=usual) as daemon:
        quiet, bulk = (daemon.socket(f"bench{vm}") for vm in range(2))
        loads = lambda: bench(quiet, pages // 8, "latency")["load_depth_1"]
        anew = lambda: sum(pool["objects"] for pool in daemon.status()["pool"]["pools"] if pool["state"] == "cold")
        bench(bulk, pages // 2, "store")
        time.sleep(6)
        # These are not cold yet.
        bench(quiet, pages // 8, "store")
        alone = loads()
        daemon.reload(usual, cold)
        wait_for("cold pages to be compressed anew", anew)
        begun = anew()
        beside = loads()
        if anew() <= begun:
            raise Failed("nothing was compressed anew while pages were loaded: store more with --pages")
    for at in ("p50", "p99"):
        of, alone_us = beside[f"latency_us_{at}"], alone[f"latency_us_{at}"]
        yield f"{at} of loads at depth 1 while cold pages are compressed anew, of alone", of / alone_us, \
              ("<=", 1.2) if at == "p50" else None, f"{of:.1f} and {alone_us:.1f} µs"


def measure(bench, directory, binary, pages, cells, file_dir):
    """All of them: (what, ratio or None, goal, note), a note saying why where there is no ratio."""
    found = []
    alone = functools.cache(lambda: bench.codec_alone(pages))
    for name, parts in (("store and load, of the codec alone", lambda: of_codec(alone, cells)),
                        ("256 VMs, of one", lambda: of_crowd(cells)),
                        ("two workers, of one", lambda: of_workers(bench, directory, binary, pages)),
                        ("evenness of service times", lambda: of_evenness(bench, directory, binary, pages, alone)),
                        ("loads beside the shrinker", lambda: of_shrinker(bench, directory, binary, pages, file_dir)),
                        ("loads beside recompression", lambda: of_recompression(bench, directory, binary, pages))):
        try:
            found += parts()
        except KeyError as missing:
            found.append((name, None, None, f"there are no figures for {missing}"))
        except Failed as failed:
            found.append((name, None, None, str(failed)))
    return found
