"""Bundles: a folder with the artifact, its proof, golden inputs and outputs, and a runner for the device."""

from edgeattn.bundle.bundle import Bundle, Verified, write_bundle
from edgeattn.bundle.manifest import Manifest

__all__ = ["Bundle", "Manifest", "Verified", "write_bundle"]
