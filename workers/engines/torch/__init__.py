"""The default engine: any Hugging Face decoder with grouped or multi-head attention, on the paged engine."""
