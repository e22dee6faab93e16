"""Pages about several things at once: runs, what their checkpoints are, and how they did."""
