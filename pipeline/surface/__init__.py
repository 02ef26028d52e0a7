"""The bodies of OpenAI's and Anthropic's clients, and how answers look: shared by whoever takes requests, over HTTP or from a file."""
