"""The activation cache: frozen prefixes are computed once, and read from memory or disk afterwards."""
