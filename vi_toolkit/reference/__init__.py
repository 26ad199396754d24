"""Reference posteriors, which variational fits are compared with, and how each is made."""

from vi_toolkit.reference.nuts import nuts_draws
from vi_toolkit.reference.reference import Reference
from vi_toolkit.reference.summary import LEVELS

__all__ = ["LEVELS", "Reference", "nuts_draws"]
