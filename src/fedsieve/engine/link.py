"""The link between server and clients: what compresses models on their way, and what each end must remember for it.

    up    what a client sends of a model is compressed: its difference to the model that it received, or, where a method sends
          an update, that
    down  the model that clients received last round is what the next one is an increment to. The increment is compressed, and
          the sum is the model that all start from, so what one increment lacks the next one holds. A client is sent increments
          if its reply of the last round counted, for then the server knows that it holds that model. Any other pays for the
          whole model.

Methods do not see it: they write and read models in messages of kind "train" as ever. Masks, signs, numbers and normalisation
statistics travel as they are.

A reply may be lost. What a client remembers of its compression (such as what was left out so far) it therefore keeps for its
last round and for the last one that the server counted, and is told which it was if they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedsieve.compress.base import Arrived, Compressor, Frame, Parts, Support, name_of
from fedsieve.errors import Diverged, UsageError
from fedsieve.params import Layout, Masks, Params, finite
from fedsieve.settings import as_table
from fedsieve.streams import Streams
from fedsieve.wire.bits import Reason, WireError
from fedsieve.wire.message import Message
from fedsieve.wire.sections import Section, dense, number, values, vector

T = TypeVar("T")

BASE, COUNTED, TOLD = "link_base", "link_counted", "told_"
"""sections: round of the model that increments are to; round of the client's last reply that counted; what it is told"""
EXACT, STEP = "exact", "step"
"""parts of a compressed model: its normalisation statistics; and of an increment, how far to go in its direction"""


@dataclass(frozen=True, slots=True)
class Link:
    """How models are compressed on their way; None: they are not."""

    up: Compressor | None = None
    down: Compressor | None = None

    def __post_init__(self) -> None:
        if self.down is not None and not self.down.caps.down:
            raise UsageError(
                f"compress.down = {type(self.down).__name__}: it is made for the updates of a cohort, and a broadcast has one"
                " sender.\nUse one of the others (fedsieve list compressors), or compress.up."
            )

    def __bool__(self) -> bool:
        """Whether anything is compressed."""
        return self.up is not None or self.down is not None

    def check(self, messages: Mapping[int, Message]) -> None:
        """Check the first broadcast of a method. UsageError: it holds no model, so none will come back either."""
        training = [message for message in messages.values() if message.kind == "train"]
        if self and training and not any(_models(message) for message in training):
            raise UsageError(
                f"compress.{'up' if self.up else 'down'} has nothing to compress: this method sends no model, and what it sends"
                " is coded already.\nLeave it out."
            )

    def tables(self) -> dict[str, Any]:
        """Return the settings as TOML tables, empty if nothing is compressed."""
        ways = {"up": self.up, "down": self.down}
        return {way: {"name": name_of(by)} | as_table(by) for way, by in ways.items() if by is not None}


@dataclass(frozen=True, slots=True)
class LinkState:
    """What the server remembers of it, after a round."""

    asked: Tensor
    """round in which each client was last asked, 0 for none; int32 of shape (clients,), (0,) if nothing is compressed"""
    counted: Tensor
    """round of each client's last reply that counted, 0 for none; as `asked`"""
    round: int
    """in which `sent` was sent"""
    sent: Mapping[str, Tensor]
    """section -> the model as clients know it, shape (layout.size,); empty without `down`"""
    memory: Any
    """of the compressor of updates"""

    @classmethod
    def start(cls, link: Link, clients: int, layout: Layout) -> LinkState:
        """Before round 1. UsageError if the compressor's memory would be too large."""
        zeros = torch.zeros(clients if link else 0, dtype=torch.int32)
        return cls(zeros, zeros, 0, {}, link.up.start(clients, layout.trainable) if link.up else None)


# ---- what both ends do


def _support(layout: Layout, masks: Masks | None) -> Support:
    return Support(layout, masks if masks is not None and masks.count < layout.maskable else None)


def _compressed(
    by: Compressor,
    name: str,
    params: Params,
    masks: Masks | None,
    reference: Tensor | None,
    frame: _Framed,
    memory: Tensor | None,
) -> tuple[dict[str, Section], Tensor | None]:
    """Return the sections of a model, and what its sender keeps, shape (layout.trainable,).

    Raises:
        Diverged: it is not finite.
    """
    layout, support = params.layout, _support(params.layout, masks)
    moved = params.trainable if reference is None else params.trainable - reference[: layout.trainable]
    x, kept, written = support.take(moved), None, dict[str, Section]()
    if len(x):
        if not finite(x):
            where = int(x.isfinite().logical_not().nonzero()[0])
            ends = torch.tensor(support.sizes).cumsum(0)
            raise Diverged(f"section {name!r}: tensor {support.names[int((ends <= where).sum())]} is not finite")
        parts, kept = by.encode(x, frame(support), None if memory is None else support.take(memory))
        written = {f"{name}_{part}": section for part, section in parts.items()}
    if layout.size > layout.trainable:
        written[f"{name}_{EXACT}"] = vector(params.statistics.contiguous())
    return written, None if kept is None else support.put(kept)


_Framed = Callable[[Support], Frame]


def _exact(message: Message, name: str) -> Tensor:
    """Read the normalisation statistics of a compressed model."""
    layout = message.layout
    n = layout.size - layout.trainable
    return Parts(message, name).floats(EXACT, n) if n else torch.zeros(0)


def _whole(support: Support, x: Tensor, statistics: Tensor, reference: Tensor | None) -> Params:
    """Return the model of n decoded numbers, added to a reference, zero where masks are."""
    layout = support.layout
    if reference is not None:
        x = x + support.take(reference)
    return Params(layout, torch.cat([support.put(x), statistics]))


# ---- the client's end


@dataclass(slots=True)
class ClientEnd:
    """A client's end of the link in one exchange: opens the request, closes the reply."""

    link: Link
    streams: Streams
    """of the round and the client"""
    kept: Mapping[str, Any]
    """what `close` returned when it last answered; empty at first"""
    _seen: dict[str, Tensor] = field(default_factory=dict)

    def open(self, request: Message) -> Message:
        """Return a request in which models read as they always do."""
        return replace(request, opener=self._open)

    def close(self, request: Message, reply: Message) -> tuple[Message, Mapping[str, Any]]:
        """Compress the models of a reply; return it, and what the client keeps of the link."""
        held = {"round": request.round, "held": dict(self._seen)} if self.link.down else {}
        up = self.link.up
        if up is None:
            return reply, held
        told = {name.removeprefix(TOLD): request.number(name) for name in request.sections if name.startswith(TOLD)}
        loss = float(reply.number("loss")) if "loss" in reply.sections else None
        before: Mapping[str, Mapping[int, Tensor]] = self.kept.get("memory", {})
        sections, memory = dict[str, Section](), dict[str, dict[int, Tensor]]()
        for name, section in reply.sections.items():
            if section.source is None:
                sections[name] = section
                continue
            mine = before.get(name, {})
            counted = int(request.number(COUNTED)) if COUNTED in request.sections else max(mine, default=0)

            def framed(support: Support, name: str = name) -> Frame:
                return Frame(support.sizes, self.streams, name, told, loss)

            written, kept = _compressed(up, name, *section.source, self._seen.get(name), framed, mine.get(counted))
            sections |= written
            if kept is not None:
                memory[name] = {counted: mine[counted]} if counted in mine else {}
                memory[name][request.round] = kept
        return replace(reply, sections=sections), held | {"memory": memory}

    def _open(self, request: Message, name: str, masks: Masks | None) -> Params:
        if name in request.sections or BASE not in request.sections or self.link.down is None:
            raw = replace(request, opener=None)
            params = raw.dense(name) if masks is None else raw.values(name, masks)
        else:
            base, held = int(request.number(BASE)), self.kept.get("held", {})
            if self.kept.get("round") != base or name not in held:
                known = self.kept.get("round", "none")
                raise WireError(Reason.RANGE, 0, f"an increment to the model of round {base}, known here is that of {known}")
            params = _incremented(self.link.down, request, name, masks, held[name], self.streams)
        self._seen[name] = params.flat if masks is None else params.flat.clone()
        return params


def _incremented(down: Compressor, request: Message, name: str, masks: Masks | None, held: Tensor, streams: Streams) -> Params:
    support = _support(request.layout, masks)
    frame = _downward(support, streams, name)
    step = request.number(f"{name}_{STEP}")
    x = down.decode(Parts(request, name), frame) * step if frame.n else torch.zeros(0)
    return _whole(support, x, _exact(request, name), held)


def _step(x: Tensor, down: Compressor, carried: Message, name: str, frame: Frame) -> float:
    """Return the multiple of what is decoded that is nearest to x: less than 1 where a compressor scatters around x.

    So an increment never takes clients further away than they were, whatever compresses it.
    """
    if not frame.n:
        return 1.0
    decoded = down.decode(Parts(carried, name), frame).double()
    square = float(decoded @ decoded)
    return float(x.double() @ decoded) / square if square else 1.0


def _downward(support: Support, streams: Streams, name: str) -> Frame:
    return Frame(support.sizes, Streams(streams.seed, streams.round), name)


# ---- the server's end


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """How a model of a broadcast travels."""

    whole: Section
    """to clients that hold no earlier one, or none that the server knows of"""
    increment: Mapping[str, Section] | None
    """to the others; None: they get the whole too"""
    flat: Tensor
    """the model as all of them then know it"""


class ServerEnd:
    """The server's end of the link in one round.

    Args:
        link: of the run.
        state: after the round before.
        streams: of the round.
    """

    def __init__(self, link: Link, state: LinkState, streams: Streams) -> None:
        self._link, self._before, self._streams = link, state, streams
        self._asked, self._counted = state.asked.clone(), state.counted.clone()
        self._sent: tuple[int, Mapping[str, Tensor]] = state.round, state.sent
        self._memory = state.memory
        self._nominal = 0.0
        self._references: dict[int, dict[str, Tensor]] = {}
        self._told: Mapping[int, Mapping[str, int | float]] = {}
        self._cohort: dict[str, Any] = {}
        self._arrived: dict[str, dict[int, Arrived]] = {}

    @classmethod
    def plain(cls, layout: Layout) -> ServerEnd:
        """Return one that compresses nothing."""
        return cls(Link(), LinkState.start(Link(), 0, layout), Streams(0))

    def send(self, messages: Mapping[int, Message]) -> Mapping[int, Message]:
        """Return messages as they travel: models as increments where they can be, and what clients are told besides."""
        training = {client: message for client, message in messages.items() if message.kind == "train"}
        if not training or not self._link:
            return messages
        state, up = self._before, self._link.up
        holders = {client for client in training if state.round and int(state.counted[client]) == state.round}
        ways = self._ways(self._link.down, list(training.values()), bool(holders)) if self._link.down else {}
        self._told = up.announce(self._memory, sorted(training)) if up else {}
        made: dict[Any, Message] = {}
        sent = dict(messages)
        for client, message in training.items():
            own = {TOLD + name: number(value) for name, value in self._told.get(client, {}).items()}
            if up is not None and up.caps.client_memory and state.asked[client] != state.counted[client]:
                own[COUNTED] = number(int(state.counted[client]))
            key = id(message), client in holders, tuple((name, bytes(section.view)) for name, section in own.items())
            if key not in made:
                made[key] = replace(message, sections=self._sections(message, ways, client in holders) | own)
            sent[client] = made[key]
        if up is not None:
            self._remember(training, ways)
        self._asked[torch.tensor(sorted(training))] = self._streams.round
        if ways:
            self._sent = self._streams.round, {name: way.flat for name, way in ways.items()}
        return sent

    def _ways(self, down: Compressor, messages: Sequence[Message], held: bool) -> dict[str, _Way]:
        """Return how the models travel that all clients of a cohort are sent."""
        first, ways = messages[0], dict[str, _Way]()
        for name in _models(first):
            section = first.sections[name]
            if any(message.sections.get(name) is not section for message in messages) or section.source is None:
                continue
            before = self._before.sent.get(name)
            ways[name] = (
                self._way(down, name, first, section.source, before)
                if held and before is not None
                else _Way(section, None, _read(first, name))
            )
        if not ways:
            raise UsageError(
                "compress.down has nothing to compress: this method sends no model that is the same for all clients.\nLeave"
                " compress.down out; compress.up may still do."
            )
        return ways

    def _way(self, down: Compressor, name: str, message: Message, source: tuple[Params, Masks | None], before: Tensor) -> _Way:
        """Compress the difference to the model that clients hold."""
        params, masks = source
        support = _support(params.layout, masks)
        frame = _downward(support, self._streams, name)
        written, _ = _compressed(down, name, params, masks, before, lambda support: frame, None)
        carried = replace(message, sections=written)
        written[f"{name}_{STEP}"] = number(_step(support.take(params.flat - before), down, carried, name, frame))
        now = _incremented(down, carried, name, masks, before, self._streams)
        return _Way(dense(now) if masks is None else values(now, masks), written, now.flat)

    def _sections(self, message: Message, ways: Mapping[str, _Way], holds: bool) -> dict[str, Section]:
        sections = dict[str, Section]()
        for name, section in message.sections.items():
            way = ways.get(name)
            if way is not None and holds and way.increment is not None:
                sections |= {BASE: number(self._before.round)} | dict(way.increment)
            else:
                sections[name] = section if way is None else way.whole
        return sections

    def _remember(self, training: Mapping[int, Message], ways: Mapping[str, _Way]) -> None:
        """Note what each client takes each model for: replies are differences to that."""
        known = {id(message.sections[name]): way.flat for message in training.values() for name, way in ways.items()}
        for client, message in training.items():
            for name in _models(message):
                key = id(message.sections[name])
                if key not in known:
                    known[key] = _read(message, name)
            self._references[client] = {name: known[id(message.sections[name])] for name in _models(message)}

    # -- replies

    def read(
        self, replies: Iterable[tuple[int, Message]], decode: Callable[[Message], T]
    ) -> Iterator[tuple[int, Message, T | WireError]]:
        """Yield clients with their replies and what is decoded of them, or why they are not valid.

        Args:
            replies: in ascending client id.
            decode: reads all of a reply. It may be called twice.
        """
        up, refused = self._link.up, dict[int, WireError]()
        if up is not None and up.caps.joint:
            replies = list(replies)
            refused = self._survey(up, replies, decode)
        for client, reply in replies:
            if client in refused:
                yield client, reply, refused[client]
                continue
            models: dict[str, Arrived] = {}
            try:
                content = decode(self._opened(client, reply, models, plain=False))
            except WireError as error:
                yield client, reply, error
                continue
            if reply.kind == "train" and self._link:
                self._learn(client, reply, models)
            yield client, reply, content

    def finish(self) -> LinkState:
        """Return what the server remembers after the round."""
        memory = self._memory if self._link.up is None else self._link.up.finish(self._memory)
        return LinkState(self._asked, self._counted, *self._sent, memory)

    def row(self) -> dict[str, Any]:
        """Return what it adds to the record of the round."""
        return {"nominal_up": round(self._nominal) if self._link.up is not None else None}

    def _survey(
        self, up: Compressor, replies: Iterable[tuple[int, Message]], decode: Callable[[Message], Any]
    ) -> dict[int, WireError]:
        """Note who sent which models; return whose replies are not valid, for they do not count."""
        refused = {}
        for client, reply in replies:
            models: dict[str, Arrived] = {}
            try:
                decode(self._opened(client, reply, models, plain=True))
            except WireError as error:
                refused[client] = error
                continue
            for name, model in models.items():
                self._arrived.setdefault(name, {})[client] = model
        self._cohort = {name: up.survey(self._memory, arrived) for name, arrived in self._arrived.items()}
        return refused

    def _opened(self, client: int, reply: Message, models: dict[str, Arrived], *, plain: bool) -> Message:
        """Return a reply whose models read as they always do, and note those that do in `models`.

        With `plain` they are read without what is known of the cohort.
        """
        up = self._link.up
        if up is None or reply.kind != "train":
            return reply
        told, streams = self._told.get(client, {}), self._streams.at(client=client)

        def opener(message: Message, name: str, masks: Masks | None) -> Params:
            if name in message.sections:
                raise WireError(Reason.SECTION, message.sections[name].offset, f"section {name!r} is not compressed")
            arrived = self._arrived.get(name, {}).get(client)
            if arrived is None:
                support = _support(message.layout, masks)
                loss = float(message.number("loss")) if "loss" in message.sections else None
                arrived = Arrived(client, Parts(message, name), Frame(support.sizes, streams, name, told, loss), support)
            x = torch.zeros(0)
            if arrived.frame.n and plain:
                x = up.decode(arrived.parts, arrived.frame)
            elif arrived.frame.n:
                x = up.estimate(arrived, self._memory, self._cohort.get(name))
            if not finite(x):
                raise WireError(Reason.NONFINITE, 0, f"model {name!r} is beyond the range of float32")
            models[name] = arrived
            return _whole(arrived.support, x, _exact(message, name), self._references.get(client, {}).get(name))

        return replace(reply, opener=opener)

    def _learn(self, client: int, reply: Message, models: Mapping[str, Arrived]) -> None:
        """Note that a reply counted."""
        self._counted[client] = self._streams.round
        if (up := self._link.up) is not None:
            if not models:
                raise UsageError(
                    "compress.up has nothing to compress: this method's replies hold no model.\nLeave compress.up out."
                )
            for name, model in models.items():
                self._memory = up.learn(model, self._memory, self._cohort.get(name))
                self._nominal += (up.nominal_bits(model.frame) or 0.0) / 8


def _models(message: Message) -> list[str]:
    """Names of the sections that hold a model."""
    return [name for name, section in message.sections.items() if section.source is not None]


def _read(message: Message, name: str) -> Tensor:
    """Read a section back that this end wrote, shape (layout.size,): its precision may be less than that of its source."""
    source = message.sections[name].source
    masks = None if source is None else source[1]
    return (message.dense(name) if masks is None else message.values(name, masks)).flat
