// Attention of the decode step, for one new token per row. In row b the token is at position S:
//
//   qkv[b] contains H heads of q, K heads of k and K heads of v, each of width C
//   q = rope(q, S), k = rope(k, S)
//   k and v are written to the cache (rows, K, context, C) at position S
//   o = softmax(q [k_0 .. k_S]^T / sqrt(C)) [v_0 .. v_S]          for each of the H query heads
//
// G = H / K query heads attend to the keys of one key-value head.
//
// How the threads share the work. Almost all of the time goes into reading the keys and values, so
// the reads are spread over the whole device:
//   - A block computes one row, one key-value head, GB of its G query heads, and one split of the
//     row's keys.
//   - The threads of a block form groups, and a group computes one key at a time. Each lane of a
//     group has 8 columns of q, k, v and o, so it loads its part of a 16-bit key as 16 bytes.
//   - A step is KEYS keys per group. A thread loads the keys and values of the next step while it
//     computes the current step, because a load takes as long as hundreds of instructions.
//
// Each group computes the softmax over its own keys. Partial softmaxes are combined with the help
// of their maxima (see OnlineSoftmax). A block first combines its groups in shared memory. The
// block that finishes last then combines the splits, in global memory.

constexpr int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// The arrangement of a block's threads for head width C. A group has a power of two lanes, as the
// sum over a group by shuffles requires. If C / 8 is not a power of two, the last lanes have no
// columns.
template <int C, int KEYS, int THREADS> struct Arrangement {
  static constexpr int LANES = next_power_of_two(C / 8);
  static constexpr int GROUPS = THREADS / LANES;
  static constexpr int STEP = GROUPS * KEYS;  // keys per step of a block
  static_assert(C % 16 == 0 && C <= 256, "a half of a head is whole groups of 8 columns");
  static_assert(THREADS % 32 == 0 && GROUPS > 0, "whole warps");
};

// 8 elements in their storage type: 16 bytes, or 32 bytes for float32.
template <typename T> struct Eight { uint4 words[sizeof(T) / 2]; };

// Load through the L2 cache only (ld.global.cg). The L1 cache would not help, because an SM reads
// each element once.
template <typename T> __device__ inline Eight<T> load_eight(const T* from) {
  Eight<T> eight;
#pragma unroll
  for (int w = 0; w < (int)(sizeof(T) / 2); w++)
    eight.words[w] = __ldcg(reinterpret_cast<const uint4*>(from) + w);
  return eight;
}
template <typename T> __device__ inline void store_eight(T* to, const Eight<T>& eight) {
#pragma unroll
  for (int w = 0; w < (int)(sizeof(T) / 2); w++) reinterpret_cast<uint4*>(to)[w] = eight.words[w];
}
template <typename T> __device__ inline void widen_eight(const Eight<T>& eight, float* to) {
#pragma unroll
  for (int w = 0; w < (int)(sizeof(T) / 2); w++)
    unpack<T>(eight.words[w], to + w * (16 / sizeof(T)));
}
template <typename T> __device__ inline Eight<T> narrow_eight(const float* from) {
  union { Eight<T> eight; T numbers[8]; } u;
#pragma unroll
  for (int i = 0; i < 8; i++) u.numbers[i] = narrow<T>(from[i]);
  return u.eight;
}

// -- the keys of a block --------------------------------------------------------------------------

// The keys begin .. end - 1 of a split. All splits except the last have the same number of keys: a
// multiple of the number of groups, and at least one step. If there are few keys, the last splits
// are empty; n_used splits have keys.
struct Split { int begin, end, n_used; };

__device__ inline Split split_of_keys(int split, int n_splits, int n_keys, int groups, int step) {
  const int for_each_group = (n_keys + n_splits * groups - 1) / (n_splits * groups);
  const int size = max(for_each_group * groups, step);
  return {split * size, min((split + 1) * size, n_keys), (n_keys + size - 1) / size};
}

// -- RoPE -----------------------------------------------------------------------------------------

// RoPE for a lane's 8 columns:
//   y_i = x_i cos_i + x_partner sin_i
// The partner of column i is C / 2 columns away. sin is negated for the columns of the first half.
template <int C> struct Rotation {
  float cos[8], sin[8];
  int column, partner;

  __device__ Rotation(const float* cos_row, const float* sin_row, int first_column) {
    constexpr int HALF = C / 2;
    const bool is_first = first_column < HALF;
    column = first_column;
    partner = is_first ? column + HALF : column - HALF;
    const int angle = is_first ? column : partner;
    read(cos_row + angle, cos);
    read(sin_row + angle, sin);
#pragma unroll
    for (int i = 0; i < 8; i++) sin[i] = is_first ? -sin[i] : sin[i];
  }

  // to = factor * rope(head), this lane's columns
  __device__ void rotate(const float* head, float factor, float* to) const {
    float x[8], other[8];
    read(head + column, x);
    read(head + partner, other);
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = (x[i] * cos[i] + other[i] * sin[i]) * factor;
  }

  __device__ static void read(const float* from, float* to) {
    widen_eight<float>(load_eight(from), to);
  }
};

// -- keys and values ------------------------------------------------------------------------------

// A lane's columns of its group's keys and values in one step. Keys that do not exist are zeros.
template <typename T, int KEYS> struct KeysAndValues { Eight<T> k[KEYS], v[KEYS]; };

// Load the keys `key`, key + GROUPS, key + 2 GROUPS, ... of this group, if they are below `end`.
// Consecutive groups thus load consecutive keys. k_column and v_column point to this lane's first
// column of key 0.
template <typename T, int C, int KEYS, int GROUPS>
__device__ inline KeysAndValues<T, KEYS> read_cache(
    const T* k_column, const T* v_column, int key, int end, bool has_columns) {
  KeysAndValues<T, KEYS> read = {};
#pragma unroll
  for (int u = 0; u < KEYS; u++) {
    if (has_columns && key + u * GROUPS < end) {
      const size_t at = (size_t)(key + u * GROUPS) * C;
      read.k[u] = load_eight(k_column + at);
      read.v[u] = load_eight(v_column + at);
    }
  }
  return read;
}

// q k^T of one key: the sum of 8 products per lane, over the lanes of the group. q already contains
// the factor 1 / sqrt(C).
template <typename T, int LANES>
__device__ inline float score(const float* q, const float* k) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += q[i] * k[i];
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, mask);
  return sum;
}

// -- softmax --------------------------------------------------------------------------------------

// exp(score - top), and 0 for the score -infinity even if top is -infinity too.
__device__ inline float weight_of(float score, float top) {
  return __expf(score - (top == MINUS_INFINITY ? 0.0f : top));
}

// The softmax of GB heads over the keys so far, for this lane's columns:
//   top = max_j score_j,  sum = sum_j exp(score_j - top),  o = sum_j exp(score_j - top) v_j
// The result is o / sum. When a higher score arrives, sum and o are multiplied by
// exp(old top - new top), so one pass over the keys is enough (Milakov & Gimelshein 2018, "Online
// normalizer calculation for softmax").
template <int GB> struct OnlineSoftmax {
  float top[GB], sum[GB], o[GB][8];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int g = 0; g < GB; g++) {
      top[g] = MINUS_INFINITY;
      sum[g] = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) o[g][i] = 0;
    }
  }

  // Add KEYS keys. Their scores are replaced by exp(score - top).
  template <typename T, int KEYS>
  __device__ void add(float (&scores)[GB][KEYS], const Eight<T> (&values)[KEYS]) {
#pragma unroll
    for (int g = 0; g < GB; g++) {
      float higher = top[g];
#pragma unroll
      for (int u = 0; u < KEYS; u++) higher = fmaxf(higher, scores[g][u]);
      const float old = weight_of(top[g], higher);
      top[g] = higher;
      sum[g] *= old;
#pragma unroll
      for (int i = 0; i < 8; i++) o[g][i] *= old;
#pragma unroll
      for (int u = 0; u < KEYS; u++) {
        scores[g][u] = weight_of(scores[g][u], higher);
        sum[g] += scores[g][u];
      }
    }
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
      float v[8];
      widen_eight<T>(values[u], v);
#pragma unroll
      for (int g = 0; g < GB; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) o[g][i] += scores[g][u] * v[i];
    }
  }
};

// One column of a softmax over some of the keys, as in OnlineSoftmax.
struct Part { float top, sum, o; };

// The softmax over the keys of a and of b.
__device__ inline Part combined(Part a, Part b) {
  const float top = fmaxf(a.top, b.top), of_a = weight_of(a.top, top), of_b = weight_of(b.top, top);
  return {top, a.sum * of_a + b.sum * of_b, a.o * of_a + b.o * of_b};
}

// The results of a block's groups, in shared memory.
template <int C, int GB, int GROUPS> struct GroupResults {
  float top[GROUPS][GB], sum[GROUPS][GB];
  float4 o[GROUPS][GB][C / 4];

  __device__ void put(int group, int lane, const OnlineSoftmax<GB>& found) {
    if (lane * 8 >= C) return;
#pragma unroll
    for (int g = 0; g < GB; g++) {
      const float* x = found.o[g];
      o[group][g][lane * 2] = make_float4(x[0], x[1], x[2], x[3]);
      o[group][g][lane * 2 + 1] = make_float4(x[4], x[5], x[6], x[7]);
      if (lane == 0) top[group][g] = found.top[g], sum[group][g] = found.sum[g];
    }
  }
  __device__ Part combine(int g, int column) const {
    Part all = {MINUS_INFINITY, 0, 0};
#pragma unroll
    for (int j = 0; j < GROUPS; j++) all.top = fmaxf(all.top, top[j][g]);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const float weight = weight_of(top[j][g], all.top);
      all.sum += sum[j][g] * weight;
      all.o += reinterpret_cast<const float*>(o[j][g])[column] * weight;
    }
    return all;
  }
};

// The results of a head's splits, in global memory: C + 2 floats per split, top, sum and o.
template <int C> struct SplitResults {
  float* of_head;  // (n_splits, C + 2)

  __device__ void put(int split, int column, Part found) {
    float* to = of_head + (size_t)split * (C + 2);
    if (column == 0) to[0] = found.top, to[1] = found.sum;
    to[2 + column] = found.o;
  }
  __device__ Part combine(int n_splits, int column) const {
    Part all = {MINUS_INFINITY, 0, 0};
#pragma unroll 8  // lets independent loads run at the same time
    for (int j = 0; j < n_splits; j++) {
      const float* from = of_head + (size_t)j * (C + 2);
      all = combined(all, {__ldcg(from), __ldcg(from + 1), __ldcg(from + 2 + column)});
    }
    return all;
  }
};

// Whether this block is the last of n_blocks blocks to call this function. The last block can read
// what all of them have written. The counter is 0 before the first call and after the last one,
// because atomicInc wraps from n_blocks - 1 to 0.
__device__ inline bool is_last(unsigned int* counter, unsigned int n_blocks) {
  __shared__ unsigned int n_before;
  __threadfence();  // make all writes visible before the count
  __syncthreads();
  if (threadIdx.x == 0) n_before = atomicInc(counter, n_blocks - 1);
  __syncthreads();
  __threadfence();  // do not read the results of other blocks before the count
  return n_before == n_blocks - 1;
}

// -- the kernel -----------------------------------------------------------------------------------

// Grid (n_splits, K * n_slices, B), where n_slices = G / GB.
//   qkv (B, (H + 2K) C); cos, sin (B, C/2), for each row's position
//   k_cache, v_cache (rows of the cache, K, context, C)
//   rows, starts (B,): the row of the cache and the position S of each token
//   partials (B, H, n_splits, C + 2), uninitialized; counters (B, K * n_slices), zeros
//   o (B, H, C)
//
// Before the wait (see common.cu), the kernel reads only the following: `rows` and `starts`, which
// were written before the array operations that computed cos and sin, and the keys and values of
// earlier steps. It does not read the new key and value from the cache. Each block that needs them
// computes them from qkv.
//
// The 1 in the launch bounds asks for at least one block per SM. Without it, the compiler (ptxas)
// may move registers to slow local memory so that more blocks fit.
template <typename T, int C, int GB, int KEYS, int THREADS>
// registers: at most 128
__global__ void __launch_bounds__(THREADS, 1) attend(
    const float* qkv, const float* cos, const float* sin, T* k_cache, T* v_cache,
    const int* rows, const int* starts, float* partials, unsigned int* counters, float* o,
    int n_kv_heads, int n_slices, int context, float scale) {
  using Threads = Arrangement<C, KEYS, THREADS>;
  constexpr int LANES = Threads::LANES, GROUPS = Threads::GROUPS, STEP = Threads::STEP;
  __shared__ GroupResults<C, GB, GROUPS> results;
  let_next_kernel_start();

  const int b = blockIdx.z, kv_head = blockIdx.y / n_slices, slice = blockIdx.y % n_slices;
  const int n_splits = gridDim.x, n_parts = gridDim.y;
  const int n_heads = n_parts * GB, first_head = blockIdx.y * GB;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const bool has_columns = lane * 8 < C;
  const int column = has_columns ? lane * 8 : 0;

  const int position = starts[b], n_keys = position + 1;
  const Split keys = split_of_keys(blockIdx.x, n_splits, n_keys, GROUPS, STEP);
  const int end_of_cached = min(keys.end, position);
  const size_t key_0 = ((size_t)rows[b] * n_kv_heads + kv_head) * context;
  T* k_column = k_cache + key_0 * C + column;
  T* v_column = v_cache + key_0 * C + column;
  auto read = [&](int first_key) {
    return read_cache<T, C, KEYS, GROUPS>(
        k_column, v_column, first_key + group, end_of_cached, has_columns);
  };
  KeysAndValues<T, KEYS> next = read(keys.begin);
  wait_for_previous_kernel();
  if ((int)blockIdx.x >= keys.n_used) return;

  // the new token's q, and its k and v rounded to the type of the cache
  const Rotation<C> rope(cos + (size_t)b * (C / 2), sin + (size_t)b * (C / 2), column);
  const float* token = qkv + (size_t)b * (n_heads + 2 * n_kv_heads) * C;
  float q[GB][8];
#pragma unroll
  for (int g = 0; g < GB; g++) rope.rotate(token + (size_t)(first_head + g) * C, scale, q[g]);
  Eight<T> k_new = {}, v_new = {};
  if (keys.end == n_keys && has_columns) {
    const float* k = token + (size_t)(n_heads + kv_head) * C;
    float x[8];
    rope.rotate(k, 1.0f, x);
    k_new = narrow_eight<T>(x);
    rope.read(k + (size_t)n_kv_heads * C + column, x);
    v_new = narrow_eight<T>(x);
    if (slice == 0 && group == 0) {
      store_eight(k_column + (size_t)position * C, k_new);
      store_eight(v_column + (size_t)position * C, v_new);
    }
  }

  OnlineSoftmax<GB> softmax;
  for (int first_key = keys.begin; first_key < keys.end; first_key += STEP) {
    KeysAndValues<T, KEYS> now = next;
    next = read(first_key + STEP);
    float scores[GB][KEYS];
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
      const int key = first_key + u * GROUPS + group;
      if (key == position) now.k[u] = k_new, now.v[u] = v_new;
      float k[8];
      widen_eight<T>(now.k[u], k);
#pragma unroll
      for (int g = 0; g < GB; g++) {
        const float s = score<T, LANES>(q[g], k);
        scores[g][u] = key < keys.end ? s : MINUS_INFINITY;
      }
    }
    softmax.add(scores, now.v);
  }

  results.put(group, lane, softmax);
  __syncthreads();
  float* o_heads = o + ((size_t)b * n_heads + first_head) * C;
  float* parts = partials + ((size_t)b * n_heads + first_head) * n_splits * (C + 2);
  auto split_results = [&](int g) {
    return SplitResults<C>{parts + (size_t)g * n_splits * (C + 2)};
  };
  for (int i = threadIdx.x; i < GB * C; i += THREADS) {
    const Part found = results.combine(i / C, i % C);
    if (keys.n_used == 1) o_heads[i] = found.o / found.sum;
    else split_results(i / C).put(blockIdx.x, i % C, found);
  }
  unsigned int* counter = counters + (size_t)b * n_parts + blockIdx.y;
  if (keys.n_used == 1 || !is_last(counter, keys.n_used)) return;
  for (int i = threadIdx.x; i < GB * C; i += THREADS) {
    const Part found = split_results(i / C).combine(keys.n_used, i % C);
    o_heads[i] = found.o / found.sum;
  }
}
