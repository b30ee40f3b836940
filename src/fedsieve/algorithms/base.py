"""What an algorithm is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from fedsieve.errors import UsageError
from fedsieve.local.executor import Client, Metrics
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Layout, Masks, Params
from fedsieve.settings import Local, nearest
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, Reason, WireError
from fedsieve.wire.sections import Section, dense, mask, number, values, vector

State = TypeVar("State")
ClientState = TypeVar("ClientState")
Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What a method knows at the server before round 1."""

    spec: ModelSpec
    start: Params
    """where the federation starts"""
    rounds: int
    clients: int
    streams: Streams
    drawn: int = 0
    """clients drawn for each round; 0: all"""
    local: Local = field(default_factory=Local)
    """how clients train"""

    @property
    def cohort(self) -> int:
        """Clients of a round."""
        return self.drawn or self.clients

    @property
    def layout(self) -> Layout:
        """Layout of the model."""
        return self.spec.layout


class Algorithm(Protocol[State, ClientState, Reply]):
    """A method: a frozen dataclass of settings with six pure steps.

    State is passed in and returned, never kept. It has a field or property `round`, the number of rounds that are complete: a
    method with several phases takes several exchanges, broadcast to aggregate, before it counts a round; in each the cohort is
    the same. Whatever goes from server to client or back is in a message, and a message is only bytes on its way. A client may
    keep a state of its own between its rounds (`mine`); it never leaves the client.
    """

    def init(self, job: Job) -> State:
        """Return the server's state before round 1."""

    def broadcast(self, state: State, cohort: Sequence[int]) -> Mapping[int, Message]:
        """Return a message for each client of the cohort that is asked; a message object given to several is packed once."""

    def client_update(self, request: Message, client: Client, mine: ClientState | None) -> tuple[Message, ClientState | None]:
        """Return the client's reply and what it keeps."""

    def read(self, state: State, reply: Message) -> Reply:
        """Decode all that the server uses of one reply. A WireError here counts the client as lost and ends no run."""

    def aggregate(self, state: State, replies: Iterable[tuple[int, Reply]]) -> State:
        """Return the next state. Replies come once, in ascending client id; there may be none."""

    def finalize(self, state: State) -> tuple[Params, Masks]:
        """Return what is evaluated and exported."""


@runtime_checkable
class Personal(Protocol):
    """What a method has besides if its clients are to be evaluated with models of their own."""

    def evaluation(self, state: Any, clients: Sequence[int], epochs: int) -> Mapping[int, Message]:
        """Return the request of kind eval to each client: to say how its model does, and how after so many epochs more."""

    def client_evaluate(self, request: Message, client: Client, mine: Any) -> Message:
        """Return the answer, with the section `counts` as `measured` makes it. What the client keeps stays as it is."""


def network(algorithm: Any, state: Any, spec: ModelSpec) -> ModelSpec | None:
    """Return the network that `finalize` returns parameters of; None: the job's, `spec`.

    A method may have a step `network(state, spec)`, which makes it of the job's: a state cannot hold a network.
    """
    found: ModelSpec | None = algorithm.network(state, spec) if hasattr(algorithm, "network") else None
    return found


def names() -> list[str]:
    """List the built-in methods: the modules of this folder."""
    here = import_module("fedsieve.algorithms")
    return sorted(module.name for module in iter_modules(here.__path__) if module.name != "base")


def find(name: str) -> type[Any]:
    """Return the class of settings of a method: a module of this folder, or `package.module:Class`.

    Raises:
        UsageError: no such method; the message names the nearest one.
    """
    if ":" in name:
        return _imported(name)
    if name not in names():
        near = nearest(name, names())
        raise UsageError(f"no algorithm {name!r}.{near} There are {', '.join(names())}, or your own as package.module:Class.")
    module = import_module(f"fedsieve.algorithms.{name}")
    return next(
        v
        for v in vars(module).values()
        if isinstance(v, type) and v.__module__ == module.__name__ and hasattr(v, "client_update")
    )


def _imported(name: str) -> type[Any]:
    path, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(path), attribute)
    except Exception as error:  # whatever stops the user's module
        raise UsageError(
            f"algorithm {name!r} cannot be loaded: {type(error).__name__}: {error}.\n"
            "Give package.module:Class, importable from this folder (--debug shows where it failed)."
        ) from error
    steps = [
        step for step in ("init", "broadcast", "client_update", "read", "aggregate", "finalize") if not hasattr(found, step)
    ]
    if steps or not is_dataclass(found):
        raise UsageError(
            f"algorithm {name!r} is no frozen dataclass with the six steps; missing: {', '.join(steps) or 'dataclass'}."
        )
    return found  # type: ignore[return-value]


def weight(reply: Message, weighting: Literal["examples", "uniform"]) -> float:
    """Return a client's weight in a mean: its number of examples, in [1, 2**48], or 1."""
    examples = reply.number("examples")
    if not 1 <= examples <= 2**48:
        raise WireError(Reason.RANGE, 0, f"examples is {examples}, not in [1, 2**48]")
    return float(examples) if weighting == "examples" else 1.0


def check_density(layout: Layout, density: float | None, floor: int | None = None, keep: int | None = None) -> None:
    """Check that there are weights to mask, and that a density keeps enough of them.

    Args:
        layout: of the model.
        density: algorithm.density; None: the method has none.
        floor: algorithm.floor, weights that each tensor keeps at least; None: the method has none, and each needs one.
        keep: weights that are kept, if not all that the density comes to.

    Raises:
        UsageError: there are none, or too few.
    """
    if not layout.maskable:
        raise UsageError("the model has no maskable weight: see model.maskable and model.dense.")
    if density is None:
        return
    each, keep = 1 if floor is None else floor, round(density * layout.maskable) if keep is None else keep
    least = max(1, sum(min(each, slot.numel) for slot in layout.masked_slots))
    if keep < least:
        raise UsageError(
            f"algorithm.density = {density} keeps {keep} of {layout.maskable} weights; {least} are needed, with {each} at least"
            f" in each of {len(layout.masked_slots)} tensors.\nSet algorithm.density to {least / layout.maskable:.4g} or more"
            f"{'' if floor is None else ', or lower algorithm.floor'}; model.dense leaves tensors out."
        )


def check_voters(job: Job, least: int, vote: str, instead: str) -> None:
    """Check that a round has as many clients as a vote needs.

    Args:
        job: of the run.
        least: clients of a round.
        vote: the settings that ask for it, and what it is.
        instead: settings that need fewer.

    Raises:
        UsageError: it has fewer.
    """
    if job.cohort < least:
        raise UsageError(
            f"{vote} needs {least} clients of a round or more; there are {job.cohort} (engine.cohort = {job.drawn},"
            f" data.clients = {job.clients}).\nSet engine.cohort (0: all) and data.clients to {least} or more, or {instead}."
        )


def check_moves(job: Job, every: int, last: int, still: str) -> None:
    """Check that masks that are to move every so many rounds do so in the run.

    Args:
        job: of the run.
        every: algorithm.every.
        last: the last round in which they may move.
        still: the setting with which they are meant to stand.

    Raises:
        UsageError: they would never move.
    """
    if every > last:
        sooner = f"algorithm.every to at most {last}, or " if last > 0 else ""
        raise UsageError(
            f"algorithm.every = {every}: masks would never move, for round {last} is the last in which they may"
            f" (engine.rounds = {job.rounds}, algorithm.stop).\nSet {sooner}engine.rounds and algorithm.stop larger; or"
            f" {still}: masks stand."
        )


def evaluation(params: Params, masks: Masks, round: int, epochs: int = 0) -> Message:
    """Return the request that a client evaluate this model on its own test examples, also after some epochs of training."""
    sections = {"epochs": number(epochs)}
    if masks.count == masks.layout.maskable:
        return Message("eval", round, params.layout, sections | {"weights": dense(params)})
    return Message("eval", round, params.layout, sections | {"mask": mask(masks), "weights": values(params, masks)})


def evaluate(request: Message, client: Client) -> Message:
    """Answer an evaluation request with the client's counts."""
    masks = request.mask("mask") if "mask" in request.sections else None
    params = request.dense("weights") if masks is None else request.values("weights", masks)
    return request.reply(counts=measured(client, params, masks, int(request.number("epochs"))))


def measured(
    client: Client,
    params: Params,
    masks: Masks | None,
    epochs: int,
    spec: ModelSpec | None = None,
    train: Callable[[int], Params] | None = None,
) -> Section:
    """Return how a model does on the client's own test examples, and again after `epochs` epochs of training if > 0.

    Args:
        client: whose examples.
        params: the model.
        masks: where it is zero.
        epochs: of training.
        spec: its network; default: that of the federation.
        train: returns the model after so many epochs; default: by SGD under the masks.
    """
    found = [client.evaluate(params, masks, spec)]
    if epochs:
        usual = train or (lambda n: client.train(params, masks=masks, epochs=n, spec=spec, purpose="tune").params)
        tuned = usual(epochs)
        found.append(client.evaluate(tuned, masks, spec))
    return vector([number for each in found for number in (each.correct, each.loss, each.predictions)])


def counts(reply: Message, models: int = 1) -> list[Metrics]:
    """Read a client's answer to an evaluation request: how so many models do, its own and, if that was asked, the tuned one."""
    numbers = reply.vector("counts").tolist()
    if len(numbers) != 3 * models:
        raise WireError(Reason.COUNT, 0, f"counts are {len(numbers)} numbers, not {3 * models}")
    triples = [numbers[begin : begin + 3] for begin in range(0, len(numbers), 3)]
    if any(not 0 <= correct <= predictions for correct, _, predictions in triples):
        raise WireError(Reason.RANGE, 0, f"counts are {numbers}: correct ones must be in [0, predictions]")
    return [Metrics(int(correct), loss, int(predictions)) for correct, loss, predictions in triples]
