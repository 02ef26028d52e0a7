"""Implementations of `workers.engine.AsyncEngine`."""
