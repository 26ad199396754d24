"""Deterministic VI: fix the base noise, then optimise as one optimises any smooth function."""
