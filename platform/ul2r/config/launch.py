"""What Ray is asked for, and what the devices are."""

from __future__ import annotations

from pydantic import Field

from ul2r.config.strict_model import PositiveInt, StrictModel


class Launch(StrictModel):
    """What Ray is asked for."""

    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)
    cpus_per_data_task: float = Field(default=0.5, ge=0)
    """CPUs reserved by each task that makes batches, of which there is one for each replica; 0 lets them run where
    every CPU is taken. They need little: one core makes over a million tokens a second."""
    max_failures: int = Field(default=3, ge=0)
    """Worker-group restarts before the run is given up."""
    min_workers: PositiveInt | None = None
    """Fewest workers that a run goes on with where a machine is lost; without it the run waits for another one."""
    device_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one worker's device, which a run must fit in; without it 76 for a GPU, what CUDA and NCCL leave of an
    H100's 80 GB, and no limit on CPUs."""
    device_peak_tflops: float | None = Field(default=None, gt=0)
    """Its dense bf16 peak, for the time that --dry-run expects; without it an H100's 989 for a GPU."""
    assumed_mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the peak that --dry-run assumes is reached."""

    @property
    def memory_gib(self) -> float | None:
        """Memory of one worker's device, None where it is not limited."""
        return self.device_memory_gib or (76.0 if self.gpus_per_worker else None)

    @property
    def peak_tflops(self) -> float | None:
        """Peak of one worker's device, None where it is not known."""
        return self.device_peak_tflops or (989.0 if self.gpus_per_worker else None)
