"""The parts of `benchmarks/gpu_disagg.py`: Baton and plain vLLM on two GPUs under the same load."""
