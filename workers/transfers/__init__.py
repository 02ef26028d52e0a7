"""Implementations of `workers.transfer.Transfer`."""
