"""Training on Megatron-Core: mesh, step, checkpoints and the loop. Knows no Ray."""
