"""EdgeAttn: from a PyTorch model to the device it must run on, with the numbers proven on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeattn.bundle import Bundle
    from edgeattn.pipeline.export import export

__version__ = "0.1.0"
__all__ = ["Bundle", "export"]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that ``import edgeattn`` stays light."""
    if name == "export":
        from edgeattn.pipeline.export import export

        return export
    if name == "Bundle":
        from edgeattn.bundle import Bundle

        return Bundle
    raise AttributeError(f"module 'edgeattn' has no attribute {name!r}")
