"""The innermost loops of the sparse kernels, on lines: stretches of neighbouring float32 numbers.

    gather   y line = start + sum over k of values[which[k]] * x line at k      (or added to what y holds)
    dots     grad[which[k]] += y line . x line at k                             for all k
    largest  y line = largest of several x lines, and which of them             (max pooling, ReLU)
    routed   the transpose of largest

In the first two a line is cut into pieces of up to 14 vectors of 8 numbers. A piece of y stays in registers while the loop runs
over the kept weights, so each multiplication reads one vector and nothing else. A compiler does not find this by itself, so the
loops are given to it in its intermediate language, which knows vectors and runs on any processor. 14 vectors are what the
sixteen registers of AVX2 hold beside a weight and a temporary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numba.extending
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.int32]
_Function = TypeVar("_Function", bound=Callable[..., object])
_intrinsic: Any = numba.extending.intrinsic
_code: Any = cgutils

LANES = 8
"""numbers in a vector: part of the order of summation, so it is the same on every processor"""
PIECE, OPEN = 14, 4
"""most vectors of a piece that is full, and of one whose last vector is partly filled"""
NONE = 255
"""tap of a window whose gradient goes nowhere"""

_INDEX, _LANE, _FLOAT, _BIT = ir.IntType(64), ir.IntType(32), ir.FloatType(), ir.IntType(1)
_BYTE = ir.IntType(8)
_VECTOR, _FLAGS, _BYTES = (ir.VectorType(element, LANES) for element in (_FLOAT, _BIT, _BYTE))
_CUT, _LINE = (types.intp, types.intp, types.intp), (types.float32[::1], types.intp)
_WEIGHTS = (types.int32[::1], types.int32[::1], types.float32[::1], types.intp, types.intp, types.intp)
_ROWS = (types.float32[::1], types.intp, types.intp)
_WINDOWS = (*_ROWS, types.uint8[::1], types.intp, types.intp, *_ROWS, types.int64[::1], types.intp, types.intp)
_CONTRACT = ("contract",)


def compiled(function: _Function) -> _Function:
    """Compile once for all processes; where no folder can be written, once for each."""
    try:
        return numba.njit(function, cache=True, error_model="numpy", fastmath={"contract"})  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(function, error_model="numpy", fastmath={"contract"})  # type: ignore[no-any-return]


class _Piece:
    """Code for a piece of `vectors` vectors, of which the last has `tail` numbers if `partial`."""

    def __init__(self, builder: ir.IRBuilder, vectors: int, partial: bool, tail: ir.Value) -> None:
        self.vectors = vectors
        self._builder, self._mask = builder, None
        if partial:
            lanes = ir.Constant(ir.VectorType(_LANE, LANES), list(range(LANES)))
            self._mask = builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(tail, _LANE), lanes.type))

    def load(self, begin: ir.Value, kind: ir.VectorType = _VECTOR) -> list[ir.Value]:
        """Vectors from a place in memory on; zero where the last one is not filled."""
        return [self._load(self._at(begin, j, kind), j, kind) for j in range(self.vectors)]

    def store(self, values: list[ir.Value], begin: ir.Value) -> None:
        """Write vectors from a place in memory on."""
        for j, value in enumerate(values):
            place = self._at(begin, j, value.type)
            if self._masked(j):
                self._masked_call("store", ir.VoidType(), value.type, [value, place, _align(value.type), self._mask])
            else:
                self._builder.store(value, place, align=_align(value.type).constant)

    def _load(self, place: ir.Value, j: int, kind: ir.VectorType) -> ir.Value:
        if not self._masked(j):
            return self._builder.load(place, align=_align(kind).constant)
        return self._masked_call("load", kind, kind, [place, _align(kind), self._mask, ir.Constant(kind, [0] * LANES)])

    def _masked(self, j: int) -> bool:
        return self._mask is not None and j == self.vectors - 1

    def _at(self, begin: ir.Value, j: int, kind: ir.VectorType) -> ir.Value:
        return self._builder.bitcast(self._builder.gep(begin, [ir.Constant(_INDEX, j * LANES)]), kind.as_pointer())

    def _masked_call(self, what: str, result: ir.Type, vector: ir.VectorType, arguments: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        name = f"llvm.masked.{what}.v{LANES}{'f32' if vector == _VECTOR else 'i8'}.p0"
        return self._builder.call(_code.get_or_insert_function(self._builder.module, kind, name), arguments)


def _align(vector: ir.VectorType) -> ir.Constant:
    """Bytes that an element is surely aligned to."""
    return ir.Constant(_LANE, 4 if vector == _VECTOR else 1)


def _spread(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Fill a vector with one number."""
    nothing, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_LANE, LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, scalar, ir.Constant(_LANE, 0)), nothing, zeros)


def _summed(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Sum of a vector's numbers, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [ir.Constant(ir.VectorType(_LANE, width), list(range(b, b + width))) for b in (0, width)]
        low, high = (builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), half) for half in halves)
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(_LANE, 0))


def _place(context: Any, builder: ir.IRBuilder, kind: Any, array: ir.Value, index: ir.Value | None = None) -> ir.Value:
    """Address of an array's element."""
    data = context.make_array(kind)(context, builder, array).data
    return data if index is None else builder.gep(data, [index])


def _added(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Total + a * b, in one operation where the processor has it."""
    return builder.fadd(total, builder.fmul(a, b, flags=_CONTRACT), flags=_CONTRACT)


def _each_size(builder: ir.IRBuilder, vectors: ir.Value, tail: ir.Value, piece: Callable[[_Piece], None]) -> None:
    """Generate code for each size of piece, and the choice among them."""
    partial = builder.select(builder.icmp_signed(">", tail, _INDEX(0)), _INDEX(PIECE), _INDEX(0))
    after = builder.append_basic_block("after")
    choice = builder.switch(builder.add(vectors, partial), after)
    for size, open_ in [(size + 1, False) for size in range(PIECE)] + [(size + 1, True) for size in range(OPEN)]:
        block = builder.append_basic_block(f"piece_{size}{'_partial' if open_ else ''}")
        choice.add_case(ir.Constant(_INDEX, size + PIECE * open_), block)
        with builder.goto_block(block):
            piece(_Piece(builder, size, open_, tail))
            builder.branch(after)
    builder.position_at_end(after)


@_intrinsic
def gather(_typing, offset, vectors, tail, y, begin, x, base, at, which, values, first, last, scale, start, fresh):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Add kept weights first..last - 1, applied to lines of x, to a piece of a line of y.

    Args:
        offset: of the piece in the line: this and the next two are a row of `pieces`.
        vectors: of the piece.
        tail: numbers in the last vector, 0 if it is full.
        y: where the sum goes.
        begin: of the line in y.
        x: where the lines are that are summed.
        base: added to the place of each.
        at: place of each kept weight's line in x, in units of `scale`.
        which: place of each kept weight in `values`.
        values: the kept weights.
        first: of the kept weights that are applied.
        last: the one after.
        scale: unit of `at`.
        start: what the sum begins with, if `fresh`.
        fresh: begin anew, instead of with what y holds.
    """
    signature = types.void(*_CUT, *_LINE, *_LINE, *_WEIGHTS, types.float32, types.boolean)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        offset, vectors, tail, y, begin, x, base, *_, first, last, scale, start, fresh = args
        kinds = signature.args
        out = _place(context, builder, kinds[3], y, builder.add(begin, offset))
        source = _place(context, builder, kinds[5], x, builder.add(base, offset))
        offsets, order, weights = (_place(context, builder, kinds[i], args[i]) for i in (7, 8, 9))

        def piece(piece: _Piece) -> None:
            sums = [_code.alloca_once(builder, _VECTOR) for _ in range(piece.vectors)]
            with builder.if_else(fresh) as (then, otherwise):
                with then:
                    for sum_ in sums:
                        builder.store(_spread(builder, start, _VECTOR), sum_)
                with otherwise:
                    for sum_, old in zip(sums, piece.load(out), strict=True):
                        builder.store(old, sum_)
            with _code.for_range_slice(builder, first, last, _INDEX(1), inc=True) as (k, _):
                index = builder.sext(builder.load(builder.gep(order, [k])), _INDEX)
                weight = _spread(builder, builder.load(builder.gep(weights, [index])), _VECTOR)
                distance = builder.mul(builder.sext(builder.load(builder.gep(offsets, [k])), _INDEX), scale)
                for sum_, term in zip(sums, piece.load(builder.gep(source, [distance])), strict=True):
                    builder.store(_added(builder, builder.load(sum_), weight, term), sum_)
            piece.store([builder.load(sum_) for sum_ in sums], out)

        _each_size(builder, vectors, tail, piece)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def dots(_typing, offset, vectors, tail, y, begin, x, base, at, which, grad, first, last, scale):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Add the products of a piece of a line of y with lines of x to the gradients of kept weights; see `gather`."""
    signature = types.void(*_CUT, *_LINE, *_LINE, *_WEIGHTS)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        offset, vectors, tail, y, begin, x, base, *_, first, last, scale = args
        kinds = signature.args
        out = _place(context, builder, kinds[3], y, builder.add(begin, offset))
        source = _place(context, builder, kinds[5], x, builder.add(base, offset))
        offsets, order, sums = (_place(context, builder, kinds[i], args[i]) for i in (7, 8, 9))

        def piece(piece: _Piece) -> None:
            line = piece.load(out)
            with _code.for_range_slice(builder, first, last, _INDEX(1), inc=True) as (k, _):
                distance = builder.mul(builder.sext(builder.load(builder.gep(offsets, [k])), _INDEX), scale)
                chains = [ir.Constant(_VECTOR, [0.0] * LANES)] * 2
                for j, (a, b) in enumerate(zip(line, piece.load(builder.gep(source, [distance])), strict=True)):
                    chains[j % 2] = _added(builder, chains[j % 2], a, b)
                place = builder.gep(sums, [builder.sext(builder.load(builder.gep(order, [k])), _INDEX)])
                dot = _summed(builder, builder.fadd(*chains))
                builder.store(builder.fadd(builder.load(place), dot), place)

        _each_size(builder, vectors, tail, piece)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def largest(_typing, y, begin, y_step, taps, first, t_step, x, base, x_step, at, pixels, length, relu):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Take the largest number of each of a row of windows: y[c] = max over k of x[at[k] + c], for c < length.

    taps[c] is the first k that has it. NaN is larger than all. With `relu`, what is 0 or less becomes 0 with tap NONE.

    Args:
        y: where the results go.
        begin: of the first window's in y.
        y_step: from window to window in y.
        taps: where the taps go; None: nobody needs them.
        first: of the first window's in taps.
        t_step: from window to window in taps.
        x: what the windows lie on.
        base: of the first window in x.
        x_step: from window to window in x.
        at: what the taps of a window stand at.
        pixels: number of windows.
        length: numbers a tap.
        relu: see above.
    """
    kept = taps != types.none
    signature = types.void(*_ROWS, taps, *_WINDOWS[4:], types.boolean)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        y, begin, y_step, taps, first, t_step, x, base, x_step, at, pixels, length, relu = args
        kinds = signature.args
        out = _place(context, builder, kinds[0], y, begin)
        numbers = _place(context, builder, kinds[3], taps, first) if kept else None
        source, offsets = _place(context, builder, kinds[6], x, base), _place(context, builder, kinds[9], at)
        count = builder.extract_value(context.make_array(kinds[9])(context, builder, at).shape, 0)
        cut, zeros = _spread(builder, builder.trunc(relu, _BIT), _FLAGS), ir.Constant(_VECTOR, [0.0] * LANES)
        best, tap = _code.alloca_once(builder, _VECTOR), _code.alloca_once(builder, _BYTES)

        def work(w: ir.Value, c: ir.Value, piece: _Piece, taps: _Taps) -> None:
            here = builder.add(builder.mul(w, x_step), c)

            def load(k: ir.Value) -> ir.Value:
                return piece.load(builder.gep(source, [builder.add(builder.load(builder.gep(offsets, [k])), here)]))[0]

            def compare(k: ir.Value) -> None:
                line, old = load(k), builder.load(best)
                larger = builder.or_(builder.fcmp_ordered(">", line, old), builder.fcmp_unordered("uno", line, line))
                builder.store(builder.select(larger, line, old), best)
                if not kept:
                    return
                number = _spread(builder, builder.trunc(k, _BYTE), _BYTES)
                builder.store(builder.select(larger, number, builder.load(tap)), tap)

            builder.store(load(_INDEX(0)), best)
            builder.store(ir.Constant(_BYTES, [0] * LANES), tap)
            taps(1, compare)
            value, number = builder.load(best), builder.load(tap)
            dead = builder.and_(builder.fcmp_ordered("<=", value, zeros), cut)
            piece.store([builder.select(dead, zeros, value)], builder.gep(out, [builder.add(builder.mul(w, y_step), c)]))
            number = builder.select(dead, ir.Constant(_BYTES, [NONE] * LANES), number)
            if numbers is not None:
                piece.store([number], builder.gep(numbers, [builder.add(builder.mul(w, t_step), c)]))

        _each_window(builder, count, pixels, length, work)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def routed(_typing, y, begin, y_step, taps, first, t_step, x, base, x_step, at, pixels, length):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Transpose of `largest`: x[at[k] + c] = y[c] if taps[c] == k else 0, for all k and c < length."""
    signature = types.void(*_WINDOWS)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        y, begin, y_step, taps, first, t_step, x, base, x_step, at, pixels, length = args
        kinds = signature.args
        source, numbers = _place(context, builder, kinds[0], y, begin), _place(context, builder, kinds[3], taps, first)
        out, offsets = _place(context, builder, kinds[6], x, base), _place(context, builder, kinds[9], at)
        count = builder.extract_value(context.make_array(kinds[9])(context, builder, at).shape, 0)

        def work(w: ir.Value, c: ir.Value, piece: _Piece, taps: _Taps) -> None:
            (line,) = piece.load(builder.gep(source, [builder.add(builder.mul(w, y_step), c)]))
            (tap,) = piece.load(builder.gep(numbers, [builder.add(builder.mul(w, t_step), c)]), _BYTES)
            there = builder.add(builder.mul(w, x_step), c)

            def hand(k: ir.Value) -> None:
                here = builder.icmp_unsigned("==", tap, _spread(builder, builder.trunc(k, _BYTE), _BYTES))
                place = builder.gep(out, [builder.add(builder.load(builder.gep(offsets, [k])), there)])
                piece.store([builder.select(here, line, ir.Constant(_VECTOR, [0.0] * LANES))], place)

            taps(0, hand)

        _each_window(builder, count, pixels, length, work)
        return context.get_dummy_value()

    return signature, generate


@_intrinsic
def copied(_typing, y, begin, y_step, x, base, x_step, pixels, length):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Copy a row of pixels of `length` numbers: they are y_step apart in y, x_step in x."""
    signature = types.void(*_ROWS, *_ROWS, types.intp, types.intp)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        y, begin, y_step, x, base, x_step, pixels, length = args
        kinds = signature.args
        out, source = _place(context, builder, kinds[0], y, begin), _place(context, builder, kinds[3], x, base)

        def work(w: ir.Value, c: ir.Value, piece: _Piece) -> None:
            line = piece.load(builder.gep(source, [builder.add(builder.mul(w, x_step), c)]))
            piece.store(line, builder.gep(out, [builder.add(builder.mul(w, y_step), c)]))

        _each_vector(builder, pixels, length, work)
        return context.get_dummy_value()

    return signature, generate


_Taps = Callable[[int, Callable[[ir.Value], None]], None]
"""generates code for each tap of a window, from one on"""


def _each_window(
    builder: ir.IRBuilder,
    count: ir.Value,
    pixels: ir.Value,
    length: ir.Value,
    work: Callable[[ir.Value, ir.Value, _Piece, _Taps], None],
) -> None:
    """Generate code for each vector of a row of windows: without a loop over the taps where there are 1 or 4."""

    def several(first: int, tap: Callable[[ir.Value], None]) -> None:
        with _code.for_range_slice(builder, _INDEX(first), count, _INDEX(1), inc=True) as (k, _):
            tap(k)

    after, others = builder.append_basic_block("after"), builder.append_basic_block("others")
    choice = builder.switch(count, others)
    for size in (1, 4):

        def known(first: int, tap: Callable[[ir.Value], None], size: int = size) -> None:
            for k in range(first, size):
                tap(_INDEX(k))

        block = builder.append_basic_block(f"taps_{size}")
        choice.add_case(_INDEX(size), block)
        with builder.goto_block(block):
            _each_vector(builder, pixels, length, lambda w, c, piece, taps=known: work(w, c, piece, taps))  # type: ignore[misc]
            builder.branch(after)
    with builder.goto_block(others):
        _each_vector(builder, pixels, length, lambda w, c, piece: work(w, c, piece, several))
        builder.branch(after)
    builder.position_at_end(after)


def _each_vector(
    builder: ir.IRBuilder, pixels: ir.Value, length: ir.Value, work: Callable[[ir.Value, ir.Value, _Piece], None]
) -> None:
    """Generate code for each vector of each pixel of a row."""
    zero, lanes = _INDEX(0), _INDEX(LANES)
    tail = builder.srem(length, lanes)
    full = builder.sub(length, tail)
    with _code.for_range(builder, pixels) as loop:
        with _code.for_range_slice(builder, zero, full, lanes, inc=True) as (c, _):
            work(loop.index, c, _Piece(builder, 1, False, tail))
        with builder.if_then(builder.icmp_signed(">", tail, zero)):
            work(loop.index, full, _Piece(builder, 1, True, tail))


@compiled
def pieces(length: int) -> NDArray[np.int64]:
    """Cut a line into pieces of nearly one size: rows of (begin, vectors, numbers in the last vector or 0 if it is full)."""
    full, tail = length // LANES, length % LANES
    rest = min(full, OPEN - 1) if tail else 0
    full -= rest
    count = (full + PIECE - 1) // PIECE
    found = np.zeros((count + (1 if tail else 0), 3), np.int64)
    begin = 0
    for c in range(count):
        found[c, 0], found[c, 1] = begin, full // count + (1 if c < full % count else 0)
        begin += found[c, 1] * LANES
    if tail:
        found[count, 0], found[count, 1], found[count, 2] = begin, rest + 1, tail
    return found
