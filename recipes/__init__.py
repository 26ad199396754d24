"""Worked examples of variational inference, each with real data and a reference posterior.

One package per model. ``python -m recipes list`` names them, ``python -m recipes new NAME --like
OTHER`` starts one of your own.
"""
