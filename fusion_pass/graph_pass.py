"""FusionPass: the custom pass that Inductor calls on each post-grad graph.

The order of things: survey the graph, let Inductor's pattern matcher visit the anchors, prove the site that grows from
each, rewrite it, and report; in the end also the rotations of what is no norm. The rewrite of a graph is a transaction:
if anything raises, the graph is the one that came in, a warning says so once, and the model compiles without the pass.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    Ignored,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
    stable_topological_sort,
)
from torch._logging import trace_structured
from torch.fx import Graph, Node

import dit_kernels.ops
import fusion_pass.lowering  # noqa: F401  how Inductor calls what the pass inserts
from fusion_pass import eligibility, sites
from fusion_pass.dataflow import VIEWS, aten, dtype, is_call, known_equal, past_views
from fusion_pass.report import (
    BY_DESIGN,
    FusionReport,
    Reason,
    Refused,
    ReportedSite,
    module_path,
    source_line,
    symbolic_shape,
)
from fusion_pass.sites import qk_rope, rope, rotation, silu_mul
from fusion_pass.sites.site import Site, Survey, prove, rewrite

log = logging.getLogger("fusion_pass")

# The prefix of our keys in counters["inductor"], which Inductor stores with a compiled graph and adds again when it
# loads the graph from a cache: so a warm process knows what the loaded code holds, though the pass is not called.
COUNTER_PREFIX = "fusion_pass_"


class FusionPass(CustomGraphPass):
    """Rewrites every proven site of a graph into a call of its op. Arguments as those of fusion_pass.Backend.

    `collector`, where given, gets each graph's report; such a pass has no uuid, so nothing that it compiles is cached.
    """

    def __init__(
        self,
        rounding: str = "model",
        kernels: str = "auto",
        strict: bool = False,
        collector: FusionReport | None = None,
    ) -> None:
        self.rounding, self.kernels, self.strict = rounding, kernels, strict
        self.collector = collector
        self.calls = 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1
        report = FusionReport(graphs=1)
        saved = None
        try:
            saved = _copied(graph, Graph())
            _Rewriter(self, graph, report).run()
            graph.lint()
            _warn_if_nothing_fused(report, graph)
            self._publish(report)
        except Exception as error:
            if saved is not None:
                _restore(graph, saved)
            if self.strict:
                raise
            _warn_of(error)
            with suppress(Exception):  # what failed may be the report
                self._publish(FusionReport(graphs=1, missed=[_failure(error)]))

    def uuid(self) -> Any | None:
        """What the output of this pass depends on, beyond the graph: its sources, its options and the versions."""
        if self.collector is not None:
            return None
        try:
            return f"fusion_pass:{_fingerprint()}:{self.options()}"
        except Exception as error:  # sources that cannot be read: nothing is cached
            if self.strict:
                raise
            _warn_of(error)
            return None

    def options(self) -> tuple[str, str, bool]:
        return (self.rounding, self.kernels, self.strict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FusionPass) or self.collector is not None or other.collector is not None:
            return self is other
        return self.options() == other.options()

    def __hash__(self) -> int:
        return hash(self.options())

    def _publish(self, report: FusionReport) -> None:
        summary, details = report.summary(), report.to_json()
        if self.collector is not None:
            self.collector.merge(report)
        for site in report.fused:
            counters["fusion_pass"][site.kind] += 1
            counters["inductor"][COUNTER_PREFIX + site.kind] += 1
        counters["fusion_pass"]["graphs"] += 1
        counters["fusion_pass"]["missed"] += len(report.missed)
        log.info("graph: %s", summary)
        for site in report.fused:
            log.debug("fused %s: %s at %s", site.kind, site.module, site.source)
        for site in report.missed:
            log.debug("missed %s: %s at %s: %s", site.kind, site.module, site.source, site.reason)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": "fusion_pass_report", "encoding": "json"},
            payload_fn=lambda: details,
        )


_FAMILIES = {target: family for family in sites.FAMILIES for target in family.value.ANCHORS}


def _found(graph: Graph, targets: Iterable[Any]) -> Iterator[Node]:
    for target in targets:
        yield from graph.find_nodes(op="call_function", target=target)


def _read_sizes_at_their_source(graph: Graph) -> None:
    """A size that is read off a view was given to that view: read there, it is no reader of what a site may replace."""
    for size in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        view, dim = size.args
        source = view.args[1][dim] if is_call(view, aten.reshape.default, aten.view.default) else None
        if isinstance(source, Node) and known_equal(source.meta["val"], size.meta["val"]):
            size.replace_all_uses_with(source)
            graph.erase_node(size)


class _Rewriter:
    """One run of the pass over one graph."""

    def __init__(self, options: FusionPass, graph: Graph, report: FusionReport) -> None:
        self.options, self.graph, self.report = options, graph, report
        self.training = _is_training(graph)
        self.survey = Survey()
        self.proven: dict[Node, Site] = {}

    def run(self) -> None:
        _read_sizes_at_their_source(self.graph)
        for anchor in sorted(_found(self.graph, _FAMILIES)):
            self._look_at(anchor)
        matcher = PatternMatcherPass(pass_name="fusion_pass")
        for target in _FAMILIES:
            inputs = [Ignored() for argument in target._schema.arguments if not argument.kwarg_only]
            pattern = CallFunction(target, *inputs, _users=MULTIPLE)
            register_graph_pattern(pattern, extra_check=self._check, pass_dict=matcher)(self._rewrite)
        matcher.apply(self.graph)
        self.report.fused.reverse()  # the matcher visits a graph from its end
        self.report.missed.reverse()
        self._report_bare_rotations()

    def _look_at(self, anchor: Node) -> None:
        """Lets the kinds of site note what their sites must know of each other."""
        family = _FAMILIES[anchor.target]
        for kind in family.kinds:
            try:
                if hasattr(kind, "note") and (found := family.value.find(anchor)) is not None:
                    kind.note(found, self.survey)
            except Exception:  # a refusal or an error of ours: told when the anchor is looked at for itself
                continue

    def _check(self, match: Match) -> bool:
        """Is the anchor that of a site that can be fused? What cannot is reported."""
        anchor = match.output_node()
        try:
            site = self._find(anchor)
            if site is None:
                return False
            self.proven[anchor] = site
            return True
        except Refused as refusal:
            self.report.missed.append(_missed(anchor, refusal, _FAMILIES[anchor.target].value))
            if refusal.reason not in BY_DESIGN:
                if self.options.strict:
                    raise StrictError(self.report.missed[-1]) from refusal
                _warn_missed(refusal)
            return False
        except Exception as error:  # reading went wrong, and nothing is rewritten yet: the other sites need not suffer
            self._report_failure(error, anchor, _FAMILIES[anchor.target].value)
            return False

    def _find(self, anchor: Node) -> Site | None:
        """The site that is to be fused, or None where there is nothing of the kind. Raises Refused."""
        family = _FAMILIES[anchor.target]
        try:
            found = family.value.find(anchor)
            site = None if found is None else self._prove(found, family)
        except Refused:
            if self.training:
                raise Refused(Reason.TRAINING, anchor) from None
            raise
        if self.training and site is not None:
            raise Refused(Reason.TRAINING, anchor)
        return site

    def _prove(self, found: Any, family: sites.Family) -> Site | None:
        """The largest provable site around a value. Raises Refused with what stood in the way of the largest."""
        first_refusal = None
        for kind in family.kinds:
            site = None
            try:
                site = kind.find(found, self.survey)
                if site is None:
                    continue
                prove(site, self.graph, sums=self.options.kernels == "reference")
                if self.options.kernels == "auto":
                    eligibility.check(site, self.options.rounding)
                return site
            except Refused as refusal:
                refusal.site = site
                first_refusal = first_refusal or refusal
                if refusal.reason is Reason.NO_KERNEL:  # not for a smaller site to hide
                    break
        if first_refusal is not None:
            raise first_refusal
        if family.value.ALONE is not None:
            raise Refused(family.value.ALONE, next(iter(past_views(found.out)[-1].users), found.out))
        return None

    def _report_bare_rotations(self) -> None:
        """A rotation of a norm is told of with the norm; here are the others. The matcher skips complex numbers."""
        if self.training:  # where the backward turns gradients, too
            return
        for anchor in sorted(_found(self.graph, rotation.ANCHORS)):
            try:
                found = rotation.find(anchor)
                if found is not None and found.x not in self.survey.rotated:
                    self.report.missed.append(_missed(anchor, Refused(rotation.ALONE, anchor), rotation))
            except Exception as error:
                self._report_failure(error, anchor, rotation)

    def _report_failure(self, error: Exception, anchor: Node, value: ModuleType) -> None:
        if self.options.strict:
            raise error
        self.report.missed.append(_failure(error, anchor, value.NAME))
        _warn_of(error)

    def _rewrite(self, match: Match) -> None:
        anchor = match.output_node()
        site = self.proven.pop(anchor)
        self.report.fused.append(_fused(site, self.options.rounding))
        call = rewrite(site, self.graph, self.options.rounding)
        if reads_too_early(call):
            stable_topological_sort(self.graph)


_OF_RESULTS = (operator.getitem, aten.reshape.default, aten.permute.default)


def reads_too_early(call: Node) -> bool:
    """Does anything that reads a result stand before the call, because an operand of the call stands behind it?"""
    results = [call]
    for result in results:  # grows: the items of the call, and these in the shapes that the graph has them in
        results += [user for user in result.users if user.target in _OF_RESULTS]
    return any(reader < call for result in results for reader in result.users)


class StrictError(RuntimeError):
    """Raised under `strict=True`: a site that matched cannot be fused."""

    def __init__(self, site: ReportedSite) -> None:
        super().__init__(f"fusion_pass (strict): {site.kind} at {site.module} ({site.source}) not fused: {site.reason}")


# --- reporting --------------------------------------------------------------------------------------------------------


def _fused(site: Site, rounding: str) -> ReportedSite:
    return ReportedSite(
        kind=site.kind,
        gate=site.gate(),
        scale=site.scale(),
        module=module_path(site.anchor),
        source=source_line(site.results()[0]),
        shape=symbolic_shape(site.x),
        dtype=site.x.meta["val"].dtype,
        rounding="fp32" if rounding == "fp32" else site.options["rounding"],
    )


def _missed(anchor: Node, refusal: Refused, value: ModuleType) -> ReportedSite:
    x = value.measured(anchor)
    site: Site | None = refusal.site
    return ReportedSite(
        kind=refusal.kind or value.NAME,
        gate=None if site is None else site.gate(),
        scale=None if site is None else site.scale(),
        module=module_path(anchor),
        source=source_line(anchor),
        shape=symbolic_shape(x),
        dtype=dtype(x),
        rounding=None if site is None else site.options["rounding"],
        reason=refusal.text(),
        reason_name=refusal.reason.name,
    )


def _failure(error: Exception, anchor: Node | None = None, kind: str = "graph") -> ReportedSite:
    """An error of our own, for the anchor that it happened at, or for the whole graph."""
    module, source, shape = ("", "", ()) if anchor is None else (module_path(anchor), source_line(anchor), ())
    at = "" if anchor is None else f", at {anchor.name}"
    reason = f"{Reason.ERROR.value}: {type(error).__name__}: {error}{at}"
    return ReportedSite(kind, None, None, module, source, shape, None, None, reason, Reason.ERROR.name)


def _warn_of(error: Exception) -> None:
    _warn_once(f"fusion_pass: {Reason.ERROR.value}: {type(error).__name__}: {error}")
    log.debug("internal error", exc_info=error)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _warn_missed(refusal: Refused) -> None:
    """Once for each reason: a site that was recognised, and is not fused."""
    detail = f" ({refusal.detail})" if refusal.reason is Reason.NO_KERNEL else ""
    _warn_once(f"fusion_pass: a site was found and not fused: {refusal.reason.value}{detail}; see fusion_pass.explain")


def _has_gate(graph: Graph) -> bool:
    """Does anything multiply by a tanh, as these models gate? A GELU adds 1 to it first."""
    tanhs = graph.find_nodes(op="call_function", target=aten.tanh.default)
    return any(is_call(user, aten.mul.Tensor) for tanh in tanhs for user in _readers(tanh))


def _readers(node: Node) -> Iterator[Node]:
    """What reads a node, past views of it."""
    for user in node.users:
        if is_call(user, *VIEWS, aten.expand.default):
            yield from _readers(user)
        else:
            yield user


_WITHOUT_GATES = (rotation.NAME, rope.KIND, qk_rope.KIND, silu_mul.KIND)


def _warn_if_nothing_fused(report: FusionReport, graph: Graph) -> None:
    """Norms and gates, and no site: perhaps a spelling that the pass does not know, which must not stay unseen."""
    gated_or_scaled = [site.kind for site in report.fused if site.kind not in _WITHOUT_GATES]
    reasons = {site.reason_name for site in report.missed if site.kind not in _WITHOUT_GATES}
    by_design = reasons and reasons <= {reason.name for reason in BY_DESIGN}
    if not gated_or_scaled and by_design and _has_gate(graph):
        _warn_once("fusion_pass: a graph has norms and gates, and nothing of it was fused; see fusion_pass.explain")


# --- the transaction --------------------------------------------------------------------------------------------------


def _copied(graph: Graph, into: Graph) -> Graph:
    """Copies every node of `graph`, with its metadata, into an empty graph."""
    node = into.output(into.graph_copy(graph, {}))
    node.meta = dict(graph.output_node().meta)
    return into


def _restore(graph: Graph, saved: Graph) -> None:
    """Makes `graph`, the object that Inductor holds, what `saved` is."""
    for node in list(graph.nodes):
        node.args, node.kwargs = (), {}
    for node in list(graph.nodes):
        graph.erase_node(node)
    _copied(saved, graph)


def _is_training(graph: Graph) -> bool:
    """AOTAutograd names what a training graph takes `primals` and, in the backward, `tangents`."""
    return any(str(node.target).startswith(("primals", "tangents")) for node in graph.find_nodes(op="placeholder"))


# --- the uuid ---------------------------------------------------------------------------------------------------------


@cache
def _fingerprint() -> str:
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(dit_kernels.ops.__file__).parent):
        for source in sorted(package.rglob("*.py")):
            digest.update(source.relative_to(package).as_posix().encode())
            digest.update(source.read_bytes())
    for name in ("torch", "nvidia-cutlass-dsl"):
        digest.update(f"{name}={_version(name)};".encode())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
