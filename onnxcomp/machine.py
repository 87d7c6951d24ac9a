"""The machine that this runs on, as far as figures turn on it."""

import contextlib
import os
import platform
import subprocess
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

_INTEGER = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that decide how fast integers are, x86's and ARM's, as Linux names them."""


def cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """The processor, what it has for integers where Linux tells, the cores and the system."""
    facts = _first_processor()
    known = {*facts.get("flags", "").split(), *facts.get("Features", "").split()}
    kind = " ".join([platform.machine(), *(name for name in _INTEGER if name in known)])
    name, count = facts.get("model name") or _brand(), cores()
    parts = (name, kind, f"{count} core{'s' * (count != 1)}", platform.system())
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
