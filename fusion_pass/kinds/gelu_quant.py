"""q, s = quantised(gelu(a)), or quantised([before, gelu(a)]) of a joined row."""

from __future__ import annotations

from fusion_pass.dataflow import dtype, is_narrowing, stored_casts
from fusion_pass.kinds import quantiser
from fusion_pass.kinds.gelu import Gelu
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands


class GeluQuant(Kind[Gelu]):
    """q, s = quantised(gelu(a)). A GELU without a quantiser is left to Inductor."""

    name = "gelu_quant"
    is_modulated = False

    def find(self, value: Gelu, survey: Survey) -> Site | None:
        """Finds the quantisers that read a gelu, or a row that is joined from another tensor and a gelu.

        The user's code; kinds/gelu.py and kinds/quantiser.py have the graphs of gelu and of a quantiser:

            self.linear(torch.cat([attention, F.gelu(self.proj_mlp(x), approximate="tanh")], dim=2))

            z = convert(gelu, bf16); r = cat([attention, z], 2); a = amax(abs(r), [-1], True); ...
        """
        z = stored_casts(value.out, is_narrowing)
        row = quantiser.row_with(z, self.name)
        if row is None:
            return None
        if value.by_hand:
            raise Refused(Reason.QUANTISER, value.anchor, "a GELU that is not F.gelu is before it", self.name)
        for node in value.interior[:-1]:
            if not set(node.users) <= set(value.interior):
                raise Refused(Reason.QUANTISER, node, "something else reads a value inside the GELU", self.name)
        operands: Operands = {"a": value.x}
        check_operands(operands | {"before": row.before}, self.name)
        found = row.quantisers(self.name)
        return Site(
            kind=self.name,
            overload=found.overload,
            operands=operands | row.operands(found),
            options={"approximate": value.approximate, "out_dtype": dtype(z[0]), **found.options()},
            form=Form("model", {}),
            outputs=tuple(map(Output, found.results(z))),
            interior=(*(node for node in value.interior if node not in z), *row.inside(found)),
            anchor=value.out,
            like=value.out,
            origin=value.out,
        )
