"""Tables of runs and descriptions of experiments in MLflow."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence

from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from ul2r.tracking.artifacts import open_experiment, translate_store_errors
from ul2r.tracking.client import create_client, translate_errors
from ul2r.tracking.provenance import NOTE_TAG
from ul2r.tracking.tables import split_table

MAX_NOTE_LENGTH = 5000
"""Characters that MLflow's database allows in a tag of an experiment."""

_log = logging.getLogger(__name__)


def log_table(uri: str, run_id: str, table: Mapping[str, Sequence[object]], file: str) -> None:
    """Log a table that MLflow's page shows and `mlflow.load_table` reads.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    # Not `MlflowClient.log_table` (3.17), which appends to a table of this name: one that is logged again would have
    # every row twice. The file and the tag are what it writes.
    with translate_store_errors(uri, f"run {run_id}"):
        client.log_text(run_id, json.dumps(split_table(table), ensure_ascii=False), file)
    with translate_errors(uri):
        tags = client.get_run(run_id).data.tags
        listed = json.loads(tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in listed:
            client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))


def note_experiment(uri: str, experiment: str, heading: str, text: str) -> None:
    """Add a section to an experiment's description, in place of one under the same heading.

    Other text is left as it is: people edit descriptions on the page.

    Args:
        uri: The tracking server.
        experiment: Name of the experiment.
        heading: Heading of the section, without #.
        text: Its Markdown, without headings of this level.

    Raises:
        ServiceError: If the server fails.
    """
    found = open_experiment(uri, experiment)
    note = replace_section(found.tags.get(NOTE_TAG, ""), heading, text)
    if note is None:
        _log.warning(
            "the description of experiment %r has no room for %r: shorten it on its page",
            experiment,
            heading,
        )
        return
    with translate_errors(uri):
        create_client(uri).set_experiment_tag(found.experiment_id, NOTE_TAG, note)


def replace_section(note: str, heading: str, text: str) -> str | None:
    """Return a description with a section added or replaced, whose end is cut where MLflow takes no more.

    Args:
        note: The description.
        heading: Heading of the section.
        text: Its Markdown.

    Returns:
        The description; None if what else is in it leaves no room for a line of the section.
    """
    beginning = f"## {heading}\n\n"
    # A comment, which the page does not show: what people write behind a section is not part of it.
    end = f"\n\n<!-- end of {heading} -->"
    # Sections of earlier versions have no such end, and go on to the next heading.
    section = re.compile(
        rf"^## {re.escape(heading)}\n(?:.*?{re.escape(end.strip())}|.*?(?=^## |\Z))",
        re.MULTILINE | re.DOTALL,
    )
    others = section.sub("", note).strip()
    room = MAX_NOTE_LENGTH - len(others) - len(beginning) - len(end) - 4
    if len(text) > room:
        text = text[: max(room, 0)].rpartition("\n")[0]
        if not text:
            return None
    # Before other sections, since the last comparison is what people look for; behind text without a heading, which
    # would else become part of this one.
    first = re.search(r"^## ", others, re.MULTILINE)
    place = first.start() if first else len(others)
    parts = (others[:place].strip(), f"{beginning}{text.strip()}{end}", others[place:].strip())
    return "\n\n".join(part for part in parts if part)
