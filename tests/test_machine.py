"""What is said of the machine."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from onnxcomp import machine as module
from onnxcomp.machine import cores, machine
from onnxcomp.report import environment
from onnxcomp.runtime import Target

X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
flags\t\t: fpu sse2 avx2 avx512_vnni amx_tile amx_int8 avx_vnni

processor\t: 1
model name\t: another
"""
ARM = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd asimddp i8mm
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (X86, "x86_64", "Intel(R) Xeon(R) Platinum 8488C, x86_64 avx2 avx512_vnni avx_vnni amx_int8, 3 cores, Linux"),
        (ARM, "aarch64", "aarch64 asimddp i8mm, 3 cores, Linux"),
        ("", "riscv64", "riscv64, 3 cores, Linux"),
    ],
)
def test_linux_tells_the_processor_and_what_it_has_for_integers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, kind: str, words: str
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    for name, value in (("machine", kind), ("system", "Linux"), ("processor", kind)):
        monkeypatch.setattr(platform, name, lambda value=value: value)
    assert machine() == words
    assert environment(Target(threads=1), 1)["machine"] == words


def test_other_systems_tell_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(module, "cores", lambda: 1)
    for name, value in (("machine", "arm64"), ("system", "Darwin"), ("processor", "arm")):
        monkeypatch.setattr(platform, name, lambda value=value: value)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "Apple M2\n"))
    assert machine() == "Apple M2, arm64, 1 core, Darwin"

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine() == "arm, arm64, 1 core, Darwin"


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    assert cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert cores() == 12


def test_cores_are_those_of_the_affinity_and_of_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    for quotas, expected in (([], 3), ([8.0], 3), ([1.5, 2.0], 1.5)):
        monkeypatch.setattr(module, "_quotas", lambda *_, quotas=quotas: iter(quotas))
        assert cores() == expected


GROUPS = {
    "cpu.max": "150000 100000",
    "outer/cpu.max": "max 100000",
    "outer/inner/cpu.max": "50000 100000",
    "cpu/cpu.cfs_quota_us": "-1",
    "cpu/cpu.cfs_period_us": "100000",
    "cpu/outer/cpu.cfs_quota_us": "400000",
    "cpu/outer/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("0::/outer/inner\n", [0.5, 1.5]),
        ("0::/\n", [1.5]),
        ("0::/elsewhere:odd\n", [1.5]),
        ("4:memory:/outer\n1:cpu,cpuacct:/outer\n", [4.0]),
        ("4:cpuset:/outer\n", []),
        (None, []),
    ],
)
def test_quotas_are_those_of_every_group_around_the_process(
    tmp_path: Path, own: str | None, expected: list[float]
) -> None:
    for name, text in GROUPS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert list(module._quotas(tmp_path / "own", tmp_path)) == expected
