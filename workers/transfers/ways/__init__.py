"""Implementations of `workers.transfers.way.Way`."""
