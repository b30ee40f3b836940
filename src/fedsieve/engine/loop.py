"""The run: round after round, with evaluation, record and checkpoint as the next lines of one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from fedsieve.algorithms.base import Algorithm, Job
from fedsieve.data.batches import Federation
from fedsieve.data.partition import Parts
from fedsieve.engine.folder import Progress, RunFolder, environment, identity
from fedsieve.engine.handle import Plan
from fedsieve.engine.link import Link, LinkState, ServerEnd
from fedsieve.engine.round import Row, draw, play, total
from fedsieve.engine.states import ClientStates
from fedsieve.engine.transports import Sequential, Transport, Workers
from fedsieve.errors import Diverged, Interrupted, UsageError
from fedsieve.local.batched import obstacle
from fedsieve.local.convolution import resolved
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Masks, Params
from fedsieve.settings import Engine, Local, as_table
from fedsieve.streams import Streams


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a run ends with."""

    params: Params
    masks: Masks
    rows: Sequence[Row]
    """the record of each round, see docs/records.md"""
    summary: Mapping[str, Any]
    folder: Path | None

    @property
    def accuracy(self) -> float:
        """Test accuracy of the final model, in [0, 1]."""
        return float(self.summary["accuracy"])

    @property
    def density(self) -> float:
        """Kept over maskable weights of the final model, in [0, 1]."""
        return self.masks.density


def fit(
    algorithm: Algorithm[Any, Any, Any],
    *,
    model: nn.Module | ModelSpec,
    data: Federation,
    local: Local | None = None,
    engine: Engine | None = None,
    link: Link | None = None,
    start: Params | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    watch: Callable[[Row], None] = lambda row: None,
) -> Result:
    """Run a federation to its last round.

    Args:
        algorithm: the method, for example `FedSparsify(density=0.1)`.
        model: any module, or a spec that says more about it.
        data: who holds which examples, see `federate`.
        local: how a client trains.
        engine: how the rounds are run.
        link: what compresses models on their way; default: nothing.
        start: parameters to start from; default: the module's own.
        out: run folder to write, which must not exist; default: none is written.
        resume: go on in the run folder `out` from its last checkpoint, or from the beginning if it has none.
        config: settings to write into the folder; default: what the arguments say.
        watch: called with the row of each round.

    Raises:
        UsageError: the settings do not fit together, or the folder exists.
        Diverged: a client's loss is not finite (engine.nonfinite = "stop").
    """
    local, engine, link = resolved(local or Local()), engine or Engine(), link or Link()
    spec = model if isinstance(model, ModelSpec) else ModelSpec.of(model, data.example())
    job = job_of(spec, data, local, engine, start)
    config = config or _described(algorithm, spec, data, local, engine, link)
    run = Progress(0, algorithm.init(job), [], LinkState.start(link, job.clients, job.layout))
    link.check(algorithm.broadcast(run.state, draw(job, engine, 1)) if link else {})
    folder, states = None, ClientStates()
    if out is not None:
        folder = RunFolder.open(Path(out), identity(config, data, job.start), resume=resume)
        if resume:
            run = folder.restore(job.layout, type(algorithm).__module__) or run
        folder.describe(config, data.manifest())
        states = folder.states
    plan = Plan(algorithm, spec, data, local, engine.rounds, engine.seed, engine.group, link)
    transport: Transport = Workers(plan, engine.workers, states) if engine.workers else Sequential(plan, states)
    try:
        while run.round < engine.rounds:
            began, states.round = perf_counter(), run.round + 1
            end = ServerEnd(link, run.link, job.streams.at(round=run.round + 1))
            state, row = play(algorithm, run.state, run.round + 1, job, engine, transport, end)
            row["seconds"] = perf_counter() - began
            run = Progress(run.round + 1, state, [*run.rows, row], end.finish())
            if folder:
                folder.record(row)
                if run.round % engine.checkpoint_every == 0 or run.round == engine.rounds:
                    folder.save(run)
            states.prune(run.round)
            watch(row)
    except (Interrupted, KeyboardInterrupt, Diverged):
        if folder:
            folder.save(run)
        raise
    finally:
        transport.close()
    params, masks = algorithm.finalize(run.state)
    summary = _summary(config, spec, data, engine, run.rows)
    if folder:
        folder.finish(params, masks, summary)
    return Result(params, masks, run.rows, summary, folder.path if folder else None)


def job_of(spec: ModelSpec, data: Federation, local: Local, engine: Engine, start: Params | None = None) -> Job:
    """Return what the method knows before round 1.

    Raises:
        UsageError: the settings do not fit together.
    """
    if engine.cohort > len(data.parts):
        raise UsageError(
            f"engine.cohort = {engine.cohort} is more than the {len(data.parts)} clients that there are (data.clients)."
        )
    if engine.workers and local.device != "cpu":
        raise UsageError(f"local.device = {local.device!r} needs engine.workers = 0: worker processes are for the CPU.")
    if local.device != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"local.device = {local.device!r}: this PyTorch finds no CUDA device. Use cpu.")
    if engine.group > 1 and (why := obstacle(spec, local, data.train)):
        raise UsageError(f"engine.group = {engine.group} does not go with model {spec.name!r}. {why}\nSet engine.group = 1.")
    sizes = Parts.of(data.parts).sizes
    if not sizes.all():
        raise UsageError(
            f"client {sizes.argmin()} holds no training example; each client needs one or more (data.min_examples).\nLeave it"
            " out of the federation, or share the examples out otherwise."
        )
    single = np.flatnonzero(sizes % local.batch == 1 % local.batch)
    if len(single) and not spec.trains_on_one():
        raise UsageError(
            f"local.batch = {local.batch} leaves client {single[0]}, which has {sizes[single[0]]} training examples, a step on"
            f" one, and model {spec.name!r} cannot train on one: its BatchNorm would normalise single numbers.\nUse another"
            " local.batch, a model without BatchNorm (model.norm) or, for clients that hold but one example, a larger"
            " data.min_examples."
        )
    streams = Streams(engine.seed)
    return Job(spec, start or spec.initial("module", streams), engine.rounds, len(data.parts), streams, engine.cohort, local)


def _described(algorithm: Any, spec: ModelSpec, data: Federation, local: Local, engine: Engine, link: Link) -> dict[str, Any]:
    """Settings of a run that was started from Python, where model and data are objects."""
    package, _, name = type(algorithm).__module__.rpartition(".")
    if package != "fedsieve.algorithms":
        name = f"{type(algorithm).__module__}:{type(algorithm).__qualname__}"
    return {
        "data": {"name": data.name, "clients": len(data.parts)},
        "model": {"name": spec.name},
        "algorithm": {"name": name} | as_table(algorithm),
        "local": as_table(local),
        "engine": as_table(engine),
    } | ({"compress": link.tables()} if link else {})


def _summary(
    config: Mapping[str, Any], spec: ModelSpec, data: Federation, engine: Engine, rows: Sequence[Row]
) -> dict[str, Any]:
    evaluated = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    return {
        "algorithm": config["algorithm"]["name"],
        "dataset": data.name,
        "model": spec.name,
        "seed": engine.seed,
        "clients": len(data.parts),
        "rounds": len(rows),
        "status": "done",
        "accuracy": evaluated[-1],
        "best_accuracy": max(evaluated),
        "client_accuracy": rows[-1]["client_accuracy"],
        "tuned_accuracy": rows[-1]["tuned_accuracy"],
        "density": rows[-1]["density"],
        "parameters": spec.parameters,
        "bytes_up": total(rows, "bytes_up"),
        "bytes_down": total(rows, "bytes_down"),
        "flops": total(rows, "flops"),
        "seconds": total(rows, "seconds"),
        "config_hash": identity(config),
    } | environment()
