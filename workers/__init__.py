"""Prefill and decode processes, engines and transfers: the only place that knows torch, vLLM and their like."""
