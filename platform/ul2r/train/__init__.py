"""Training on Megatron-Core: mesh, step, checkpoints and the loop. Knows no Ray."""

# For its effect: modules here import Megatron-Core before any of the model's.
import ul2r.model  # noqa: F401  prepares the import of Megatron-Core
