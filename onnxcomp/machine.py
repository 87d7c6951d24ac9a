"""The machine that this runs on, as far as figures turn on it."""

import contextlib
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

_INTEGER = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that decide how fast integers are, x86's and ARM's, as Linux names them."""


def cores() -> float:
    """Cores that this process may use: those of its affinity, or less where a control group has a quota of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, *_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")), math.inf)


def _quotas(own: Path, mounted: Path) -> Iterator[float]:
    """Cores' worth of time that each control group leaves which has this process in it, as far as Linux says.

    Args:
        own: lists the groups, of version 2 or 1.
        mounted: folder of all groups.
    """
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, name = line.split(":", 2)
        first = "cpu" in kinds.split(",")
        for group in (Path(name), *Path(name).parents) if first or not kinds else ():
            folder = mounted / ("cpu" if first else "") / group.relative_to("/")
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first else ("cpu.max",)
            with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
                quota, period = map(int, " ".join((folder / file).read_text() for file in files).split())
                if quota > 0:
                    yield quota / period


def machine() -> str:
    """The processor, what it has for integers where Linux tells, the cores and the system."""
    facts = _first_processor()
    known = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    kind = " ".join([platform.machine(), *(name for name in _INTEGER if name in known)])
    name, count = facts.get("model name") or _brand(), cores()
    parts = (name, kind, f"{count:g} core{'s' * (count != 1)}", platform.system())
    return ", ".join(part for part in parts if part)


def _first_processor() -> dict[str, str]:
    """What Linux says of it; nothing elsewhere."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in _CPUINFO.read_text().partition("\n\n")[0].splitlines())
        return {name.strip(): value.strip() for name, _, value in lines}
    return {}


def _brand() -> str:
    """The processor's name on other systems, as far as they tell more than its kind."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    name = platform.processor()
    return "" if name == platform.machine() else name
