// The kernels for many tokens. cuBLAS computes the matrix products, and these kernels compute the
// operations between them. Memory bandwidth limits these kernels, so each kernel reads its input
// once, 16 bytes per thread at a time, and writes its result once.
//
// The template parameter T is the 16-bit type of the products, __half or __nv_bfloat16. In shapes,
// T is the number of new tokens, and the other letters are: M = B * T rows (tokens), D width, H
// query heads, K key-value heads, G = H / K, C head width, F ffn width.

constexpr int THREADS = 256;  // threads per block, in all of these kernels
constexpr int WARPS = THREADS / 32;

__device__ inline float4 load4(const float* from) { return *(const float4*)from; }

__device__ inline float4 times(float4 a, float4 b) {
  return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

// Round four floats to 16 bits, and write them in one store of 8 bytes.
template <typename T> __device__ inline void store4(T* to, float4 v) {
  union { T numbers[4]; uint2 bits; } u;
  u.numbers[0] = narrow<T>(v.x);
  u.numbers[1] = narrow<T>(v.y);
  u.numbers[2] = narrow<T>(v.z);
  u.numbers[3] = narrow<T>(v.w);
  *(uint2*)to = u.bits;
}

// The sum (or the maximum) of v over the block, returned to every thread. Shuffles combine the
// threads of each warp, and shared memory combines the warps. The first barrier ensures that no
// thread still reads of_warps from an earlier call.
__device__ inline float block_sum(float v, float* of_warps) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += of_warps[w];
  return sum;
}
__device__ inline float block_max(float v, float* of_warps) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, mask));
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = v;
  __syncthreads();
  float largest = of_warps[0];
#pragma unroll
  for (int w = 1; w < WARPS; w++) largest = fmaxf(largest, of_warps[w]);
  return largest;
}

// h = x / sqrt(mean(x^2) + eps) * weight, rounded to T: x (M, D) float32 -> h (M, D).
//
// A block computes one row. It keeps the row in shared memory until the sum of squares is known, so
// it reads the row from global memory only once. Each thread reads only the elements of shared
// memory that it wrote. D is a multiple of 4. Dynamic shared memory: D + WARPS floats.
// registers: at most 40
template <typename T>
__global__ void __launch_bounds__(THREADS)
rms_norm_rows(const float* x, const float* weight, T* h, int width, float eps) {
  extern __shared__ float4 row[];  // (D/4,)
  float* of_warps = (float*)(row + width / 4);  // (WARPS,)
  wait_for_previous_kernel();
  const size_t begin = (size_t)blockIdx.x * width;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < width / 4; i += THREADS) {
    const float4 v = load4(x + begin + 4 * i);
    row[i] = v;
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float factor = rsqrtf(block_sum(sum, of_warps) / width + eps);
  const float4 factors = make_float4(factor, factor, factor, factor);
  for (int i = threadIdx.x; i < width / 4; i += THREADS)
    store4(h + begin + 4 * i, times(times(row[i], factors), load4(weight + 4 * i)));
}

// Rotate the new queries and keys (RoPE), and write the new keys and values to the cache:
//
//   (y_i, y_{i+C/2}) = (x_i cos_i - x_{i+C/2} sin_i,  x_{i+C/2} cos_i + x_i sin_i)
//
// Input: qkv (B, T, (H + 2K) C) float32, multiplied by scale ((H + 2K) C,) if that is not null, and
// cos, sin (B, T, C/2). All results are rounded to the type T:
//   - The rotated keys and the values go to k_cache and v_cache (rows, K, context, C), at row
//     rows[b] and position starts[b] + t.
//   - The rotated queries of the last n of the T tokens go to q, B * n * H * C elements. q is
//     divided into tiles of `tile` tokens, of which the last one may be smaller. A tile of t tokens
//     is stored as (H, t, C), so the queries of one key head form one matrix (G*t, C).
//
// A block computes one token. A thread rotates four pairs at a time: it reads 16 bytes and writes 8
// bytes of each half of a head. C is a multiple of 8.
// registers: at most 40
template <typename T>
__global__ void __launch_bounds__(THREADS)
rotate_and_cache(const float* qkv, const float* scale, const float* cos, const float* sin,
                 const int* rows, const int* starts, T* q, T* k_cache, T* v_cache, int n_heads,
                 int n_kv_heads, int head_dim, int context, int n_new, int n_last, int tile) {
  wait_for_previous_kernel();
  const int token = blockIdx.x, b = token / n_new, t = token % n_new;
  const int half = head_dim / 2, fours = half / 4;
  const int all_heads = n_heads + 2 * n_kv_heads;
  const size_t cache_row = (size_t)rows[b] * n_kv_heads, position = starts[b] + t;
  const int query = t - (n_new - n_last);  // index in the last n tokens; negative before them
  const int in_tile = query % tile, tile_begin = query - in_tile;
  const int tile_size = min(tile, n_last - tile_begin);
  for (int i = threadIdx.x; i < all_heads * fours; i += THREADS) {
    const int head = i / fours, at = i % fours * 4;  // the pairs at .. at + 3
    const bool is_query = head < n_heads, is_value = head >= n_heads + n_kv_heads;
    if (is_query && query < 0) continue;
    const int column = head * head_dim + at;
    const float* from = qkv + (size_t)token * all_heads * head_dim + column;
    float4 first = load4(from), second = load4(from + half);
    if (scale != nullptr) {
      first = times(first, load4(scale + column));
      second = times(second, load4(scale + column + half));
    }
    if (!is_value) {
      const float4 c = load4(cos + (size_t)token * half + at);
      const float4 s = load4(sin + (size_t)token * half + at);
      const float4 a = first, z = second;
      first = make_float4(a.x * c.x - z.x * s.x, a.y * c.y - z.y * s.y, a.z * c.z - z.z * s.z,
                          a.w * c.w - z.w * s.w);
      second = make_float4(z.x * c.x + a.x * s.x, z.y * c.y + a.y * s.y, z.z * c.z + a.z * s.z,
                           z.w * c.w + a.w * s.w);
    }
    T* to;
    if (is_query) {
      const size_t tile_row = ((size_t)b * n_last + tile_begin) * n_heads;  // in rows of C elements
      to = q + (tile_row + head * tile_size + in_tile) * head_dim;
    } else {
      const int kv_head = (head - n_heads) % n_kv_heads;
      to = (is_value ? v_cache : k_cache) +
           ((cache_row + kv_head) * context + position) * head_dim;
    }
    store4(to + at, first);
    store4(to + at + half, second);
  }
}

// The softmax over the keys that a query attends to, and 0 for the other keys:
//
//   p_j = exp(x_j - max x) / sum_i exp(x_i - max x)  for j < first + t,  and 0 for other j
//
// scores (heads, n_queries, stride) float32 -> p (heads, n_queries, stride) T. Query t of each head
// attends to the first `first + t` keys. stride is the number of keys rounded up to a multiple of
// 4. The kernel ignores the scores of other keys.
//
// A block computes one row. It keeps the row in shared memory until the maximum and the sum are
// known. Each thread reads only the elements of shared memory that it wrote. Dynamic shared memory:
// stride + WARPS floats.
// registers: at most 40
template <typename T>
__global__ void __launch_bounds__(THREADS)
softmax_rows(const float* scores, T* p, int n_queries, int stride, int first) {
  extern __shared__ float4 row[];  // (stride/4,)
  float* of_warps = (float*)(row + stride / 4);  // (WARPS,)
  wait_for_previous_kernel();
  const int n_seen = first + blockIdx.x % n_queries;
  const size_t begin = (size_t)blockIdx.x * stride;
  const int n_fours = (n_seen + 3) / 4;  // the last four may contain up to 3 hidden keys
  float largest = MINUS_INFINITY;
  for (int i = threadIdx.x; i < n_fours; i += THREADS) {
    float4 v = load4(scores + begin + 4 * i);
    if (4 * i + 1 >= n_seen) v.y = MINUS_INFINITY;
    if (4 * i + 2 >= n_seen) v.z = MINUS_INFINITY;
    if (4 * i + 3 >= n_seen) v.w = MINUS_INFINITY;
    row[i] = v;
    largest = fmaxf(largest, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
  }
  largest = block_max(largest, of_warps);
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n_fours; i += THREADS) {
    float4 v = row[i];
    v = make_float4(__expf(v.x - largest), __expf(v.y - largest), __expf(v.z - largest),
                    __expf(v.w - largest));
    row[i] = v;
    sum += v.x + v.y + v.z + v.w;
  }
  const float factor = 1.0f / block_sum(sum, of_warps);
  const float4 factors = make_float4(factor, factor, factor, factor);
  for (int i = threadIdx.x; i < stride / 4; i += THREADS)
    store4(p + begin + 4 * i, i < n_fours ? times(row[i], factors) : make_float4(0, 0, 0, 0));
}

// y = silu(gate) * up, rounded to T: gate_up (M, 2F) float32 -> y (M, F). If scale (2F,) is not
// null, gate_up is first multiplied by it.
//
// Block (m, i) computes 4 * THREADS elements of row m, four per thread. F is a multiple of 4.
// registers: at most 40
template <typename T>
__global__ void __launch_bounds__(THREADS)
swiglu_rows(const float* gate_up, const float* scale, T* y, int width) {
  wait_for_previous_kernel();
  const int column = 4 * (blockIdx.y * THREADS + threadIdx.x);
  if (column >= width) return;
  const float* from = gate_up + (size_t)blockIdx.x * 2 * width + column;
  float4 gate = load4(from), up = load4(from + width);
  if (scale != nullptr) {
    gate = times(gate, load4(scale + column));
    up = times(up, load4(scale + width + column));
  }
  gate = make_float4(silu(gate.x), silu(gate.y), silu(gate.z), silu(gate.w));
  store4(y + (size_t)blockIdx.x * width + column, times(gate, up));
}

// x += y * scale, in-place: x, y (M, O) float32, scale (O,).
//
// Block (m, i) computes 4 * THREADS elements of row m, four per thread. O is a multiple of 4.
// registers: at most 32
extern "C" __global__ void __launch_bounds__(THREADS)
add_scaled_rows(const float* y, const float* scale, float* x, int width) {
  wait_for_previous_kernel();
  const int column = 4 * (blockIdx.y * THREADS + threadIdx.x);
  if (column >= width) return;
  const size_t at = (size_t)blockIdx.x * width + column;
  const float4 product = times(load4(y + at), load4(scale + column));
  const float4 old = load4(x + at);
  *(float4*)(x + at) = make_float4(old.x + product.x, old.y + product.y, old.z + product.z,
                                   old.w + product.w);
}

// int8 -> T without rounding, for n elements; n is a multiple of 16. Each thread converts 16
// elements: it reads 16 bytes and writes 32.
// registers: at most 40
template <typename T>
__global__ void __launch_bounds__(THREADS)
widen_int8(const signed char* from, T* to, int n) {
  wait_for_previous_kernel();
  const int at = 16 * (blockIdx.x * THREADS + threadIdx.x);
  if (at >= n) return;
  float numbers[16];
  unpack<signed char>(*(const uint4*)(from + at), numbers);
  union { T numbers[16]; uint4 bits[2]; } u;
#pragma unroll
  for (int i = 0; i < 16; i++) u.numbers[i] = narrow<T>(numbers[i]);
  *(uint4*)(to + at) = u.bits[0];
  *(uint4*)(to + at + 8) = u.bits[1];
}
