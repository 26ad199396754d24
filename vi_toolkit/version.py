"""The version of this package, as it is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vi-recipes")
except PackageNotFoundError:  # a checkout that is on the path but has not been installed
    __version__ = "unknown"
