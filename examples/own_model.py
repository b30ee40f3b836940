"""Your own network and your own numpy arrays: python examples/own_model.py (a few seconds, one core)."""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from fedsieve import Data, Engine, FedSparsify, Local, Streams, federate, fit, from_arrays

x, y = load_breast_cancer(return_X_y=True)  # any arrays: examples (N, ...), labels (N,) counted from 0
x = (x - x[:400].mean(0)) / x[:400].std(0)
dataset = from_arrays(x[:400], y[:400], x[400:], y[400:], name="breast-cancer")
data = federate(dataset, Data(clients=8, partition="dirichlet", alpha=1.0, min_examples=10), Streams(seed=0))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
engine = Engine(rounds=20, seed=0)
result = fit(FedSparsify(density=0.1), model=model, data=data, local=Local(batch=16, lr=0.1), engine=engine)
print(f"accuracy {result.accuracy:.1%} at density {result.density:.3f}, {result.summary['bytes_up'] / 1e6:.3f} MB up")
