"""Paths of the files that runs keep; no other module spells their names.

storage/
  store/                     token store: tokenizer.json, manifest.json, *.bin, *.idx
  pairs-DIGEST/              pairs of prompt and answer, in the same format; a folder for each `data.pairs`
  runs/NAME/
    checkpoints/             step_00000100/, latest, owner
    export/                  Hugging Face folder: safetensors, config.json, tokenizer.json, ul2r.json, README.md
    guards/                  a report on each step that the guards did not apply
    heartbeats/              the current step and phase of each rank, for the watchdog
    profiles/                traces of torch's profiler
    ray/                     Ray Train's own files
    few_shot/SUITE/FORM/     items.parquet, result.json: answers and scores of few-shot tasks
    gaps/                    items.parquet, result.json: losses and answers of held-out gaps
    recipe.yaml              recipe of the last start of training
    data.html  evaluation.json  tracking.json  tracking_waiting.json
    metrics.jsonl  run.json  the run's record, with tracking.uri: none
    ladder.yaml              recipe with which a ladder has trained and measured the run
  bases/NAME-DIGEST/         evaluation.json, few_shot/, gaps/, tracking.json of a model that is measured as it is
  comparisons/NAME/          table.md, table.json, comparison.png, few_shot.json, gaps.md, gaps.json,
                             report.html
  ladders/NAME/              recipes/ of its runs, and what they show together
  mlflow.db  artifacts/  mlflow.log   the MLflow server that a job starts here
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# tokenizer.json and README.md are what Hugging Face's libraries and Hub look for; ul2r.json is this project's own.
TOKENIZER_FILE = "tokenizer.json"
EXPORT_METADATA_FILE = "ul2r.json"
MODEL_CARD_FILE = "README.md"

# ASCII letters, digits and ". _ -", not "." and "..": no separator of any system, drive, NUL, wildcard or URL syntax.
_FILE_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,255}")


def is_file_name(name: object) -> bool:
    """Return whether a name from a file or a server names a file in the folder that it is appended to, and no other.

    Every such name is checked with this before it becomes part of a path or a URL.
    """
    return isinstance(name, str) and _FILE_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class StoragePaths:
    """Files that the runs of one family share.

    Attributes:
        storage: The recipes' `storage`.
    """

    storage: Path

    @property
    def store(self) -> Path:
        """Folder of the token store and its tokenizer."""
        return self.storage / "store"

    def pairs(self, digest: str) -> Path:
        """Return the folder of pairs made with the settings of this digest."""
        return self.storage / f"pairs-{digest}"

    @property
    def mlflow_database(self) -> Path:
        """Database of the MLflow server that `ul2r ui` and `jobs/demo.py` start."""
        return self.storage / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """Folder of that server's artifacts."""
        return self.storage / "artifacts"

    @property
    def mlflow_log(self) -> Path:
        """Output of that server."""
        return self.storage / "mlflow.log"

    def run(self, name: str) -> RunPaths:
        """Return the paths of a run."""
        return RunPaths(self.storage / "runs" / name)

    @property
    def bases(self) -> Path:
        """Folder of what is known of models that are no runs: their scores in comparisons."""
        return self.storage / "bases"

    def comparison(self, name: str) -> Path:
        """Return the folder of a comparison's table and plot."""
        return self.storage / "comparisons" / name

    def ladder(self, name: str) -> Path:
        """Return the folder of a ladder's recipes, tables and figures."""
        return self.storage / "ladders" / name


@dataclass(frozen=True)
class RunPaths:
    """Files of one run.

    Attributes:
        folder: The run's own folder.
    """

    folder: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def export(self) -> Path:
        """Hugging Face folder of the run's last checkpoint."""
        return self.folder / "export"

    @property
    def completed_recipe(self) -> Path:
        """Recipe with which a ladder has trained and measured the run."""
        return self.folder / "ladder.yaml"

    @property
    def anomaly_reports(self) -> Path:
        """Folder of the reports on steps that the guards did not apply."""
        return self.folder / "guards"

    @property
    def heartbeats(self) -> Path:
        """Folder of the ranks' heartbeats."""
        return self.folder / "heartbeats"

    @property
    def profiles(self) -> Path:
        """Folder of the profiler's traces."""
        return self.folder / "profiles"

    @property
    def ray(self) -> Path:
        """Folder of Ray Train's own files."""
        return self.folder / "ray"

    @property
    def data_page(self) -> Path:
        """Page of training examples that `ul2r inspect` writes."""
        return self.folder / "data.html"

    @property
    def evaluation(self) -> Path:
        """Scores of the run's export."""
        return self.folder / "evaluation.json"

    @property
    def few_shot(self) -> Path:
        """Folder of the results of few-shot suites."""
        return self.folder / "few_shot"

    @property
    def gaps(self) -> Path:
        """Folder of the scores of held-out gaps."""
        return self.folder / "gaps"

    @property
    def metrics(self) -> Path:
        """Metrics of a run that is recorded in files."""
        return self.folder / "metrics.jsonl"

    @property
    def run_record(self) -> Path:
        """Name, status, tags and parameters of a run that is recorded in files."""
        return self.folder / "run.json"

    @property
    def recorded_recipe(self) -> Path:
        """Recipe of the last start of the run's training."""
        return self.folder / "recipe.yaml"

    @property
    def tracking_record(self) -> Path:
        """Record of the run's id in MLflow."""
        return self.folder / "tracking.json"

    @property
    def tracking_backlog(self) -> Path:
        """Metrics that MLflow has not accepted yet."""
        return self.folder / "tracking_waiting.json"
