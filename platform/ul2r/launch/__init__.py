"""Where the parts are put together: a worker's run, and Ray Train around it."""
