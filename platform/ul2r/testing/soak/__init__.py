"""Load on a served model for minutes: mixed requests, clients that leave, hostile ones, and killed replicas."""
