"""Resources that Ray reserves, and the workers' devices."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.field_types import PositiveInt
from ul2r.config.parallel import Parallel
from ul2r.config.strict_model import StrictModel


class Launch(StrictModel):
    """Resources that Ray reserves, and the workers' devices."""

    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    cpus_per_data_task: float = Field(default=0.5, ge=0)
    """CPUs reserved by each task that builds batches, one task per replica; with 0 they also run where every CPU is
    taken. They need little: one core processes over a million tokens a second."""
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the worker group before the run fails; each new checkpoint resets the count."""
    worker_start_timeout_s: float = Field(default=600, gt=0)
    """Seconds within which the workers' processes start on machines that are there; otherwise the run ends with Ray's
    reason. Ray gives each process 60 s and then starts another, so that the default allows ten attempts: importing
    torch on many machines from one network file system takes some."""
    min_workers: PositiveInt | None = None
    """Fewest workers that a run continues with after a machine is lost; by default it waits for a replacement."""
    device_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one worker's device, which a run must fit in. Default: 76 for a GPU, which is what CUDA and NCCL leave
    of an H100's 80 GB, and no limit for CPUs."""
    device_peak_tflops: float | None = Field(default=None, gt=0)
    """Its dense bf16 peak, for the time that --dry-run predicts. Default: an H100's 989 for a GPU."""
    assumed_mfu: float = Field(default=0.4, gt=0, le=1)
    """Fraction of the peak that --dry-run assumes is reached."""

    @property
    def memory_gib(self) -> float | None:
        """Memory of one worker's device, None if it is not limited."""
        # No default for CPUs: their memory is whatever the machine has.
        return self.device_memory_gib or (76.0 if self.gpus_per_worker else None)

    @property
    def peak_tflops(self) -> float | None:
        """Peak of one worker's device, None if it is not known."""
        return self.device_peak_tflops or (989.0 if self.gpus_per_worker else None)


def check_min_workers(launch: Launch, parallel: Parallel) -> None:
    """Refuse a minimum of workers above their number.

    Raises:
        ValueError: With both numbers.
    """
    minimum = launch.min_workers
    if minimum is not None and minimum > parallel.num_workers:
        raise ValueError(
            f"launch.min_workers={minimum} is more than parallel.num_workers={parallel.num_workers}: lower the first"
        )
