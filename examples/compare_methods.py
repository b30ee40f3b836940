"""Two methods on the same seeds, side by side: python examples/compare_methods.py (a few seconds, one core).

A seed decides the split, the start, the order of the examples: both methods meet the same federation.
"""

from statistics import mean, stdev

from fedsieve import Data, Engine, FedAvg, FedSparsify, Local, Model, Streams, build, federate, fit, load

SEEDS = (0, 1, 2)
METHODS = {"FedAvg, dense": FedAvg(), "FedSparsify, density 0.1": FedSparsify(density=0.1)}

settings = Data(name="digits", clients=10, partition="dirichlet", alpha=0.3, min_examples=10)
dataset = load(settings)
print(f"{'method':26} {'accuracy %':>13} {'density':>8} {'MB up':>7} {'MB down':>8}")
for name, method in METHODS.items():
    results = []
    for seed in SEEDS:
        data = federate(dataset, settings, Streams(seed))
        model = build(Model(name="mlp"), data.shape, data.classes)
        engine = Engine(rounds=15, seed=seed, eval_every=15)
        start = model.initial("glorot", Streams(seed))
        results.append(fit(method, model=model, data=data, local=Local(batch=64, lr=0.5), engine=engine, start=start))
    accuracies = [100 * result.accuracy for result in results]
    up, down = (mean(result.summary[f"bytes_{way}"] for result in results) / 1e6 for way in ("up", "down"))
    accuracy = f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}"
    print(f"{name:26} {accuracy:>13} {results[0].density:8.3f} {up:7.2f} {down:8.2f}")
