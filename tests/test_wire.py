"""The wire: exact round trips, pinned bytes, sizes near the entropy, and nothing but WireError for hostile bytes."""

import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from fedsieve.params import Kind, Layout, Masks, Params, Slot
from fedsieve.streams import Streams
from fedsieve.wire import (
    Codec,
    Ledger,
    Message,
    Reason,
    Section,
    WireError,
    pack,
    pack_into,
    packed_size,
    phases,
    sections,
    unpack,
)
from fedsieve.wire import bits as wire_bits
from fedsieve.wire.bits import (
    Coding,
    byte_frequencies,
    decode_mask,
    encode_mask,
    entropy_bits,
    level_frequencies,
    pack_bits,
    unpack_bits,
)

GOLDEN = Path(__file__).parent / "golden"
SIZES = (0, 1, 7, 8, 9, 100)
fuzz = settings(deadline=None, max_examples=40)


def layout_of(maskable: tuple[int, ...], dense: int = 3, statistics: int = 2) -> Layout:
    weights = [Slot(f"w{i}", (n,), Kind.WEIGHT, True, i) for i, n in enumerate(maskable)]
    return Layout.of(
        [*weights, Slot("bias", (dense,), Kind.BIAS, False, 0), Slot("mean", (statistics,), Kind.BUFFER, False, 0)]
    )


def masks_of(layout: Layout, density: float, seed: int = 0) -> Masks:
    n = layout.maskable
    k = {0.0: 0, 1.0: n}.get(density, min(n, max(1, round(density * n))))
    kept = np.zeros(n, dtype=bool)
    kept[Streams(seed)("kept").choice(n, k)] = True
    return Masks(layout, torch.from_numpy(kept))


def params_of(layout: Layout, seed: int = 0) -> Params:
    return Params(layout, torch.from_numpy(Streams(seed)("params").numpy().standard_normal(layout.size, dtype=np.float32)))


def carried(section: Section, layout: Layout) -> Message:
    """The message after a trip as bytes, under the name x."""
    return unpack(pack(Message("train", 7, layout, {"x": section})), layout)


def refusal(act: Callable[[], object]) -> WireError:
    with pytest.raises(WireError) as caught:
        act()
    return caught.value


layouts = st.builds(layout_of, st.lists(st.sampled_from(SIZES), max_size=4).map(tuple), st.integers(0, 9), st.integers(0, 9))
densities = st.sampled_from((0.0, 1e-9, 0.05, 0.5, 0.9, 1.0))
seeds = st.integers(0, 2**32)

# ---- round trips


@fuzz
@given(layouts, densities, seeds, st.sampled_from(("fp32", "fp16", "bf16")))
@example(layout_of((), 0, 0), 0.0, 0, "fp32")
def test_parameters_come_back_as_sent(layout, density, seed, precision):
    params, masks = params_of(layout, seed), masks_of(layout, density, seed)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    rounded = Params(layout, params.flat.to(dtype).float())
    assert torch.equal(carried(sections.dense(params, precision), layout).dense("x").flat, rounded.flat)
    assert torch.equal(
        carried(sections.values(params, masks, precision), layout).values("x", masks).flat, rounded.under(masks).flat
    )


@fuzz
@given(layouts, densities, densities, seeds)
def test_positions_come_back_as_sent(layout, density, outer, seed):
    within, masks = masks_of(layout, outer, seed + 1), masks_of(layout, density, seed)
    kept = torch.nonzero(masks.kept)[:, 0]
    shrunk = masks & within
    assert torch.equal(carried(sections.mask(masks), layout).mask("x").kept, masks.kept)
    assert torch.equal(carried(sections.mask(shrunk, within), layout).mask("x", within).kept, shrunk.kept)
    assert torch.equal(carried(sections.indices(kept, layout), layout).indices("x"), kept)
    positive = torch.from_numpy(Streams(seed)("signs").uniform(layout.maskable) < 0.5)
    expected = torch.where(positive, 1, -1).to(torch.int8)[masks.kept]
    for sent in (positive, torch.where(positive, 1, -1), expected):
        assert torch.equal(carried(sections.signs(sent, masks), layout).signs("x", masks), expected)
    assert torch.equal(carried(sections.signs(expected), layout).signs("x", masks), expected)


@fuzz
@given(st.lists(st.integers(-(2**31), 2**31 - 1)) | st.lists(st.integers(-3, 3), max_size=300), st.integers(1, 32))
@example([5] * 70_000, 1)
@example([-(2**31), 2**31 - 1], 32)
def test_integers_come_back_as_sent(numbers, width):
    layout, expected = layout_of((8,)), torch.tensor(numbers, dtype=torch.int32)
    if len(set(numbers)) > 1 or len(numbers) < 60_000:
        assert torch.equal(carried(sections.integers(expected), layout).integers("x"), expected)
    if not numbers or (max(numbers) - min(numbers)).bit_length() <= width:
        assert torch.equal(carried(sections.integers(numbers, bits=width), layout).integers("x"), expected)


@pytest.mark.parametrize("width", range(1, 33))
def test_packed_bits_are_in_the_stated_places(width):
    values = np.array([Streams(width)("v").word() % 2**width, 2**width - 1, 0, 1, 2**width // 3], dtype=np.int64)
    body = pack_bits(values, width)
    assert int.from_bytes(body, "little") == sum(int(v) << i * width for i, v in enumerate(values))
    assert len(body) == (5 * width + 7) // 8
    assert np.array_equal(unpack_bits(memoryview(body), 5, width), values)
    many = np.arange(140_001, dtype=np.int64) % 2**width
    assert np.array_equal(unpack_bits(memoryview(pack_bits(many, width)), many.size, width), many)


@pytest.mark.parametrize("value", [0, -1, 2**63 - 1, -(2**63), 0.1, -0.0, 5e-324, 1.7976931348623157e308])
def test_numbers_keep_value_and_type(value):
    back = carried(sections.number(value), layout_of((3,))).number("x")
    assert struct.pack("<d", back) == struct.pack("<d", value)
    assert type(back) is type(value)


def test_seeds_and_vectors_come_back_as_sent():
    layout = layout_of((3,))
    assert carried(sections.seed(2**64 - 1), layout).seed("x") == 2**64 - 1
    for vector in (
        torch.tensor([1.5, -2.0]),
        torch.tensor([0.1, -65504.0], dtype=torch.float16),
        torch.tensor([0.1], dtype=torch.float64),
        torch.zeros(0),
    ):
        back = carried(sections.vector(vector), layout).vector("x")
        assert back.dtype == vector.dtype
        assert torch.equal(back, vector)
    assert carried(sections.vector([0.1, 2]), layout).vector("x").tolist() == [0.1, 2.0]


def test_a_message_keeps_kind_round_and_order():
    layout = layout_of((3,))
    sent = Message("phase-2_b", 2**32 - 1, layout, {"b": sections.seed(1), "a": sections.number(2)})
    back = unpack(pack(sent), layout)
    assert (back.kind, back.round, list(back.sections)) == ("phase-2_b", 2**32 - 1, ["b", "a"])
    answer = back.reply(c=sections.seed(9))
    assert (answer.kind, answer.round, answer.layout, list(answer.sections)) == (back.kind, back.round, layout, ["c"])


def test_all_ways_to_pack_give_the_same_bytes():
    layout = layout_of((100, 9))
    message = Message(
        "train", 1, layout, {"w": sections.dense(params_of(layout), "bf16"), "m": sections.mask(masks_of(layout, 0.1))}
    )
    payload, room = pack(message), bytearray(b"\xff" * 4096)
    assert pack_into(message, memoryview(room)) == packed_size(message) == len(payload)
    assert room[: len(payload)] == payload
    assert set(room[len(payload) :]) == {255}
    with pytest.raises(ValueError, match="bytes"):
        pack_into(message, memoryview(bytearray(len(payload) - 1)))


def test_writable_payloads_are_read_without_a_copy_and_bytes_stay_unchanged():
    layout = layout_of((100,))
    payload = pack(Message("train", 1, layout, {"x": sections.dense(params_of(layout))}))
    room, before = bytearray(payload), bytes(bytearray(payload))
    shared = unpack(room, layout).dense("x").flat
    shared[0] = 3.25
    assert struct.pack("<f", 3.25) in room
    unpack(payload, layout).dense("x").flat.zero_()
    assert payload == before
    odd = memoryview(bytearray(b"\0" + payload))[1:]
    assert torch.equal(unpack(odd, layout).dense("x").flat, params_of(layout).flat)


# ---- sizes


@pytest.mark.parametrize(
    ("density", "excess"), [(0.5, 0.01), (0.4, 0.01), (0.1, 0.01), (0.05, 0.01), (0.01, 0.01), (0.001, 0.03)]
)
def test_random_masks_cost_their_entropy(density, excess):
    n = 1_000_000
    bits = Streams(1)("mask").uniform(n) < density
    coding, body = encode_mask(bits, [n])
    assert len(body) <= (1 + excess) * entropy_bits(int(bits.sum()), n) / 8
    assert np.array_equal(decode_mask(coding, memoryview(body), [n]), bits)
    mirrored = encode_mask(~bits, [n])
    assert abs(len(mirrored[1]) - len(body)) <= 1


def test_layers_of_different_density_cost_the_sum_of_their_entropies():
    layout = layout_of((50_000, 50_000, 1_000))
    uniform = Streams(2)("mask").uniform(layout.maskable)
    kept = uniform < np.repeat([0.5, 0.01, 1.0], [50_000, 50_000, 1_000])
    masks = Masks(layout, torch.from_numpy(kept))
    section = sections.mask(masks)
    assert section.codec is Codec.MASK_SLOTS
    floor = sum(entropy_bits(int(part.sum()), part.size) for part in np.split(kept, [50_000, 100_000])) / 8
    assert len(section.body) <= 1.01 * floor + 8
    assert floor < 0.7 * entropy_bits(masks.count, layout.maskable) / 8


def test_a_mask_that_shrinks_costs_only_what_is_new():
    layout = layout_of((100_000,))
    outer = masks_of(layout, 0.1)
    masks = outer & masks_of(layout, 0.8, seed=3)
    section = sections.mask(masks, outer)
    assert len(section.body) <= 1.01 * entropy_bits(masks.count, outer.count) / 8 + 8
    assert len(section.body) < len(sections.mask(masks).body) / 5
    assert len(sections.mask(outer, outer).body) == 2  # only the count


@pytest.mark.parametrize(("density", "codec"), [(0.0, Codec.MASK_WHOLE), (0.5, Codec.MASK_BITMAP), (0.1, Codec.MASK_WHOLE)])
def test_the_smaller_mask_coding_is_chosen(density, codec):
    layout = layout_of((8_000,))
    section = sections.mask(masks_of(layout, density))
    assert section.codec is codec
    assert len(section.body) <= 1_000


def test_quantised_values_cost_their_entropy_and_indices_little():
    levels = np.rint(Streams(4)("q").numpy().standard_normal(100_000) * 1.5).astype(np.int64)
    p = np.bincount(levels - levels.min()) / levels.size
    floor = -(p[p > 0] * np.log2(p[p > 0])).sum() * levels.size / 8
    assert len(sections.integers(levels).body) <= 1.005 * floor + 40
    layout = layout_of((1_000_000,))
    assert len(sections.indices([3, 999_999], layout).body) == 1 + 5
    assert (
        len(sections.indices(Streams(5)("at").choice(1_000_000, 1_000), layout).body)
        <= 1.02 * entropy_bits(1_000, 1_000_000) / 8
    )


def test_three_small_sections_fit_in_100_bytes():
    small = {"mask": sections.seed(1), "loss": sections.number(0.5), "count": sections.number(600)}
    assert packed_size(Message("train", 3, layout_of((9,)), small)) < 100


# ---- the specification: a second implementation, from docs/wire.md alone


def frequencies_by_the_book(k: int, n: int) -> list[int]:
    p, table = (k << 32) // n, []
    for byte in range(256):
        ones = zeros = 1 << 32
        for _ in range(bin(byte).count("1")):
            ones = (ones * p) >> 32
        for _ in range(8 - bin(byte).count("1")):
            zeros = (zeros * (2**32 - p)) >> 32
        table.append(1 + ((((ones * zeros) >> 32) * (2**24 - 256)) >> 32))
    table[0] += 2**24 - sum(table)
    return table


def ans_by_the_book(body: bytes, models: list[tuple[list[int], int]]) -> list[list[int]]:
    words = list(struct.unpack(f"<{len(body) // 4}I", body))
    state, out = 0, []
    while words and state < 2**32:
        state = state << 32 | words.pop()
    for table, n in models:
        symbols = []
        for _ in range(n):
            slot, symbol, begin = state % 2**24, 0, 0
            while slot >= begin + table[symbol]:
                begin += table[symbol]
                symbol += 1
            state = (state >> 24) * table[symbol] + slot - begin
            if state < 2**32 and words:
                state = state << 32 | words.pop()
            symbols.append(symbol)
        out.append(symbols)
    assert state == 0
    assert not words
    return out


@pytest.mark.parametrize("counts", [(30, 500), (1, 999), (0, 70), (999, 40)])
def test_masks_decode_by_the_specification(counts):
    sizes = (1_000, 1_001)
    bits = np.concatenate([np.isin(np.arange(n), Streams(6)(f"{k}").choice(n, k)) for n, k in zip(sizes, counts, strict=True)])
    coding, body = encode_mask(bits, sizes)
    assert coding is Coding.GROUPS
    at, stated = 0, []
    for _ in sizes:
        value = shift = 0
        while True:
            value |= (body[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if body[at - 1] < 128:
                break
        stated.append(value)
    assert tuple(stated) == counts
    coded = [(k, n) for k, n in zip(counts, sizes, strict=True) if 0 < k < n]
    symbols = iter(ans_by_the_book(body[at:], [(frequencies_by_the_book(min(k, n - k), n), (n + 7) // 8) for k, n in coded]))
    expected = [bits[:1_000], bits[1_000:]]
    for k, n, part in zip(counts, sizes, expected, strict=True):
        if 0 < k < n:
            number = int.from_bytes(bytes(next(symbols)), "little")
            assert [bool(number >> i & 1) ^ (2 * k > n) for i in range(n)] == part.tolist()


@fuzz
@given(st.integers(2, 2**32 - 1).flatmap(lambda n: st.tuples(st.integers(1, n // 2), st.just(n))))
def test_byte_models_are_whole_and_by_the_book(pair):
    table = byte_frequencies(*pair)
    assert table.tolist() == frequencies_by_the_book(*pair)
    assert (table.min(), table.sum()) >= (1, 2**24)
    assert table.argmax() == 0


@fuzz
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=40).filter(any))
def test_level_models_are_whole(histogram):
    table = level_frequencies(np.array(histogram))
    assert table.min() >= 1
    assert table.sum() == 2**24


# ---- golden files: FEDSIEVE_WRITE_GOLDEN=1 writes them anew

EXAMPLE = layout_of((64,), 2, 0)
SMALL = layout_of((40, 24, 9), 3, 2)
LARGE = layout_of((600, 1400), 0, 0)
_I = torch.arange(LARGE.maskable)
EVEN = {layout: Masks(layout, torch.arange(layout.maskable) % 2 == 0) for layout in (EXAMPLE, SMALL, LARGE)}


def golden_messages() -> dict[str, Message]:
    """Messages without any random number; between them they use every codec. What is relative is so to EVEN."""
    s, i, at = sections, _I, torch.arange(SMALL.maskable)
    params = Params(SMALL, torch.arange(SMALL.size) / 8 - 3)
    outer, half = EVEN[SMALL], EVEN[LARGE]
    step = Masks(LARGE, (i % 16 == 3) & (i < 600) | (i >= 600) & (i % 100 != 7))
    twentieth = Masks(LARGE, i % 20 == 0)
    example = {
        "mask": s.mask(Masks(EXAMPLE, torch.arange(64) == 5)),
        "n": s.number(600),
        "lr": s.vector(torch.tensor([0.5])),
    }
    return {
        "example": Message("train", 1, EXAMPLE, example),
        "dense": Message("train", 3, SMALL, {p: s.dense(params, p) for p in ("fp32", "fp16", "bf16")}),
        "values": Message("train", 3, SMALL, {p: s.values(params, outer, p) for p in ("fp32", "fp16", "bf16")}),
        "masks": Message("setup", 4, LARGE, {"slots": s.mask(step), "whole": s.mask(twentieth), "bitmap": s.mask(half)}),
        "within": Message(
            "shrink",
            5,
            LARGE,
            {
                "slots": s.mask(Masks(LARGE, half.kept & ((i < 600) | (i % 30 == 0))), half),
                "whole": s.mask(twentieth, half),
                "bitmap": s.mask(Masks(LARGE, i % 4 == 0), half),
                "same": s.mask(half, half),
            },
        ),
        "indices": Message(
            "train",
            6,
            LARGE,
            {
                n: s.indices(torch.nonzero(m)[:, 0], LARGE)
                for n, m in {"packed": i % 1994 == 5, "whole": twentieth.kept, "slots": step.kept, "bitmap": half.kept}.items()
            },
        ),
        "signs": Message(
            "train",
            7,
            LARGE,
            {n: s.signs(m, half) for n, m in {"bitmap": i % 4 == 0, "whole": i % 20 == 0, "slots": i < 600}.items()},
        ),
        "integers": Message(
            "train",
            8,
            SMALL,
            {
                "packed": s.integers(at * 1000 - 9),
                "coded": s.integers([0] * 90 + [-1, 4] * 5),
                "same": s.integers([7] * 99),
                "none": s.integers([]),
                "four_bits": s.integers(at % 8, bits=4),
            },
        ),
        "scalars": Message(
            "eval",
            9,
            SMALL,
            {
                "seed": s.seed(2**63 + 5),
                "int": s.number(-600),
                "real": s.number(0.1),
                "v32": s.vector(torch.tensor([0.5, 2.0])),
                "v64": s.vector([0.1, -1e300]),
            },
        ),
        "half": Message("setup", 1, SMALL, {"v16": s.vector(torch.tensor([0.1, -65504.0], dtype=torch.float16))}),
        "brain": Message("setup", 1, SMALL, {"vb16": s.vector(torch.tensor([0.1, -1e30], dtype=torch.bfloat16))}),
        "empty": Message("control", 2**32 - 1, SMALL, {}),
    }


def read(message: Message, name: str) -> list:
    """Read a section by its codec, hold the result to what a reader may rely on, and return it as plain numbers."""
    section, layout, even = message.sections[name], message.layout, EVEN[message.layout]
    match section.codec >> 4:
        case 0x1 | 0x2 as family:
            params = message.dense(name) if family == 1 else message.values(name, even)
            assert params.flat.dtype == torch.float32
            assert params.flat.isfinite().all()
            assert family == 1 or not params.maskable[~even.kept].any()
            return params.flat.tolist()
        case 0x3:
            within = even if section.codec >= Codec.WITHIN_BITMAP else None
            masks = message.mask(name, within)
            assert within is None or masks <= within
            return masks.kept.tolist()
        case 0x4:
            indices = message.indices(name)
            assert (indices.diff() > 0).all()
            assert not indices.numel() or 0 <= indices[0] <= indices[-1] < layout.maskable
            return indices.tolist()
        case 0x5:
            signs = message.signs(name, even)
            assert signs.dtype == torch.int8
            assert signs.shape == (even.count,)
            assert (signs.abs() == 1).all()
            return signs.tolist()
        case 0x6:
            integers = message.integers(name)
            assert integers.dtype == torch.int32
            return integers.tolist()
    if section.codec is Codec.SEED:
        return [message.seed(name)]
    back = [message.number(name)] if section.codec in (Codec.INTEGER, Codec.REAL) else message.vector(name).tolist()
    assert np.isfinite(np.array(back, dtype=np.float64)).all()
    return back


def read_all(payload: bytes, layout: Layout) -> dict[str, list]:
    message = unpack(payload, layout)
    return {name: read(message, name) for name in message.sections}


def golden(name: str, payload: bytes) -> bytes:
    path = GOLDEN / f"{name}.bin"
    if os.environ.get("FEDSIEVE_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(payload)
    return path.read_bytes()


@pytest.mark.parametrize("name", golden_messages())
def test_the_format_is_pinned(name):
    message = golden_messages()[name]
    stored = golden(name, pack(message))
    assert pack(message).hex() == stored.hex()
    assert read_all(stored, message.layout) == {key: read(message, key) for key in message.sections}


def test_golden_files_use_every_codec():
    used = {section.codec for message in golden_messages().values() for section in message.sections.values()}
    assert used == set(Codec)


def test_the_example_of_the_specification_is_the_golden_file():
    text = (Path(__file__).parents[1] / "docs" / "wire.md").read_text()
    dump = text.split("<!-- example -->")[1].split("```")[1]
    shown = bytes.fromhex("".join(line[5:].split("  ")[0] for line in dump.strip().splitlines()))
    assert shown.hex() == golden("example", pack(golden_messages()["example"])).hex()


# ---- hostile bytes


def assemble(
    *entries: tuple[int, bytes, bytes], kind: bytes = b"train", layout: Layout = SMALL, magic: bytes = b"FSV\1"
) -> bytes:
    """A payload with a right checksum, built from the specification."""
    head = magic + bytes([len(kind), len(entries)]) + struct.pack("<I", 1) + layout.fingerprint + kind
    head += b"".join(bytes([codec, len(name)]) + struct.pack("<I", len(body)) + name for codec, name, body in entries)
    payload = head + bytes(-len(head) % 4) + b"".join(body + bytes(-len(body) % 4) for _, _, body in entries)
    return sealed(payload)


def sealed(payload: bytes) -> bytes:
    return payload + struct.pack("<Q", xxh3_64_intdigest(payload))


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value >> 7
    return out + bytes([value])


def hostile() -> dict[str, bytes]:
    """Payloads that must be refused, under the name of the reason."""
    good = assemble((Codec.SEED, b"seed", bytes(range(8))))
    n, m = SMALL.size, SMALL.maskable
    mask = encode_mask(np.arange(m) % 31 == 4, [m])[1]
    coded = sections.integers([0] * 90 + [-1, 4] * 5).body
    packed = pack_bits(np.array([1, 5, 9]), 7)
    flat = [0.5] * (n - 1)

    def one(codec: Codec, body: bytes) -> bytes:
        return assemble((codec, b"x", body))

    return {
        "truncated-empty": b"",
        "truncated-header": good[:17],
        "truncated-table": sealed(good[:24]),
        "truncated-checksum": good[:-1],
        "truncated-huge_length": sealed(
            assemble((Codec.DENSE_FP32, b"x", b""))[:-8].replace(bytes(4) + b"x", b"\xff" * 4 + b"x")
        ),
        "truncated-huge_count": sealed(good[:5] + b"\xff" + good[6:-8]),
        "truncated-huge_kind": sealed(good[:4] + b"\xff" + good[5:-8]),
        "trailing-word": good + bytes(4),
        "magic": sealed(b"GET /" + good[5:-8]),
        "version": sealed(b"FSV\2" + good[4:-8]),
        "checksum": good[:-1] + bytes([good[-1] ^ 1]),
        "layout": assemble(layout=LARGE),
        "kind-empty": assemble(kind=b""),
        "kind-upper": assemble(kind=b"Train"),
        "kind-long": assemble(kind=b"t" * 17),
        "kind-newline": assemble(kind=b"train\n"),
        "section-codec": assemble((0x77, b"x", b"")),
        "section-twice": assemble((Codec.SEED, b"x", bytes(8)), (Codec.SEED, b"x", bytes(8))),
        "section-unnamed": assemble((Codec.SEED, b"", bytes(8))),
        "section-latin": assemble((Codec.SEED, b"\xe4", bytes(8))),
        "padding-table": sealed(assemble(kind=b"train")[:23] + b"\1" + assemble(kind=b"train")[24:-8]),
        "padding-body": sealed(one(Codec.INTEGERS_PACKED, b"\0")[:-9] + b"\1"),
        "padding-bitmap": one(Codec.MASK_BITMAP, b"\xff" * 10),
        "padding-indices": one(Codec.INDICES_PACKED, b"\3" + packed[:-1] + bytes([packed[-1] | 128])),
        "length-dense_short": one(Codec.DENSE_FP32, bytes(4 * n - 4)),
        "length-dense_odd": one(Codec.DENSE_FP16, bytes(2 * n + 1)),
        "length-values": one(Codec.VALUES_FP32, bytes(4 * n)),
        "length-bitmap": one(Codec.MASK_BITMAP, bytes(11)),
        "length-mask_empty": one(Codec.MASK_WHOLE, b""),
        "length-mask_counts": one(Codec.MASK_SLOTS, b"\0\0"),
        "length-words": one(Codec.MASK_WHOLE, mask + b"\1"),
        "length-signs": one(Codec.SIGNS_BITMAP, bytes(4)),
        "length-seed": one(Codec.SEED, bytes(7)),
        "length-vector": one(Codec.VECTOR_FP64, bytes(12)),
        "length-integers": one(Codec.INTEGERS_PACKED, varint(2**34) + b"\0\1" + bytes(16)),
        "length-none": one(Codec.INTEGERS_PACKED, b"\0\0"),
        "length-indices": one(Codec.INDICES_PACKED, b"\4" + packed),
        "count-mask": one(Codec.MASK_WHOLE, varint(m + 1)),
        "count-mask_huge": one(Codec.MASK_WHOLE, varint(2**35 - 1)),
        "count-mask_other": one(Codec.MASK_WHOLE, b"\1" + wire_bits._encode_groups(np.arange(m) % 31 == 4, [m], [1])),
        "count-indices": one(Codec.INDICES_PACKED, varint(2**34) + packed),
        "count-integers": one(Codec.INTEGERS_CODED, varint(2**34) + b"\0\1" + varint(2**34)),
        "count-integers_none": one(Codec.INTEGERS_CODED, b"\0\0\1\0"),
        "count-histogram": one(Codec.INTEGERS_CODED, b"\5\0\2\2\2"),
        "count-histogram_ends": one(Codec.INTEGERS_CODED, b"\5\0\3\0\2\3"),
        "order-twice": one(Codec.INDICES_PACKED, b"\3" + pack_bits(np.array([1, 5, 5]), 7)),
        "order-descending": one(Codec.INDICES_PACKED, b"\3" + pack_bits(np.array([5, 1, 9]), 7)),
        "range-index": one(Codec.INDICES_PACKED, b"\3" + pack_bits(np.array([1, 5, m]), 7)),
        "range-varint_long": one(Codec.MASK_WHOLE, b"\x80\0"),
        "range-varint_huge": one(Codec.MASK_WHOLE, b"\xff" * 12),
        "range-width": one(Codec.INTEGERS_PACKED, b"\1\0\x21" + bytes(5)),
        "range-width_zero": one(Codec.INTEGERS_PACKED, varint(2**34) + b"\0\0"),
        "range-int32": one(Codec.INTEGERS_PACKED, b"\1" + varint(2 * (2**31 - 1)) + b"\1\1"),
        "range-levels": one(Codec.INTEGERS_CODED, b"\5\0" + varint(4097)),
        "nonfinite-dense": one(Codec.DENSE_FP32, struct.pack(f"<{n}f", *flat, float("nan"))),
        "nonfinite-fp16": one(Codec.DENSE_FP16, struct.pack(f"<{n}e", *flat, float("inf"))),
        "nonfinite-bf16": one(Codec.DENSE_BF16, b"\x80\x3f" * (n - 1) + b"\x80\xff"),
        "nonfinite-values": one(Codec.VALUES_FP32, struct.pack("<42f", *flat[:41], float("-inf"))),
        "nonfinite-real": one(Codec.REAL, struct.pack("<d", float("nan"))),
        "nonfinite-vector": one(Codec.VECTOR_FP32, struct.pack("<2f", 1, float("inf"))),
        "count-word_more": one(Codec.MASK_WHOLE, mask + b"\1\0\0\0"),
        "code-word_zero": one(Codec.MASK_WHOLE, mask + bytes(4)),
        "code-full_mask": one(Codec.MASK_WHOLE, varint(m) + b"\1\0\0\0"),
        "code-integers": one(Codec.INTEGERS_CODED, bytes(coded) + b"\1\0\0\0"),
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_payloads_are_refused_for_the_right_reason_in_bounded_memory(name):
    payload = golden(f"hostile/{name}", hostile()[name])
    assert payload == hostile()[name]
    tracemalloc.start()
    error = refusal(lambda: read_all(payload, SMALL))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.reason == name.split("-")[0]
    assert 0 <= error.offset <= len(payload)
    assert peak < 200_000
    back = pickle.loads(pickle.dumps(error))
    assert (back.reason, back.offset, str(back)) == (error.reason, error.offset, str(error))


def test_every_reason_occurs():
    assert {name.split("-")[0] for name in hostile()} | {"missing"} == set(Reason)


def test_a_section_is_read_only_as_what_it_is():
    layout = layout_of((9, 8))
    within = masks_of(layout, 0.5)
    message = carried(sections.mask(within, within), layout)
    assert refusal(lambda: message.mask("y")).reason is Reason.MISSING
    assert refusal(lambda: message.mask("x")).reason is Reason.SECTION
    for get in (message.dense, message.indices, message.integers, message.seed, message.number, message.vector):
        assert refusal(lambda get=get: get("x")).reason is Reason.SECTION
    for get in (message.values, message.signs):
        assert refusal(lambda get=get: get("x", within)).reason is Reason.SECTION
    grown = carried(sections.mask(Masks.full(layout)), layout)
    assert refusal(lambda: grown.mask("x", within)).reason is Reason.RANGE


def test_large_payloads_are_refused_unread():
    layout = layout_of((9,))
    payload = pack(Message("train", 1, layout, {}))
    assert unpack(payload, layout, limit=len(payload)).kind == "train"
    assert refusal(lambda: unpack(payload, layout, limit=len(payload) - 1)).reason is Reason.LENGTH


@pytest.mark.parametrize("name", golden_messages())
def test_every_truncation_is_refused(name):
    message = golden_messages()[name]
    payload = pack(message)
    for n in range(len(payload)):
        assert refusal(lambda n=n: unpack(payload[:n], message.layout)).reason is Reason.TRUNCATED
        if n != len(payload) - 8:
            refusal(lambda n=n: read_all(sealed(payload[:n]), message.layout))


@pytest.mark.parametrize("name", golden_messages())
def test_every_flipped_bit_is_refused_or_with_a_right_checksum_read_as_something_valid(name):
    message = golden_messages()[name]
    payload = pack(message)
    step = 1 if len(payload) < 350 else 5
    for bit in range(0, 8 * len(payload), step):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack(flipped, message.layout)
        with suppress(WireError):
            read_all(sealed(bytes(flipped[:-8])), message.layout)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(Codec)), st.binary(max_size=60) | st.binary(max_size=12).map(lambda b: b"\4" + b))
def test_any_body_is_refused_or_read_as_something_valid(codec, body):
    with suppress(WireError):
        read_all(assemble((codec, b"x", body)), SMALL)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_are_refused(body, framed):
    payload = sealed(b"FSV\1" + body) if framed else body
    with pytest.raises(WireError):
        unpack(payload, SMALL)
    assert phases(payload) in ({"control": len(payload)}, {"eval": len(payload)}) or sum(phases(payload).values()) == len(
        payload
    )


# ---- what a sender may not send


def test_values_that_are_not_finite_are_not_sent():
    layout = layout_of((4,), 0, 0)
    for precision, value in (("fp32", float("nan")), ("fp32", float("-inf")), ("fp16", 65520.0), ("bf16", 3.4e38)):
        params = Params(layout, torch.tensor([0.0, 1.0, value, 2.0]))
        assert refusal(lambda p=params, f=precision: carried(sections.dense(p, f), layout)).reason is Reason.NONFINITE
        masks = Masks(layout, torch.tensor([True, True, False, True]))
        assert carried(sections.values(params, masks, precision), layout).values("x", masks).flat.tolist() == [0, 1, 0, 2]
    assert carried(sections.dense(Params(layout, torch.full((4,), 65519.0)), "fp16"), layout).dense("x").flat[0] == 65504
    assert refusal(lambda: sections.number(float("inf"))).reason is Reason.NONFINITE
    assert refusal(lambda: sections.vector([float("nan")])).reason is Reason.NONFINITE
    assert refusal(lambda: sections.integers([2**31])).reason is Reason.RANGE


def test_mistakes_of_a_caller_are_refused():
    layout, other = layout_of((9, 8)), layout_of((8, 9))
    half = masks_of(layout, 0.5)
    wrong = [
        lambda: sections.mask(Masks.full(layout), half),
        lambda: sections.mask(masks_of(other, 0.0), half),
        lambda: sections.indices([3, 3], layout),
        lambda: sections.indices([4, 3], layout),
        lambda: sections.indices([-1, 3], layout),
        lambda: sections.indices([17], layout),
        lambda: sections.signs(torch.tensor([1, 0]), half),
        lambda: sections.signs(torch.ones(3), half),
        lambda: sections.integers([0, 4], bits=2),
        lambda: sections.integers([0.5]),
        lambda: sections.seed(-1),
        lambda: sections.number(2**63),
        lambda: sections.vector(torch.zeros(2, 2)),
        lambda: sections.dense(Params(layout, torch.zeros(2, layout.size))),
        lambda: Message("Train", 1, layout, {}),
        lambda: Message("train", -1, layout, {}),
        lambda: Message("train", 1, layout, {"Upper": sections.seed(1)}),
        lambda: Message("train", 1, layout, {f"s{i}": sections.seed(1) for i in range(256)}),
    ]
    for act in wrong:
        with pytest.raises(ValueError):  # noqa: PT011
            act()


# ---- the byte count


@pytest.mark.parametrize("name", golden_messages())
def test_phases_sum_to_the_length(name):
    message = golden_messages()[name]
    payload = pack(message)
    split = phases(payload)
    assert split == phases(message)
    assert sum(split.values()) == len(payload)
    masks = [
        s
        for s in message.sections.values()
        if s.codec.name.startswith(("MASK", "WITHIN", "INDICES")) and message.kind != "eval"
    ]
    assert split.get("masks", 0) == sum(-(-len(section.body) // 4) * 4 for section in masks)
    assert set(split) - {"masks"} == {message.kind if message.kind in ("train", "eval", "setup") else "control"}


def test_the_ledger_counts_each_payload_exactly():
    layout, ledger = layout_of((100,)), Ledger()
    mask, dense = sections.mask(masks_of(layout, 0.1)), sections.dense(params_of(layout))
    broadcast = pack(Message("train", 1, layout, {"mask": mask, "w": dense}))
    test = pack(Message("eval", 1, layout, {"mask": mask, "w": dense}))
    replies = [pack(Message("train", 1, layout, {"w": dense, "n": sections.number(client)})) for client in range(3)]
    for reply in replies:
        ledger.count("down", broadcast)
        ledger.count("down", test)
        ledger.count("up", reply)
    ledger.count("up", b"no payload at all")
    row = ledger.row()
    assert row["bytes_down"] == 3 * len(broadcast)
    assert row["bytes_up"] == sum(map(len, replies)) + 17
    assert row["bytes_down_once"] == len(broadcast)
    assert row["phases"]["eval"] == {"up": 0, "down": 3 * len(test)}
    assert row["phases"]["masks"] == {"up": 0, "down": 3 * phases(broadcast)["masks"]}
    assert row["phases"]["control"] == {"up": 17, "down": 0}
    assert sum(n for ways in row["phases"].values() for n in ways.values()) == sum(
        len(payload) for payload in [*replies, *[broadcast, test] * 3, b"no payload at all"]
    )
