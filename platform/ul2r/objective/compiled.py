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

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function for the types of its arguments at the first call, and cache the result on disk."""
    # nogil: compiled code touches no Python objects, so other threads need not wait for a batch. The cast is needed
    # because numba has no type hints for what it returns.
    return cast(Function, numba.njit(cache=True, nogil=True)(function))
