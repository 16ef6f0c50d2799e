"""Updates: the delta applier against bsdiff4's own in C, its memory, and how fast a bad image is left."""

from __future__ import annotations

import bz2
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import bsdiff4
import numpy as np

from tbox.bench.factory import CRASHES
from tbox.durable import OsStorage
from tbox.ota import image, publish
from tbox.ota.bootctl import BootCtl
from tbox.ota.supervisor import RESTART_EXIT, BootSettings
from tests.bench.harness import Result, interleaved
from tests.daemon import wait_for
from tests.io.test_ota_agent import Bench as AgentBench
from tests.io.test_supervisor import Bench

APPLY_RSS_MIB_MAX = 32.0
APPLY_TIMES_C_MAX = 1.5
SIZES_MIB = (16, 128, 256)  # memory must not know them
LEAVE_S_MAX = 10.0
CRASH_LOOP_S_MAX = 60.0
TREE = Path(np.__file__).parent  # a real package tree of tens of MB that every installation has
EDITED_EVERY = 7  # one in so many Python files changes between the two images

# Both run as processes of their own and tell their CPU seconds and peak memory.
RUN = """
import json, sys, time
{imports}
begin = time.process_time()
{work}
seconds = time.process_time() - begin
rss = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(rss.split()[1]) / 1024]))
"""
OURS = RUN.format(imports="from tbox.ota import patch", work="patch._main(sys.argv[1:])")
THEIRS = RUN.format(
    imports="import bsdiff4", work="bsdiff4.file_patch(sys.argv[1], sys.argv[3], sys.argv[2])"
)


DELTA_SHARE_MAX, DELTA_SHARE_TYPICAL = 1 / 4, 1 / 8  # of the full image, compressed

# An app image of the size of ours, from the registry, and its neighbours: the same with another release of
# a pure-Python package, which stands for our own code; of a compiled one; of all that weighs, a feature on.
APP = {
    "cantools": "40.2.1",
    "numpy": "2.2.5",
    "cryptography": "44.0.2",
    "msgspec": "0.19.0",
    "zstandard": "0.23.0",
    "paho-mqtt": "2.1.0",
}
NEIGHBOURS = {
    "own code released": {"cantools": "40.2.2"},
    "numpy upgraded": {"numpy": "2.2.6"},
    "cryptography upgraded": {"cryptography": "44.0.3"},
    "feature releases of all": {"numpy": "2.3.0", "cryptography": "45.0.2", "cantools": "40.3.0"},
}


def cases() -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        yield from delta_cases(top)
        yield from apply_cases("package tree", *tree_pair(top))
        for mib in SIZES_MIB:
            yield from apply_cases(f"{mib} MiB", *big_pair(top, mib << 20), runs=1)
    yield from leaving_cases()
    yield from agent_cases()


# --- the size of a delta ----------------------------------------------------------------------------------


def delta_cases(top: Path) -> Iterator[Result]:
    """Real package trees from the registry, as the publisher packs them; a line on stderr without one."""
    base = app_image(top / "base", APP)
    if base is None:
        print("ota: no registry that has these packages: the size of deltas is not measured", file=sys.stderr)
        return
    for case, change in NEIGHBOURS.items():
        data = app_image(top / case.replace(" ", "-"), APP | change)
        if data is None:
            print(f"ota: the registry lacks {change}: not measured", file=sys.stderr)
            continue
        full, patch = len(publish.compress(data)), len(publish.diff(base, data))
        yield Result(
            bench="ota",
            case=f"delta, {case}",
            value=patch / 1024,
            unit="KiB",
            peer="full image, zstd",
            peer_value=full / 1024,
            ratio=full / patch,
            goal=f"<= 1/{1 / DELTA_SHARE_MAX:.0f}, typical 1/{1 / DELTA_SHARE_TYPICAL:.0f}",
            ok=patch <= DELTA_SHARE_MAX * full,
            note=f"{len(data) / (1 << 20):.0f} MiB image",
        )


def app_image(tree: Path, packages: dict[str, str]) -> bytes | None:
    """Install packages into a directory of their own and pack it; None when the registry lacks one."""
    wanted = [f"{name}=={version}" for name, version in packages.items()]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    if subprocess.run([*pip, "--target", str(tree), *wanted], capture_output=True, check=False).returncode:
        return None
    header = image.ImageHeader(name="bench", version="1", entry="numpy:test")
    return b"".join(image.build(tree, header))


# --- applying a delta ------------------------------------------------------------------------------------


def tree_pair(top: Path) -> tuple[Path, Path, Path]:
    """Two app images of a real tree, the second with edited sources, and the delta between them."""
    old, new, patch = top / "old", top / "new", top / "patch"
    header = image.ImageHeader(name="bench", version="1", entry="numpy:test")
    data = b"".join(image.build(TREE, header))
    edited = bytearray()
    members = list(image.members(lambda at, n: data[at : at + n], len(data)))
    at = 0
    for number, member in enumerate(members):
        if member.path.endswith(".py") and number % EDITED_EVERY == 0 and member.size > 200:
            middle = member.offset + member.size // 2
            edited += data[at:middle] + b"# changed between the two releases\n" * 3
            at = middle + 40
    edited += data[at:]
    old.write_bytes(data)
    new.write_bytes(edited)
    patch.write_bytes(bsdiff4.diff(data, bytes(edited)))
    return old, new, patch


def big_pair(top: Path, size: int) -> tuple[Path, Path, Path]:
    """An image of any size against itself with sparse changes, its patch made directly."""
    old, new, patch = top / "big_old", top / "big_new", top / "big_patch"
    base = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    diff = np.zeros(size, np.uint8)
    diff[:: 64 * 1024] = 1
    base.tofile(old)
    (base + diff).tofile(new)
    control = bz2.compress(size.to_bytes(8, "little") + bytes(16))
    packed = bz2.compress(diff.tobytes())
    lengths = b"".join(n.to_bytes(8, "little") for n in (len(control), len(packed), size))
    patch.write_bytes(b"BSDIFF40" + lengths + control + packed + bz2.compress(b""))
    return old, new, patch


def apply_cases(case: str, old: Path, new: Path, patch: Path, runs: int = 5) -> Iterator[Result]:
    out = new.with_name("out")
    expected = new.read_bytes()
    peaks: list[float] = []

    def run(code: str) -> float:
        arguments = [str(old), str(patch), str(out), str(len(expected))]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
        assert out.read_bytes() == expected
        seconds, rss_mib = json.loads(done.stdout)
        peaks.append(rss_mib if code is OURS else 0.0)
        return float(seconds)

    ours, theirs, ratio = interleaved(lambda: run(OURS), lambda: run(THEIRS), runs)
    mib = len(expected) / (1 << 20)
    yield Result(
        bench="ota",
        case=f"apply {case}: CPU time",
        value=ours,
        unit="s",
        peer="bsdiff4 (C)",
        peer_value=theirs,
        ratio=ratio,
        goal=f"<= {APPLY_TIMES_C_MAX} x",
        ok=ours <= APPLY_TIMES_C_MAX * theirs,
        note=f"{mib:.0f} MiB image, patch {patch.stat().st_size / 1024:.0f} KiB",
    )
    yield Result(
        bench="ota",
        case=f"apply {case}: peak memory",
        value=max(peaks),
        unit="MiB",
        goal=f"<= {APPLY_RSS_MIB_MAX:.0f} MiB",
        ok=max(peaks) <= APPLY_RSS_MIB_MAX,
    )


# --- leaving a bad image -----------------------------------------------------------------------------------

STAMP = "import time\nopen(sys.argv[1] + '.times', 'a').write(f'{VERSION} {time.monotonic()}\\n')\n"


def leaving_cases() -> Iterator[Result]:
    """Seconds by the wall until the previous image runs, with the boot loader's own settings."""
    verdict = (
        STAMP + "from tbox.durable import OsStorage\nfrom tbox.ota import boot\n"
        "from tbox.ota.bootctl import BootCtl\n"
        "ctl = BootCtl(OsStorage(), os.path.dirname(sys.argv[1]) + '/firmware')\n"
        "ctl.commit(boot.fail(ctl.read(), 'b', 'verdict'))\n"
        "open(sys.argv[1] + '.times', 'a').write(f'verdict {time.monotonic()}\\n')\n"
        f"sys.exit({RESTART_EXIT})"
    )
    times = leave(verdict)
    yield _leaving("failed trial: verdict to previous version", times["1"] - times["verdict"], LEAVE_S_MAX)
    times = leave(STAMP + "sys.exit(1)")
    yield _leaving("crash loop: first start to previous version", times["1"] - times["2"], CRASH_LOOP_S_MAX)


def leave(body: str) -> dict[str, float]:
    """Boot a bad second image until the first one runs; return when each first ran."""
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        bench.provision(1, STAMP)
        bench.update(2, body)
        assert bench.supervisor(BootSettings()).run() is None
        assert BootCtl(OsStorage(), str(bench.directory)).read().b.priority == 0
        times: dict[str, float] = {}
        for line in Path(f"{bench.out}.times").read_text().splitlines():
            times.setdefault(line.split()[0], float(line.split()[1]))
        return times


# The same for the whole agent: what each bad release adds to its own files. STAMP_PATH is filled in.
UNHEALTHY = """

import msgspec

_proof = Observer.proof


def _unclean(self: Observer) -> Proof:
    if not Path("STAMP_PATH").exists():
        Path("STAMP_PATH").write_text(str(time.monotonic()))
    return msgspec.structs.replace(_proof(self), ledger_clean=False)


Observer.proof = _unclean
"""
FIRST_START = """
import time

if not Path("STAMP_PATH").exists():
    Path("STAMP_PATH").write_text(str(time.monotonic()))
"""


def agent_cases() -> Iterator[Result]:
    """As above, with the shipped agent as the images, until the previous one answers its control socket."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        bench = AgentBench(Path(directory), stack)
        bench.car.start()
        bench.park()
        wait_for("frames", lambda: bench.speed_kmh() is not None)
        crashes = {"agent.py": CRASHES["agent.py"] + FIRST_START}
        for case, version, counter, added, goal_s in (
            ("failed trial: verdict", "2.0", 2, {"update.py": UNHEALTHY}, LEAVE_S_MAX),
            ("crash loop: first start", "3.0", 3, crashes, CRASH_LOOP_S_MAX),
        ):
            stamp = Path(directory) / f"stamp-{version}"
            texts = {name: text.replace("STAMP_PATH", str(stamp)) for name, text in added.items()}
            bench.offer(version, counter, texts)
            wait_for(f"{version} was tried", stamp.exists)
            wait_for("the previous one runs", lambda: bench.car.runs("1.0"))
            yield _leaving(
                f"agent, {case} to previous version", time.monotonic() - float(stamp.read_text()), goal_s
            )
        bench.stop()


def _leaving(case: str, seconds: float, goal_s: float) -> Result:
    return Result(
        bench="ota", case=case, value=seconds, unit="s", goal=f"<= {goal_s:.0f} s", ok=seconds <= goal_s
    )
