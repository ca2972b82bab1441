"""The back ends that are measured side by side: Ballast, qemu-storage-daemon over host zram, and any other by its command.
Each is started fresh for a number of VMs with a socket each, and takes away what it made."""

import contextlib
import dataclasses
import pathlib
import re
import shlex
import stat
import time

from common import MIB, PAGE_BYTES, Failed, ballast_daemon, read, running, say, wait_for

# All disks together; each VM has its part.
DISKS_BYTES = 1 << 30

# When pages are compressed anew.
COLD_SOON = 'cold_after = "1s"\ncold_cpu = "100%"\n'
COLD_AS_USUAL = 'cold_after = "5m"\ncold_cpu = "10%"\n'

# struct zram_table_entry without CONFIG_ZRAM_TRACK_ENTRY_ACTIME and lockdep: an unsigned long for the handle,
# another for flags and lock. The table is one vzalloc over the whole disk.
ZRAM_TABLE_ENTRY_BYTES = 16
# ZS_HANDLE_SIZE of mm/zsmalloc.c: one unsigned long for each object, from a slab.
ZSMALLOC_HANDLE_BYTES = 8


@dataclasses.dataclass
class Up:
    """A back end that runs. `memory` says what its pages take, in parts; `daemon` is there for Ballast alone."""
    sockets: list
    memory: object = None
    daemon: object = None


def anonymous_bytes(pid):
    """Memory of the process's own; shared mappings (guest memory, an arena) are not in it."""
    found = re.search(r"^Anonymous:\s+(\d+) kB$", read(f"/proc/{pid}/smaps_rollup"), re.MULTILINE)
    return int(found.group(1)) * 1024


@contextlib.contextmanager
def zram_device(algorithm, disk_bytes):
    """A fresh zram device."""
    number = int(read("/sys/class/zram-control/hot_add"))
    sysfs = pathlib.Path(f"/sys/block/zram{number}")
    try:
        try:
            (sysfs / "comp_algorithm").write_text(algorithm)
            (sysfs / "disksize").write_text(str(disk_bytes))
        except OSError as error:
            raise Failed(f"no zram of {disk_bytes // MIB} MiB with {algorithm}: {error}") from None
        yield number
    finally:
        for attempt in range(50):
            try:
                (sysfs / "reset").write_text("1")
                pathlib.Path("/sys/class/zram-control/hot_remove").write_text(str(number))
                break
            except OSError as error:
                # udev may hold a fresh device open for a moment.
                if attempt == 49:
                    say(f"zram{number} could not be removed: {error}")
                time.sleep(0.1)


def fresh_sockets(directory, prefix, vms):
    sockets = [directory / f"{prefix}{vm}.sock" for vm in range(vms)]
    for socket in sockets:
        socket.unlink(missing_ok=True)
    return sockets


class Qsd:
    """qemu-storage-daemon: one process that exports a host zram device for each VM."""

    def __init__(self, directory, aio, iothread, algorithm="lz4"):
        self.name = f"qemu-storage-daemon over zram ({algorithm}), aio={aio}" + (", iothread" if iothread else "")
        self.directory, self.aio, self.iothread, self.algorithm = directory, aio, iothread, algorithm

    def __str__(self):
        return f"aio={self.aio}, {'an iothread' if self.iothread else 'main loop'}"

    def command(self, sockets, numbers, queues):
        command = ["qemu-storage-daemon"]
        if self.iothread:
            command += ["--object", "iothread,id=thread"]
        for vm, (socket, number) in enumerate(zip(sockets, numbers)):
            node = f"driver=host_device,filename=/dev/zram{number},node-name=disk{vm}"
            export = f"type=vhost-user-blk,id=export{vm},node-name=disk{vm},addr.type=unix,addr.path={socket}"
            export += f",writable=on,num-queues={queues},logical-block-size=4096"
            export += ",iothread=thread" if self.iothread else ""
            command += ["--blockdev", f"{node},cache.direct=on,discard=unmap,aio={self.aio}", "--export", export]
        return command

    @contextlib.contextmanager
    def up(self, vms=1, queues=1):
        sockets = fresh_sockets(self.directory, "qsd", vms)
        with contextlib.ExitStack() as stack:
            zram = lambda: stack.enter_context(zram_device(self.algorithm, DISKS_BYTES // vms))
            numbers = [zram() for _ in sockets]
            process = stack.enter_context(running(self.command(sockets, numbers, queues), self.directory / "qsd.log"))
            for socket in sockets:
                wait_for("qemu-storage-daemon's socket", socket.is_socket, process)
            yield Up(sockets, lambda: self.memory(numbers, DISKS_BYTES // vms, process.pid))

    def at_rest(self, bench, pages):
        """zram leaves pages as they are: what it takes, and how long loads take."""
        with self.up() as up:
            loads = bench(up.sockets, pages, "store,latency")
            return up.memory(), loads

    @staticmethod
    def memory(numbers, disk_bytes, pid):
        used_bytes = objects = 0
        for number in numbers:
            fields = [int(field) for field in read(f"/sys/block/zram{number}/mm_stat").split()]
            used_bytes += fields[2]
            objects += fields[0] // PAGE_BYTES - fields[5]
        return {
            "zsmalloc (mm_stat mem_used_total)": used_bytes,
            f"zram's table ({ZRAM_TABLE_ENTRY_BYTES} B for each of the disk's pages)":
                len(numbers) * disk_bytes // PAGE_BYTES * ZRAM_TABLE_ENTRY_BYTES,
            f"zsmalloc's handles ({ZSMALLOC_HANDLE_BYTES} B an object)": objects * ZSMALLOC_HANDLE_BYTES,
            "the daemon's anonymous memory (smaps_rollup)": anonymous_bytes(pid),
        }


class Other:
    """Any vhost-user-blk back end, by the command that starts it for one VM: {socket} in it stands for where it has to
    listen, {disk} for a zram device (lz4) that it may use, {queues} for how many queues the front end will use."""

    # A process a VM: so many still start in no time.
    VMS_MAX = 16

    def __init__(self, directory, name, command):
        self.name, self.directory, self.template = name, directory, shlex.split(command)

    @contextlib.contextmanager
    def up(self, vms=1, queues=1):
        if vms > self.VMS_MAX:
            raise Failed(f"it takes a process for each VM, and is not started for more than {self.VMS_MAX}")
        sockets = fresh_sockets(self.directory, "other", vms)
        with contextlib.ExitStack() as stack:
            for socket in sockets:
                words = {"{socket}": str(socket), "{queues}": str(queues)}
                if any("{disk}" in word for word in self.template):
                    words["{disk}"] = f"/dev/zram{stack.enter_context(zram_device('lz4', DISKS_BYTES // vms))}"
                command = self.template
                for placeholder, value in words.items():
                    command = [word.replace(placeholder, value) for word in command]
                process = stack.enter_context(running(command, self.directory / "other.log"))
                wait_for(f"the socket of {self.name}", socket.is_socket, process)
            yield Up(sockets)


class Ballast:
    """`ballast serve` with some VMs."""

    # How long it may take to compress all pages again, in seconds.
    REST_SECONDS_MAX = 300

    def __init__(self, directory, binary, deduplicate=False, workers=1):
        self.name = "Ballast (lz4)" if workers == 1 else f"Ballast (lz4), {workers} workers"
        self.directory, self.binary, self.deduplicate, self.workers = directory, binary, deduplicate, workers

    def daemon(self, vms=1, queues=1, pool=""):
        names = [f"bench{vm}" for vm in range(vms)]
        config = f'workers = {self.workers}\n[pool]\nmax = "4GiB"\ncompressor = "lz4"\n{pool}\n'
        for name in names:
            config += f'[[vm]]\nname = "{name}"\nsize = "{DISKS_BYTES // vms // MIB}MiB"\nqueues = {queues}\n'
        return ballast_daemon(self.binary, self.directory, config, names)

    @contextlib.contextmanager
    def up(self, vms=1, queues=1):
        with self.daemon(vms, queues) as daemon:
            sockets = [daemon.socket(f"bench{vm}") for vm in range(vms)]
            yield Up(sockets, lambda: self.memory(daemon.state, daemon.pid), daemon)

    @contextlib.contextmanager
    def resting(self, bench, pages):
        """A daemon whose pages are as after the minutes that make them cold, but sooner."""
        deduplicate = f"deduplicate = {str(self.deduplicate).lower()}\n"
        with self.daemon(pool=COLD_SOON + deduplicate) as daemon:
            bench([daemon.socket("bench0")], pages, "store")
            wait_for("the pages to get cold", lambda: self.settled(daemon, pages), seconds=self.REST_SECONDS_MAX)
            yield daemon

    @staticmethod
    def settled(daemon, pages):
        """Whether nearly all pages are cold, and nothing has changed for seconds: equal pages found, memory given back."""
        pool = daemon.status()["pool"]
        hot = sum(compressor["objects"] for compressor in pool["pools"] if compressor["state"] != "cold")
        if hot > pages // 100:
            return False
        time.sleep(3)
        now = daemon.status()["pool"]
        return all(now[what] == pool[what] for what in ("object_bytes", "shared_pages", "used_bytes"))

    def at_rest(self, bench, pages):
        """What it takes then, and how long loads take."""
        with self.resting(bench, pages) as daemon:
            memory = self.memory(daemon.state, daemon.pid)
            # Pages that come back to lz4 because they are loaded do so as slowly as on any host, and get cold again as late.
            daemon.reload(COLD_SOON, COLD_AS_USUAL)
            return memory, bench([daemon.socket("bench0")], pages, "latency")

    @staticmethod
    def memory(state, pid):
        backed = {}
        for path in state.rglob("*"):
            # The daemon is at work: what it has just replaced or removed takes nothing.
            with contextlib.suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    backed[path.relative_to(state)] = found.st_blocks * 512
        arena = sum(size for path, size in backed.items() if "arena" in path.name)
        return {
            "the arena (st_blocks)": arena,
            "page tables and the rest of the state directory (st_blocks)": sum(backed.values()) - arena,
            "the daemon's anonymous memory (smaps_rollup)": anonymous_bytes(pid),
        }
