"""How many workers each stage should have: a decision as a pure function of values."""
