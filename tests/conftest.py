import numpy as np
import pytest
import torch
from torch import nn

from fedsieve import Data, Layout, Model, Params, Streams, build, federate, load
from fedsieve.params import Kind, Slot


@pytest.fixture(scope="session")
def digits():
    """Six clients with 40 digits each, unevenly labelled."""
    settings = Data(name="digits", clients=6, partition="dirichlet", alpha=1.0, train_limit=240, test_limit=90, min_examples=5)
    return federate(load(settings), settings, Streams(0))


@pytest.fixture(scope="session")
def small(digits):
    """An MLP with 64-16-10 weights and biases."""
    return build(Model(name="mlp", hidden=(16,)), digits.shape, digits.classes)


def normalised(shape, classes):
    """A convolution with BatchNorm and a linear layer, for images of 8 x 8 pixels."""
    beginning = nn.Conv2d(shape[0], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*beginning, nn.Flatten(), nn.Linear(64, classes))


@pytest.fixture
def three():
    """A layout of three maskable weights and one bias."""
    return Layout.of([Slot("w", (3,), Kind.WEIGHT, True, 0), Slot("b", (1,), Kind.BIAS, False, 0)])


@pytest.fixture
def vector():
    """Make parameters of a layout from numbers."""

    def make(layout, *numbers):
        return Params(layout, torch.tensor(numbers, dtype=torch.float32))

    return make


def same(a, b):
    """Whether two tensors or arrays are equal bit for bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def one_thread():
    """Numbers are compared bit for bit, or time is short: torch computes on one thread, as workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
