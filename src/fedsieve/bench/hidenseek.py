"""HideNseek's options, one changed at a time: `python -m fedsieve.bench.hidenseek`, part of `make reproduce`.

What is not told of the method is a setting; this is what each choice costs. Fashion-MNIST by Dirichlet as in
`bench/federated.py`; each variant has the learning rate that suits it, chosen at each density (see `bench/methods.py`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedsieve.bench.federated import FASHION
from fedsieve.bench.methods import Method, Study, main


def _variant(name: str, first: tuple[float, float] = (0.1, 0.3), **settings: Any) -> Method:
    return Method(name, "hidenseek", settings, densities=(0.1, 0.05), rate="algorithm.lr", first=first)


VARIANTS = (
    _variant("default"),
    _variant("pruned-at-once", iterations=1),
    _variant("pruned-by-layer", scope="layer"),
    _variant("mask-sent", sent="mask"),
    _variant("constant-magnitudes", magnitudes="constant"),
    _variant("signs-of-draw", start="keep"),
    _variant("half-scale", scale=0.25),
    _variant("double-scale", scale=1.0),
    _variant("restart-at-bound", restart="bound"),
    _variant("identity", estimator="identity"),
    _variant("tanh", estimator="tanh"),
    _variant("no-clip", clip=0.0),
    _variant("adam", (0.001, 0.003), optimizer="adam"),
    _variant("layer-gradient", (0.03, 0.1), gradient="layer"),
    _variant("mean-8-bits", merge="mean"),
    _variant("logit-8-bits", merge="logit"),
    _variant("logit-4-bits", merge="logit", bits=4),
    _variant("logit-floats", merge="logit", bits=0),
    _variant("stateful", memory="stateful"),
    _variant("stateful-logit", memory="stateful", merge="logit"),
    _variant("equal-votes", weighting="uniform"),
    _variant("biases", others="biases"),
    _variant("float-head", exclude_head=True),
)
STUDY = Study(Path("results/hidenseek"), (FASHION,), VARIANTS)

if __name__ == "__main__":
    sys.exit(main(STUDY, "python -m fedsieve.bench.hidenseek", __doc__ or "", sys.argv[1:]))
