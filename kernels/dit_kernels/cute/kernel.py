"""The base class of a family's kernels: launches a kernel with its arguments bundled by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import cutlass.cute as cute
from cutlass import Int32

from dit_kernels.arguments import Argument
from dit_kernels.cute.spec import TensorSpec


class Kernel:
    """One kernel of a family: a chain for one D and one layout of its arguments. A subclass defines `launch`.

    arguments: the family's, in order.
    """

    of_launch: tuple[Any, ...] = ()  # the CuTe types of the numbers from Family.of_launch

    def __init__(
        self,
        arguments: Sequence[Argument],
        chain: Any,
        d: int,
        specs: Mapping[str, TensorSpec | None],
        tiling: Any,
    ):
        self.arguments, self.chain, self.d, self.specs, self.tiling = arguments, chain, d, specs, tiling

    @cute.jit
    def __call__(self, *given):
        """given: the family's arguments as pointers, numbers or None; the numbers from Family.launch_numbers and
        Family.of_launch; the stream."""
        self.split(iter(given))

    def split(self, given: Iterator[Any]) -> None:
        operands = {argument.name: next(given) for argument in self.arguments}
        batches, tokens = next(given), next(given)
        strides = {a.name: tuple(islice(given, a.numbers)) for a in self.arguments if a.numbers}
        *of_launch, stream = given
        self.launch(operands, batches, tokens, strides, of_launch, stream)

    def launch(
        self, operands: dict[str, Any], batches: Int32, tokens: Int32, strides: dict[str, Any], of_launch, stream
    ) -> None:
        """Launches the kernel. operands: by name, None if absent; strides: by name, the numbers of each argument
        that has any, see Layout.launch_numbers."""
        raise NotImplementedError
