"""A folder of task data that mirrors the Hub.

FOLDER/OWNER/NAME/
  README.md                    the list of files, from which `datasets` loads them
  CONFIGURATION/SPLIT.parquet
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ul2r.errors import CorpusError
from ul2r.filesystem import staged_file, write_atomically

README_FILE = "README.md"
MARK = "Laid out by ul2r task-data."
"""Line that tells a README of ours from one that came from the Hub."""


class DataFolder:
    """Data sets by their names on the Hub.

    Attributes:
        folder: The folder.
        written: (data set, configuration, split) with its number of items, as written so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: dict[tuple[str, str, str], int] = {}

    def write_split(
        self, dataset: str, configuration: str, split: str, rows: list[dict[str, Any]]
    ) -> None:
        """Write a split in place of an earlier one, or append to the rows that this object has written.

        Raises:
            CorpusError: If the data set's folder was not made by this class, or cannot be written.
        """
        home = self.folder / dataset
        readme = home / README_FILE
        if home.exists() and not (readme.is_file() and MARK in readme.read_text(encoding="utf-8")):
            raise CorpusError(
                f"{home} was not laid out by ul2r task-data, and is left as it is: move it away, or take another folder"
            )
        path = home / configuration / f"{split}.parquet"
        key = (dataset, configuration, split)
        try:
            table = pa.Table.from_pylist(rows)
            # Two files may hold parts of a split, such as stories of several years.
            if key in self.written:
                table = pa.concat_tables([pq.read_table(path), table], promote_options="default")
            path.parent.mkdir(parents=True, exist_ok=True)
            # First, so that an interrupted start is recognized as ours.
            if not readme.exists():
                self._write_readme(home)
            with staged_file(path) as temporary:
                pq.write_table(table, temporary)
            self._write_readme(home)
        except OSError as error:
            raise CorpusError(f"{path} cannot be written: {error.strerror or error}") from None
        except pa.ArrowException as error:
            raise CorpusError(f"{path}: rows are not of one form: {error}") from None
        self.written[key] = len(table)

    def _write_readme(self, home: Path) -> None:
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
