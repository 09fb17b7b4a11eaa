"""Reparameterization with proof: the training form of a model becomes its deploy form, and every fusion is measured.

``reparameterize(model, inputs)`` takes any module in eval mode. Rules, one a file, propose fusions (parallel branches,
batch norms on either side of a layer, a guest's own method, residual branches, the attention scale). Each proposal is
run in both forms on real and on random activations, in float64 and float32; what does not hold keeps its training form.
The proof lists what was fused and how exactly, and what was not and why; it is plain data for a manifest.
"""

from edgeattn.reparam.engine import RULES, Reparameterized, reparameterize
from edgeattn.reparam.proof import BlockProof, NotFused, Proof

__all__ = ["RULES", "BlockProof", "NotFused", "Proof", "Reparameterized", "reparameterize"]
