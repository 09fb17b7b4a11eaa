"""Runs a plan: cached stages are taken, the others go to the worker."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from edgeattn.pipeline.cache import Cache, Record
from edgeattn.pipeline.job import Job
from edgeattn.pipeline.locks import locked
from edgeattn.pipeline.plan import Planned, make_plan, sources_key
from edgeattn.pipeline.supervisor import Supervisor

_WAITING = "waiting for another process that builds the same"


class Progress(Protocol):
    """What a caller sees of a running plan."""

    def start(self, stage: str) -> None:
        """A stage begins to run."""

    def say(self, text: str) -> None:
        """A line from inside the stage."""

    def done(self, stage: str, seconds: float, peak_mb: float, cached: bool) -> None:
        """A stage has its result: just made, or found in the cache."""


class Silent:
    """A ``Progress`` that shows nothing."""

    def start(self, stage: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def done(self, stage: str, seconds: float, peak_mb: float, cached: bool) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Finished:
    """A plan that ran.

    Attributes:
        records: results by stage.
        fresh: stages that ran now; the others came from the cache.
        keys: of all planned stages, also of those that this run leaves to its caller (bundle).
        seconds: wall time of the run.
        advice: what was found of a quantized artifact's speed, see ``pipeline.advice``.
    """

    records: dict[str, Record]
    fresh: tuple[str, ...]
    keys: dict[str, str]
    seconds: float
    advice: tuple[str, ...] = ()


def run_plan(job: Job, cache: Cache, progress: Progress, upto: str = "verify") -> Finished:
    """Bring every stage up to ``upto`` to its result.

    No two processes that share the cache run a stage of one key at the same time: the second waits, and takes what the
    first has made.

    Raises:
        EdgeAttnError: what a stage raised; the results of the stages before stay cached.
    """
    begun = time.perf_counter()
    cache.prepare()
    records: dict[str, Record] = {}
    fresh: list[str] = []
    with Supervisor(cache.root / "logs", cache.scratch()) as supervisor:
        plan = make_plan(job, cache)
        if _missing(plan, upto):
            supervisor.start()
        for index, planned in enumerate(plan):
            name = planned.stage.name
            record = plan[index].record
            if record is None:
                progress.start(name)
                # The build's own key changes when its files become known, while another process may wait for it.
                lock = sources_key(job) if name == "build" else plan[index].key
                with locked(cache.root / "locks" / lock, lambda: progress.say(_WAITING)):
                    if name == "build":
                        plan = make_plan(job, cache)
                        record = plan[index].record
                    else:
                        record = cache.get(plan[index].key)
                    if record is None:
                        scratch = cache.scratch()
                        try:
                            results = {n: {"folder": str(r.folder), "facts": r.facts} for n, r in records.items()}
                            facts, seconds, peak = supervisor.run(name, job, scratch, results, progress.say)
                            if name == "build":
                                # Only now is it known which files the model is made from: the keys follow from them.
                                cache.put_sources(sources_key(job), facts.pop("sources"))
                                plan = make_plan(job, cache)
                            record = cache.put(scratch, name, plan[index].key, facts, seconds, peak)
                        finally:
                            cache.discard(scratch)
                        fresh.append(name)
            records[name] = record
            progress.done(name, record.seconds, record.peak_mb, name not in fresh)
            if name == upto:
                break
    keys = {planned.stage.name: planned.key for planned in plan}
    return Finished(records, tuple(fresh), keys, time.perf_counter() - begun)


def _missing(plan: list[Planned], upto: str) -> bool:
    names = [p.stage.name for p in plan]
    return any(p.record is None for p in plan[: names.index(upto) + 1])
