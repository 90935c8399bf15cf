"""Models that Megatron-Core refuses to build, as errors of the recipe."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import megatron.core

from ul2r.errors import LayoutError


@contextmanager
def translate_refusals() -> Iterator[None]:
    """Turn what Megatron-Core raises about its own settings and layers into an error of the recipe.

    Raises:
        LayoutError: With Megatron-Core's reason. It is reported in one line, and workers are not restarted for it.
    """
    try:
        yield
    # Settings that contradict each other, or that it cannot divide among ranks. A RuntimeError is the device's.
    except (AssertionError, NotImplementedError, ValueError) as error:
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        module = frame.f_globals["__name__"]
        # An error of our own code stays as it is.
        if not module.startswith("megatron."):
            raise
        reason = " ".join(str(error).split()).rstrip(".") or f"assertion in {module}, line {line}"
        raise LayoutError(
            f"Megatron-Core {megatron.core.__version__} refuses to build this model: {reason}: "
            "change model or parallel"
        ) from error
