"""The kinds of site: one module each, with `find(norm, survey)`, which gives the site that a norm belongs to.

A kind composes the lower ones: `norm` is the norm as a value, `gated` and `scaled` are what stands around one norm,
`dual` is both. The order below is the order in which they are tried: the larger site first.
"""

from fusion_pass.sites import dual, gated, scaled

KINDS = (dual, gated, scaled)
