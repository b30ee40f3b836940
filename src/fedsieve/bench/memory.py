"""Peak memory of the server against the size of the cohort: `python -m fedsieve.bench.memory`.

Dense FedAvg of the 1.66 M parameter CNN (6.7 MB a message) on Fashion-MNIST: 1,000 clients of 8 examples, 2 workers, 2 rounds.
Each cohort is measured in a process of its own; the figure is that process's largest resident memory, workers not included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fedsieve import files
from fedsieve.algorithms.fedavg import FedAvg
from fedsieve.bench import history
from fedsieve.data.batches import federate
from fedsieve.data.datasets import load
from fedsieve.engine.folder import environment
from fedsieve.engine.loop import fit
from fedsieve.engine.transports import peak_memory
from fedsieve.models.spec import build
from fedsieve.settings import Data, Engine, Local, Model
from fedsieve.streams import Streams

COHORTS = (10, 100, 500)


def measure(cohort: int) -> int:
    """Run two rounds in this process; return its peak memory in bytes."""
    settings = Data(name="fashion-mnist", clients=1000, train_limit=8000, test_limit=1000)
    data = federate(load(settings), settings, Streams(0))
    spec = build(Model(name="cnn"), data.shape, data.classes)
    engine = Engine(rounds=2, cohort=cohort, workers=2, eval_every=2, eval_clients=0)
    fit(FedAvg(), model=spec, data=data, local=Local(lr=0.05, batch=8), engine=engine)
    return peak_memory()


def main() -> int:
    """Print the peak of each cohort, and keep the figures in results/bench_memory.json."""
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1])))
        return 0
    peaks = {}
    for cohort in COHORTS:
        words = [sys.executable, "-m", "fedsieve.bench.memory", str(cohort)]
        peaks[cohort] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        print(f"{cohort:4} clients a round: server peak {peaks[cohort] / 1e6:.1f} MB", flush=True)
    ratio = peaks[COHORTS[-1]] / peaks[COHORTS[0]]
    print(f"{COHORTS[-1]} against {COHORTS[0]}: {ratio:.3f}")
    figures = {"peak_bytes": peaks, "ratio": ratio, "goal": 1.1, **environment()}
    files.replace(Path("results/bench_memory.json"), json.dumps(figures, indent=2) + "\n")
    history.add("memory", {"smallest over largest cohort": 1 / ratio})
    return 0


if __name__ == "__main__":
    sys.exit(main())
