"""One round: state -> broadcast -> bytes -> client update -> bytes -> aggregate -> state, and its record.

A round is one such exchange, or several where a method has phases: it ends when the method's state says so (`state.round`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedsieve.algorithms.base import Algorithm, Job, Personal, counts, evaluation, network
from fedsieve.engine.link import ServerEnd
from fedsieve.engine.masking import Own, moved
from fedsieve.engine.transports import Lost, Transport
from fedsieve.errors import Diverged
from fedsieve.params import Masks, Params
from fedsieve.settings import Engine
from fedsieve.wire.ledger import Ledger
from fedsieve.wire.message import Message, WireError, pack, unpack

Row = dict[str, Any]
"""the record of one round, see docs/records.md"""
EXCHANGES = 64
"""most exchanges that a round may consist of"""


def play(
    algorithm: Algorithm[Any, Any, Any],
    state: Any,
    round: int,
    job: Job,
    engine: Engine,
    transport: Transport,
    link: ServerEnd | None = None,
) -> tuple[Any, Row]:
    """Play one round; return the next state and the record. `link` is of this round; None: nothing is compressed.

    Raises:
        Diverged: a client's loss is not finite and engine.nonfinite is "stop".
    """
    spent, before = transport.flops, state
    cohort = draw(job, engine, round)
    exchange = Exchange(job, engine, transport, Ledger(), link)
    for _ in range(EXCHANGES):
        requests = exchange.send(algorithm.broadcast(state, cohort))
        present = {client: payload for client, payload in requests.items() if not drops_out(job, engine, round, client)}
        exchange.lost.update(dict.fromkeys(requests.keys() - present.keys(), "dropped out"))
        replies = exchange.receive(present)
        state = algorithm.aggregate(state, exchange.read(algorithm, state, replies))
        if state.round >= round:
            break
    else:
        raise RuntimeError(f"{type(algorithm).__name__} did not end round {round} in {EXCHANGES} exchanges")
    params, masks = algorithm.finalize(state)
    row: Row = {"round": round, "accuracy": None, "loss": None, "train_loss": exchange.train_loss()}
    row |= {"client_accuracy": None, "tuned_accuracy": None}
    row |= {"clients": len(cohort), "examples": exchange.examples, "flops": transport.flops - spent}
    row |= {"client_memory": getattr(state, "client_memory", None)}
    row |= {"density": masks.density, "densities": masks.densities() if masks.density < 1 else None}
    row |= moved(algorithm, before, round, params, masks) | {"client_overlap": exchange.own.overlap()}
    row["events"] += [str(event) for event in getattr(state, "events", ())]
    if round % engine.eval_every == 0 or round == engine.rounds:
        found = transport.evaluate(params, masks, network(algorithm, state, job.spec))
        row |= {"accuracy": found.accuracy, "loss": found.mean_loss}
        untuned, tuned = exchange.evaluate(algorithm, state, params, masks)
        row |= {"client_accuracy": _percentiles(untuned), "tuned_accuracy": _percentiles(tuned)}
    row |= exchange.link.row() | {"lost": {str(client): reason for client, reason in sorted(exchange.lost.items())}}
    return state, row | exchange.ledger.row() | {"peak_memory_mb": transport.peak_memory() / 1e6}


def draw(job: Job, engine: Engine, round: int) -> list[int]:
    """Draw the cohort of a round, ascending: uniformly without replacement, or everybody."""
    if not engine.cohort:
        return list(range(job.clients))
    return [int(client) for client in job.streams.at(round=round)("cohort").choice(job.clients, engine.cohort)]


def drops_out(job: Job, engine: Engine, round: int, client: int) -> bool:
    """Whether a client drops out of a round after it received the broadcast."""
    return bool(engine.dropout) and job.streams.at(round=round, client=client)("dropout").uniform(1)[0] < engine.dropout


def took_part(job: Job, engine: Engine, rows: Sequence[Row]) -> list[int]:
    """Return the clients, ascending, whose reply counted in one of these rounds."""
    there = (set(draw(job, engine, row["round"])) - {int(client) for client in row["lost"]} for row in rows)
    return sorted(set().union(*there))


class Exchange:
    """Messages of one round on their way: packs, counts, unpacks, and notes who was lost."""

    def __init__(self, job: Job, engine: Engine, transport: Transport, ledger: Ledger, link: ServerEnd | None = None) -> None:
        self._job, self._engine, self._transport, self.ledger = job, engine, transport, ledger
        self.link = link or ServerEnd.plain(job.layout)
        self.lost: dict[int, str] = {}
        self.examples = 0
        self.own = Own()
        """clients' own masks, of the last exchange that had some"""
        self._losses: list[tuple[float, int]] = []

    def send(self, messages: Mapping[int, Message]) -> dict[int, bytes]:
        """Pack each distinct message once and count it for each client that receives it."""
        messages = self.link.send(messages)
        packed = {key: pack(message) for key, message in {id(m): m for m in messages.values()}.items()}
        requests = {client: packed[id(message)] for client, message in messages.items()}
        for payload in requests.values():
            self.ledger.count("down", payload)
        return requests

    def receive(self, requests: Mapping[int, bytes]) -> Iterator[tuple[int, Message]]:
        """Carry requests to their clients; yield the replies in ascending client id, counted and unpacked."""
        for client, payload in self._transport.exchange(requests):
            if isinstance(payload, Lost):
                if payload.diverged and self._engine.nonfinite == "stop":
                    raise Diverged(
                        f'{payload.reason}.\nTry a smaller local.lr, or engine.nonfinite = "drop" to leave such clients out.'
                    )
                self.lost[client] = payload.reason
                continue
            self.ledger.count("up", payload)
            try:
                yield client, unpack(payload, self._job.layout)
            except WireError as error:
                self.lost[client] = str(error)

    def read(
        self, algorithm: Algorithm[Any, Any, Any], state: Any, replies: Iterable[tuple[int, Message]]
    ) -> Iterator[tuple[int, Any]]:
        """Decode replies as the method reads them; one that is not valid counts as lost."""
        own = Own()

        def decode(reply: Message) -> tuple[Any, float, int]:
            loss, examples = (reply.number(name) if name in reply.sections else 0 for name in ("loss", "examples"))
            return algorithm.read(state, reply), float(loss), int(examples)

        for client, reply, found in self.link.read(replies, decode):
            if isinstance(found, WireError):
                self.lost[client] = str(found)
                continue
            content, loss, examples = found
            if reply.kind == "train":
                self._losses.append((loss, examples))
                self.examples += examples
            own.add(content)
            self.own = own if own.any else self.own
            yield client, content

    def train_loss(self) -> float | None:
        """Mean of the clients' training losses by examples; None if nobody answered."""
        return sum(loss * n for loss, n in self._losses) / self.examples if self.examples else None

    def evaluate(
        self, algorithm: Algorithm[Any, Any, Any], state: Any, params: Params, masks: Masks
    ) -> tuple[list[float], list[float]]:
        """Have clients evaluate on their own test examples: the global model, or their own where the method keeps such.

        Returns:
            The accuracy of each client that holds some; and the same after `engine.eval_tune` epochs of training, if any.
        """
        job, wanted, epochs = self._job, self._engine.eval_clients, self._engine.eval_tune
        if not wanted:
            return [], []
        chosen = range(job.clients) if job.clients <= wanted else job.streams("evaluation").choice(job.clients, wanted)
        clients = [int(client) for client in chosen]
        if isinstance(algorithm, Personal):
            messages = algorithm.evaluation(state, clients, epochs)
        else:
            messages = dict.fromkeys(clients, evaluation(params, masks, state.round, epochs))
        found = []
        for client, reply in self.receive(self.send(messages)):
            try:
                found.append(counts(reply, 2 if epochs else 1))
            except WireError as error:
                self.lost[client] = str(error)
        untuned, *tuned = zip(*found, strict=True) if found else ((),)
        shown = [[metrics.accuracy for metrics in each if metrics.predictions] for each in (untuned, *tuned)]
        return shown[0], shown[1] if tuned else []


def total(rows: Sequence[Row], key: str) -> Any:
    """Sum a column of the record."""
    return sum(row[key] for row in rows)


def _percentiles(accuracies: list[float]) -> dict[str, float] | None:
    """Describe how accuracy is spread over the clients; worst10 is the mean of the worst tenth (at least one)."""
    if not accuracies:
        return None
    ordered = np.sort(accuracies)
    described = {"mean": float(ordered.mean()), "std": float(ordered.std())}
    described |= {f"p{p}": float(np.percentile(ordered, p)) for p in (5, 10, 25, 50, 75, 90, 95)}
    return described | {"worst10": float(ordered[: max(1, len(ordered) // 10)].mean())}
