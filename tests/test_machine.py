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
