"""out = silu(linear(x)) * linear(x) (SwiGLU), inside the matmuls that make both operands."""

from __future__ import annotations

from torch.fx import Node

from fusion_pass.dataflow import computed_alike, stored_casts
from fusion_pass.kinds import matmul
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.matmul import Matmul
from fusion_pass.kinds.silu import Silu
from fusion_pass.kinds.silu_mul import Gated, gated, product_of
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands


class LinearSiluMul(Kind[Silu]):
    """out = silu(x @ w_gate + bias_gate) * (x @ w_up + bias_up)."""

    name = "linear_silu_mul"
    is_modulated = False

    def find(self, value: Silu, survey: Survey) -> Site | None:
        """Finds the linear layers whose results only a SwiGLU reads: two layers, or the parts of one.

        The user's code, then its graph in bf16; kinds/silu_mul.py has the graph of the SwiGLU:

            F.silu(self.w1(x)) * self.w3(x)

            r = reshape(x, [B * S, K])
            a = reshape(mm(r, permute(w1, [1, 0])), [B, S, N]); b = reshape(mm(r, permute(w3, [1, 0])), [B, S, N])
            mul(silu(a), b)

            gate, up = self.proj(x).chunk(2, dim=-1); F.silu(gate) * up

            p = split(reshape(mm(r, permute(w, [1, 0])), [B, S, 2 * N]), N, -1)
            mul(silu(getitem(p, 0)), getitem(p, 1))
        """
        product = product_of(value)
        gate = None if product is None else matmul.behind(value.x)
        if product is None or gate is None:
            return None
        try:
            found = gated(value, product, stored_casts(product), self.name)
        except Refused:  # silu_mul gives the same reason
            return None
        up = matmul.behind(found.b)
        return None if up is None else self._site(product, found, gate, up)

    def _site(self, product: Node, found: Gated, gate: Matmul, up: Matmul) -> Site | None:
        for layer in (gate, up):
            matmul.check(layer, self.name)
        x = matmul.tokens(gate, product)
        like = matmul.like(gate, x, product)
        if not matmul.is_written(found.out, viewed=like is not None):
            return None
        self._check_pair(product, gate, up)
        layers = (*matmul.inside(found.a, gate), *matmul.inside(found.b, up))
        interior = tuple(dict.fromkeys((*layers, *found.inside)))
        matmul.check_closed(interior, found.out, self.name)
        biases: Operands = {"bias_gate": gate.bias, "bias_up": up.bias}
        operands: Operands = {"x": x, "w_gate": gate.w, "w_up": up.w, **biases}
        check_operands(operands, self.name)
        return Site(
            kind=self.name,
            operands=operands,
            options=found.options(),
            form=Form("model", {}),
            outputs=(Output(found.out),),
            interior=interior,
            anchor=product,
            like=like,
            origin=product,
        )

    def _check_pair(self, product: Node, gate: Matmul, up: Matmul) -> None:
        """Raises Refused unless gate and up are two linear layers of one value."""
        if not computed_alike(matmul.tokens(gate, product), matmul.tokens(up, product)):
            raise Refused(Reason.MATMUL, product, "the layers of gate and up read different values", self.name)
        if (gate.node, gate.columns) == (up.node, up.columns):
            raise Refused(Reason.MATMUL, product, "gate and up are one value", self.name)
