"""The kinds of site that the pass fuses, and the values that they grow from. A new kind or value gets a line here."""

from __future__ import annotations

from fusion_pass.kinds.gelu import GELU
from fusion_pass.kinds.gelu_quant import GeluQuant
from fusion_pass.kinds.kind import Entry, Registry
from fusion_pass.kinds.linear_gelu import LinearGelu
from fusion_pass.kinds.linear_silu_mul import LinearSiluMul
from fusion_pass.kinds.modulated_norm import (
    MulAddNormScale,
    MulAddNormScaleQuant,
    NormScale,
    NormScaleQuant,
    NormTanhMulAdd,
    NormTanhMulAddNormScale,
    NormTanhMulAddNormScaleQuant,
)
from fusion_pass.kinds.norm import NORM
from fusion_pass.kinds.norm_all_heads_rope import NormAllHeadsRope
from fusion_pass.kinds.norm_rope import NormRope
from fusion_pass.kinds.qk_norm_cat_rope import QKNormCatRope
from fusion_pass.kinds.qk_norm_part_rope import QKNormPartRope
from fusion_pass.kinds.qk_norm_rope import QKNormRope
from fusion_pass.kinds.quant import STORED_ROWS, Quant
from fusion_pass.kinds.residual_add import RESIDUAL_ADD
from fusion_pass.kinds.rotation import ROTATION
from fusion_pass.kinds.silu import SILU
from fusion_pass.kinds.silu_mul import SiluMul, SiluMulQuant
from fusion_pass.kinds.unread_rotation import UNREAD_ROTATION

REGISTRY = Registry(
    Entry(
        NORM,
        [
            NormAllHeadsRope(),
            QKNormCatRope(),
            QKNormPartRope(),
            QKNormRope(),
            NormRope(),
            NormTanhMulAddNormScaleQuant(),
            NormTanhMulAddNormScale(),
            MulAddNormScaleQuant(),
            MulAddNormScale(),
            NormScaleQuant(),
            NormTanhMulAdd(),
            NormScale(),
        ],
    ),
    Entry(SILU, [SiluMulQuant(), LinearSiluMul(), SiluMul()]),
    Entry(GELU, [GeluQuant(), LinearGelu()]),
    Entry(STORED_ROWS, [Quant()]),
    Entry(ROTATION),
    Entry(UNREAD_ROTATION),
    Entry(RESIDUAL_ADD),
)
