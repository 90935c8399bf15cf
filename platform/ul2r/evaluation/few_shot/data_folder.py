"""A folder of task data that mirrors the Hub.

FOLDER/OWNER/NAME/
  README.md                    the list of files, from which `datasets` loads them
  CONFIGURATION/SPLIT.parquet
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ul2r.errors import CorpusError
from ul2r.evaluation.few_shot.repository_files import Split
from ul2r.filesystem import staged_file, write_atomically

README_FILE = "README.md"
MARK = "Laid out by ul2r task-data."
"""Line that tells a README of ours from one that came from the Hub."""


class DataFolder:
    """Data sets by their names on the Hub.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[Path, pa.Table] = {}

    def write(self, splits: Sequence[Split]) -> None:
        """Write all splits or none, in place of earlier ones; append to those that this object has written.

        Raises:
            CorpusError: If a data set's folder was not made by this class, or cannot be written.
        """
        tables: dict[Path, pa.Table] = {}
        try:
            for split in splits:
                home = self.folder / split.dataset
                path = home / split.configuration / f"{split.split}.parquet"
                _refuse_foreign(home)
                # Several files may hold parts of a split, such as stories of several years.
                earlier = tables.get(
                    path, self._written.get(path, split.table.schema.empty_table())
                )
                tables[path] = pa.concat_tables([earlier, split.table], promote_options="default")
            # The files get their names at the end of the block, when all are written.
            with ExitStack() as staged:
                for path, table in tables.items():
                    home = path.parent.parent
                    path.parent.mkdir(parents=True, exist_ok=True)
                    # First, so that an interrupted start is recognized as ours.
                    if not (home / README_FILE).exists():
                        _write_readme(home)
                    pq.write_table(table, staged.enter_context(staged_file(path)))
            for home in {path.parent.parent for path in tables}:
                _write_readme(home)
        except OSError as error:
            raise CorpusError(f"{path} cannot be written: {error.strerror or error}") from None
        except pa.ArrowException as error:
            raise CorpusError(f"{path}: rows are not of one form: {error}") from None
        self._written |= tables


def _refuse_foreign(home: Path) -> None:
    readme = home / README_FILE
    if home.exists() and not (readme.is_file() and MARK in readme.read_text(encoding="utf-8")):
        raise CorpusError(
            f"{home} was not laid out by ul2r task-data, and is left as it is: move it away, or take another folder"
        )


def _write_readme(home: Path) -> None:
    """Write the list of files that `datasets` reads."""
    configurations = [
        {
            "config_name": folder.name,
            "data_files": [
                {"split": path.stem, "path": f"{folder.name}/{path.name}"}
                for path in sorted(folder.glob("*.parquet"))
            ],
        }
        for folder in sorted(home.iterdir())
        if folder.is_dir() and any(folder.glob("*.parquet"))
    ]
    # Names such as no, or of digits alone, stay text.
    header = yaml.safe_dump({"configs": configurations}, sort_keys=False)
    write_atomically(home / README_FILE, f"---\n{header}---\n{MARK}\n")
