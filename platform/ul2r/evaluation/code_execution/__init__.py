"""Programs that a model wrote, run apart from everything else.

sandbox.py    starts a process for each program, and ends it
confine.py    what this process does first: it gives up rights, for good
"""

from ul2r.evaluation.code_execution.sandbox import (
    ExecutionLimits,
    ExecutionResult,
    check_confinement,
    run_program,
)

__all__ = ["ExecutionLimits", "ExecutionResult", "check_confinement", "run_program"]
