"""Whether to believe a fit: one diagnostic per file, and ``diagnose``, which runs them in order."""
