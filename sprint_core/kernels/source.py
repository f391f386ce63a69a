"""The kernels in Triton's language; fused.py says what each computes, and calls it. Imported only where triton is.

Arithmetic is in fp32, whatever lies in memory. Tensors in capitals are pointers, whose rows of channels are contiguous
unless there is a stride. Constants (`tl.constexpr`) have a kernel of their own for each value: few, and powers of two.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def rms_norm(X, W, B, R, Y, rows, channels, offset, eps, HAS_B: tl.constexpr, HAS_R: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    ok = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * channels + c[None, :]
    x = tl.load(X + at, ok, 0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / channels + eps)
    y = x * scale[:, None] * (tl.load(W + c, inside, 0.0).to(tl.float32) + offset)[None, :]
    if HAS_B:
        y += tl.load(B + c, inside, 0.0).to(tl.float32)[None, :]
    if HAS_R:
        y += tl.load(R + at, ok, 0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), ok)


@triton.jit
def rms_norm_pair(X1, W1, Y1, rows1, X2, W2, Y2, rows2, channels, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of two tensors with their weights; the grid is as long as the longer one needs."""
    if tl.program_id(1) == 0:
        rms_norm(X1, W1, W1, X1, Y1, rows1, channels, 0.0, eps, False, False, ROWS, BLOCK)
    else:
        rms_norm(X2, W2, W2, X2, Y2, rows2, channels, 0.0, eps, False, False, ROWS, BLOCK)


@triton.jit
def modulated_norm(X, BRANCH, SHIFT, SCALE, SUM, Y, tokens, channels, shift_stride, scale_stride, eps,
                   HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    c = tl.arange(0, BLOCK)
    ok = c < channels
    at = row * channels + c
    x = tl.load(X + at, ok, 0.0)
    if HAS_BRANCH:
        x = (x.to(tl.float32) + tl.load(BRANCH + at, ok, 0.0).to(tl.float32)).to(SUM.dtype.element_ty)
        tl.store(SUM + at, x, ok)
    x = x.to(tl.float32)
    away = tl.where(ok, x - tl.sum(x, 0) / channels, 0.0)
    y = away / tl.sqrt(tl.sum(away * away, 0) / channels + eps)
    shift = tl.load(SHIFT + sample * shift_stride + c, ok, 0.0).to(tl.float32)
    scale = tl.load(SCALE + sample * scale_stride + c, ok, 0.0).to(tl.float32)
    tl.store(Y + at, (y * (1 + scale) + shift).to(Y.dtype.element_ty), ok)


@triton.jit
def linear_attention_sums(K, V, SUMS, heads, tokens, k_batch, k_head, k_token, v_batch, v_head, v_token,
                          D: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """relu(k)^T v and the sum of relu(k), of one head and of every PARTS-th block of tokens: [D, D] and [D]."""
    head, part = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, D)
    products, total = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    k_first = K + (head // heads).to(tl.int64) * k_batch + (head % heads) * k_head
    v_first = V + (head // heads).to(tl.int64) * v_batch + (head % heads) * v_head
    first = part * TOKENS
    while first < tokens:
        token = (first + tl.arange(0, TOKENS)).to(tl.int64)
        ok = (token < tokens)[:, None]
        k = tl.maximum(tl.load(k_first + token[:, None] * k_token + d[None, :], ok, 0.0).to(tl.float32), 0.0)
        v = tl.load(v_first + token[:, None] * v_token + d[None, :], ok, 0.0).to(tl.float32)
        products += tl.dot(tl.trans(k), v, input_precision="ieee")
        total += tl.sum(k, 0)
        first += PARTS * TOKENS
    out = SUMS + (head * PARTS + part) * (D * D + D)
    tl.store(out + d[:, None] * D + d[None, :], products)
    tl.store(out + D * D + d, total)


@triton.jit
def linear_attention_outputs(Q, SUMS, Y, heads, tokens, q_batch, q_head, q_token, eps, D: tl.constexpr,
                             TOKENS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Of one head and one block of tokens, from the sums above."""
    head = tl.program_id(0)
    sample = (head // heads).to(tl.int64)
    d = tl.arange(0, D)
    products, total = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for part in range(PARTS):
        sums = SUMS + (head * PARTS + part) * (D * D + D)
        products += tl.load(sums + d[:, None] * D + d[None, :])
        total += tl.load(sums + D * D + d)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    ok = (token < tokens)[:, None]
    q_at = Q + sample * q_batch + (head % heads) * q_head + token[:, None] * q_token + d[None, :]
    q = tl.maximum(tl.load(q_at, ok, 0.0).to(tl.float32), 0.0)
    y = tl.dot(q, products, input_precision="ieee") / (tl.sum(q * total[None, :], 1) + eps)[:, None]
    y_at = Y + ((sample * tokens + token) * heads + head % heads)[:, None] * D + d[None, :]
    tl.store(y_at, y.to(Y.dtype.element_ty), ok)


@triton.jit
def gated_depthwise(X, W, B, Y, height, width, hidden, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of one block of channels and of columns, in one row of pixels; X and Y have channels last."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2)
    y, first_row = row % height, row - row % height  # of pixels of all images
    known = c < hidden
    value = tl.zeros((COLUMNS, CHANNELS), tl.float32) + tl.load(B + c, known, 0.0).to(tl.float32)[None, :]
    gate = tl.zeros((COLUMNS, CHANNELS), tl.float32) + tl.load(B + hidden + c, known, 0.0).to(tl.float32)[None, :]
    for down in tl.static_range(3):
        for right in tl.static_range(3):
            i, j = y + down - 1, column + right - 1
            ok = ((j >= 0) & (j < width))[:, None] & known[None, :] & (i >= 0) & (i < height)
            pixel = (first_row + i).to(tl.int64) * width + j
            at = X + pixel[:, None] * (2 * hidden) + c[None, :]
            weight = W + c * 9 + 3 * down + right
            value += tl.load(at, ok, 0.0).to(tl.float32) * tl.load(weight, known, 0.0).to(tl.float32)[None, :]
            gate_weight = tl.load(weight + hidden * 9, known, 0.0).to(tl.float32)
            gate += tl.load(at + hidden, ok, 0.0).to(tl.float32) * gate_weight[None, :]
    out = value * gate / (1 + tl.exp(-gate))
    pixel = row.to(tl.int64) * width + column
    ok = (column < width)[:, None] & known[None, :]
    tl.store(Y + pixel[:, None] * hidden + c[None, :], out.to(Y.dtype.element_ty), ok)


@triton.jit
def rotate(X, COS, SIN, Y, heads, tokens, x_batch, x_head, x_token, channels, BLOCK: tl.constexpr):
    """One token of one head."""
    row = tl.program_id(0)
    token, head, sample = row % tokens, row // tokens % heads, row // tokens // heads
    c = tl.arange(0, BLOCK)
    ok = c < channels
    first = X + sample.to(tl.int64) * x_batch + head * x_head + token * x_token
    x = tl.load(first + c, ok, 0.0).to(tl.float32)
    other = tl.load(first + (c + channels // 2) % channels, ok, 0.0).to(tl.float32)
    cos, sin = (tl.load(COS + token * channels + c, ok, 0.0), tl.load(SIN + token * channels + c, ok, 0.0))
    tl.store(Y + row.to(tl.int64) * channels + c, (x * cos + other * sin).to(Y.dtype.element_ty), ok)


@triton.jit
def softcapped_softmax(LOGITS, MASK, Y, queries, keys, scale, cap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """One row of keys."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < keys
    x = tl.load(LOGITS + row * keys + c, ok, 0.0).to(tl.float32) * scale
    if HAS_CAP:
        x = cap * tanh(x)
    hidden = tl.load(MASK + row % queries * keys + c, ok, 1).to(tl.int1)
    x = tl.where(hidden, float("-inf"), x)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * keys + c, (x / tl.sum(x, 0)).to(Y.dtype.element_ty), ok)


@triton.jit
def gelu_gate(GATE, X, Y, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < elements
    g = tl.load(GATE + at, ok, 0.0).to(tl.float32)
    y = 0.5 * g * (1 + tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))) * tl.load(X + at, ok, 0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), ok)
