from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from ul2r.filesystem import is_locked, locked

HOLD = """
import sys
from pathlib import Path
from ul2r.filesystem import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time_has_the_lock(tmp_path: Path) -> None:
    path, order = tmp_path / "store", list[str]()
    assert not is_locked(path)

    def second() -> None:
        with locked(path):
            order.append("second")

    with locked(path):
        assert is_locked(path)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert not is_locked(path)


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(tmp_path / "store")
        holder.kill()
        holder.wait()
        assert not is_locked(tmp_path / "store")
