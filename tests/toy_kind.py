"""A kind of site in one file: relu(a) * b. See CONTRIBUTING.md; test_structure.py registers it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from fusion_pass.dataflow import aten, have_same_shape, is_call, other_operands, sole_user
from fusion_pass.kinds.kind import Kind, Survey, Value
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands


@dataclass(frozen=True)
class Relu:
    """out = relu(x)."""

    x: Node
    out: Node


class ReluValue(Value[Relu]):
    """relu(x), which is one node."""

    name = "relu"
    anchors = (aten.relu.default,)
    is_modulated = False
    unfused = None

    def find(self, anchor: Node) -> Relu | None:
        return Relu(anchor.args[0], anchor)

    def measured(self, anchor: Node) -> Node:
        return anchor


class ReluMulKind(Kind[Relu]):
    """out = relu(a) * b."""

    name = "relu_mul"
    is_modulated = False

    def find(self, value: Relu, survey: Survey) -> Site | None:
        """Finds the product of a relu and a tensor of its shape.

        The user's code, then its graph:

            a.relu() * b

            r = relu(a); mul(r, b)
        """
        product = sole_user(value.out)
        if product is None or not is_call(product, aten.mul.Tensor):
            return None
        b = next(other_operands(product, value.out))
        if b is value.out or not have_same_shape(value.out, b):
            raise Refused(Reason.SHAPE, product, kind=self.name)
        operands: Operands = {"a": value.x, "b": b, "bias": None}
        check_operands(operands, self.name)
        return Site(
            kind=self.name,
            operands=operands,
            options={"out_dtype": product.meta["val"].dtype},
            form=Form("model", {}),
            outputs=(Output((product,)),),
            interior=(value.out,),
            anchor=value.out,
        )


RELU = ReluValue()
