"""A package, so that test processes find helpers and workers by name."""
