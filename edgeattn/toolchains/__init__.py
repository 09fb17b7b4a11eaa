"""Toolchains that cannot live beside the others, each in an environment of its own.

``edgeattn toolchain add NAME`` makes one, on request and never by itself. What runs in it is a script that reads a
request and writes a result, both JSON in a folder: nothing of it is ever imported here.
"""

from edgeattn.toolchains.calling import call, script
from edgeattn.toolchains.environment import State, folder, installed, packages, python, size
from edgeattn.toolchains.install import add, remove
from edgeattn.toolchains.known import KNOWN, Toolchain, get, known

__all__ = [
    "KNOWN",
    "State",
    "Toolchain",
    "add",
    "call",
    "folder",
    "get",
    "installed",
    "known",
    "packages",
    "python",
    "remove",
    "script",
    "size",
]
