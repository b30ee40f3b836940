"""Plays a job with Flower: `python drive_flower.py JOB.npz RECORD.json`.

The Simulation Runtime (Ray) with one processor a client, which Flower's guide "Run simulations" gives for as many clients at a
time as there are processors. It is started from Python: `flwr run` starts the same runtime behind a server process. Cohorts are
drawn by Flower's FedAvg.
"""

import sys
from collections.abc import Iterable

import flower_client
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from textbook import Job, Record


class Strict(FedAvg):
    """FedAvg that ends the run if a client failed, where Flower's own goes on with the others."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies."""
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or len(replies) < self.min_train_nodes:
            raise RuntimeError(f"round {server_round}: {len(replies)} replies, {len(failed)} failed: {failed[:1]}")
        return super().aggregate_train(server_round, replies)


def main(path: str, out: str) -> None:
    """Run a ServerApp and the ClientApp in the Simulation Runtime."""
    job, record = Job.read(path), Record()
    torch.manual_seed(0)
    server, network = ServerApp(), job.network()

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if round == 0:
            return None
        if round % job.every:
            record.ended()
            return None
        network.load_state_dict(arrays.to_torch_state_dict())
        accuracy = job.accuracy(network)
        record.ended(accuracy)
        return MetricRecord({"accuracy": accuracy})

    @server.main()
    def play(grid: Grid, context: Context) -> None:
        strategy = Strict(
            fraction_train=job.cohort / job.clients,
            fraction_evaluate=0.0,
            min_train_nodes=job.cohort,
            min_available_nodes=job.clients,
        )
        arrays, config = ArrayRecord(network.state_dict()), ConfigRecord({"path": path})
        strategy.start(grid, arrays, num_rounds=job.rounds, train_config=config, evaluate_fn=evaluate)

    resources = {"num_cpus": 1, "num_gpus": 0.0}
    run_simulation(server, flower_client.app, num_supernodes=job.clients, backend_config={"client_resources": resources})
    record.write(out, "flwr", "Simulation Runtime on Ray, 1 CPU a client")


if __name__ == "__main__":
    main(*sys.argv[1:])
