"""The batch worker: takes batches from rq, and their lines through the same queues as everything else."""
