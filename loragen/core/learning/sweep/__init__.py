"""A search over settings: trials of one training, chosen by what earlier ones have validated."""
