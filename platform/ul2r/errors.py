"""Errors, named for the person who must act.

Ul2rError
├── RunInterrupted         nobody: a run was asked to stop and has saved its state; ends a job with exit code 130
└── UserError              the person who typed the command; ends a job with one line and exit code 2
    ├── RecipeError        a recipe's key, type or value
    ├── CorpusError        the text given to `prepare`, or a token store
    ├── LayoutError        worker counts and parallel sizes that do not fit each other or the cluster
    ├── LaunchError        workers that die more often than the recipe allows
    ├── CheckpointError    a checkpoint or export that is missing, damaged, of another recipe, or cannot be written
    ├── ServiceError       MLflow, Ray or a port that cannot be reached or is in use
    ├── DivergedError      a run whose loss or gradient is NaN or infinite
    └── RequestError       a request to a served model (HTTP 4xx)

Every message says in one line what is wrong, the values, and what to change.
"""

from __future__ import annotations


class Ul2rError(Exception):
    """Base of every error that this library raises on purpose."""


class RunInterrupted(Ul2rError):  # noqa: N818  not an error: the run did what it was asked to
    """A run stopped before its last step because it was asked to; its state is saved."""


class UserError(Ul2rError):
    """Something that a user typed or pointed to; the message is shown alone, without a traceback."""


class RecipeError(UserError):
    """A recipe's key, type or value is wrong."""


class CorpusError(UserError):
    """A corpus or token store is missing, empty or unreadable."""


class LayoutError(UserError):
    """Parallel sizes do not fit the model, the workers or the cluster."""


class LaunchError(UserError):
    """Workers died more often than the recipe allows."""


class CheckpointError(UserError):
    """A checkpoint or export is missing, damaged, of another recipe, or cannot be written."""


class ServiceError(UserError):
    """A service cannot be reached, or a port is in use."""


class DivergedError(UserError):
    """A run's loss or gradient is NaN or infinite."""


class RequestError(UserError):
    """A served model cannot answer a request."""
