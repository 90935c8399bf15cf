"""One commit of a base on the Hub for all processes of a run.

Under Ray the driver reads the recipe, asks the Hub and sends the recipe, with the commit in it, to the workers. Under
torchrun each process reads the recipe: rank 0 asks, and tells the others by the store in which torchrun's processes
meet. A branch that moves in between, or a Hub that is asked by a thousand processes at once, is then no danger.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

DOWNLOAD_TIMEOUT = timedelta(days=1)
"""Time that other ranks wait for rank 0 to download a base. If rank 0 fails, torchrun ends them."""


def resolve_base_once(name: str, revision: str | None) -> Path:
    """Return the local folder of a Hugging Face base, as `resolve_model_folder` does, of rank 0's commit.

    Raises:
        CheckpointError: If there is no such folder, or the model cannot be downloaded.
    """
    from ul2r.model.huggingface.safetensors_reader import find_commit, resolve_model_folder

    # Only where torchrun itself holds the store, which is its default.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return resolve_model_folder(name, revision)

    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # not in torch's list of exports

    server = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=DOWNLOAD_TIMEOUT,
    )
    # A restart asks again: nothing has been trained on the earlier answer, or it is in a checkpoint.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"ul2r/base/{attempt}", server)
    if os.environ["RANK"] != "0":
        # Empty for a folder, and after a failure, which this rank then meets itself.
        return resolve_model_folder(name, store.get("commit").decode() or revision)

    commit = None
    try:
        folder = resolve_model_folder(name, revision)
        commit = find_commit(folder)
    finally:
        store.set("commit", commit or "")
    return folder
