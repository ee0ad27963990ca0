"""The version of this build."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """The installed version, for handshakes and `tokenrelay version`."""
    try:
        return metadata.version("tokenrelay")
    except metadata.PackageNotFoundError:  # run from a tree that is not installed
        return "0.0.0+unknown"
