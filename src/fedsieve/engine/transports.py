"""Carriers of payloads between the server and simulated clients: in this process, or in worker processes.

Both play the same groups of clients with the same one-thread kernels and hand replies back in ascending client id, so a result
does not depend on which one is used, nor on the number of workers. One worker plays a group, by default one client.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import resource
import selectors
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from fedsieve.data.partition import Parts
from fedsieve.engine import nursery
from fedsieve.engine.arena import Arena, SharedTensor
from fedsieve.engine.handle import Answer, Device, Plan
from fedsieve.engine.states import ClientStates
from fedsieve.errors import Diverged, FedsieveError
from fedsieve.local.executor import EVALUATION_BATCH, Metrics
from fedsieve.models.spec import ModelSpec
from fedsieve.params import Layout, Masks, Params
from fedsieve.wire.message import Message, WireError, pack, pack_into, packed_size

SHARD = 8 * EVALUATION_BATCH
"""test examples that the server evaluates in one piece; sums are taken over pieces in order"""

AHEAD = 4
"""clients per worker, or two groups if that is more, that may be under way before the next reply in order has come: bounds the
server's memory"""


@dataclass(frozen=True, slots=True)
class Lost:
    """A client whose reply does not count, and why."""

    reason: str
    diverged: bool = False


class Transport(Protocol):
    """Carries requests to clients and replies back."""

    states: ClientStates
    """what each client keeps between its rounds, frozen; here only because the simulator plays the clients"""

    @property
    def flops(self) -> int:
        """Floating-point operations that training took so far."""

    def exchange(self, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes | bytearray | Lost]]:
        """Carry each client's request to it; yield the replies in ascending client id."""

    def evaluate(self, params: Params, masks: Masks, spec: ModelSpec | None = None) -> Metrics:
        """Evaluate a model on the server's test examples; `spec`: of another network. Carries nothing and counts nothing."""

    def peak_memory(self) -> int:
        """Largest resident memory so far, in bytes, summed over processes (shared pages count in each)."""

    def close(self) -> None:
        """End what was started, and close the file of the clients' states."""


class Sequential:
    """Plays one client after another in this process."""

    def __init__(self, plan: Plan, states: ClientStates | None = None) -> None:
        self.states = ClientStates() if states is None else states
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._plan = replace(plan, federation=plan.federation.to(torch.device(plan.local.device)))
        self._device = Device(self._plan)

    @property
    def flops(self) -> int:
        """Floating-point operations that training took so far."""
        return self._device.executor.total_flops

    def exchange(self, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes | bytearray | Lost]]:
        """Carry each client's request to it; yield the replies in ascending client id."""
        for group in groups(requests, self._plan.group):
            asked = [(client, requests[client], self.states.get(client)) for client in group]
            for client, answer in zip(group, self._device.answers(asked), strict=True):
                payload, mine = _sent(answer, pack)
                if mine is not None:
                    self.states.put(client, mine)
                yield client, payload

    def evaluate(self, params: Params, masks: Masks, spec: ModelSpec | None = None) -> Metrics:
        """Evaluate on the server's test examples."""
        spec = spec or self._plan.spec
        pieces = [_evaluate(self._device, self._plan, spec, params, masks, shard) for shard in range(_shards(self._plan))]
        return sum(pieces, Metrics(0, 0.0, 0))

    def peak_memory(self) -> int:
        """Largest resident memory so far, in bytes."""
        return peak_memory()

    def close(self) -> None:
        """Give torch its threads back, and close the file of the clients' states."""
        self.states.close()
        torch.set_num_threads(self._threads)


class Workers:
    """Plays clients in persistent worker processes of one thread each; data, broadcast and replies cross in shared memory."""

    def __init__(self, plan: Plan, count: int, states: ClientStates | None = None) -> None:
        self.states = ClientStates() if states is None else states
        self.flops = 0
        self._plan, self._layout = plan, plan.spec.layout
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a second thread here would take a core from a worker
        self._sent = Arena(_BROADCASTS * _room(self._layout))
        self._peaks = [0] * count
        shared = _shared(plan)
        context = nursery.context()
        self._pipes: list[Connection] = []
        self._selector = selectors.DefaultSelector()
        self._slots: list[Arena] = []
        self._processes = []
        with nursery.one_thread_each():
            for _ in range(count):
                ours, theirs = context.Pipe()
                slots = Arena(2 * plan.group * _room(self._layout))
                process = context.Process(target=_work, args=(theirs, ours, shared, self._sent, slots), daemon=True)
                process.start()
                theirs.close()
                self._selector.register(ours, selectors.EVENT_READ, data=len(self._pipes))
                self._pipes.append(ours)
                self._slots.append(slots)
                self._processes.append(process)
        self.peak_memory()  # wait until all are ready

    def exchange(self, requests: Mapping[int, bytes]) -> Iterator[tuple[int, bytes | bytearray | Lost]]:
        """Carry each client's request to it; yield the replies in ascending client id."""
        order = groups(requests, self._plan.group)
        places = self._place(requests)
        # A second request may wait at a worker only if it is small: a large one would block this end while the worker, blocked
        # by its own large answer, does not read.
        small = len(places) == len(set(map(id, requests.values()))) and not self.states
        depth = 2 if small and len(order) >= 8 * len(self._pipes) else 1
        ahead = max(AHEAD // self._plan.group, 2 if self._plan.group > 1 else 1) * len(self._pipes)
        queued = [0] * len(self._pipes)
        ready: dict[int, bytes | bytearray | Lost] = {}
        handed = 0
        for done, group in enumerate(order):
            while group[0] not in ready:
                while handed < min(len(order), done + ahead) and min(queued) < depth:
                    worker = queued.index(min(queued))
                    sent = [(client, requests[client], self.states.get(client)) for client in order[handed]]
                    self._send(worker, ("clients", [(who, places.get(id(what), what), mine) for who, what, mine in sent]))
                    queued[worker] += 1
                    handed += 1
                for worker in self._ready():
                    answers, flops = self._receive(worker)
                    queued[worker] -= 1
                    self.flops += flops
                    for client, reply, mine in answers:
                        ready[client] = self._fetch(worker, reply)
                        if mine is not None:
                            self.states.put(client, mine)
            for client in group:
                yield client, ready.pop(client)

    def evaluate(self, params: Params, masks: Masks, spec: ModelSpec | None = None) -> Metrics:
        """Evaluate on the server's test examples, in pieces spread over the workers."""
        model, support = _model_in(self._sent, params.layout)
        model.flat.copy_(params.flat)
        support.kept.copy_(masks.kept)
        for worker in range(len(self._pipes)):
            self._send(worker, ("evaluate", list(range(worker, _shards(self._plan), len(self._pipes))), spec))
        pieces: dict[int, Metrics] = {}
        for worker in range(len(self._pipes)):
            pieces.update(self._receive(worker))
        return sum((pieces[shard] for shard in sorted(pieces)), Metrics(0, 0.0, 0))

    def peak_memory(self) -> int:
        """Largest resident memory so far, in bytes, summed over processes."""
        for worker in range(len(self._pipes)):
            self._send(worker, ("memory",))
            self._peaks[worker] = self._receive(worker)
        return peak_memory() + sum(self._peaks)

    def close(self) -> None:
        """End the workers, and close the file of the clients' states."""
        self.states.close()
        self._selector.close()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            pipe.close()
        for process in self._processes:
            process.join()
        torch.set_num_threads(self._threads)

    def _place(self, requests: Mapping[int, bytes]) -> dict[int, tuple[int, int]]:
        """Put the payloads that several clients get into shared memory; return where each stands: id -> (begin, end)."""
        places: dict[int, tuple[int, int]] = {}
        begin = 0
        distinct = {id(payload): payload for payload in requests.values()}
        for key, uses in Counter(map(id, requests.values())).items():
            payload = distinct[key]
            if uses > 1 and begin + len(payload) <= self._sent.nbytes:
                self._sent.view[begin : begin + len(payload)] = payload
                places[key] = (begin, begin + len(payload))
                begin += -(-len(payload) // 64) * 64
        for worker in range(len(self._pipes)):
            self._send(worker, ("exchange",))
        return places

    def _fetch(self, worker: int, reply: Any) -> bytes | bytearray | Lost:
        if isinstance(reply, tuple):
            begin, end = reply
            return bytearray(self._slots[worker].view[begin:end])
        return reply  # type: ignore[no-any-return]

    def _ready(self) -> list[int]:
        """Wait until a worker has something to say; return which."""
        return [key.data for key, _ in self._selector.select()]

    def _send(self, worker: int, task: tuple[Any, ...]) -> None:
        try:
            _send(self._pipes[worker], task)
        except OSError:
            raise self._died(worker) from None

    def _receive(self, worker: int) -> Any:
        try:
            answer = _receive(self._pipes[worker])
        except (EOFError, OSError):
            raise self._died(worker) from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"a worker failed\n{answer.text}")
        return answer

    def _died(self, worker: int) -> FedsieveError:
        self._processes[worker].join(timeout=1)
        code = self._processes[worker].exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return FedsieveError(f"worker {worker} ended unexpectedly ({how}); if memory ran out, use fewer engine.workers.")


def groups(clients: Iterable[int], most: int) -> list[list[int]]:
    """Share clients out, ascending, among as few groups of at most `most` as suffice, as evenly as can be."""
    order = sorted(clients)
    count = -(-len(order) // most)
    return [order[part * len(order) // count : (part + 1) * len(order) // count] for part in range(count)]


def peak_memory() -> int:
    """Return this process's largest resident memory so far, in bytes."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a worker says when it meets an error that is no client's."""

    text: str


_BROADCASTS = 8
"""dense payloads that the block for shared requests holds; further ones go through the pipe"""


def _room(layout: Layout) -> int:
    """Bytes that a dense payload of the layout surely fits in."""
    return 4 * layout.size + layout.maskable // 8 + (1 << 16)


R = TypeVar("R")


def _sent(answer: Answer | FedsieveError | WireError, put: Callable[[Message], R]) -> tuple[R | Lost, bytes | None]:
    """Pack a client's reply; return what `put` returns, and the state that the client keeps. A client may be lost here too."""
    try:
        if isinstance(answer, Exception):
            raise answer
        reply, mine = answer
        return put(reply), mine
    except (FedsieveError, WireError) as error:
        return Lost(str(error), diverged=isinstance(error, Diverged)), None


def _shards(plan: Plan) -> int:
    return -(-len(plan.federation.test) // SHARD)


def _model_in(block: Arena, layout: Layout) -> tuple[Params, Masks]:
    """Return the model that stands at the beginning of a shared block, for an evaluation."""
    flat, kept = (
        torch.from_numpy(np.frombuffer(block.view, dtype, count, begin))
        for dtype, count, begin in ((np.float32, layout.size, 0), (np.bool_, layout.maskable, 4 * layout.size))
    )
    return Params(layout, flat), Masks(layout, kept)


def _evaluate(device: Device, plan: Plan, spec: ModelSpec, params: Params, masks: Masks, shard: int) -> Metrics:
    test = plan.federation.test
    return device.executor.of(spec).evaluate(params, test, np.arange(shard * SHARD, min(len(test), (shard + 1) * SHARD)), masks)


def _shared(plan: Plan) -> dict[str, SharedTensor]:
    """Put a plan into memory that all workers share: the examples and who holds which as they are, all else pickled."""
    data = plan.federation
    tensors = {"x": data.train.x, "y": data.train.y, "test_x": data.test.x, "test_y": data.test.y}
    for name, parts in (("parts", Parts.of(data.parts)), ("shares", Parts.of(data.shares))):
        tensors |= {name: torch.from_numpy(parts.flat), f"{name}_bounds": torch.from_numpy(parts.bounds)}
    empty = torch.empty(0)
    train, test = replace(data.train, x=empty, y=empty), replace(data.test, x=empty, y=empty)
    bare = replace(data, train=train, test=test, parts=(), shares=())
    rest = torch.frombuffer(bytearray(pickle.dumps(replace(plan, federation=bare))), dtype=torch.uint8)
    return {name: SharedTensor(tensor, move=name in ("x", "test_x")) for name, tensor in (tensors | {"rest": rest}).items()}


def _whole(shared: Mapping[str, SharedTensor]) -> Plan:
    plan: Plan = pickle.loads(shared["rest"].tensor().numpy().data)  # noqa: S301  written by the process that started this one
    data = plan.federation
    train = replace(data.train, x=shared["x"].tensor(), y=shared["y"].tensor())
    test = replace(data.test, x=shared["test_x"].tensor(), y=shared["test_y"].tensor())
    parts, shares = (
        Parts(shared[name].tensor().numpy(), shared[f"{name}_bounds"].tensor().numpy()) for name in ("parts", "shares")
    )
    return replace(plan, federation=replace(data, train=train, test=test, parts=parts, shares=shares))


def _work(pipe: Connection, parent: Connection, shared: Any, sent: Arena, slots: Arena) -> None:
    """Run a worker: take tasks until the server's end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent.close()
    Thread(target=_die_with_the_server, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        plan = _whole(shared)
        device = Device(plan)
        room, turn = slots.nbytes // (2 * plan.group), 0
        views: dict[tuple[int, int], memoryview] = {}
        while True:
            task = _receive(pipe)
            if task[0] == "exchange":
                views = {}
            elif task[0] == "evaluate":
                spec = task[2] or plan.spec
                model = _model_in(sent, spec.layout)
                _send(pipe, {shard: _evaluate(device, plan, spec, *model, shard) for shard in task[1]})
            elif task[0] == "memory":
                _send(pipe, peak_memory())
            else:
                asked = [
                    (client, views.setdefault(at, sent.view[slice(*at)].toreadonly()) if isinstance(at, tuple) else at, mine)
                    for client, at, mine in task[1]
                ]
                before = device.executor.total_flops
                turn = 1 - turn
                answers = []
                for place, ((client, *_), answer) in enumerate(zip(asked, device.answers(asked), strict=True)):
                    begin = (turn * plan.group + place) * room
                    answers.append((client, *_sent(answer, partial(_put, slots.view[begin : begin + room], begin))))
                _send(pipe, (answers, device.executor.total_flops - before))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except BaseException:
        with suppress(OSError):
            _send(pipe, _Failure(traceback.format_exc()))


def _put(slot: memoryview, begin: int, message: Message) -> tuple[int, int] | bytes:
    """Pack a reply into its slot; return where it stands in the block, or the reply itself if it has no room there."""
    size = packed_size(message)
    if size > len(slot):
        whole = bytearray(size)
        pack_into(message, memoryview(whole))
        return bytes(whole)
    pack_into(message, slot[:size])
    return begin, begin + size


def _send(pipe: Connection, content: Any) -> None:
    """Send anything. `Connection.send` sets up a pickler of its own for each message, which takes as long as the rest."""
    pipe.send_bytes(pickle.dumps(content, pickle.HIGHEST_PROTOCOL))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())  # noqa: S301  written by `_send` at the other end


def _die_with_the_server() -> None:
    """Wait until the server's process ends, however that ends, and end this one."""
    server = multiprocessing.parent_process()
    if server is not None:
        server.join()
    os._exit(1)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it after each step: saves hundreds of page faults a step."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
            libc.mallopt(-8, 1)  # M_ARENA_MAX: the threads of a group take turns, so one heap does for all
