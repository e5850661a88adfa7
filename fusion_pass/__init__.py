"""Compiler passes that make diffusion transformers faster with no change to their code."""

from fusion_pass.backend import Backend, explain, inductor_options
from fusion_pass.report import FusionReport

__all__ = ["Backend", "FusionReport", "explain", "inductor_options"]
