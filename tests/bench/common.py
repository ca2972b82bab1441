"""What the benches share: daemons that end with a block of code, `ballast bench`, and who measured."""

import contextlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
PAGE_BYTES = 4096
MIB = 1 << 20


class Failed(Exception):
    """Something that the reader can mend, in one sentence."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def read(path):
    return pathlib.Path(path).read_text()


def wait_for(what, ready, process=None, seconds=20):
    deadline = time.monotonic() + seconds
    while not ready():
        if process is not None and process.poll() is not None:
            raise Failed(f"{what}: the process ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not there after {seconds} s")
        time.sleep(0.02)


@contextlib.contextmanager
def running(command, log):
    """A daemon for as long as the block lasts."""
    with open(log, "ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    except Failed as failed:
        words = read(log)[-2000:].strip()
        raise Failed(f"{failed}\n{words}" if words else str(failed)) from None
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Daemon:
    """A running `ballast serve`."""

    def __init__(self, binary, run, state, pid):
        self.binary, self.run, self.state, self.pid = binary, run, state, pid

    def socket(self, vm):
        return self.run / f"{vm}.sock"

    def reload(self, old, new):
        """Puts `new` instead of `old` in its configuration."""
        config = self.run / "ballast.toml"
        config.write_text(config.read_text().replace(old, new))
        subprocess.run([self.binary, "reload", "--config", str(config)], stdout=subprocess.DEVNULL, check=True)

    def status(self):
        command = [self.binary, "status", "--json", "--config", str(self.run / "ballast.toml")]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


@contextlib.contextmanager
def ballast_daemon(binary, directory, config, vms):
    """`ballast serve` with a state of its own in a tmpfs, until the block ends; `config` follows the directories."""
    run = directory / "ballast"
    state = pathlib.Path(tempfile.mkdtemp(prefix="ballast-bench-", dir="/dev/shm"))
    run.mkdir(exist_ok=True)
    for vm in vms:
        (run / f"{vm}.sock").unlink(missing_ok=True)
    (run / "ballast.toml").write_text(f'state_dir = "{state}"\nruntime_dir = "{run}"\n\n{config}')
    try:
        command = [binary, "serve", "--config", str(run / "ballast.toml")]
        with running(command, directory / "ballast.log") as process:
            for vm in vms:
                wait_for(f"the socket of {vm}", (run / f"{vm}.sock").is_socket, process)
            yield Daemon(binary, run, state, process.pid)
    finally:
        shutil.rmtree(state, ignore_errors=True)


class Bench:
    """`ballast bench`, the front end for all."""

    def __init__(self, command, corpus):
        self.command = command
        self.corpus = corpus

    def __call__(self, sockets, pages, phases, block="4KiB", options=(), depth=32, queues=1):
        """The figures by phase; `sockets` is one or a list, one for each VM."""
        sockets = sockets if isinstance(sockets, list) else [sockets]
        command = [*map(str, sockets), "--pages", str(pages), "--phases", phases, *options]
        command += ["--qd", str(depth), "--queues", str(queues), "--block-size", block]
        return self.run(command)["phases"]

    def codec_alone(self, pages, compressor="lz4"):
        """What the codec, the checksum and one copy take without a daemon."""
        return self.run(["--codec-alone", "--pages", str(pages), "--compressor", compressor])

    def run(self, options):
        command = self.with_corpus(self.command + options + ["--json"])
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            named = shlex.join(command if len(command) < 40 else [*command[:4], "..."])
            raise Failed(f"{named} ended with status {done.returncode}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def with_corpus(self, command):
        return command + (["--corpus"] + self.corpus if self.corpus else [])


def machine():
    model = re.search(r"^model name\s*: (.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    return f"{os.cpu_count()} × {model.group(1) if model else platform.machine()}, Linux {platform.release()}"


def binary(given):
    if given:
        return given
    say("Building ballast (cargo build --release).")
    subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "ballast"], cwd=REPOSITORY, check=True)
    return str(REPOSITORY / "target/release/ballast")


def median(rounds, key):
    return statistics.median(turn[key] for turn in rounds)
