"""Stochastic VI: annealed steps, averaged iterates, restarts, and a rule for when to stop."""
