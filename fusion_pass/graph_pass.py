"""FusionPass: the custom pass that Inductor calls on each post-grad graph.

The steps: survey the graph; let Inductor's pattern matcher visit the anchors; find, prove and rewrite the site of each
anchor; report these sites, and then the values that no kind fuses. An error in finding a site costs this site. The
rewrite of a graph is a transaction: if the rewrite raises, the graph is restored, one warning says so, and the model
compiles without the pass.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import operator
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters
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
import fusion_pass.lowering  # noqa: F401  registers how Inductor calls the ops
from dit_kernels import tuning
from dit_kernels.arguments import MATRIX
from dit_kernels.families import OPS
from dit_kernels.families.family import Op
from dit_kernels.versions import generator_versions, hash_of_sources
from dit_kernels.warn import warn_once
from fusion_pass import eligibility
from fusion_pass.dataflow import aten, dtype, module_path, past_views, source_line, symbolic_shape
from fusion_pass.hook import OurPass
from fusion_pass.kinds import REGISTRY
from fusion_pass.kinds.kind import Entry, Survey, Value
from fusion_pass.prepare import drop_what_computes_nothing, merge_equal_quantisers, read_sizes_at_their_source
from fusion_pass.proof import prove
from fusion_pass.refusal import BY_DESIGN, Reason, Refused
from fusion_pass.report import FusionReport, ReportedSite, columns
from fusion_pass.rewrite import rewrite
from fusion_pass.site import Site

log = logging.getLogger("fusion_pass")

# The prefix of our keys in counters["inductor"]. Inductor stores these counts with a compiled graph and adds them again
# when it loads the graph from a cache. So the fused ops of the loaded code are known, though the pass is not called.
COUNTER_PREFIX = "fusion_pass_"
_PACKAGES = (Path(__file__).parent, Path(dit_kernels.ops.__file__).parent)


def counted() -> dict[str, int]:
    """How many ops of each kind the graphs hold that this process has compiled or loaded from a cache."""
    ours = ((key, count) for key, count in counters["inductor"].items() if key.startswith(COUNTER_PREFIX))
    return {key.removeprefix(COUNTER_PREFIX): count for key, count in ours}


def report_cached(before: dict[str, int]) -> None:
    """Adds the counts, and logs the INFO line, of graphs that a cache gave since `counted()` returned `before`."""
    loaded = {kind: count - before.get(kind, 0) for kind, count in counted().items() if count > before.get(kind, 0)}
    counters["fusion_pass"].update(loaded)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(loaded.items()))
    log.info("graph from a warm cache: fused ops in it: %d%s", sum(loaded.values()), f" ({kinds})" if kinds else "")


class _Watch:
    """Reports graphs that the stock backend loads from a cache. Inductor asks the pass for its uuid in either case, and
    calls the pass only if there is no cached graph."""

    def __init__(self) -> None:
        self.started: tuple[FusionPass, int, dict[str, int]] | None = None

    def start(self, fusion_pass: FusionPass) -> None:
        """Remembers the counts at the first uuid of a compilation."""
        if self.end not in callback_handler.end_callbacks:  # torch._dynamo.reset() drops them
            callback_handler.register_end_callback(self.end)
        if self.started is None:
            self.started = fusion_pass, fusion_pass.calls, counted()

    def end(self, *_: Any) -> None:
        """Called by Dynamo at the end of a compilation."""
        started, self.started = self.started, None
        if started is not None and started[0].calls == started[1]:
            report_cached(started[2])


_WATCH = _Watch()


class FusionPass(OurPass):
    """Rewrites every proven site of a graph into a call of its op. The arguments are those of fusion_pass.Backend.

    policy: the `rounding` that the user asked for, "model" or "fp32". It is not the rounding form, which each site has.
    collector: a report to which the report of each graph is added. A pass with a collector has no uuid, so nothing that
    it compiles is cached.
    """

    def __init__(
        self,
        policy: str = "model",
        kernels: str = "auto",
        strict: bool = False,
        collector: FusionReport | None = None,
    ) -> None:
        self.policy, self.kernels, self.strict = policy, kernels, strict
        self.collector = collector
        self.calls = 0
        self.watches_caches = False  # on the stock backend, which does not say when it has loaded a graph from a cache

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
            with suppress(Exception):  # the report itself may be what failed
                self._publish(FusionReport(graphs=1, missed=[_failure(error)]))

    def uuid(self) -> Any | None:
        """Everything that the output of this pass depends on, except the graph: its sources, its options, the versions,
        and what could not be measured. A measured choice is kept on disk, and a cached graph holds it."""
        if self.collector is not None:
            return None
        if self.watches_caches:
            _WATCH.start(self)
        try:
            return f"fusion_pass:{_fingerprint()}:{_registered()}:{self.options()}:{tuning.not_measured()}"
        except Exception as error:  # the sources cannot be read: nothing is cached
            if self.strict:
                raise
            _warn_of(error)
            return None

    def options(self) -> tuple[str, str, bool]:
        return (self.policy, self.kernels, self.strict)

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


def _found(graph: Graph, targets: Iterable[Any]) -> Iterator[Node]:
    for target in targets:
        yield from graph.find_nodes(op="call_function", target=target)


class _Rewriter:
    """One run of the pass over one graph."""

    def __init__(self, options: FusionPass, graph: Graph, report: FusionReport) -> None:
        self.options, self.graph, self.report = options, graph, report
        self.training = _is_training(graph)
        self.entries = REGISTRY.by_anchor()
        self.survey = Survey()
        self.proven: dict[Node, Site] = {}

    def run(self) -> None:
        drop_what_computes_nothing(self.graph)
        read_sizes_at_their_source(self.graph)
        if not self.training:
            merge_equal_quantisers(self.graph)
        for anchor in sorted(_found(self.graph, self.entries)):
            self._note(anchor)
        unfused = list(self._unfused())  # found before the rewrite, which replaces the norms that they are found by
        matcher = PatternMatcherPass(pass_name="fusion_pass")
        for target in self.entries:
            inputs = [Ignored() for argument in target._schema.arguments if not argument.kwarg_only]
            pattern = CallFunction(target, *inputs, _users=MULTIPLE)
            register_graph_pattern(pattern, extra_check=self._check, pass_dict=matcher)(self._rewrite)
        matcher.apply(self.graph)
        self.report.fused.reverse()  # the matcher visits a graph from its end
        self.report.missed.reverse()
        self.report.missed += [
            row for anchor, row in unfused if not anchor._erased
        ]  # the others became a part of a site

    def _note(self, anchor: Node) -> None:
        """Lets each kind note what its sites must know about each other."""
        entry = self.entries[anchor.target]
        with suppress(Exception):  # a refusal or an internal error, which _check reports
            found = entry.value.find(anchor)
            for kind in entry.kinds if found is not None else ():
                with suppress(Exception):
                    kind.note(found, self.survey)

    def _check(self, match: Match) -> bool:
        """Does the anchor belong to a site that can be fused? A site that cannot is reported."""
        anchor = match.output_node()
        entry = self.entries[anchor.target]
        try:
            site = self._find(anchor, entry)
            if site is None:
                return False
            self.proven[anchor] = site
            return True
        except Refused as refusal:
            self.report.missed.append(_missed(anchor, refusal, entry.value))
            if refusal.reason not in BY_DESIGN:
                if self.options.strict:
                    raise StrictError(self.report.missed[-1]) from refusal
                _warn_missed(refusal)
            return False
        except Exception as error:  # the graph is not changed yet: the other sites can still be fused
            self.report.missed.append(self._failed(error, anchor, entry.value))
            return False

    def _find(self, anchor: Node, entry: Entry) -> Site | None:
        """The site to fuse, or None if there is none. Raises Refused."""
        try:
            found = entry.value.find(anchor)
            site = None if found is None else self._prove(found, entry)
        except Refused:
            if self.training:
                raise Refused(Reason.TRAINING, anchor) from None
            raise
        if self.training and site is not None:
            raise Refused(Reason.TRAINING, anchor)
        return site

    def _prove(self, found: Any, entry: Entry) -> Site | None:
        """The largest provable site around a value. If there is none, raises Refused with the reason for the largest
        site.

        A matmul that cannot be a part of its site is only a remark on the smaller site that is fused instead. A matmul
        that could be, and does not pay, is a reason.
        """
        first_refusal, remark = None, ""
        for kind in entry.kinds:
            site, proven = None, False
            try:
                site = kind.find(found, self.survey)
                if site is None:
                    continue
                prove(site, self.graph, sums=self.options.kernels == "reference")
                proven = True
                chosen = site.under(self.options.policy)
                if self.options.kernels == "auto":
                    chosen = eligibility.prepared(chosen)
                return replace(chosen, remark=chosen.remark or remark)
            except Refused as refusal:
                refusal.site = site
                op = OPS[kind.name]
                if refusal.reason is Reason.UNFIT and (op.quantises or has_matrix(op)):
                    continue  # the report is that of the site without the quantiser or the matmul
                if first_refusal is None:
                    remark = remark or _remark(refusal, op)
                if has_matrix(op) and not proven:
                    continue
                first_refusal = first_refusal or refusal
                if refusal.reason is Reason.NO_KERNEL:  # a smaller site must not hide this reason
                    break
        if first_refusal is not None:
            raise first_refusal
        if entry.value.unfused is not None:
            raise Refused(entry.value.unfused, next(iter(past_views(found.out)[-1].users), found.out))
        return None

    def _unfused(self) -> Iterator[tuple[Node, ReportedSite]]:
        """Yields the anchor and a row for each value that no kind fuses by itself. Finds them without the pattern
        matcher, which skips complex numbers."""
        for value in REGISTRY.only_reported() if not self.training else ():  # a backward computes such values, too
            for anchor in sorted(_found(self.graph, value.anchors)):
                try:
                    found = value.find(anchor)
                    if found is not None and value.unfused and not value.is_reported_elsewhere(found, self.survey):
                        yield anchor, _missed(anchor, Refused(value.unfused, anchor), value)
                except Exception as error:
                    yield anchor, self._failed(error, anchor, value)

    def _failed(self, error: Exception, anchor: Node, value: Value[Any]) -> ReportedSite:
        """Warns of an internal error and returns its row of the report. Under strict, raises the error."""
        if self.options.strict:
            raise error
        _warn_of(error)
        return _failure(error, anchor, value.name)

    def _rewrite(self, match: Match) -> None:
        site = self.proven.pop(match.output_node())
        self.report.fused.append(_fused(site))
        if reads_too_early(rewrite(site, self.graph)):
            stable_topological_sort(self.graph)


def has_matrix(op: Op) -> bool:
    """Does an op compute a matmul, too?"""
    return any(argument.role is MATRIX for argument in op.inputs)


def _remark(refusal: Refused, op: Op) -> str:
    """What the report says about a smaller site that is fused in place of a refused one; "" if nothing."""
    if refusal.reason in (Reason.QUANTISER, Reason.MATMUL):
        return refusal.why()
    return Refused(Reason.MATMUL, detail=refusal.reason.value).why() if has_matrix(op) else ""


_OF_RESULTS = (operator.getitem, aten.reshape.default, aten.permute.default)


def reads_too_early(call: Node) -> bool:
    """Is a reader of a result before the call, because an operand of the call is after the reader?"""
    results = [call]
    for result in results:  # the list grows: the getitems of the call, and views of the results
        results += [user for user in result.users if user.target in _OF_RESULTS]
    return any(reader < call for result in results for reader in result.users)


class StrictError(RuntimeError):
    """Raised under `strict=True`: a site that matched cannot be fused."""

    def __init__(self, site: ReportedSite) -> None:
        super().__init__(f"fusion_pass (strict): {site.kind} at {site.module} ({site.source}) not fused: {site.reason}")


# --- reporting --------------------------------------------------------------------------------------------------------


def _fused(site: Site) -> ReportedSite:
    return ReportedSite(
        kind=site.kind,
        **columns(site.activations()),
        module=module_path(site.anchor),
        source=source_line(site.origin or site.results()[0]),
        shape=symbolic_shape(site.x),
        dtype=site.x.meta["val"].dtype,
        rounding=site.form.name,
        remark=site.remark,
    )


def _missed(anchor: Node, refusal: Refused, value: Value[Any]) -> ReportedSite:
    x = value.measured(anchor)
    site: Site | None = refusal.site
    return ReportedSite(
        kind=refusal.kind or value.name,
        **columns({} if site is None else site.activations()),
        module=module_path(anchor),
        source=source_line(anchor),
        shape=symbolic_shape(x),
        dtype=dtype(x),
        rounding=None if site is None else site.form.name,
        reason=refusal.text(),
        reason_name=refusal.reason.name,
    )


def _failure(error: Exception, anchor: Node | None = None, kind: str = "graph") -> ReportedSite:
    """The row of the report for an internal error, at an anchor or in the whole graph."""
    module, source, shape = ("", "", ()) if anchor is None else (module_path(anchor), source_line(anchor), ())
    at = "" if anchor is None else f", at {anchor.name}"
    reason = f"{Reason.ERROR.value}: {type(error).__name__}: {error}{at}"
    return ReportedSite(kind, None, None, module, source, shape, None, None, reason, Reason.ERROR.name)


def _warn_of(error: Exception) -> None:
    warn_once(f"fusion_pass: {Reason.ERROR.value}: {type(error).__name__}: {error}")
    log.debug("internal error", exc_info=error)


def _warn_missed(refusal: Refused) -> None:
    """Warns once for each reason that the pass found a site and did not fuse it."""
    detail = f" ({refusal.detail})" if refusal.reason is Reason.NO_KERNEL else ""
    warn_once(f"fusion_pass: a site was found and not fused: {refusal.reason.value}{detail}; see fusion_pass.explain")


def _warn_if_nothing_fused(report: FusionReport, graph: Graph) -> None:
    """Warns if the graph has norms and gates, but no norm was fused. The user should see this: the pass may not know a
    spelling of the model."""
    unmodulated = REGISTRY.unmodulated()
    fused = [site.kind for site in report.fused if site.kind not in unmodulated]
    reasons = {site.reason_name for site in report.missed if site.kind not in unmodulated}
    by_design = reasons and reasons <= {reason.name for reason in BY_DESIGN}
    if not fused and by_design and any(entry.value.has_gates(graph) for entry in REGISTRY.entries):
        warn_once("fusion_pass: a graph has norms and gates, and nothing of it was fused; see fusion_pass.explain")


# --- the transaction --------------------------------------------------------------------------------------------------


def _copied(graph: Graph, into: Graph) -> Graph:
    """Copies every node of `graph`, with its metadata, into the empty graph `into`."""
    node = into.output(into.graph_copy(graph, {}))
    node.meta = dict(graph.output_node().meta)
    return into


def _restore(graph: Graph, saved: Graph) -> None:
    """Replaces the nodes of `graph`, the object that Inductor holds, by copies of the nodes of `saved`."""
    for node in list(graph.nodes):
        node.args, node.kwargs = (), {}
    for node in list(graph.nodes):
        graph.erase_node(node)
    _copied(saved, graph)


def _is_training(graph: Graph) -> bool:
    """Is this a training graph? AOTAutograd names its inputs `primals` and, in the backward, `tangents`."""
    return any(str(node.target).startswith(("primals", "tangents")) for node in graph.find_nodes(op="placeholder"))


# --- the uuid ---------------------------------------------------------------------------------------------------------


@cache
def _fingerprint() -> str:
    """Our sources, as a hash, and the versions of the packages that they depend on."""
    return ":".join((hash_of_sources(*_PACKAGES), *generator_versions()))


def _registered() -> str:
    """A hash of the registered values, kinds and families, including the source of each that is not in our packages."""
    digest = hashlib.sha256()
    sites = [member for entry in REGISTRY.entries for member in (entry.value, *entry.kinds)]
    for member in (*sites, *(op.family for op in OPS.values())):
        digest.update(f"{type(member).__module__}.{type(member).__qualname__};".encode())
        source = Path(inspect.getfile(type(member)))
        if not set(_PACKAGES) & set(source.parents):
            digest.update(source.read_bytes())
    return digest.hexdigest()
