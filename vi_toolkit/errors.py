"""Every exception that vi_toolkit raises on purpose."""

from __future__ import annotations

from typing import Any


class VIError(Exception):
    """Base class of all errors raised on purpose by vi_toolkit."""


class PreflightError(VIError, ValueError):
    """Model, guide and data do not fit together; raised before the first step.

    Attributes:
        site: name of the sample site, plate or data entry at fault, if there is one.
        remedy: what to change, in one sentence.
    """

    def __init__(self, message: str, site: str | None = None, remedy: str | None = None):
        self.site = site
        self.remedy = remedy
        super().__init__(f"{message} {remedy}" if remedy else message)


class NonFiniteError(VIError, FloatingPointError):
    """The ELBO or its gradient is no longer a finite number.

    Attributes:
        site: the sample site (or parameter) where the first non-finite value stands.
        index: index of that value inside the site, as a tuple.
        step: the step at which it happened, counted from 0.
        fit: the last good state as a :class:`~vi_toolkit.Fit`; None if there was none yet.
    """

    def __init__(
        self,
        message: str,
        site: str | None = None,
        index: tuple[int, ...] | None = None,
        step: int | None = None,
        fit: object | None = None,
    ):
        self.site = site
        self.index = index
        self.step = step
        self.fit: Any = fit
        super().__init__(message)


class NotDeterministicError(VIError, ValueError):
    """``method="deterministic"`` was asked for, and this model, guide or data cannot have it."""


class InvalidReferenceError(VIError, ValueError):
    """A reference posterior is refused: inconsistent, or MCMC that has not passed the rules.

    Attributes:
        reference: the refused :class:`~vi_toolkit.Reference` where MCMC ran but was not admitted,
            so that its numbers can be looked at (``error.reference.table``); else None. Its
            ``made["refused"]`` says why, and :func:`~vi_toolkit.compare` trusts nothing on it.
    """

    def __init__(self, message: str, reference: object | None = None):
        self.reference: Any = reference
        super().__init__(message)


class LoadError(VIError, ValueError):
    """A file is corrupt, truncated, or not what it is said to be."""


class ConvergenceWarning(UserWarning):
    """The fit stopped before its optimum was reached to the promised accuracy."""


class PrivateNameError(VIError, AttributeError):
    """The installed Pyro has no longer a private name that vi_toolkit uses; says what is lost."""


class CompileError(VIError, RuntimeError):
    """A step cannot be compiled; the message says why."""


class CompileWarning(UserWarning):
    """A fit runs eagerly although compiled steps would have paid; the message says why."""
