"""`/openapi.json`: every public route, from the types that check bodies and a table of routes."""
