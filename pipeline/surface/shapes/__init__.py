"""The shapes of answers, by the kind of their request."""
