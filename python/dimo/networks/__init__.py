"""Network modules that no library provides."""
