"""The way `tcp`: the reader asks the owner's server. Between hosts, and where two processes share no memory."""
