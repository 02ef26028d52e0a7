"""The paged engine: blocks, sequences, scheduler and loop that every engine of Baton's own shares."""
