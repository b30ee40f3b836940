"""Plays a job with pfl: `torchrun --standalone --nproc_per_node=2 drive_pfl.py JOB.npz RECORD.json`.

Set up as pfl's guide "Fast distributed simulations" recommends: several processes started by torchrun, users' data as in-memory
datasets, evaluation in larger batches and shared among the processes. pfl cuts a user's data into batches once and does not
shuffle them.
"""

import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import get_ops
from pfl.metrics import Metrics, StringMetricName, Weighted, get_overall_value
from pfl.model.pytorch import PyTorchModel
from textbook import EVALUATION_BATCH, Job, Record
from torch import Tensor, nn

ACCURACY = StringMetricName("Central val | accuracy")


class Network(nn.Module):
    """The network with the two methods that pfl asks for."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return nn.functional.cross_entropy(self.layers(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Return the accuracy on a batch."""
        return {"accuracy": Weighted(int((self.layers(x).argmax(1) == y).sum()), len(y))}


class Evaluation(CentralEvaluationCallback):
    """pfl's own evaluation, after every n-th round where its iterations count from 0."""

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Evaluate if the round is due."""
        return super().after_central_iteration(aggregate_metrics, model, central_iteration=central_iteration + 1)


class Clock(TrainingProcessCallback):
    """Notes the end of each round; the last of the callbacks."""

    def __init__(self, every: int) -> None:
        self.record, self._every = Record(), every

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time, and the accuracy of a round that was evaluated."""
        due = (central_iteration + 1) % self._every == 0
        self.record.ended(float(get_overall_value(aggregate_metrics[ACCURACY])) if due else None)
        return False, Metrics()


def main(path: str, out: str) -> None:
    """Run FederatedAveraging on the simulated backend with the cohorts of the job."""
    job = Job.read(path)
    np.random.seed(0)  # noqa: NPY002 the same in every process, as pfl's samplers want
    users = [PyTorchTensorDataset((job.x_train[part], job.y_train[part])) for part in job.parts]
    torch.manual_seed(0)
    network = Network(job.network())
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    chosen = iter(job.cohorts.ravel().tolist())
    dataset = FederatedDataset(users.__getitem__, lambda: next(chosen))
    evaluation = NNEvalHyperParams(local_batch_size=EVALUATION_BATCH)
    clock = Clock(job.every)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=job.rounds,  # of users' own metrics: in the first round, which pfl insists on
            train_cohort_size=job.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=dataset),
        model=model,
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=job.lr, local_batch_size=job.batch),
        model_eval_params=evaluation,
        callbacks=[
            Evaluation(PyTorchTensorDataset((job.x_test, job.y_test)), evaluation, frequency=job.every),
            clock,
        ],
    )
    distributed = get_ops().distributed
    if distributed.global_rank == 0:
        threads = torch.get_num_threads()
        setting = f"SimulatedBackend, torchrun, {distributed.world_size} processes x {threads} threads"
        clock.record.write(out, "pfl", setting)


if __name__ == "__main__":
    main(*sys.argv[1:])
