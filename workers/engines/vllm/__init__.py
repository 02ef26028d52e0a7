"""vLLM as an engine of Baton: its core in this process, its paged cache behind Baton's transfers."""
