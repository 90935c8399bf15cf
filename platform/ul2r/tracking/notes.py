"""Tables of runs, and descriptions of runs and experiments, in MLflow."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from ul2r.tracking.artifacts import open_experiment, translate_store_errors
from ul2r.tracking.client import create_client, translate_errors
from ul2r.tracking.provenance import NOTE_TAG
from ul2r.tracking.sections import replace_section
from ul2r.tracking.tables import split_table

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


def note_run(uri: str, run_id: str, heading: str, text: str) -> None:
    """Add a section to a run's description, in place of one under the same heading; leave other text as it is.

    Args:
        uri: The tracking server.
        run_id: The run.
        heading: Heading of the section, without #.
        text: Its Markdown, without headings of this level.

    Raises:
        ServiceError: If the server fails.
    """
    client = create_client(uri)
    with translate_errors(uri):
        run = client.get_run(run_id)
        before = run.data.tags.get(NOTE_TAG, "")
        note = replace_section(before, heading, text)
        if note is None:
            _log.warning(
                "the description of run %r has no room for %r: shorten it on its page",
                run.info.run_name,
                heading,
            )
        elif note != before:
            client.set_tag(run_id, NOTE_TAG, note)
