// The product of a weight matrix W (O, D) with M = 1 to 8 rows x (M, D), for decode steps:
//
//   y[m, o] = sum_d h[m, d] W[o, d] * scale[o] + residual[m, o]
//   h[m, d] = x[m, d] * norm[d] / sqrt(mean_d x[m, d]^2 + eps)
//
// With SWIGLU, W (2F, D) has F rows of gate followed by F rows of up, and y (M, F) is
//
//   y[m, f] = silu(g) u
//   g = sum_d h[m, d] W[f, d] scale[f],   u = sum_d h[m, d] W[F + f, d] scale[F + f]
//
// Without norm, h is x. The scale and the residual are optional too.
//
// Almost all of the time goes into reading W from global memory, which happens once per launch. The
// kernel is designed to keep many of these reads in progress:
//
//   - As a rule, there is one block per multiprocessor (SM). Each block computes a contiguous range
//     of the rows of W.
//   - A block copies its rows to shared memory through a queue. The copies are asynchronous: they
//     need no registers, and the threads compute meanwhile. The block fills the queue before it
//     waits for x, while the previous kernel is still running.
//   - The threads of a block share the columns. Thread t copies the 16-byte chunks t, t + THREADS,
//     ... of each row, and keeps the same columns of x in registers. It multiplies only the chunks
//     that it copied, so the loop over the rows needs no barrier.
//   - Each warp stores its part of each sum in shared memory. After one barrier at the end, the
//     threads add up these parts.
//   - A row of more than THREADS * CHUNKS chunks is split into tiles of that size. The block
//     processes the first tile of all its rows, then the second tile, and so on.

template <typename W> struct Chunk { static constexpr int SIZE = 16 / sizeof(W); };  // elements

// COUNT sums over a warp, where COUNT is a power of two up to 32. Lane l returns the sum of
// v[l / (32 / COUNT)] over all lanes.
//
// In the first step, half of the lanes keep the lower half of v and send the upper half to the
// other lanes, which do the opposite. The next steps repeat this with half as many elements. When
// each lane has one element left, several lanes may have parts of the same sum, and these parts are
// added. The whole takes COUNT - 1 shuffles, and log2(32 / COUNT) for the last additions. COUNT
// separate sums would take 5 COUNT shuffles.
template <int COUNT, int MASK = 16> __device__ inline float warp_sums(float* v) {
  if constexpr (COUNT == 1) {
#pragma unroll
    for (int mask = MASK; mask > 0; mask /= 2) v[0] += __shfl_xor_sync(ALL_LANES, v[0], mask);
    return v[0];
  } else {
    const bool keeps_upper = (threadIdx.x & MASK) != 0;
#pragma unroll
    for (int i = 0; i < COUNT / 2; i++) {
      const float lower = v[i], upper = v[i + COUNT / 2];
      v[i] = keeps_upper ? upper : lower;
      v[i] += __shfl_xor_sync(ALL_LANES, keeps_upper ? lower : upper, MASK);
    }
    return warp_sums<COUNT / 2, MASK / 2>(v);
  }
}

// -- a thread's columns of h, and their products with W -------------------------------------------
//
// set() stores the thread's columns of row m of h, (CHUNKS, 16 / sizeof(W)). add() multiplies 16
// bytes of a row of W by them, and adds the products to Sums. value() returns the sum for row m.

// int8 weights are multiplied as integers if M is small. For larger M, the digits of h (see below)
// would take more registers and more instructions than its floats.
template <typename W, int M> constexpr bool in_digits() { return sizeof(W) == 1 && M <= 2; }

template <typename W, int M, int CHUNKS, bool DIGITS = in_digits<W, M>()> struct Columns {
  static constexpr int N = Chunk<W>::SIZE;
  float h[M][CHUNKS][N];

  struct Sums { float even[M], odd[M]; };  // two independent chains of additions halve the latency

  __device__ void set(int m, const float (&row)[CHUNKS][N]) {
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int i = 0; i < N; i++) h[m][j][i] = row[j][i];
  }
  __device__ void clear(Sums& sums) const {
#pragma unroll
    for (int m = 0; m < M; m++) sums.even[m] = sums.odd[m] = 0;
  }
  __device__ void add(Sums& sums, uint4 bits, int j) const {
    float w[N];
    unpack<W>(bits, w);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        sums.even[m] += w[i] * h[m][j][i];
        sums.odd[m] += w[i + 1] * h[m][j][i + 1];
      }
  }
  __device__ float value(const Sums& sums, int m) const { return sums.even[m] + sums.odd[m]; }
};

// Integer products for int8 weights. One instruction (dp4a) computes four products of int8 and adds
// them to an int, while products of floats take three instructions per weight.
//
// h is represented as unit * (digit0 + 2^8 digit1 + 2^16 digit2) with signed 8-bit digits. The sums
// of the digits' products are exact. The unit is about 2^-23 of the largest element of h that the
// thread has in a row, so the error is not larger than the rounding of a float32 product with that
// element.
template <int M, int CHUNKS> struct Columns<signed char, M, CHUNKS, true> {
  static constexpr int N = Chunk<signed char>::SIZE, WORDS = N / 4;
  static constexpr float LARGEST = 127 * 65536;  // keeps the digits <= 127 even after rounding
  int digits[M][CHUNKS][3][WORDS];  // four columns per word
  float unit[M];

  struct Sums { int of_digit[M][3]; };

  __device__ void set(int m, const float (&row)[CHUNKS][N]) {
    float largest = 0, nothing = 0;  // `nothing` becomes NaN if an element is not finite
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int i = 0; i < N; i++) {
        largest = fmaxf(largest, fabsf(row[j][i]));
        nothing += row[j][i] * 0.0f;
      }
    unit[m] = largest / LARGEST + nothing;
    const float factor = largest > 1e-30f ? LARGEST / largest : 0.0f;  // avoids an overflow
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int word = 0; word < WORDS; word++) {
        unsigned int q[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          // The low three bytes of (q + 0x8080) ^ 0x8080 are the signed digits of q. If a byte of q
          // is 128 or more, its digit is negative, and the addition carries 1 into the next byte.
          q[i] = (__float2int_rn(row[j][4 * word + i] * factor) + 0x8080) ^ 0x8080;
        }
        // four values of three bytes -> three words of four bytes, one word per digit
        const unsigned int low01 = __byte_perm(q[0], q[1], 0x5140);  // bytes 0 0 1 1 of q0 q1 q0 q1
        const unsigned int low23 = __byte_perm(q[2], q[3], 0x5140);
        const unsigned int high01 = __byte_perm(q[0], q[1], 0x0062);  // byte 2 of q0 and of q1
        const unsigned int high23 = __byte_perm(q[2], q[3], 0x0062);
        digits[m][j][0][word] = __byte_perm(low01, low23, 0x5410);
        digits[m][j][1][word] = __byte_perm(low01, low23, 0x7632);
        digits[m][j][2][word] = __byte_perm(high01, high23, 0x5410);
      }
  }
  __device__ void clear(Sums& sums) const {
#pragma unroll
    for (int m = 0; m < M; m++) sums.of_digit[m][0] = sums.of_digit[m][1] = sums.of_digit[m][2] = 0;
  }
  __device__ void add(Sums& sums, uint4 bits, int j) const {
    const int words[WORDS] = {(int)bits.x, (int)bits.y, (int)bits.z, (int)bits.w};
#pragma unroll
    for (int word = 0; word < WORDS; word++)
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < 3; k++)
          sums.of_digit[m][k] = __dp4a(words[word], digits[m][j][k][word], sums.of_digit[m][k]);
  }
  // A sum is at most 16 CHUNKS 2^14, so the combination of the two lower digits fits an int.
  __device__ float value(const Sums& sums, int m) const {
    const int low = sums.of_digit[m][1] * 256 + sums.of_digit[m][0];
    return ((float)sums.of_digit[m][2] * 65536.0f + (float)low) * unit[m];
  }
};

// -- the queue of weights -------------------------------------------------------------------------

// The rows of W that this block computes. A unit is the rows of one output: one row of W, or with
// SWIGLU a row of gate and the corresponding row of up. The block numbers its rows unit by unit.
template <bool SWIGLU> struct Share {
  static constexpr int UNIT = SWIGLU ? 2 : 1;  // rows per unit
  int first, n_units, n_rows;  // the block's first unit, and its numbers of units and rows
  int n_all_units, most_rows;  // units of all blocks, and the most rows of any block

  __device__ explicit Share(int n_weight_rows) {
    n_all_units = n_weight_rows / UNIT;
    const int block = blockIdx.x, n_blocks = gridDim.x;
    const int each = n_all_units / n_blocks, rest = n_all_units % n_blocks;
    first = each * block + min(block, rest);
    n_units = each + (block < rest ? 1 : 0);
    n_rows = n_units * UNIT;
    most_rows = (each + (rest > 0 ? 1 : 0)) * UNIT;
  }
  // the row of W that is the block's row i
  __device__ int row(int i) const { return first + i / UNIT + (i % UNIT) * n_all_units; }
};

// The asynchronous copies of W to shared memory. A batch has ROWS rows of a tile, and STAGES
// batches are copied at the same time.
template <typename W, int THREADS, int CHUNKS, int ROWS, int STAGES, bool SWIGLU> struct Queue {
  static_assert(!SWIGLU || ROWS % 2 == 0, "gate and up are in one batch");
  static constexpr int TILE = THREADS * CHUNKS, UNIT = Share<SWIGLU>::UNIT;  // in chunks; in rows

  const Share<SWIGLU>& share;
  uint4* mine;       // this thread's part of (STAGES, ROWS, CHUNKS, THREADS) in shared memory
  const char* next;  // this thread's first chunk of the next batch, in global memory
  size_t row_bytes;
  int n_chunks;   // chunks per row
  int chunk;      // the column of `next`, in chunks
  int rows_left;  // rows of the tile from `next` on

  __device__ Queue(const Share<SWIGLU>& share_, const W* w, int width, uint4* queue)
      : share(share_), mine(queue + threadIdx.x) {
    row_bytes = (size_t)width * sizeof(W);
    n_chunks = width / Chunk<W>::SIZE;
    chunk = threadIdx.x;
    rows_left = share.n_rows;
    next = (const char*)w + row_bytes * share.first + chunk * 16;
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) copy_next(stage);
  }
  // Start to copy a batch. Rows and columns that do not exist are filled with zeros.
  __device__ void copy_next(int stage) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int unit = r / UNIT, is_up = r % UNIT;
      const char* from = next + row_bytes * unit + (is_up ? row_bytes * share.n_all_units : 0);
#pragma unroll
      for (int j = 0; j < CHUNKS; j++) {
        const bool is_there = r < rows_left && chunk + j * THREADS < n_chunks;
        __pipeline_memcpy_async(at(stage, r, j), from + j * THREADS * 16, 16, is_there ? 0 : 16);
      }
    }
    __pipeline_commit();
    next += row_bytes * (ROWS / UNIT);
    rows_left -= ROWS;
    if (rows_left <= 0) {  // continue with the first batch of the next tile, which may not exist
      const int n_batches = (share.n_rows + ROWS - 1) / ROWS;
      next -= row_bytes * (ROWS / UNIT) * n_batches;
      next += TILE * 16;
      chunk += TILE;
      rows_left = share.n_rows;
    }
  }
  __device__ uint4* at(int stage, int r, int j) const {
    return mine + ((stage * ROWS + r) * CHUNKS + j) * THREADS;
  }
};

// -- the kernel -----------------------------------------------------------------------------------

// Read this thread's columns of x * norm in one tile; columns that do not exist are zeros. Lane 0
// of each warp adds the warp's sum of x^2 to squares (M).
template <typename W, int M, int THREADS, int CHUNKS, bool NORM>
__device__ inline void read_columns(Columns<W, M, CHUNKS>& columns, const float* x,
                                    const float* __restrict__ norm, int n_tokens, int width,
                                    int tile, float* squares) {
  constexpr int N = Chunk<W>::SIZE;
  float factor[CHUNKS][N], h[M][CHUNKS][N];
  const int first = (tile * THREADS * CHUNKS + threadIdx.x) * N;
#pragma unroll
  for (int j = 0; j < CHUNKS; j++)
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const int d = first + j * THREADS * N + i;
      float4 v = make_float4(1, 1, 1, 1);
      if (NORM && d < width) v = __ldg(reinterpret_cast<const float4*>(norm + d));
      factor[j][i] = v.x, factor[j][i + 1] = v.y, factor[j][i + 2] = v.z, factor[j][i + 3] = v.w;
    }
  if (tile == 0) wait_for_previous_kernel();  // that kernel writes x
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const int d = first + j * THREADS * N + i;
        float4 v = make_float4(0, 0, 0, 0);
        if (m < n_tokens && d < width) {
          v = *reinterpret_cast<const float4*>(x + (size_t)m * width + d);
        }
        h[m][j][i] = v.x, h[m][j][i + 1] = v.y, h[m][j][i + 2] = v.z, h[m][j][i + 3] = v.w;
      }
#pragma unroll
  for (int m = 0; m < M; m++) {
    if (NORM) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < CHUNKS; j++)
#pragma unroll
        for (int i = 0; i < N; i++) {
          sum += h[m][j][i] * h[m][j][i];
          h[m][j][i] *= factor[j][i];
        }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) squares[m] = tile == 0 ? sum : squares[m] + sum;
    }
    columns.set(m, h[m]);
  }
}

// Compute y for the block's units from its shared memory: the sums (WARPS, M, pitch) and the sums
// of squares (WARPS, M) of each warp, the scales (pitch) and the residuals (M, pitch).
template <int M, int THREADS, bool SWIGLU>
__device__ inline void write_outputs(const Share<SWIGLU>& share, const float* sums, int pitch,
                                     const float* squares, const float* scales, bool has_scale,
                                     bool has_norm, const float* residuals, bool has_residual,
                                     float* y, int n_tokens, int width, float eps) {
  constexpr int WARPS = THREADS / 32, UNIT = Share<SWIGLU>::UNIT;
#pragma unroll
  for (int m = 0; m < M; m++) {
    if (m >= n_tokens) break;
    float inverse = 1;  // 1 / RMS
    if (has_norm) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) sum += squares[warp * M + m];
      inverse = rsqrtf(sum / width + eps);
    }
    for (int unit = threadIdx.x; unit < share.n_units; unit += THREADS) {
      float outputs[UNIT];
#pragma unroll
      for (int i = 0; i < UNIT; i++) {
        const int row = unit * UNIT + i;
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += sums[(warp * M + m) * pitch + row];
        outputs[i] = sum * inverse * (has_scale ? scales[row] : 1.0f);
      }
      float value = outputs[0];
      if (SWIGLU) value = silu(value) * outputs[UNIT - 1];
      if (has_residual) value += residuals[m * pitch + unit];
      y[(size_t)m * share.n_all_units + share.first + unit] = value;
    }
  }
}

// W (n_weight_rows, width), scale (n_weight_rows), x (n_tokens, width), norm (width), and y and
// residual (n_tokens, n_weight_rows), or (n_tokens, n_weight_rows / 2) with SWIGLU. n_tokens <= M,
// and width * sizeof(W) is a multiple of 16.
//
// The dynamic shared memory contains the queue, followed by the float arrays that are defined
// below. The 2 in the launch bounds limits the registers such that two blocks fit on an SM: one of
// this kernel and one of the next kernel, which overlaps with it.
// registers: at most 224
template <typename W, int M, int THREADS, int CHUNKS, int ROWS, int STAGES, bool NORM, bool SWIGLU>
__global__ void __launch_bounds__(THREADS, 2) gemv(
    const W* __restrict__ w, const float* __restrict__ scale, const float* x,
    const float* __restrict__ norm, const float* residual, float* y, int n_weight_rows, int width,
    int n_tokens, float eps) {
  typedef Queue<W, THREADS, CHUNKS, ROWS, STAGES, SWIGLU> Weights;
  typedef Columns<W, M, CHUNKS> X;
  constexpr int WARPS = THREADS / 32, UNIT = Share<SWIGLU>::UNIT, LANES_OF_SUM = 32 / (ROWS * M);
  static_assert(LANES_OF_SUM > 0, "a lane has one sum of a batch");
  let_next_kernel_start();
  const Share<SWIGLU> share(n_weight_rows);
  const int pitch = share.most_rows, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n_tiles = (width / Chunk<W>::SIZE + Weights::TILE - 1) / Weights::TILE;

  extern __shared__ uint4 queue[];  // (STAGES, ROWS, CHUNKS, THREADS)
  float* sums = reinterpret_cast<float*>(queue + STAGES * ROWS * Weights::TILE);
  float* squares = sums + WARPS * M * pitch;  // (WARPS, M), after sums (WARPS, M, pitch)
  float* scales = squares + WARPS * M;        // (pitch)
  float* residuals = scales + pitch;          // (M, pitch)

  // Each thread copies the scales and residuals of its own units together with the weights. If it
  // read them only at the end, every block would have to wait for them there.
  if (scale != nullptr) {
    for (int unit = threadIdx.x; unit < share.n_units; unit += THREADS)
      for (int i = unit * UNIT; i < (unit + 1) * UNIT; i++)
        __pipeline_memcpy_async(scales + i, scale + share.row(i), 4);
  }
  Weights weights(share, w, width, queue);

  // of each batch, this lane stores the sum of row sum_row of W and row sum_token of x
  const int sum_row = lane / LANES_OF_SUM / M, sum_token = lane / LANES_OF_SUM % M;
  float* my_sums = sums + (warp * M + sum_token) * pitch + sum_row;
  X columns;
  int stage = 0;
  for (int tile = 0; tile < n_tiles; tile++) {
    read_columns<W, M, THREADS, CHUNKS, NORM>(columns, x, norm, n_tokens, width, tile,
                                              squares + warp * M);
    if (tile == 0 && residual != nullptr) {
      for (int unit = threadIdx.x; unit < share.n_units; unit += THREADS) {
        for (int m = 0; m < n_tokens; m++) {
          const size_t output = (size_t)m * share.n_all_units + share.first + unit;
          __pipeline_memcpy_async(residuals + m * pitch + unit, residual + output, 4);
        }
      }
    }
    for (int row = 0; row < share.n_rows; row += ROWS) {
      __pipeline_wait_prior(STAGES - 1);  // until the oldest batch has been copied
      typename X::Sums batch[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) columns.clear(batch[r]);
#pragma unroll
      for (int j = 0; j < CHUNKS; j++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) columns.add(batch[r], *weights.at(stage, r, j), j);
      weights.copy_next(stage);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
      float v[ROWS * M];
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int m = 0; m < M; m++) v[r * M + m] = columns.value(batch[r], m);
      const float sum = warp_sums<ROWS * M>(v);
      if (lane % LANES_OF_SUM == 0 && row + sum_row < share.n_rows)
        my_sums[row] = tile == 0 ? sum : my_sums[row] + sum;
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  write_outputs<M, THREADS>(share, sums, pitch, squares, scales, scale != nullptr, NORM, residuals,
                            residual != nullptr, y, n_tokens, width, eps);
}
