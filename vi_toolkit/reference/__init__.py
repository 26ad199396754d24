"""Reference posteriors: what a variational fit is compared with, and how each was made."""
