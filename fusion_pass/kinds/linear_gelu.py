"""out = gelu(linear(x)): a GELU inside the matmul that makes its operand."""

from __future__ import annotations

from fusion_pass.dataflow import dtype, is_narrowing, stored_casts
from fusion_pass.kinds import matmul
from fusion_pass.kinds.gelu import Gelu
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands


class LinearGelu(Kind[Gelu]):
    """out = gelu(x @ w + bias). Where it does not pay, the GELU is left to Inductor."""

    name = "linear_gelu"
    is_modulated = False

    def find(self, value: Gelu, survey: Survey) -> Site | None:
        """Finds the linear layer whose result only a gelu reads.

        The user's code, then its graph in bf16; kinds/gelu.py has the graph of gelu:

            F.gelu(self.proj(x), approximate="tanh")

            a = reshape(addmm(bias, reshape(x, [B * S, K]), permute(w, [1, 0])), [B, S, N]); z = convert(gelu(a), bf16)
        """
        z = stored_casts(value.out, is_narrowing)
        layer = matmul.behind(value.x)
        if layer is None:
            return None
        matmul.check(layer, self.name)
        x = matmul.tokens(layer, value.out)
        like = matmul.like(layer, x, value.out)
        if not matmul.is_written(z, viewed=like is not None):
            return None
        if value.by_hand:
            raise Refused(Reason.MATMUL, value.anchor, "a GELU that is not F.gelu reads its result", self.name)
        interior = (*matmul.inside(value.x, layer), *(node for node in value.interior if node not in z))
        matmul.check_closed(interior, z, self.name)
        operands: Operands = {"x": x, "w": layer.w, "bias": layer.bias}
        check_operands(operands, self.name)
        return Site(
            kind=self.name,
            operands=operands,
            options={"approximate": value.approximate, "out_dtype": dtype(z[0])},
            form=Form("model", {}),
            outputs=(Output(z),),
            interior=interior,
            anchor=value.out,
            like=like,
            origin=value.out,
        )
