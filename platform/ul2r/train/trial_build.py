"""A run's model built without its weights, before any worker starts."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from concurrent.futures import ProcessPoolExecutor

from ul2r.child_process import tie_to_parent
from ul2r.config import Recipe

VOCABULARY_SIZE = 2**16
"""Any will do: Megatron-Core is only given vocabularies that fit every layout."""
_built: set[str] = set()
"""Sections of recipes, as JSON, whose models were built."""


def check_buildable(recipe: Recipe) -> None:
    """Build the first, a middle and the last pipeline stage as Megatron-Core will, but without memory for weights.

    It is done in another process: Megatron-Core keeps its layout in global variables, and without a GPU needs torch to
    be patched (`model/cpu.py`). What was built once in this process is not built again.

    Raises:
        LayoutError: If Megatron-Core refuses the model or the layout.
    """
    portable = replace_device_settings(recipe)
    sections = portable.model_dump_json(
        include={"model", "parallel", "training", "optimizer", "objective"}
    )
    if sections in _built:
        return
    # A forked process would inherit the locks of this one's threads; a fork server needs a socket in TMPDIR.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=tie_to_parent) as pool:
        pool.submit(build_stages, portable).result()
    _built.add(sections)


def replace_device_settings(recipe: Recipe) -> Recipe:
    """Return the recipe without what this machine may lack: TransformerEngine, for fp8 and for attention."""
    precision = "fp32" if recipe.precision == "fp32" else "bf16"
    training = recipe.training.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"attention": "sdpa", "training": training})


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
