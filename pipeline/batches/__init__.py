"""Batches: files of requests that are answered at low priority, by the same queues and workers as everything else."""
