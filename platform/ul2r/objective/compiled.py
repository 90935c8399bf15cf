"""The decorator of compiled functions, and the rule that they follow.

numba keys its disk cache by the source file of a compiled function and the types of its arguments. A change in another
file does not invalidate it, even if the function calls a compiled function of that file, reads its constants or takes
its named tuples: it would go on running the old code. So compiled functions use nothing but numpy and their own module:

    random_kernels    all that is drawn: Philox, shuffles, the denoiser of each sample, its kept and masked runs
    layout_kernels    all that is written: examples from the runs, and the batch's arrays from examples

Python code in between passes arrays from one to the other. Structured arrays may be shared, because numba's type of a
record holds its fields.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

CACHE_VARIABLE = "NUMBA_CACHE_DIR"

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function for the types of its arguments at the first call, and cache the result on disk.

    Where neither the folder of the source nor one below HOME can be written, the cache is in a temporary folder;
    without that, each process compiles for itself.
    """
    try:
        return _compile(function, cache=True)
    # numba 0.62 finds no folder for its cache ("no locator available"), which it looks for here already.
    except RuntimeError:
        return _compile(function, cache=_use_temporary_cache())


def _compile(function: Function, *, cache: bool) -> Function:
    # nogil: compiled code touches no Python objects, so other threads need not wait for a batch. The cast is needed
    # because numba has no type hints for what it returns.
    return cast(Function, numba.njit(cache=cache, nogil=True)(function))


def _use_temporary_cache() -> bool:
    """Have numba cache in a temporary folder; return whether there is one."""
    if CACHE_VARIABLE in os.environ:
        # The user's own folder, or the one chosen here, cannot be written.
        return False
    try:
        folder = Path(tempfile.gettempdir()) / f"ul2r-numba-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # numba unpickles what it finds: nobody else may write there.
        is_own = found.st_uid == os.getuid() and not found.st_mode & 0o077
        place = str(folder) if is_own else ""
    except OSError:
        place = ""
    # For this process, and for those that it starts.
    numba.config.CACHE_DIR = place
    os.environ[CACHE_VARIABLE] = place
    logger.warning(
        "compiled code cannot be cached in the installation or below HOME: %s; %s chooses a folder",
        f"cached in {place}" if place else "each process compiles for itself, about a minute",
        CACHE_VARIABLE,
    )
    return bool(place)
