"""Does a trained model tell who was in the training data? Two attacks on membership, with what they reach.

    loss     an example with a smaller loss is the likelier member (Yeom et al. 2018, arXiv 1709.01604)
    shadow   logistic regressions, one a class, learn from models of our own what membership looks like (Shokri et al. 2017,
             arXiv 1610.05820)

Members are training examples of the run's clients, non-members test examples. That sparse models tell less is what Stripelis
et al. 2022 (arXiv 2208.11669) report of FedSparsify.

A shadow model has the run's network and the density of each layer that the run had, update by update: it is trained in one
place on a random half of test examples that are not among the non-members, visits each of its examples as often as the run
visited one of its own on average, and is pruned by magnitude, whatever the method of the run ranks by. The other half are
its non-members. The regressions see an example's loss, the log odds that the model gives its class, and the entropy of its
scores.

Deviates: Shokri et al. train a neural network a class on the whole vector of scores. Yeom et al. call a member what has a loss
of at most the mean training loss; here that threshold is the balanced accuracy's, and the other measures have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsieve.data.batches import Examples, Federation
from fedsieve.errors import UsageError
from fedsieve.finish.roc import LEVEL, Ranked, Reals, described
from fedsieve.local.executor import EVALUATION_BATCH, Executor
from fedsieve.models.flow import one_thread
from fedsieve.models.spec import ModelSpec, cross_entropy
from fedsieve.params import Layout, Masks, Params
from fedsieve.settings import Local
from fedsieve.sparsity.scores import magnitude
from fedsieve.sparsity.select import select_by_slot
from fedsieve.streams import Stream, Streams

LEAST = 100
"""members, and non-members, without which a true positive rate at a false one of 1 % says nothing"""
LEAST_SHADOW, LEAST_CLASS = 50, 5
"""examples that a shadow model is trained on at least: in all, and for each class there is"""
LEAST_CLIENT = 30
"""training examples of a client that is told by itself"""
LEAST_KIND = 10
"""members and non-members of a class that gets a regression of its own; others share one"""
RESAMPLES = 1000
PERCENTILES = (5, 25, 50, 75, 95)
Indices = NDArray[np.int64]
Init = Literal["module", "kaiming", "glorot"]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Which examples an audit looks at, and how its shadow models are trained."""

    streams: Streams
    client: int | None
    """whose examples are members; None: those of all clients that took part"""
    clients: tuple[int, ...]
    """clients that took part"""
    members: Indices
    """all members, positions among the training examples"""
    others: Indices
    """all non-members, positions among the test examples"""
    drawn: tuple[Indices, Indices]
    """the members and the non-members, equally many, that are compared"""
    pool: Indices
    """test examples for shadow models"""
    shadows: int
    updates: Sequence[tuple[int, Mapping[str, float] | None]]
    """round that each update of a shadow model stands for, and densities after it; None: nothing pruned"""

    @property
    def ticks(self) -> int:
        """Updates of all shadow models."""
        return self.shadows * len(self.updates)

    def half(self, shadow: int) -> tuple[Indices, Indices]:
        """Return what a shadow model is trained on, and what not."""
        order = self.pool[self.streams.at(client=shadow)("audit/half").permutation(len(self.pool))]
        return order[: len(order) // 2], order[len(order) // 2 :]


def plan(
    data: Federation,
    rows: Sequence[Mapping[str, Any]],
    *,
    shadows: int = 8,
    clients: Sequence[int] | None = None,
    client: int | None = None,
    seed: int = 0,
) -> Plan:
    """Choose the examples of an audit.

    Args:
        data: the run's.
        rows: the run's records.
        shadows: shadow models, >= 0; without any, all test examples are non-members.
        clients: those that took part in a round; None: all.
        client: audit this client's examples only.
        seed: of all that is drawn.

    Raises:
        UsageError: there are too few examples; it says how many are needed.
    """
    took_part = tuple(range(len(data.parts)) if clients is None else clients)
    if client is not None and client not in took_part:
        raise UsageError(
            f"client {client} took part in no round; there are {len(took_part)} that did, such as {took_part[:5]}."
        )
    chosen = took_part if client is None else (client,)
    members = np.unique(np.concatenate([np.arange(0), *(data.parts[each] for each in chosen)]))
    half = max(LEAST_SHADOW, LEAST_CLASS * (1 if data.tokens else data.classes)) if shadows else 0
    if len(members) < LEAST:
        who = "the clients that took part hold" if client is None else f"client {client} holds"
        raise UsageError(
            f"{who} {len(members)} training examples: an audit needs {LEAST} members."
            + ("" if client is None else "\nLeave --client out to audit all clients together.")
        )
    if len(data.test) < LEAST + 2 * half:
        raise UsageError(
            f"the run has {len(data.test)} test examples; an audit needs {LEAST + 2 * half}: {LEAST} as non-members"
            + (f" and {2 * half} of which\nhalf train a shadow model. --shadows 0 leaves these out." if half else ".")
            + "\nElse audit a run with more test examples (data.test_limit)."
        )
    streams = Streams(seed)
    order = streams("audit/test").permutation(len(data.test))
    free = max(2 * half, len(order) // 2) if shadows else 0
    pool, others = np.sort(order[:free]), np.sort(order[free:])
    count = min(len(members), len(others))
    drawn = members[streams("audit/members").choice(len(members), count)]
    against = others[streams("audit/nonmembers").choice(len(others), count)]
    updates = _updates(rows, data) if shadows else []
    return Plan(streams, client, took_part, members, others, (drawn, against), pool, shadows, updates)


def _updates(rows: Sequence[Mapping[str, Any]], data: Federation) -> list[tuple[int, Mapping[str, float] | None]]:
    """Return the rounds that a shadow model follows, as many as an example of the run was visited in on average."""
    held = len(np.unique(np.concatenate([np.arange(0), *data.parts])))
    visits = max(1, round(sum(row.get("examples") or 0 for row in rows) / max(1, held)))
    places = [-(-update * len(rows) // visits) - 1 for update in range(1, visits + 1)]
    return [(rows[place]["round"], rows[place].get("densities")) for place in places]


def audit(
    chosen: Plan,
    spec: ModelSpec,
    params: Params,
    data: Federation,
    local: Local,
    *,
    init: Init = "glorot",
    rounds: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Attack a model; return what is found, as audit.json holds it (see docs/records.md).

    Args:
        chosen: the examples, see `plan`.
        spec: the network.
        params: the final model.
        data: the run's.
        local: how a client of the run trained.
        init: start of the shadow models, as model.init.
        rounds: of the run, for its learning-rate schedule; None: the last that the shadow models follow.
        tick: called after each update of a shadow model.

    Raises:
        UsageError: the model has a loss of its own.
        Diverged: the loss of a shadow model is not finite.
    """
    if spec.loss is not cross_entropy:
        raise UsageError("an audit reads the cross-entropy of class scores; this model has a loss of its own.")
    with one_thread():
        inside = signals(spec, params, data.train, chosen.members)
        outside = signals(spec, params, data.test, chosen.others)
        scores = {"loss": (-inside.loss, -outside.loss, -float(inside.loss.mean()))}
        told: dict[str, Any] = {"shadows": {"count": chosen.shadows}}
        if chosen.shadows:
            local = replace(local, device="cpu", compact=False)
            learned = list(_shadow_models(chosen, spec, data, local, init, rounds or chosen.updates[-1][0], tick))
            attack = Attack.learned([first for first, _ in learned], [second for _, second in learned])
            scores["shadow"] = (attack.scores(inside), attack.scores(outside), 0.0)
            told["shadows"] |= {
                "examples": len(chosen.half(0)[0]),
                "updates": len(chosen.updates),
                "epochs": len(chosen.updates) * local.epochs,
                "density": _density(spec.layout, chosen.updates[-1][1]),
                "accuracy": {
                    "members": float(np.mean([first.correct.mean() for first, _ in learned])),
                    "nonmembers": float(np.mean([second.correct.mean() for _, second in learned])),
                },
            }
    some, against = (np.searchsorted(*pair) for pair in zip((chosen.members, chosen.others), chosen.drawn, strict=True))
    attacks = {}
    for name, (members, others, threshold) in scores.items():
        stream = chosen.streams(f"audit/bootstrap/{name}")
        attacks[name] = {
            **described(Ranked.of(members[some], others[against]), threshold, RESAMPLES, stream),
            "clients": _by_client(chosen, data, (members, inside.label), (others, outside.label), threshold),
        }
    steps = np.linspace(0, 1, 101)
    return {
        "version": 1,
        "seed": chosen.streams.seed,
        "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        "client": chosen.client,
        "clients": len(chosen.clients),
        "examples": {"each": len(some), "members": len(chosen.members), "nonmembers": len(chosen.others)},
        "accuracy": {"members": float(inside.correct[some].mean()), "nonmembers": float(outside.correct[against].mean())},
        "losses": {
            "members": np.quantile(inside.loss[some], steps).tolist(),
            "nonmembers": np.quantile(outside.loss[against], steps).tolist(),
        },
        **told,
        "attacks": attacks,
    }


# ------------------------------------------------------------------------------------------------ what a model shows


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """What an attacker sees of some examples, each of shape (n,); of sequences the mean over their symbols."""

    loss: Reals
    odds: Reals
    """log of the probability of the true class over that of all others"""
    entropy: Reals
    correct: Reals
    label: Indices
    """the class; 0 for sequences, which have none"""

    @property
    def features(self) -> Reals:
        """What the regressions see, shape (n, 3)."""
        return np.stack([self.loss, self.odds, self.entropy], axis=1)


@torch.no_grad()
def signals(spec: ModelSpec, params: Params, examples: Examples, order: Indices) -> Signals:
    """Return what a model shows of examples, without augmentation."""
    module, tensors = deepcopy(spec.module).eval(), dict(params)
    found = []
    for x, y in examples.epoch(order, EVALUATION_BATCH):
        scores = torch.func.functional_call(module, tensors, (x,)).double()
        found.append(_shown(scores, y))
    loss, odds, entropy, correct = (torch.cat(column).numpy() for column in zip(*found, strict=True))
    labels = examples.y[torch.from_numpy(np.asarray(order))]
    flat = labels.numpy() if labels.dim() == 1 else np.zeros(len(order), dtype=np.int64)
    return Signals(loss, odds, entropy, correct, flat)


def _shown(scores: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Return loss, log odds, entropy and whether the prediction is right, each of shape (B,); scores (B, ..., classes)."""
    truth, logs = y.clamp(min=0).unsqueeze(-1), scores.log_softmax(-1)
    loss = -logs.gather(-1, truth).squeeze(-1)
    odds = scores.gather(-1, truth).squeeze(-1) - scores.scatter(-1, truth, -torch.inf).logsumexp(-1)
    each = (loss, odds, -(logs.exp() * logs).sum(-1), (scores.argmax(-1) == y).double())
    if y.dim() == 1:
        return each
    counts = (y != -100).double()  # symbols that pad a sequence do not count
    return tuple((part * counts).sum(1) / counts.sum(1).clamp(min=1) for part in each)


# ------------------------------------------------------------------------------------------------ shadow models


def _shadow_models(
    chosen: Plan, spec: ModelSpec, data: Federation, local: Local, init: Init, rounds: int, tick: Callable[[], None]
) -> Iterator[tuple[Signals, Signals]]:
    """Train the shadow models; yield what each shows of its members and of its non-members."""
    executor, examples = Executor(spec, local, rounds), replace(data.test, augment=data.train.augment)
    for shadow in range(chosen.shadows):
        own, rest = chosen.half(shadow)
        params = shadow_model(chosen, shadow, executor, examples, own, init, tick)
        yield signals(spec, params, data.test, own), signals(spec, params, data.test, rest)


def shadow_model(
    chosen: Plan,
    shadow: int,
    executor: Executor,
    examples: Examples,
    own: Indices,
    init: Init,
    tick: Callable[[], None] = lambda: None,
) -> Params:
    """Train one model on some examples, each layer as dense as the run's was."""
    spec, streams = executor.spec, chosen.streams.at(client=shadow)
    params, masks = spec.initial(init, streams), Masks.full(spec.layout)
    for number, (round_, densities) in enumerate(chosen.updates):
        here = streams.at(round=round_)
        under = None if masks.count == spec.layout.maskable else masks
        params = executor.train(params, examples, own, here, masks=under, purpose=f"audit/{number}").params
        if densities is not None:
            masks = _pruned(params, masks, densities, here(f"audit/{number}/prune"))
            params = params.under(masks)
        tick()
    return params


def _pruned(params: Params, masks: Masks, densities: Mapping[str, float], ties: Stream) -> Masks:
    """Keep the largest weights of each layer, as many as its density says, and no more than there are."""
    keep = {slot.name: round(densities.get(slot.name, 1.0) * slot.numel) for slot in masks.layout.masked_slots}
    return select_by_slot(magnitude(params), keep, within=masks, ties=ties)


def _density(layout: Layout, densities: Mapping[str, float] | None) -> float:
    if densities is None or not layout.maskable:
        return 1.0
    kept = sum(round(densities.get(slot.name, 1.0) * slot.numel) for slot in layout.masked_slots)
    return kept / layout.maskable


@dataclass(frozen=True, slots=True, eq=False)
class Attack:
    """Logistic regressions from what a model shows of an example to the log odds that it is a member."""

    centre: Reals
    spread: Reals
    shared: Any
    """of all classes"""
    own: Mapping[int, Any]
    """of the classes with enough examples"""

    @classmethod
    def learned(cls, members: Sequence[Signals], others: Sequence[Signals]) -> Attack:
        """Learn from examples that are members of their model, and from such as are not."""
        from sklearn.linear_model import LogisticRegression

        groups = (*members, *others)
        features = np.concatenate([group.features for group in groups])
        centre, spread = features.mean(0), np.maximum(features.std(0), 1e-12)
        features = (features - centre) / spread
        labels = np.concatenate([group.label for group in groups])
        is_member = np.concatenate([np.full(len(group.label), i < len(members)) for i, group in enumerate(groups)])

        def fitted(where: NDArray[np.bool_]) -> Any:
            return LogisticRegression(max_iter=1000).fit(features[where], is_member[where])

        own = {}
        for label in np.unique(labels):
            where = labels == label
            if min(is_member[where].sum(), (~is_member[where]).sum()) >= LEAST_KIND:
                own[int(label)] = fitted(where)
        return cls(centre, spread, fitted(np.ones(len(labels), dtype=bool)), own)

    def scores(self, shown: Signals) -> Reals:
        """Return the log odds of membership, shape (n,)."""
        features = (shown.features - self.centre) / self.spread
        found: Reals = self.shared.decision_function(features)
        for label, regression in self.own.items():
            where = shown.label == label
            if where.any():
                found[where] = regression.decision_function(features[where])
        return found


# ------------------------------------------------------------------------------------------------ by client


def _by_client(
    chosen: Plan, data: Federation, members: tuple[Reals, Indices], others: tuple[Reals, Indices], threshold: float
) -> dict[str, Any]:
    """Return percentiles over the clients, each with all its examples, against non-members weighted to its labels."""
    found = []
    for client in chosen.clients if chosen.client is None else (chosen.client,):
        places = np.searchsorted(chosen.members, data.parts[client])
        if (measures := one_client(members[0][places], members[1][places], *others, threshold)) is not None:
            found.append(measures)
    if not found:
        return {"count": 0}
    percentiles = {
        key: {f"p{p}": float(np.percentile([each[key] for each in found], p)) for p in PERCENTILES} for key in found[0]
    }
    return {"count": len(found), **percentiles}


def one_client(
    scores: Reals, labels: Indices, other_scores: Reals, other_labels: Indices, threshold: float
) -> dict[str, float] | None:
    """Return the measures of one client; None if it has too few examples of classes that non-members have too.

    Non-members are weighted so that their classes weigh as much as the client's: a client of easy classes is no leak.
    """
    count = max(labels.max(initial=0), other_labels.max(initial=0)) + 1
    there = np.bincount(other_labels, minlength=count)
    known = there[labels] > 0
    if known.sum() < LEAST_CLIENT:
        return None
    wanted = np.bincount(labels[known], minlength=count)
    weights = wanted[other_labels] / there[other_labels]
    return Ranked.of(scores[known], other_scores).curve(negative=weights).measures(threshold)
