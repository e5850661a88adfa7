"""Norms of heads that are not fused with a rotation: rotations of a part, norms without a rotation. Each has one row in
the report, which names the obstacle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_modules import half_rope, neighbours_rope
from graph_backend import GraphBackend, run
from site_modules import diffusers_norm
from test_adaln_models import cogvideox, cogview4, sd3
from test_models import Arguments
from test_models import run as run_model
from torch import Tensor, nn

BF16 = torch.bfloat16
B, S, H, D, TEXT = 2, 6, 3, 16, 2


def attend(q: Tensor) -> Tensor:
    q = q.transpose(1, 2)
    return q @ q.mT


def written_into_a_slice(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """CogVideoX and CogView4."""
    n[:, TEXT:] = neighbours_rope(n[:, TEXT:], cos[:, TEXT:], sin[:, TEXT:])
    return n


def joined_with_the_rest(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """HunyuanVideo's single blocks."""
    text, image = n.split((TEXT, S - TEXT), 1)
    return torch.cat((text, neighbours_rope(image, cos[:, TEXT:], sin[:, TEXT:])), 1)


def some_heads(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((neighbours_rope(n[:, :, :2], cos, sin), n[:, :, 2:]), 2)


def a_part_of_each_head(n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((half_rope(n[..., :8], cos[..., :8], sin[..., :8]), n[..., 8:]), -1)


SOME = "only some tokens or heads are rotated"
PARTS = {
    written_into_a_slice: ("qk_norm_part_rope", "ALONE", "q and k have no rotation in common"),
    joined_with_the_rest: ("norm_rope", "HEADS", SOME),
    some_heads: ("norm_rope", "HEADS", SOME),
    a_part_of_each_head: ("norm_rope", "HEADS", "only a part of each head is rotated"),
}


@pytest.mark.parametrize(
    ("rotate", "layer_norm"),
    [*((rotate, False) for rotate in PARTS), (written_into_a_slice, True), (a_part_of_each_head, True)],
)
def test_a_rotation_of_a_part_has_one_row_that_says_so(rotate: Callable[..., Tensor], layer_norm: bool) -> None:
    torch.manual_seed(0)
    args = (torch.randn(B, S, H, D).to(BF16), *torch.randn(2, 1, S, 1, D))

    def model(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = F.layer_norm(x, (D,)) if layer_norm else diffusers_norm(x, None)
        return attend(rotate(n, cos, sin))

    got, backend = run(model, *args, strict=True)
    assert torch.equal(got, run(model, *args, fuse=False)[0])
    assert not backend.report.fused
    (row,) = backend.report.missed
    kind, name, detail = PARTS[rotate]
    assert (row.kind, row.reason_name, row.shape) == (kind, name, (B, S, H, D))
    assert f"({detail}" in (row.reason or "")


def test_a_bias_is_named() -> None:
    def model(x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        return attend(neighbours_rope(diffusers_norm(x, bias) + bias, cos, sin))

    args = (torch.randn(B, S, H, D).to(BF16), *torch.randn(2, 1, S, 1, D), torch.randn(D).to(BF16))
    got, backend = run(model, *args, strict=True)
    assert torch.equal(got, model(*args))
    (row,) = backend.report.missed
    assert "(the norm has a bias)" in (row.reason or "")


# --- models -----------------------------------------------------------------------------------------------------------


def rotated_cogvideox(layers: int = 1) -> tuple[nn.Module, Arguments]:
    model, arguments = cogvideox(layers, use_rotary_positional_embeddings=True)
    return model, arguments | {"image_rotary_emb": tuple(torch.randn(2, 32, 16))}


def rows_of_heads(model: nn.Module, arguments: Arguments) -> Counter[tuple[str, str, str]]:
    """How often each (kind, reason, detail) is the row of a norm of heads, or of a rotation, in the first block."""
    expected, backend = run_model(model, arguments), GraphBackend()
    model.transformer_blocks[0].compile(backend=backend, fullgraph=True)
    assert torch.equal(run_model(model, arguments), expected)
    rows = [s for s in backend.report.missed if "attn" in s.module or s.kind == "rope" or s.kind.endswith("_rope")]
    return Counter((row.kind, str(row.reason_name), _detail(row)) for row in rows)


def _detail(row: Any) -> str:
    return row.reason.partition(" (")[2].partition(")")[0] if " (" in row.reason else ""


@pytest.mark.parametrize("make", (rotated_cogvideox, lambda: cogview4(1)), ids=("CogVideoX", "CogView4"))
def test_a_layer_norm_of_each_head_whose_last_tokens_are_rotated_is_no_row(make: Callable[[], Any]) -> None:
    assert rows_of_heads(*make()) == {}


def test_heads_without_a_rotation_are_named() -> None:
    """q and k of image and text, and q and k of a second attention, of the image alone."""
    assert rows_of_heads(*sd3(1)) == {("norm", "ALONE", ""): 6}
