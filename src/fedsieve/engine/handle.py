"""The client's end of the wire: bytes in, bytes out.

All that is here may be at a client in a deployment: the method and its settings, the model, the client's own data and its own
state from earlier rounds. Nothing else reaches it but the bytes of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsieve.algorithms.base import Algorithm, evaluate
from fedsieve.data.batches import Federation
from fedsieve.engine.freeze import freeze, thaw
from fedsieve.local.executor import Client, Executor
from fedsieve.models.spec import ModelSpec
from fedsieve.settings import Local
from fedsieve.streams import Streams
from fedsieve.wire.message import Message, pack, unpack


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a run consists of at the clients' end."""

    algorithm: Algorithm[Any, Any, Any]
    spec: ModelSpec
    federation: Federation
    local: Local
    rounds: int
    seed: int


class Device:
    """A machine that plays clients, one after another: in a simulation many, in a deployment one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.executor = Executor(plan.spec, plan.local, plan.rounds)
        self._last: tuple[bytes | memoryview, Message] | None = None

    def answer(self, client: int, payload: bytes | memoryview, mine: bytes | None) -> tuple[Message, bytes | None]:
        """Play a client that received a request: return its reply and the state that it keeps from now on, frozen.

        None instead of a state: it keeps what it kept before.

        Raises:
            WireError: the payload is no valid request.
            FedsieveError: the client cannot do what is asked, or its loss is not finite.
        """
        plan, data = self._plan, self._plan.federation
        request = self._unpack(payload)
        streams = Streams(plan.seed).at(round=request.round, client=client)
        who = Client(client, self.executor, data.train, data.parts[client], data.test, data.shares[client], streams)
        if request.kind == "eval":
            return evaluate(request, who), None
        module = type(plan.algorithm).__module__
        state = None if mine is None else thaw(mine, plan.spec.layout, module)
        reply, state = plan.algorithm.client_update(request, who, state)
        return reply, None if state is None else freeze(state)

    def _unpack(self, payload: bytes | memoryview) -> Message:
        """Unpack a payload; one that came for the client before is not unpacked again."""
        if self._last is None or self._last[0] is not payload:
            self._last = (payload, unpack(payload, self._plan.spec.layout))
        return self._last[1]


def handle(device: Device, client: int, payload: bytes, mine: bytes | None) -> tuple[bytes, bytes | None]:
    """Play one request at one client: bytes -> bytes. Errors as in `Device.answer`."""
    reply, mine = device.answer(client, payload, mine)
    return pack(reply), mine
