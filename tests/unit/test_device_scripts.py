"""benchmarks/device/: the wheel cut to one architecture, and the table of results."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks/device"
CODE = {80: b"ampere" * 50, 90: b"hopper" * 50, 100: b"blackwell" * 40}


def make_fat_binary() -> bytes:
    """Build what nvcc embeds: a header, then an entry with a header of 64 bytes for each architecture."""
    entries = b""
    for architecture, code in CODE.items():
        # Kind, version, header size, code size; 12 bytes of other fields; the architecture at byte 28.
        header = struct.pack("<HHIQ", 2, 257, 64, len(code)) + bytes(12)
        header += struct.pack("<I", architecture)
        entries += header.ljust(64, b"\0") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_shrunk_wheel_keeps_one_architecture_and_a_valid_record(tmp_path: Path) -> None:
    # The magic number in front of something else, as it may occur in data.
    library = b"\x7fELF" + struct.pack("<IHHQ", 0xBA55ED50, 7, 3, 0) + make_fat_binary() + b"end"
    wheel = tmp_path / "engine-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("transformer_engine/libtransformer_engine.so", library)
        archive.writestr("transformer_engine/__init__.py", "x = 1\n")
        archive.writestr("transformer_engine/jax/__init__.py", "")
        archive.writestr("engine-1.dist-info/RECORD", "transformer_engine/jax/__init__.py,,\n")

    shrunk = tmp_path / "small.whl"
    run_script("shrink_wheel.py", str(wheel), str(shrunk))

    with zipfile.ZipFile(shrunk) as archive:
        kept = archive.read("transformer_engine/libtransformer_engine.so")
        record = archive.read("engine-1.dist-info/RECORD").decode().splitlines()
        names = set(archive.namelist())
    assert "transformer_engine/jax/__init__.py" not in names
    expected = library
    for architecture, code in CODE.items():
        if architecture != 90:
            expected = expected.replace(code, bytes(len(code)))
    assert kept == expected
    digest = base64.urlsafe_b64encode(hashlib.sha256(kept).digest()).rstrip(b"=").decode()
    assert f"transformer_engine/libtransformer_engine.so,sha256={digest},{len(kept)}" in record
    assert {line.partition(",")[0] for line in record} == names


def test_table_lists_steps_and_figures(tmp_path: Path) -> None:
    (tmp_path / "steps.tsv").write_text(
        "mfu\t0\t12\t\ntests\t124\t150\t3 passed | 1 failed\nengine\t-\t0\tneeds a GPU\n"
    )
    results = [
        {"benchmark": "mfu", "device": "H100", "1b/2048": {"mfu": 0.41}},
        {"benchmark": "ceilings", "copy_tb_per_s": 3.0},
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    lines = run_script("table.py", str(tmp_path)).splitlines()
    assert lines[2:5] == [
        "| mfu | ok | 12 |  |",
        "| tests | reached its limit | 150 | 3 passed / 1 failed |",
        "| engine | not run | 0 | needs a GPU |",
    ]
    assert lines[-3:] == [
        "| mfu | device | H100 |",
        "| mfu | 1b/2048 mfu | 0.41 |",
        "| ceilings | copy_tb_per_s | 3.0 |",
    ]


def run_script(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout
