"""The settings of a run, one frozen dataclass a section; importing this loads neither torch nor numpy.

Each field carries its type, its default, its range (checked by pydantic when the object is made, from Python, TOML and
the command line alike) and a string that says what it is. An algorithm's own settings are a dataclass in its own file,
made with the same decorator.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedsieve.errors import UsageError

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
"""a whole number of 1 or more"""
CountOrZero = Annotated[int, Field(ge=0)]
"""a whole number of 0 or more"""
Share = Annotated[float, Field(ge=0, lt=1)]
"""a share in [0, 1)"""
Threshold = Annotated[float, Field(ge=0, le=1)]
"""a share in [0, 1]"""
Density = Annotated[float, Field(gt=0, le=1)]
"""kept over maskable, in (0, 1]"""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bits = Annotated[
    Literal[32, 8, 4, 2], BeforeValidator(lambda given: int(given) if isinstance(given, str) and given.isdecimal() else given)
]
"""bits of each number that is sent; 32: float32"""


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass of checked settings: unknown names and values out of range raise `UsageError`."""
    config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)
    make: Callable[[type[T]], Any] = dataclass(frozen=True, slots=True, config=config)
    made = make(cls)
    check = made.__init__

    @wraps(check)
    def init(self: T, *args: Any, **values: Any) -> None:
        try:
            check(self, *args, **values)
        except ValidationError as error:
            raise UsageError(_said(error, made, made.__name__)) from None

    made.__init__ = init
    checked: type[T] = made
    return checked


def checked(cls: type[T], values: Mapping[str, Any], section: str, keys: Iterable[str] = ()) -> T:
    """Make settings of values from a file or the command line, where a number may be given as text.

    Raises:
        UsageError: an unknown name, the nearest of `keys` is offered; or a value out of range. It begins with `section.key`.
    """
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    try:
        if unknown := next((name for name in values if name not in known), None):
            raise UsageError(_unknown(f"{section}.{unknown}", keys))
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise UsageError(_said(error, cls, section, keys)) from None


def as_table(section: Any) -> dict[str, Any]:
    """Return settings as a TOML table. TOML has no null: a setting that is None is left out, for None is its default."""
    return {
        entry.name: as_table(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for entry in fields(section)
        if (value := getattr(section, entry.name)) is not None
    }


def nearest(word: str, words: Iterable[str]) -> str:
    """Return ` Did you mean X?` for the nearest of the words, or nothing where none is near.

    A key that exists in another section is nearer than any that is merely spelt alike, and more so if it is as deep.
    """
    words = list(map(str, words))
    last = word.lstrip("-").rpartition(".")[2]
    alike = [each for each in words if each.rpartition(".")[2] == last]
    as_deep = [each for each in alike if each.count(".") == word.count(".")]
    match = get_close_matches(word, as_deep or alike or words, n=1, cutoff=0.0 if alike else 0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _said(error: ValidationError, cls: Any, section: str, keys: Iterable[str] = ()) -> str:
    """Put the first thing that pydantic found into words: what was given, what is allowed, the nearest name."""
    first = error.errors(include_url=False)[0]
    key, allowed = section, ""
    for name in first["loc"]:
        if name not in getattr(cls, "__dataclass_fields__", ()):
            break
        key, field = f"{key}.{name}", getattr(cls, "__pydantic_fields__", {}).get(name)
        allowed, cls = (field.description or "", field.annotation) if field else ("", None)
    if first["type"] == "unexpected_keyword_argument":
        return _unknown(f"{key}.{first['loc'][-1]}", keys or [f"{key}.{name}" for name in cls.__dataclass_fields__])
    if first["type"] == "missing":
        return f"{key} is not given and has no default.\n{key}: {allowed}"
    given = textwrap.shorten(str(first["input"]), 80, placeholder="...") or "''"
    problem = (
        first["msg"].removeprefix("Value error, ").replace("Input should", "it should").replace("String should", "it should")
    )
    near = nearest(given, get_args(cls)) if get_origin(cls) is Literal else ""
    return f"{key} = {given}: {problem}.{near}\n{key}: {' '.join(allowed.split())}".removesuffix(f"\n{key}: ")


def _unknown(key: str, keys: Iterable[str]) -> str:
    return f"{key} is no setting.{nearest(key, keys)}"


Partition = Literal["iid", "dirichlet", "shards", "classes", "quantity", "sample", "natural"]


@settings
class Data:
    """Which examples there are and how they are shared out among the clients."""

    name: str = "digits"
    """data set (see `fedsieve list datasets`), npz:PATH, hf:NAME, or your own as package.module:function"""
    root: str | None = None
    """folder that holds the data files; None: the folder FEDSIEVE_DATA names, ./data, or /usr/share/datasets"""
    clients: Count = 10
    """number of clients, >= 1 (a natural partition brings its own number: there it is the most to use)"""
    partition: Partition = "iid"
    """how examples are shared out: iid, dirichlet (label skew `alpha`), shards (`per_client` slices of label-sorted data),
    classes (`per_client` classes each), quantity (sizes skewed by `alpha`), sample (each client draws `examples` of its own,
    which others may hold too: for more clients than the examples suffice for), natural (by the data's own client ids)"""
    alpha: Positive = 0.3
    """concentration of the dirichlet and quantity partitions, > 0: the smaller, the more uneven"""
    per_client: Count = 2
    """classes or shards that each client holds, >= 1 (partitions classes and shards)"""
    examples: Count = 60
    """training examples that each client draws, >= 1 (partition sample)"""
    min_examples: Count = 1
    """fewest training examples that a client may hold, >= 1; a split that cannot honour it is refused"""
    train_limit: CountOrZero = 0
    """use at most so many training examples, >= 0 (0: all)"""
    test_limit: CountOrZero = 0
    """use at most so many test examples, >= 0 (0: all)"""
    validation: Share = 0.0
    """share of the training examples that is held out and evaluated on in place of the test examples, in [0, 1): to choose
    settings by, without a look at test examples (0: train on all, evaluate on test examples)"""
    augment: Literal["none", "crop-flip"] = "none"
    """crop-flip: pad by 4 pixels, crop at random and mirror at random, anew in each epoch (images only)"""


@settings
class Model:
    """Which network is trained and how it starts."""

    name: str = "mlp"
    """model (see `fedsieve list models`), or your own as package.module:callable that returns a torch.nn.Module"""
    norm: Literal["default", "none", "group", "batch"] = "default"
    """normalisation layers, where the model offers a choice"""
    hidden: tuple[Count, ...] = ()
    """widths of the hidden layers, each >= 1, where the model offers a choice; empty: the model's own"""
    dropout: Share | None = None
    """dropout probability in [0, 1), where the model has dropout; None: the model's own"""
    init: Literal["module", "kaiming", "glorot"] = "glorot"
    """start of the weights: glorot or kaiming (uniform, from the seed, biases zero), module (as the module starts itself)"""
    maskable: Literal["weights", "all"] = "weights"
    """which tensors may be pruned: convolution, linear and recurrent weights, or everything that is trained"""
    dense: tuple[str, ...] = ()
    """names of tensors that are never pruned, for example fc.weight"""


@settings
class Local:
    """How a client trains."""

    epochs: Count = 1
    """passes over the client's data in each round, >= 1"""
    batch: Count = 32
    """examples per step, >= 1; the last step of an epoch takes what is left"""
    lr: Positive = 0.1
    """learning rate of the first round, > 0"""
    schedule: Literal["constant", "cosine", "exponential"] = "constant"
    """learning rate over the rounds: constant; cosine to 0; exponential: lr * decay**(round - 1)"""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.99
    """factor per round of the exponential schedule, in (0, 1]"""
    momentum: Share = 0.0
    """momentum of the client's SGD, in [0, 1)"""
    nesterov: bool = False
    """Nesterov's form of the momentum"""
    weight_decay: NonNegative = 0.0
    """L2 penalty added to the gradient, >= 0"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """arithmetic of forward and backward; bf16 is faster where the processor has it, and changes results"""
    convolution: Literal["fast", "avx2", "avx512", "library"] = "fast"
    """on a CPU: by layer, the algorithms that are fastest on processors with avx2 or with avx512, or PyTorch's own (library);
    fast: those for this processor, recorded with the run. Rounding differs by about 1e-5 of the largest value"""
    linear: Literal["fast", "library"] = "fast"
    """on a CPU in fp32: networks of linear layers and ReLUs take steps that are written out, or those that PyTorch records;
    rounding differs by about 1e-7 of the largest value"""
    sparse_conv: Threshold = 0.3
    """largest density at which a masked convolution is computed over its kept weights only, in [0, 1] (0: never; on a CPU, in
    fp32); rounding differs by about 1e-6 of the largest value. A convolution of at most 4 inputs follows the other layers"""
    sparse_linear: Threshold = 0.3
    """largest density at which a masked linear layer is computed over its kept weights only, in [0, 1] (0: never); one of at
    most 8,192 weights follows the other layers. `fedsieve bench kernels` prints where either pays on a machine"""
    sparse_least: CountOrZero = 262_144
    """weights, kept or not, that such layers must have together to be computed so, >= 0: small networks are faster dense"""
    compact: bool = False
    """leave dead channels and neurons out of masked networks while they train; they stay as they are, weight decay included"""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """cpu, or cuda (cuda:0, ...): sequential only"""


@settings
class Engine:
    """How the rounds are run."""

    rounds: Count = 20
    """rounds in total, >= 1; a resumed run counts from its beginning"""
    cohort: CountOrZero = 0
    """clients drawn for each round, >= 0 (0: all of them)"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of every random number of the run, in [0, 2**63)"""
    workers: CountOrZero = 0
    """worker processes, >= 0 (0: train in this process, one client after another); results do not depend on it"""
    group: Count = 1
    """clients that are trained in one batch, >= 1 (1: one by one, as reported figures are). Groups of 5 to 10 are up to twice
    as fast where clients take many small steps; for sequences of linear layers and ReLUs (local.linear = fast), no others. A
    client's parameters then differ by up to 1e-5 of the largest after a local epoch, by more where rounding switches a ReLU.
    Workers take groups whole, so use group * workers <= cohort"""
    dropout: Share = 0.0
    """chance that a client of the cohort drops out after it received the broadcast, in [0, 1)"""
    nonfinite: Literal["stop", "drop"] = "stop"
    """what to do when a client's loss is not finite: stop the run (exit code 4) or count that client as lost"""
    eval_every: Count = 1
    """rounds between evaluations, >= 1; the last round is always evaluated"""
    eval_clients: CountOrZero = 100
    """clients on whose own test examples the model is evaluated too, >= 0 (0: none)"""
    eval_tune: CountOrZero = 0
    """epochs that each of these clients then trains on its own examples to be evaluated once more, >= 0 (0: it does not)"""
    checkpoint_every: Count = 5
    """rounds between checkpoints, >= 1"""
