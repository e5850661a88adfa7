"""The kinds of site that are stages of a norm: one stage with a term, one without, and one that reads the other."""

from __future__ import annotations

from torch.fx import Node

from dit_kernels.chain import GATED, SCALED, SECOND, UNNORMED, StageNames
from dit_kernels.families import OPS
from fusion_pass.dataflow import have_same_shape, keeps_sums, value
from fusion_pass.kinds import gain, quantiser, stage
from fusion_pass.kinds.kind import Kind, Survey
from fusion_pass.kinds.norm import NORM, Norm, eps_operand
from fusion_pass.kinds.stage import StageInGraph
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import MODEL_FORMS, Form, Operands, Output, Site, check_operands

FEW_ROWS = 8  # a batch of embeddings, without tokens


class NormTanhMulAdd(Kind[Norm]):
    """y = residual + tanh(gate) * norm(x); without a gate y = residual + norm(x)."""

    name = stage.ADDED
    is_modulated = True

    def note(self, value: Norm, survey: Survey) -> None:
        """Notes y and the anchor of its norm, so that the norm that reads y can find the site."""
        upper = stage.grow(value)
        if upper is not None and upper.has_residual:
            notes = survey.notes(self.name)
            if upper.factor is not None or upper.out[0] not in notes:
                notes[upper.out[0]] = value.anchor

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the residual add of a norm.

        The user's code, then its graph in bf16:

            x = x + gate_msa.tanh() * self.attention_norm2(attn_out)

            t = tanh(gate); n = mul(convert(mul(a, rsqrt)), w); p = mul(t, n); y = add(x, p)
        """
        upper = stage.grow(value)
        if upper is None or not upper.has_residual:
            return None
        # If two norms are added, one is the residual of the other. If one of them is gated, the site is that one's.
        if upper.factor is None and survey.notes(self.name).get(upper.out[0], value.anchor) is not value.anchor:
            return None
        return _site(self.name, [(upper, GATED)])


class NormScale(Kind[Norm]):
    """z = norm(x) * (1 + scale) + shift. The shift may be absent."""

    name = stage.SCALED
    is_modulated = True

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the product of a norm with a scale, or its sum with a shift.

        The user's code, then its graph in bf16:

            h = self.norm_final(x) * (1 + scale)

            n = mul(convert(mul(x, rsqrt)), w); s = add(scale, 1); z = mul(n, s)

            h = self.norm1(x) * (1 + scale) + shift

            n = convert(mul(sub(c, mean), rsqrt)); s = add(scale, 1); m = mul(n, s); z = add(m, shift)
        """
        quantises = OPS[self.name].quantises
        lower = stage.grow(value, quantises)
        if lower is None or lower.has_residual:
            return None
        if lower.term is not None and not quantises and gain.is_computed_with_the_norm(lower.x):
            raise Refused(Reason.INLINE, lower.out[0], gain.INLINE, self.name)
        return _site(self.name, [(lower, SCALED)])


class NormScaleQuant(NormScale):
    """The same z, of which only q and s are stored. kinds/quantiser.py has the code of the user."""

    name = "norm_scale_quant"


class NormTanhMulAddNormScale(Kind[Norm]):
    """y = residual + tanh(gate) * norm(x) and z = norm(y) * (1 + scale) + shift.

    Gate, scale and shift may be absent.
    """

    name = "norm_tanh_mul_add_norm_scale"
    is_modulated = True

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the site whose second norm this is.

        The user's code, then its graph in bf16:

            x = x + gate_msa.tanh() * self.attention_norm2(attn_out)
            f = self.feed_forward(self.ffn_norm1(x) * scale_mlp)

            p = mul(t, n); y = add(x, p); c = convert(y, f32); ...; m = mul(convert(mul(y, rsqrt)), w2); z = mul(m, s)
        """
        y = value.x
        while keeps_sums(y):
            y = y.args[0]
        anchor = survey.notes(NormTanhMulAdd.name).get(y)
        first = None if anchor is None or anchor._erased else NORM.find(anchor)
        upper = None if first is None else stage.grow(first)
        if first is None or upper is None or not upper.has_residual or upper.out[0] is not y:
            return None
        lower = _second(value, OPS[self.name].quantises)
        if lower is None:
            return None
        if (first.kind, first.steps.root) != (value.kind, value.steps.root):
            raise Refused(Reason.KINDS, value.anchor, kind=self.name)
        if isinstance(eps_operand(first.eps), float) != isinstance(eps_operand(value.eps), float):
            raise Refused(Reason.EPS, value.anchor, "one eps is a constant, the other a tensor", self.name)
        return _site(self.name, [(upper, GATED), (lower, SECOND)])


class NormTanhMulAddNormScaleQuant(NormTanhMulAddNormScale):
    """The same y, and z, of which only q and s are stored. kinds/quantiser.py has the code of the user."""

    name = "norm_tanh_mul_add_norm_scale_quant"


class MulAddNormScale(Kind[Norm]):
    """y = residual + gate * x and z = norm(y) * (1 + scale) + shift. Gate, scale and shift may be absent."""

    name = stage.MUL_ADDED
    is_modulated = True

    def find(self, value: Norm, survey: Survey) -> Site | None:
        """Finds the site whose norm this is, from the norm backwards to the add that it reads.

        The user's code, then its graph in bf16:

            x = x + gate_msa * attn_output
            h = self.norm2(x) * (1 + scale_mlp) + shift_mlp

            p = mul(gate, a); y = add(x, p); c = convert(y, f32); ...; n = convert(mul(sub(c, mean), rsqrt));
            s = add(scale, 1); m = mul(n, s); z = add(m, shift)
        """
        upper = stage.before(value)
        if upper is None or upper.out[0] in survey.notes(NormTanhMulAdd.name):  # the add belongs to another norm
            return None
        if gain.is_computed_by_the_reader(upper.rows):
            return None
        lower = _second(value, OPS[self.name].quantises)
        if lower is None or not _have_one_shape([upper, lower]):  # the norm may be a site without the add
            return None
        return _site(self.name, [(upper, UNNORMED), (lower, SCALED)])


class MulAddNormScaleQuant(MulAddNormScale):
    """The same y, and z, of which only q and s are stored. kinds/quantiser.py has the code of the user."""

    name = "mul_add_norm_scale_quant"


def _second(norm: Norm, quantises: bool) -> StageInGraph | None:
    """The stage of a norm behind another stage: without a residual, or the norm alone. Raises Refused."""
    lower = stage.grow(norm, quantises)
    return stage.bare(norm, quantises) if lower is None or lower.has_residual else lower


def _site(kind: str, stages: list[tuple[StageInGraph, StageNames]]) -> Site:
    """The site of one stage, or of two stages in sequence. Raises Refused if their operands or casts do not fit the
    op."""
    x, norms = stages[0][0].x, [part.norm for part, _ in stages if part.norm is not None]
    if _has_no_tokens(x):
        raise Refused(Reason.INLINE, norms[0].anchor, "the norm has few rows", kind)
    operands: Operands = {"x": x}
    options: dict[str, object] = {"norm": norms[-1].kind, "root": norms[-1].steps.root}
    for part, names in stages:
        operands |= {names.factor: part.factor, names.term: part.term}
        if part.norm is not None:
            operands |= {names.weight: part.norm.weight, names.bias: part.norm.bias}
            operands |= {names.eps: eps_operand(part.norm.eps)}
        options |= {names.switch: part.factor is not None and part.factor.activation is not None}
        options |= {names.out_dtype: part.steps.out}
    check_operands(operands, kind)
    found = quantiser.behind(stages[-1][0].out, kind) if OPS[kind].quantises else None
    *stored, z = (part.out for part, _ in stages)
    return Site(
        kind=kind,
        overload="" if found is None else found.overload,
        operands=operands if found is None else operands | found.operands(),
        options=options if found is None else options | found.options(),
        form=_form(kind, stages),
        outputs=tuple(map(Output, (*stored, *((z,) if found is None else found.results(z))))),
        interior=(
            *(node for part, _ in stages for node in part.interior),
            *(() if found is None else found.inside(z)),
        ),
        anchor=norms[0].anchor,
        like=_like(kind, [part for part, _ in stages]),
        # F.layer_norm sums a contiguous copy, as the op does.
        summed=("x",) if stages[0][0].norm is not None and norms[0].kind == "rms" else (),
        takes_any_layout=True,
        remark=max(norm.remark for norm in norms),
        origin=stages[0][0].out[0],
    )


def _has_no_tokens(x: Node) -> bool:
    """Is x [B, D] with a few rows, as an embedding of the time or of the whole prompt is?

    A launch takes longer than the work on a few rows, which Inductor adds to a kernel that runs anyway.
    """
    val = value(x)
    return val is not None and val.ndim == 2 and type(val.shape[0]) is int and val.shape[0] <= FEW_ROWS


def _form(kind: str, stages: list[tuple[StageInGraph, StageNames]]) -> Form:
    """The first form whose steps are those of every stage. Raises Refused if there is none."""
    for form in MODEL_FORMS:
        fitting = {names.norm_dtype: part.norm_dtypes(form) for part, names in stages}
        if all(fitting.values()):
            return Form(form, {option: dtypes[0] for option, dtypes in fitting.items() if option})
    raise Refused(Reason.ROUNDING, stages[-1][0].out[0], kind=kind)


def _like(kind: str, stages: list[StageInGraph]) -> Node:
    """The node to whose shape all factors and shifts broadcast. A stage without them takes any shape."""
    if not _have_one_shape(stages):
        raise Refused(Reason.SHAPE, stages[-1].like, "the gate and the scale are applied in different shapes", kind)
    return next((part for part in stages if part.is_modulated), stages[0]).like


def _have_one_shape(stages: list[StageInGraph]) -> bool:
    """Do the factors and shifts of all stages broadcast to one shape?"""
    shaped = [part.like for part in stages if part.is_modulated]
    return all(have_same_shape(shaped[0], like) for like in shaped[1:])
