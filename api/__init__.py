"""Baton's HTTP surface: routes, bodies, SSE framing, authentication. Imports `pipeline`, never `workers`."""
