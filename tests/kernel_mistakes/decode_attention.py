"""Mistakes in decode_attention.cu, and launches of one template instance that detect them."""

from npllama.ops.cuda.decode_attention import Division
from test_kernels_decode_attention import Case, check_many_numbers, replayed

MISTAKES = [
    # the equations
    (
        "the second half is rotated the wrong way",
        "sin[i] = is_first ? -sin[i] : sin[i];",
        "sin[i] = -sin[i];",
    ),
    (
        "the partner is the neighbouring column",
        "partner = is_first ? column + HALF : column - HALF;",
        "partner = column ^ 8;",
    ),
    (
        "q is not scaled",
        "rope.rotate(token + (size_t)(first_head + g) * C, scale, q[g]);",
        "rope.rotate(token + (size_t)(first_head + g) * C, 1.0f, q[g]);",
    ),
    ("the new key is not rotated", "rope.rotate(k, 1.0f, x);", "rope.read(k + column, x);"),
    (
        "every query head's slice reads the first heads",
        "first_head = blockIdx.y * GB;",
        "first_head = kv_head * GB;",
    ),
    ("the value's head is the key's", "rope.read(k + (size_t)n_kv_heads * C", "rope.read(k"),
    (
        "an earlier maximum is not scaled down",
        "for (int i = 0; i < 8; i++) o[g][i] *= old;",
        "",
    ),
    ("the sum is not scaled down", "sum[g] *= old;", ""),
    (
        "no key yet: infinity less infinity",
        "__expf(score - (top == MINUS_INFINITY ? 0.0f : top))",
        "__expf(score - top)",
    ),
    # the keys that are read
    (
        "the new key is read from the cache",
        "const int end_of_cached = min(keys.end, position);",
        "const int end_of_cached = keys.end;",
    ),
    (
        "the new key is left out",
        "scores[g][u] = key < keys.end ? s : MINUS_INFINITY;",
        "scores[g][u] = key < end_of_cached ? s : MINUS_INFINITY;",
    ),
    (
        "keys behind the split's end count",
        "scores[g][u] = key < keys.end ? s : MINUS_INFINITY;",
        "scores[g][u] = s;",
    ),
    (
        "a split ends one step early",
        "first_key < keys.end; first_key += STEP",
        "first_key + STEP < keys.end; first_key += STEP",
    ),
    (
        "the last split goes on to the end of its size",
        "min((split + 1) * size, n_keys)",
        "(split + 1) * size",
    ),
    (
        "the batch's row is taken for the cache's",
        "((size_t)rows[b] * n_kv_heads",
        "((size_t)b * n_kv_heads",
    ),
    (
        "angles of the first row for all",
        "rope(cos + (size_t)b * (C / 2), sin + (size_t)b * (C / 2), column)",
        "rope(cos, sin, column)",
    ),
    (
        "offsets of 32 bits",
        "const size_t key_0 = ((size_t)rows[b] * n_kv_heads + kv_head) * context;",
        "const int key_0 = (rows[b] * n_kv_heads + kv_head) * context;",
    ),
    # the overlap with the previous kernel
    (
        "the token is read before the kernel that writes it has ended",
        "  wait_for_previous_kernel();\n",
        "  if (qkv[b] == 0.5f) return;\n  wait_for_previous_kernel();\n",
    ),
    (
        "empty splits do not wait",
        "  wait_for_previous_kernel();\n",
        "  if ((int)blockIdx.x >= keys.n_used) return;\n  wait_for_previous_kernel();\n",
    ),
    # which thread writes
    (
        "each slice of a head writes the cache",
        "if (slice == 0 && group == 0) {",
        "if (group == 0) {",
    ),
    ("each group writes the cache", "if (slice == 0 && group == 0) {", "if (slice == 0) {"),
    (
        "idle lanes write the cache",
        "if (keys.end == n_keys && has_columns) {",
        "if (keys.end == n_keys) {",
    ),
    (
        "idle lanes read the cache",
        "if (has_columns && key + u * GROUPS < end) {",
        "if (key + u * GROUPS < end) {",
    ),
    ("idle lanes have results", "if (lane * 8 >= C) return;", ""),
    (
        "every split has a result of the first's",
        "put(blockIdx.x, i % C, found)",
        "put(0, i % C, found)",
    ),
    # the order of reads and writes
    (
        "no barrier before the groups are combined",
        "results.put(group, lane, softmax);\n  __syncthreads();",
        "results.put(group, lane, softmax);",
    ),
    (
        "a lane leaves before its group's shuffle",
        "OnlineSoftmax<GB> softmax;\n",
        "OnlineSoftmax<GB> softmax;\n  if (!has_columns) return;\n",
    ),
    (
        "no fence before the count",
        "__threadfence();  // make all writes visible before the count",
        "",
    ),
    (
        "the count before the block's results",
        "__threadfence();  // make all writes visible before the count\n  __syncthreads();",
        "__threadfence();",
    ),
    (
        "the last block is one too early",
        "return n_before == n_blocks - 1;",
        "return n_before == n_blocks - 2;",
    ),
    (
        "the counter is not reset",
        "atomicInc(counter, n_blocks - 1)",
        "atomicInc(counter, n_blocks)",
    ),
    (
        "empty splits are waited for",
        "is_last(counter, keys.n_used)",
        "is_last(counter, n_splits)",
    ),
    (
        "rows share a counter",
        "counters + (size_t)b * n_parts + blockIdx.y",
        "counters + blockIdx.y",
    ),
]


def run(launcher):
    """Cover unused lanes, permuted cache rows, empty splits, and a row with S = 0."""
    launcher.n_sms = 12
    Case("float16", 48, 2, 4, (37, 0, 200), (2, 0, 3), 5).check(launcher)
    Case("float16", 48, 2, 4, (70,)).check(launcher, Division(2, 2, 16, 4), replayed)
    check_many_numbers(launcher)
