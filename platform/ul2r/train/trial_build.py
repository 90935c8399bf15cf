"""A run's model checked without its weights, before any worker starts."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

from ul2r.child_process import tie_to_parent
from ul2r.config import Recipe
from ul2r.errors import UserError

VOCABULARY_SIZE = 2**16
"""Any will do: Megatron-Core is only given vocabularies that fit every layout."""
TRIAL_NICENESS = 10
THREADS = Path("/proc/self/task")
"""Folder of this process's threads, those of C libraries included (proc(5))."""
FORKABLE_THREADS = {"jemalloc_bg_thd"}
"""Threads of libraries that cope with forks: pyarrow's allocator starts its own again (`jemalloc_postfork_child`)."""
_built: set[str] = set()
"""Sections of recipes, as JSON, whose models were built."""


@contextmanager
def start_trial_build(recipe: Recipe) -> Iterator[Callable[[], None]]:
    """Check in another process, while the block runs, that a recipe's model can be trained and exported.

    The first, a middle and the last pipeline stage are built as Megatron-Core will, but without memory for weights, and
    the class that the model is exported as is asked whether it computes the model (`check_family`). That takes seconds
    of imports, in which the block can do other work. What was checked once by this process is not checked again.

    It is another process because Megatron-Core keeps its layout in global variables, and without a GPU needs torch to
    be patched (`model/cpu.py`). It is killed if the block ends before the result was asked for.

    Yields:
        A function that waits for the result. It raises a LayoutError if Megatron-Core refuses the model or the layout,
        and a RecipeError if the class would lose a setting.
    """
    portable = replace_device_settings(recipe)
    sections = portable.model_dump_json(
        include={"model", "parallel", "training", "optimizer", "objective"}
    )
    if sections in _built:
        yield lambda: None
        return

    context = _choose_context(recipe)
    receiver, sender = context.Pipe(duplex=False)
    # A daemon: this process does not wait for it at its own end.
    process = context.Process(target=_check, args=(portable, sender), daemon=True)
    process.start()
    # Of this process's own copy: reading ends when the other process has closed its one, however it ended.
    sender.close()

    def wait() -> None:
        try:
            error = receiver.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"the trial build ended with exit code {process.exitcode}") from None
        if error is not None:
            raise error
        _built.add(sections)

    try:
        yield wait
    finally:
        process.kill()
        process.join()
        receiver.close()


def _choose_context(recipe: Recipe) -> ForkContext | SpawnContext:
    """Return how to start the other process: by a fork, which imports nothing again, where that can build the model."""
    # A forked process inherits the locks of this one's other threads, locked for ever, and a CUDA that cannot be used.
    names = _list_threads()
    is_single = sum(name not in FORKABLE_THREADS for name in names) == 1
    can_fork = "megatron.core" in sys.modules and is_single and not recipe.launch.gpus_per_worker
    # Not "forkserver", which needs a socket in TMPDIR.
    return get_context("fork") if can_fork else get_context("spawn")


def _list_threads() -> list[str]:
    """Return the names of this process's threads."""
    names = []
    for thread in THREADS.iterdir():
        # A thread may end between the two.
        with suppress(FileNotFoundError, ProcessLookupError):
            names.append((thread / "comm").read_text().strip())
    return names


def check_buildable(recipe: Recipe) -> None:
    """Check a recipe's model as `start_trial_build` does, and wait for the result.

    Raises:
        UserError: If a check fails.
    """
    with start_trial_build(recipe) as wait:
        wait()


def replace_device_settings(recipe: Recipe) -> Recipe:
    """Return the recipe without what this machine may lack: TransformerEngine, for fp8 and for attention."""
    precision = "fp32" if recipe.precision == "fp32" else "bf16"
    training = recipe.training.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"attention": "sdpa", "training": training})


def _check(recipe: Recipe, sender: Connection) -> None:
    """Send the user error that a check ends with, None if there is none; run in a process of its own."""
    tie_to_parent()
    # Ray's node, which starts meanwhile, gives up after 30 s on a busy machine.
    os.nice(TRIAL_NICENESS)
    # This process ends before its garbage would matter.
    gc.disable()
    from ul2r.model.huggingface.config_json import check_family

    try:
        build_stages(recipe)
        # Last, when torch is imported: the class needs transformers, which needs that.
        check_family(recipe.model)
    except UserError as error:
        sender.send(error)
    else:
        sender.send(None)


def build_stages(recipe: Recipe) -> None:
    """Build stages of one replica in turn, each as a rank of a process group whose collectives do nothing."""
    # Before torch looks for GPUs: they are the workers'.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron-Core warns of each package that only GPUs need; the workers' logs have the warnings that matter.
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    # torch's own backend for trials like this one.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ul2r.model.build import build_chunks
    from ul2r.model.cpu import use_cpu
    from ul2r.model.refusals import translate_refusals

    use_cpu()
    parallel = recipe.parallel
    num_ranks = parallel.tensor * parallel.pipeline
    for stage in sorted({0, parallel.pipeline // 2, parallel.pipeline - 1}):
        # Megatron-Core numbers ranks by tensor, then by pipeline rank.
        rank = stage * parallel.tensor
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
        try:
            # As in `Mesh.join`, but without its groups for objects, which would connect to other ranks.
            with translate_refusals():
                parallel_state.initialize_model_parallel(
                    tensor_model_parallel_size=parallel.tensor,
                    pipeline_model_parallel_size=parallel.pipeline,
                    virtual_pipeline_model_parallel_size=(
                        parallel.virtual_stages if parallel.virtual_stages > 1 else None
                    ),
                    create_gloo_process_groups=False,
                )
            with torch.device("meta"):
                build_chunks(recipe, VOCABULARY_SIZE)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
