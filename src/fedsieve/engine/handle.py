"""The client's end of the wire: bytes in, bytes out.

All that is here may be at a client in a deployment: the method and its settings, the model, the client's own data and its own
state from earlier rounds. Nothing else reaches it but the bytes of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fedsieve.algorithms.base import Algorithm, Personal, evaluate
from fedsieve.data.batches import Federation
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.engine.link import ClientEnd, Link
from fedsieve.engine.turns import Turns
from fedsieve.errors import FedsieveError
from fedsieve.local.batched import Batched
from fedsieve.local.executor import Client, Executor, Trained
from fedsieve.models.spec import ModelSpec
from fedsieve.settings import Local
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, WireError, pack, unpack

Asked = tuple[int, bytes | memoryview, bytes | None]
"""a client, the request that it received, and its frozen state"""
Answer = tuple[Message, bytes | None]
"""a client's reply, and the state that it keeps from now on, frozen"""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a run consists of at the clients' end."""

    algorithm: Algorithm[Any, Any, Any]
    spec: ModelSpec
    federation: Federation
    local: Local
    rounds: int
    seed: int
    group: int = 1
    """clients that are trained in one batch"""
    link: Link = field(default_factory=Link)
    """what compresses models on their way"""


class Device:
    """A machine that plays clients, one after another or in groups: in a simulation many, in a deployment one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.executor = Executor(plan.spec, plan.local, plan.rounds)
        self._batched, self._turns = Batched(self.executor, plan.group), Turns(plan.group)
        self._last: tuple[bytes | memoryview, Message] | None = None

    def answers(self, asked: Sequence[Asked]) -> Iterator[Answer | FedsieveError | WireError]:
        """Play the clients of a group, ascending; yield what each answers, or why it is lost.

        Their requests are of one exchange. What they train is trained together; evaluations are played one after another.
        """
        if len(asked) > 1 and not self._evaluates(asked[0][1]):
            yield from self._turns.take([partial(self.answer, *each) for each in asked], self._batched.train)
            return
        for each in asked:
            try:
                yield self.answer(*each)
            except (FedsieveError, WireError) as error:
                yield error

    def answer(
        self, client: int, payload: bytes | memoryview, mine: bytes | None, train_by: Callable[..., Trained] | None = None
    ) -> Answer:
        """Play a client that received a request: return its reply and the state that it keeps from now on, frozen.

        None instead of a state: it keeps what it kept before. See `Client` for `train_by`.

        Raises:
            WireError: the payload is no valid request.
            FedsieveError: the client cannot do what is asked, or its loss is not finite.
        """
        plan, data = self._plan, self._plan.federation
        request = self._unpack(payload)
        streams = Streams(plan.seed).at(round=request.round, client=client)
        who = Client(client, self.executor, data.train, data.parts[client], data.test, data.shares[client], streams, train_by)
        personal = plan.algorithm if request.kind == "eval" and isinstance(plan.algorithm, Personal) else None
        if request.kind == "eval" and personal is None:
            return evaluate(request, who), None
        module = type(plan.algorithm).__module__
        state = None if mine is None else thaw(mine, plan.spec.layout, module)
        state, kept = state or (None, {}) if plan.link else (state, {})
        if personal is not None:
            return personal.client_evaluate(request, who, state), None
        if not plan.link or request.kind != "train":
            reply, after = plan.algorithm.client_update(request, who, state)
        else:
            end = ClientEnd(plan.link, streams, kept)
            request = end.open(request)
            reply, after = plan.algorithm.client_update(request, who, state)
            reply, kept = end.close(request, reply)
        if plan.link:
            return reply, freeze((state if after is None else after, kept))
        return reply, None if after is None else freeze(after)

    def _evaluates(self, payload: bytes | memoryview) -> bool:
        with suppress(WireError):
            return self._unpack(payload).kind == "eval"
        return False

    def _unpack(self, payload: bytes | memoryview) -> Message:
        """Unpack a payload; one that came for the client before is not unpacked again."""
        if self._last is None or self._last[0] is not payload:
            self._last = (payload, unpack(payload, self._plan.spec.layout))
        return self._last[1]


def handle(device: Device, client: int, payload: bytes, mine: bytes | None) -> tuple[bytes, bytes | None]:
    """Play one request at one client: bytes -> bytes. Errors as in `Device.answer`."""
    reply, mine = device.answer(client, payload, mine)
    return pack(reply), mine
