"""Gradient estimators: ``pyro.infer.ELBO`` subclasses, usable with ``pyro.infer.SVI`` too."""

from vi_toolkit.estimators.reparam import Reparam

__all__ = ["Reparam"]
