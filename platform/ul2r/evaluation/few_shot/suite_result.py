"""Results of a suite on disk.

RUN/few_shot/SUITE/FORM/
  items.parquet    a row for each item, metric and seed
  tasks/           while it runs, see task_outcome.py
  result.json      scores, settings, what was left out, versions

FORM names mode and attention, such as S2S-prefix, and a part of the items or other seeds if only these were asked for:
results of several settings stand side by side, and a quick look at ten items does not replace a whole suite.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, get_args

from ul2r.config.denoisers import Mode
from ul2r.config.few_shot import FewShot
from ul2r.errors import CheckpointError
from ul2r.evaluation.few_shot.items import ITEMS_FILE, RESULT_FILE
from ul2r.evaluation.scores import Score
from ul2r.filesystem import write_atomically

FORMAT = 2
"""Raised when the meaning of scores or this file's fields change."""
MAX_NAMED_TASKS = 3
"""Tasks of a part of a suite that its label has by their names."""


@dataclass(frozen=True)
class SuiteResult:
    """Scores of a model on a suite.

    Attributes:
        suite: Name of the suite.
        model: Digest of the model's weights.
        scores: Headline score of each line of the suite that was run; errors are over items.
        mean: Their unweighted mean.
        left_out: Lines or tasks that the mean does not cover, with the reason.
        metrics: Names of the headline metrics, by line.
        all_metrics: Every metric of every task, as lm-eval combines it, with the first seed.
        form: Settings of the prompts, and how many contexts were cut.
        settings: Seeds, limit, and the tasks that were asked for, if not all; of infilling also the samples.
        digests: Of all that each task's items depend on; none in results of earlier versions.
    """

    suite: str
    model: str
    scores: Mapping[str, Score]
    mean: Score
    left_out: Mapping[str, str]
    metrics: Mapping[str, str]
    all_metrics: Mapping[str, Mapping[str, float]]
    form: Mapping[str, Any]
    settings: Mapping[str, Any]
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name of the form and of the part that was run, for folders and tables."""
        return make_label(self.form, self.settings)

    @property
    def pooling(self) -> str | None:
        """Seeds or samples that the scores of items are means over, in words; None if there is one of each."""
        # Infilling has samples, and no few-shot examples.
        count = self.settings.get("samples", 1)
        if count > 1:
            return f"pooled over {count} samples, by item"
        seeds = self.settings["seeds"]
        if len(seeds) == 1 or "samples" in self.settings:
            return None
        return f"pooled over few-shot examples of seeds {', '.join(map(str, seeds))}, by item"

    def write(self, folder: Path) -> None:
        """Write result.json."""
        tree = {
            "format": FORMAT,
            **asdict(self),
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        write_atomically(folder / RESULT_FILE, json.dumps(tree, indent=2) + "\n")

    @classmethod
    def read_if_same(cls, folder: Path, digests: Mapping[str, str]) -> Self | None:
        """Read result.json, if it has these digests; None if it has others, another form, or is not there."""
        path = folder / RESULT_FILE
        if not path.is_file() or not (folder / ITEMS_FILE).is_file():
            return None
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.get("format") != FORMAT or tree.get("digests") != digests:
            return None
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read result.json.

        Raises:
            CheckpointError: If it has another form than this version's.
        """
        path = folder / RESULT_FILE
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format {tree.get('format')}, this version reads {FORMAT}: run `ul2r evaluate RECIPE --suite "
                f"{folder.parent.name}` again, or remove {folder}"
            )
        del tree["format"], tree["lm_eval"]
        tree["scores"] = {line: Score(**fields) for line, fields in tree["scores"].items()}
        tree["mean"] = Score(**tree["mean"])
        return cls(**tree)


def make_label(form: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the name of a form and of the part of a suite that is run."""
    parts = [form["reading"]] if "reading" in form else []
    # Infilling has a mode only if it is the same for all tasks.
    if not parts or form["mode"] in get_args(Mode):
        parts.append(form["mode"])
    parts.append(form["attention"])
    parts += [key for key in ("sentinel", "eos") if form[key]]
    # That of infilling follows from its reading.
    if form["trailing_space"] == "context" and "reading" not in form:
        parts.append("space")

    tasks = settings["tasks"]
    if len(tasks) > MAX_NAMED_TASKS:
        digest = hashlib.sha256("/".join(sorted(tasks)).encode()).hexdigest()
        parts.append(f"{len(tasks)}_tasks_{digest[:8]}")
    else:
        parts += sorted(tasks)
    if settings["limit"] is not None:
        parts.append(f"first_{settings['limit']}")
    if tuple(settings["seeds"]) != FewShot.model_fields["seeds"].default:
        parts.append("_".join(["seeds", *map(str, settings["seeds"])]))
    if settings.get("temperature"):
        parts.append(f"{settings['samples']}_samples_at_{settings['temperature']:g}")
    return "-".join(parts)
