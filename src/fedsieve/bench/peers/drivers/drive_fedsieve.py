"""Plays a job with fedsieve: `python drive_fedsieve.py JOB.npz RECORD.json [bf16]`."""

import sys
from typing import Literal

from fedsieve import warm_up

if __name__ == "__main__":
    warm_up()  # before torch is imported

import numpy as np
from textbook import Job, Record

from fedsieve.algorithms.fedavg import FedAvg
from fedsieve.data.batches import Examples, Federation
from fedsieve.engine.loop import fit
from fedsieve.models.spec import build
from fedsieve.settings import Engine, Local, Model


def main(path: str, out: str, precision: Literal["fp32", "bf16"] = "fp32") -> None:
    """Run FedAvg on the examples and the partition of the job; the engine draws the cohorts that the job lists."""
    job, record = Job.read(path, images="bytes"), Record()
    data = Federation(
        name="job",
        classes=10,
        train=Examples(job.x_train, job.y_train, tuple(job.mean), tuple(job.std)),
        test=Examples(job.x_test, job.y_test, tuple(job.mean), tuple(job.std)),
        parts=tuple(part.numpy() for part in job.parts),
        shares=(np.arange(0),) * job.clients,
        natural=False,
    )
    model = Model(name="cnn") if job.model == "cnn" else Model(name="mlp", hidden=(200, 200))
    fit(
        FedAvg(),
        model=build(model, data.shape, data.classes),
        data=data,
        local=Local(lr=job.lr, batch=job.batch, precision=precision),
        engine=Engine(rounds=job.rounds, cohort=job.cohort, workers=job.processes, eval_every=job.every, eval_clients=0),
        watch=lambda row: record.ended(row["accuracy"]),
    )
    record.write(out, "fedsieve", f"{job.processes} workers, {precision}")


if __name__ == "__main__":
    main(*sys.argv[1:])
