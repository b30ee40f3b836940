"""Sizes and speeds of the wire, printed: `python -m fedsieve.bench.codec [seed]`.

Messages are packed into a block that is there, and unpacked from it, as worker processes and their server do it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from xxhash import xxh3_64_intdigest

from fedsieve.bench import history
from fedsieve.engine.transports import keep_freed_memory
from fedsieve.params import Kind, Layout, Masks, Params, Slot
from fedsieve.streams import Streams
from fedsieve.wire import Ledger, Message, Section, pack, pack_into, sections, unpack
from fedsieve.wire.bits import decode_mask, encode_mask, entropy_bits

DENSITIES = (0.5, 0.4, 0.2, 0.1, 0.05, 0.01, 0.001)
PARAMETERS = 1_663_370
"""the size of the usual two-layer CNN on 28 x 28 images"""


def milliseconds(act: Callable[[], object], repeats: int = 15) -> float:
    """Return the median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        act()
        times.append(time.perf_counter() - begin)
    return 1e3 * median(times[1:])


def mask_row(streams: Streams, density: float, n: int = 1_000_000) -> float:
    """Print bytes, bytes over entropy, and speeds of one random mask; return entropy over bytes."""
    bits = streams(f"mask {density}").uniform(n) < density
    coding, body = encode_mask(bits, [n])
    encode = milliseconds(lambda: encode_mask(bits, [n]))
    decode = milliseconds(lambda: decode_mask(coding, memoryview(body), [n]))
    floor = entropy_bits(int(np.count_nonzero(bits)), n) / 8
    print(f"{density:7} {coding.name:7} {len(body):9,} {len(body) / floor:8.4f} {encode:8.2f} {decode:8.2f}")
    return floor / len(body)


def section_row(name: str, layout: Layout, encode: Callable[[], Section], decode: Callable[[Message], object]) -> list[float]:
    """Print times of one section in a message, also as copies of the payload, the checksum taken off; return these two."""
    payload = pack(Message("train", 1, layout, {"x": encode()}))
    room = bytearray(payload)
    copy = milliseconds(lambda: room.__setitem__(slice(None), payload))
    checksum = milliseconds(lambda: xxh3_64_intdigest(payload))
    out = milliseconds(lambda: pack_into(Message("train", 1, layout, {"x": encode()}), memoryview(room)))
    back = milliseconds(lambda: decode(unpack(room, layout)))
    copies = [(spent - checksum) / copy for spent in (out, back)]
    print(
        f"{name:22} {len(payload):9,} {copy:6.3f} {checksum:6.3f} {out:7.3f} {back:7.3f}"
        f" {copies[0]:9.1f} {copies[1]:7.1f} {1e6 * out / layout.size:9.2f} {1e6 * back / layout.size:6.2f}"
    )
    return copies


def exchange_seconds(layout: Layout, cohort: int, workers: int = 2) -> float:
    """Return the time that wire coding takes in one round of dense FedAvg, both ends together.

    One broadcast is packed once and unpacked once in each worker; each reply is packed by a client and unpacked by the server.
    """
    params = Params(layout, torch.from_numpy(Streams(0)("params").uniform(layout.size)).float())

    def broadcast() -> Message:
        return Message("train", 1, layout, {"weights": sections.dense(params)})

    def reply() -> Message:
        return Message("train", 1, layout, {"update": sections.dense(params), "examples": sections.number(600)})

    packed, answered = (bytearray(pack(message())) for message in (broadcast, reply))
    slot = memoryview(bytearray(answered))

    def ledger() -> None:
        book = Ledger()
        for _ in range(cohort):
            book.count("down", packed)
            book.count("up", answered)

    down = milliseconds(lambda: pack(broadcast()))
    down += workers * milliseconds(lambda: unpack(packed, layout).dense("weights"))
    up = milliseconds(lambda: pack_into(reply(), slot)) + milliseconds(lambda: unpack(answered, layout).dense("update"))
    return (down + cohort * up + milliseconds(ledger)) / 1e3


def main(streams: Streams) -> None:
    """Print both tables, and add to results/bench.jsonl."""
    print("random masks of 1,000,000 bits")
    print("density coding      bytes /entropy  encode   decode (ms)")
    figures = {f"mask {density}: entropy over bytes": mask_row(streams, density) for density in DENSITIES}

    weights = PARAMETERS - 2_000
    layout = Layout.of([Slot("weight", (weights,), Kind.WEIGHT, True, 0), Slot("bias", (2_000,), Kind.BIAS, False, 0)])
    params = Params(layout, torch.from_numpy(streams("values").numpy().standard_normal(layout.size, dtype=np.float32)))
    uniform = torch.from_numpy(streams("kept").uniform(weights))
    half, few = (Masks(layout, uniform < density) for density in (0.5, 0.05))
    print(f"\none model of {layout.size:,} parameters: ms; copies of the payload, checksum taken off; ns a parameter")
    print("section                    bytes   copy   xxh3    pack  unpack   pack(c) unpack(c) pack(ns) unpack(ns)")
    out, back = section_row("dense fp32", layout, lambda: sections.dense(params), lambda m: m.dense("x"))
    history.add("codec", figures | {"dense fp32: copies over pack": 1 / out, "dense fp32: copies over unpack": 1 / back})
    section_row("dense fp16", layout, lambda: sections.dense(params, "fp16"), lambda m: m.dense("x"))
    section_row("dense bf16", layout, lambda: sections.dense(params, "bf16"), lambda m: m.dense("x"))
    section_row("values at 0.5", layout, lambda: sections.values(params, half), lambda m: m.values("x", half))
    section_row("values at 0.05", layout, lambda: sections.values(params, few), lambda m: m.values("x", few))
    section_row("mask at 0.5", layout, lambda: sections.mask(half), lambda m: m.mask("x"))
    section_row("mask at 0.05", layout, lambda: sections.mask(few), lambda m: m.mask("x"))
    section_row("mask at 0.05 within 0.5", layout, lambda: sections.mask(few, half), lambda m: m.mask("x", half))


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    main(Streams(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
