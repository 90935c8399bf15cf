"""Errors, named for who must act.

Ul2rError
├── RunInterrupted         nobody: a run was asked to stop and has saved; ends a job with exit code 130
└── UserError              the person who typed the command; ends a job with one line and exit code 2
    ├── RecipeError        a recipe's key, type or value
    ├── CorpusError        the text given to `prepare`, or a token store
    ├── LayoutError        worker counts and parallel sizes that do not fit each other or the cluster
    ├── CheckpointError    a checkpoint or export that is missing, damaged, not of the recipe, or cannot be written
    ├── ServiceError       MLflow, Ray or a port that is not there, or is taken
    ├── DivergedError      a run whose loss or gradient is no longer a number
    └── RequestError       a request to a served model (HTTP 4xx)

Every message states what is wrong, the values, and what to change, on one line.
"""

from __future__ import annotations


class Ul2rError(Exception):
    """Base of every error that this library raises on purpose."""


class RunInterrupted(Ul2rError):  # noqa: N818  no error: the run did as it was asked
    """A run that was asked to stop before its last step; its state is saved."""


class UserError(Ul2rError):
    """Something a user typed or pointed to; its text is the whole answer."""


class RecipeError(UserError):
    """A recipe's key, type or value."""


class CorpusError(UserError):
    """A corpus or token store that is missing, empty or unreadable."""


class LayoutError(UserError):
    """Parallel sizes that do not fit the model, the workers or the cluster."""


class CheckpointError(UserError):
    """A checkpoint or export that is missing, damaged, differs from the recipe, or cannot be written."""


class ServiceError(UserError):
    """A service that cannot be reached, or a port that is taken."""


class DivergedError(UserError):
    """A run whose loss or gradient is no longer a number."""


class RequestError(UserError):
    """A request that a served model cannot answer as asked."""
