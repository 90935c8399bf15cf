"""Tables of text and numbers as MLflow stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def split_table(table: Mapping[str, Sequence[object]]) -> dict[str, Any]:
    """Return a table in the form of `mlflow.log_table`'s files, pandas' `orient="split"` without an index.

    Args:
        table: Values by column, as many in each.
    """
    return {
        "columns": list(table),
        "data": [list(row) for row in zip(*table.values(), strict=True)],
    }
