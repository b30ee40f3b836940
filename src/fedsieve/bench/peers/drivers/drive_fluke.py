"""Plays a job with fluke: `python drive_fluke.py JOB.npz RECORD.json`.

FedAVG with the keys of fluke's own configuration, its FastDataLoader, models in memory, evaluation by the server alone. fluke
plays its clients one after another; its parallel server is for several GPUs.
"""

import sys
from collections.abc import Sequence

import numpy as np
import torch
from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.client import Client
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.evaluation import ClassificationEval
from fluke.server import Server
from fluke.utils import FederationObserver, ServerObserver
from textbook import EVALUATION_BATCH, Job, Record
from torchmetrics import Accuracy


class Clock(FederationObserver, ServerObserver):
    """Notes the end of each round and the accuracy that the server found in it."""

    def __init__(self, every: int) -> None:
        self.record, self._every, self._accuracy = Record(), every, None

    def server_evaluation(self, round: int, eval_type: str, evals: dict[str, float]) -> None:
        """Keep the accuracy of a round that was evaluated; fluke evaluates the first one as well."""
        self._accuracy = evals.get("accuracy") if round % self._every == 0 else None

    def end_round(self, round: int) -> None:
        """Note the time."""
        self.record.ended(self._accuracy)
        self._accuracy = None


def main(path: str, out: str) -> None:
    """Run FedAVG with the cohorts of the job."""
    job = Job.read(path)
    cohorts = iter(job.cohorts)

    class Drawn(Server):
        """A server that is told the cohorts."""

        def get_eligible_clients(self, eligible_perc: float) -> Sequence[Client]:
            return [self.clients[client] for client in next(cohorts)]

    class Told(FedAVG):
        """FedAVG with that server."""

        def get_server_class(self) -> type[Server]:
            return Drawn

    def loader(x: torch.Tensor, y: torch.Tensor, batch: int, shuffle: bool) -> FastDataLoader:
        return FastDataLoader(x, y, num_labels=10, batch_size=batch, shuffle=shuffle)

    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=True)
    accuracy = Accuracy(task="multiclass", num_classes=10, top_k=1)
    environment.set_evaluator(ClassificationEval(eval_every=job.every, n_classes=10, accuracy=accuracy))
    data = DummyDataContainer(
        clients_tr=[loader(job.x_train[part], job.y_train[part], job.batch, shuffle=True) for part in job.parts],
        clients_te=[None] * job.clients,
        server_data=loader(job.x_test, job.y_test, EVALUATION_BATCH, shuffle=False),
        num_classes=10,
    )
    settings = DDict(
        client=DDict(
            batch_size=job.batch,
            local_epochs=1,
            loss="CrossEntropyLoss",
            optimizer=DDict(lr=job.lr),
            scheduler=DDict(gamma=1, step_size=1),
        ),
        server=DDict(weighted=True),
        model=job.network(),
    )
    algorithm = Told(job.clients, DataSplitter(data), settings)
    clock = Clock(job.every)
    algorithm.set_callbacks([clock])
    np.random.seed(0)  # noqa: NPY002 fluke draws from numpy's global generator
    algorithm.run(job.rounds, job.cohort / job.clients)
    clock.record.write(out, "fluke-fl", f"FedAVG in memory, one process x {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main(*sys.argv[1:])
