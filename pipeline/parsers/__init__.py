"""Ways to read an answer: by the model's response template, or as calls that a grammar made it write."""
