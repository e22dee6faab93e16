"""Traditional experiment folders -> run directories of ours."""
