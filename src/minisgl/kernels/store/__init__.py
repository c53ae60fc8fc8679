"""Keys and values of a step into their cache slots."""
