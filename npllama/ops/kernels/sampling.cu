// The next token of each row, chosen from its logits as `next_token` in npllama/ops/sampling.py
// does.
//
// One block computes one row. Each warp of the block has a contiguous segment of the vocabulary,
// and consecutive lanes read consecutive logits. The steps are:
//   1. `summarize`: the maximum, the most likely token and the sum of exponentials, in one pass.
//      Greedy decoding needs only this step.
//   2. `least_kept`, for top_k and then for top_p: a search for the smallest logit that is kept.
//   3. `draw`: add up the probabilities of each segment, choose one segment, and choose the token
//      within it.
//
// Probabilities are added as integers (`Weight`). A sum of integers does not depend on the order of
// its terms, so the chosen token does not depend on the order in which the threads run.
//
// To add a filter, extend `Kept`, which combines all filters, and FILTERS in ops/cuda/sampling.py.
// A filter that searches for a threshold also needs a call of `least_kept` in `next_token`.

constexpr int MAX_WARPS = 32;
constexpr int MAX_THREADS = 32 * MAX_WARPS;
constexpr float ONE = 17592186044416.0f;  // 2^44, the mass of the most likely token
constexpr float LEAST = -45.0f;           // the log2 of a probability with a mass below 1
constexpr int NO_TOKEN = 0x7fffffff;

using Mass = unsigned long long;
using Key = unsigned int;

struct Shared {
  float raw_max[MAX_WARPS], raw_sum[MAX_WARPS], max[MAX_WARPS], lowest[MAX_WARPS];
  int token[MAX_WARPS];
  Mass segment[MAX_WARPS];  // the mass of the kept tokens in each warp's segment
  Mass scan[MAX_WARPS];
  unsigned int low[MAX_THREADS], high[MAX_THREADS];  // a histogram with one 64-bit bin per thread
  Key first, last;
  Mass above;
  int bin;
};

// -- logits and their masses ----------------------------------------------------------------------

// An unsigned key per float, in the same order as the floats: the bits of a negative float are
// inverted, and those of another float get the highest bit set. -0 has the key of 0.
__device__ inline Key key_of(float x) {
  const unsigned int bits = x == 0.0f ? 0u : __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(Key key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The adjusted logits of a row, (V,), which the filters read. The repetition penalty is applied,
// and tokens that are not allowed have -inf. With KEEP, the first pass stores them in shared
// memory.
template <bool KEEP> struct Row {
  static constexpr int UNROLL = KEEP ? 4 : 2;
  const float* logits;
  const bool* seen;     // null without a penalty
  const bool* allowed;  // null if all tokens are allowed
  float penalty;
  float* kept;

  __device__ float adjusted(float x, int i) const {
    if (allowed && !allowed[i]) return MINUS_INFINITY;
    if (seen && seen[i]) return x > 0.0f ? x / penalty : x * penalty;
    return x;
  }
  __device__ float operator[](int i) const { return KEEP ? kept[i] : adjusted(logits[i], i); }
};

// The mass of a token with adjusted logit x at temperature t: its probability relative to that of
// the most likely token,
//
//   p / max p = exp((x - max x) / t) = 2^y,   y = (x - max x) log2(e) / t
//
// as an integer in units of 2^-44, rounded down. A sum of floats would depend on the order of its
// terms. The rounding error of a row's sum is below V units, which for V = 2^18 is 1.5e-8 of the
// most likely token's mass. The sum of 2^18 masses fits 64 bits.
struct Weight {
  float max, sharpness;  // log2(e) / t

  __device__ float log2(float x) const { return (x - max) * sharpness; }
  __device__ Mass operator()(float x) const {
    const float y = log2(x);
    return y > LEAST ? (Mass)(exp2f(y) * ONE) : 0;  // 0 for NaN
  }
};

// -- sums over a block ----------------------------------------------------------------------------

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, mask));
  return v;
}

__device__ inline Mass warp_total(Mass v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(ALL_LANES, v, mask);
  return v;
}

// The sum of v over the lanes 0 .. this lane.
__device__ inline Mass warp_scan(Mass v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const Mass other = __shfl_up_sync(ALL_LANES, v, delta);
    if (lane >= delta) v += other;
  }
  return v;
}

// The sum of v over the threads 0 .. this thread. `total` becomes the sum over all threads. There
// is one barrier.
__device__ inline Mass block_scan(Mass v, Mass* partial, Mass& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  const Mass in_warp = warp_scan(v);
  if (lane == 31) partial[warp] = in_warp;
  __syncthreads();
  const Mass of_warps = warp_scan(lane < n_warps ? partial[lane] : 0);
  total = __shfl_sync(ALL_LANES, of_warps, 31);
  const Mass before = __shfl_sync(ALL_LANES, of_warps, (warp + 31) % 32);
  return in_warp + (warp == 0 ? 0 : before);
}

// -- the first pass -------------------------------------------------------------------------------

// The results of the first pass. raw_max and raw_sum describe the original logits, which the
// log-probability needs. The other members describe the adjusted logits.
struct Summary {
  float raw_max = MINUS_INFINITY, raw_sum = 0.0f;  // sum of exp(x - raw_max)
  float max = MINUS_INFINITY, lowest = -MINUS_INFINITY;
  int token = NO_TOKEN;  // the first token with the logit `max`

  // What to subtract from logits: their maximum, or 0 if that is -inf, as -inf + inf would be NaN.
  __device__ static float from(float max) { return max == MINUS_INFINITY ? 0.0f : max; }

  __device__ void likeliest(float x, int i) {
    const bool is_first = x > max || (x == max && i < token);
    max = is_first ? x : max;
    token = is_first ? i : token;
  }

  // Combine the summaries of a warp (of the block). Sums are computed in a fixed tree order, so
  // they are the same in each thread and in each run.
  template <bool SAMPLED> __device__ void join_warp() {
    const float all = warp_max(raw_max);
    raw_sum = warp_sum(raw_sum * __expf(raw_max - from(all)));
    raw_max = all;
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      const float x = __shfl_xor_sync(ALL_LANES, max, mask);
      likeliest(x, __shfl_xor_sync(ALL_LANES, token, mask));
    }
    if (SAMPLED) lowest = -warp_max(-lowest);
  }

  template <bool SAMPLED> __device__ void join_block(Shared& s) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
    join_warp<SAMPLED>();
    if (lane == 0) {
      s.raw_max[warp] = raw_max;
      s.raw_sum[warp] = raw_sum;
      s.max[warp] = max;
      s.token[warp] = token;
      if (SAMPLED) s.lowest[warp] = lowest;
    }
    __syncthreads();
    *this = Summary();
    if (lane < n_warps) {
      raw_max = s.raw_max[lane];
      raw_sum = s.raw_sum[lane];
      max = s.max[lane];
      token = s.token[lane];
      if (SAMPLED) lowest = s.lowest[lane];
    }
    join_warp<SAMPLED>();
  }
};

// A warp's segment of the vocabulary. Lane l reads the tokens begin + l, begin + l + 32, ...
struct Segment {
  int length, begin;

  __device__ explicit Segment(int n_vocab) {
    const int n_warps = blockDim.x / 32;
    length = ((n_vocab + n_warps - 1) / n_warps + 31) / 32 * 32;
    begin = (int)(threadIdx.x / 32) * length;
  }
  __device__ int mine() const { return begin + (int)(threadIdx.x % 32); }
  __device__ int end(int n) const { return min(begin + length, n); }
};

// Compute the summary in one pass. When the maximum grows, the sum of exponentials is rescaled.
template <bool SAMPLED, bool KEEP>
__device__ Summary summarize(const Row<KEEP>& row, Segment segment, int n_vocab, int n_tokens) {
  constexpr int AT_ONCE = !SAMPLED ? 12 : KEEP ? 8 : 4;  // loads at a time per thread
  Summary all;
  const int end = segment.end(n_vocab);
  for (int i0 = segment.mine(); i0 < end; i0 += 32 * AT_ONCE) {
    float x[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int i = i0 + 32 * j;
      x[j] = i < end ? row.logits[i] : MINUS_INFINITY;
    }
    float max = all.raw_max;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) max = fmaxf(max, x[j]);
    const float from = Summary::from(max);
    all.raw_sum *= __expf(all.raw_max - from);
    all.raw_max = max;
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) all.raw_sum += __expf(x[j] - from);
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int i = i0 + 32 * j;
      if (i >= end || i >= n_tokens) continue;
      const float adjusted = row.adjusted(x[j], i);
      if (adjusted > all.max) {  // keeps the first of equal logits, because i grows
        all.max = adjusted;
        all.token = i;
      }
      if (SAMPLED && adjusted > MINUS_INFINITY) all.lowest = fminf(all.lowest, adjusted);
      if (SAMPLED && KEEP) row.kept[i] = adjusted;
    }
  }
  return all;
}

// -- filters --------------------------------------------------------------------------------------

// The masses of the tokens after all filters. Tokens that a filter drops have the mass 0.
template <bool KEEP> struct Kept {
  const Row<KEEP>& row;
  const Weight& weight;
  Key top_k;         // the least key that top_k keeps
  Key top_p;         // the least key that top_p keeps
  Mass top_p_equal;  // its mass; top_p keeps all tokens of this mass, as they are equally likely
  float log2_min_p;

  __device__ Mass operator[](int i) const {
    const float x = row[i];
    const Key key = key_of(x);
    const Mass mass = weight(x);
    const bool is_in_p = key >= top_p || mass >= top_p_equal;
    return key >= top_k && is_in_p && weight.log2(x) >= log2_min_p ? mass : 0;
  }
};

// Add to a 64-bit bin by two 32-bit atomic additions, which shared memory supports in hardware.
__device__ inline void add(Shared& s, int bin, Mass weight) {
  const unsigned int low = (unsigned int)weight;
  const unsigned int old = atomicAdd(&s.low[bin], low);
  const unsigned int high = (unsigned int)(weight >> 32) + (old + low < old ? 1u : 0u);
  if (high != 0) atomicAdd(&s.high[bin], high);
}

// The threshold of top_k or top_p: the least key such that the tokens above it weigh at most
// `limit` together. Only tokens that top_k keeps count. The filter keeps all tokens with this key
// or a larger one, so it treats equal logits equally.
//
// For top_k, every token weighs 1 and limit = k - 1. For top_p (MASS), a token weighs its mass and
// limit is p times the sum of all masses. limit_of is k - 1 or p.
//
// The search makes a histogram of a range of keys, with one bin per thread and the largest keys in
// bin 0. A scan over the bins finds the bin in which the sum crosses the limit. The next round
// searches the range from the smallest to the largest key in that bin, until one key is left. In
// the first round, bins have equal widths in x, which distributes the logits evenly. In later
// rounds they have equal widths in keys, and each round divides the range by the number of threads.
// Two or three rounds of two passes each are usual.
template <bool MASS, bool KEEP>
__device__ Key least_kept(Shared& s, const Kept<KEEP>& kept, Segment segment, int n_tokens,
                          double limit_of) {
  const Row<KEEP>& row = kept.row;
  const Weight& weight = kept.weight;
  const int end = segment.end(n_tokens), n_bins = blockDim.x;
  Key first = kept.top_k, last = key_of(weight.max);
  Mass limit = MASS ? 0 : (Mass)limit_of, above = 0;
  float range = weight.max - value_of(first);
  if (MASS) range = fminf(range, -LEAST / weight.sharpness);
  const float scale = n_bins / range;
  for (bool by_value = true; first < last; by_value = false) {
    int shift = 0;
    while ((last - first) >> shift >= (Key)n_bins) shift++;
    const auto bin_of = [&](float x, Key key) {
      if (!by_value) return (int)((last - key) >> shift);
      return (int)fminf((weight.max - x) * scale, (float)(n_bins - 1));
    };
    s.low[threadIdx.x] = s.high[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll Row<KEEP>::UNROLL
    for (int i = segment.mine(); i < end; i += 32) {
      const float x = row[i];
      const Key key = key_of(x);
      if (key < first || key > last) continue;
      const Mass w = MASS ? weight(x) : 1;
      if (w != 0) add(s, bin_of(x, key), w);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      s.bin = -1;
      s.first = 0xffffffffu;
      s.last = 0;
    }
    const Mass own = (Mass)s.high[threadIdx.x] << 32 | s.low[threadIdx.x];
    Mass total;
    const Mass through = block_scan(own, s.scan, total);
    if (MASS && by_value) limit = (Mass)(limit_of * (double)total);
    if (above + through - own <= limit && limit < above + through) {
      s.bin = threadIdx.x;
      s.above = above + through - own;
    }
    __syncthreads();
    const int bin = s.bin;
    if (bin < 0) break;  // all tokens together weigh at most the limit
    Key low = 0xffffffffu, high = 0;
#pragma unroll Row<KEEP>::UNROLL
    for (int i = segment.mine(); i < end; i += 32) {
      const float x = row[i];
      const Key key = key_of(x);
      if (key < first || key > last || bin_of(x, key) != bin) continue;
      low = min(low, key);
      high = max(high, key);
    }
    if (low <= high) {
      atomicMin(&s.first, low);
      atomicMax(&s.last, high);
    }
    __syncthreads();
    first = s.first;
    last = s.last;
    above = s.above;
  }
  return first;
}

// -- the draw -------------------------------------------------------------------------------------

// Find the first token at which the cumulative sum of the masses exceeds uniform * total. One
// thread finds it and sets its `token` to it; the other threads set theirs to NO_TOKEN. If the
// total is 0, `token` does not change.
template <bool KEEP>
__device__ void draw(Shared& s, const Kept<KEEP>& kept, Segment segment, int n_tokens,
                     double uniform, int& token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_warps = blockDim.x / 32;
  Mass sum = 0;
#pragma unroll Row<KEEP>::UNROLL
  for (int i = segment.mine(); i < segment.end(n_tokens); i += 32) sum += kept[i];
  sum = warp_total(sum);
  if (lane == 0) s.segment[warp] = sum;
  __syncthreads();
  // every warp computes the segment that contains the token
  const Mass own = lane < n_warps ? s.segment[lane] : 0;
  const Mass through = warp_scan(own), total = __shfl_sync(ALL_LANES, through, 31);
  if (total == 0) return;
  const Mass product = (Mass)(uniform * (double)total);
  Mass target = product < total ? product : total - 1;
  const int chosen = __ffs((int)__ballot_sync(ALL_LANES, target < through)) - 1;
  target -= __shfl_sync(ALL_LANES, through - own, chosen);
  // the threads share this segment; each has a few consecutive tokens
  const int n_each = (segment.length + (int)blockDim.x - 1) / (int)blockDim.x;
  const int segment_end = min((chosen + 1) * segment.length, n_tokens);
  const int begin = chosen * segment.length + (int)threadIdx.x * n_each;
  const int end = min(begin + n_each, segment_end);
  Mass mine = 0, all;
  for (int i = begin; i < end; i++) mine += kept[i];
  Mass before = block_scan(mine, s.scan, all) - mine;
  token = NO_TOKEN;
  if (target < before || target >= before + mine) return;
  for (token = begin; (before += kept[token]) <= target;) token++;
}

// Write the next token of each row b to ids[b], and its log-probability under the original logits
// to log_probs[b]; set seen[b, ids[b]] = true.
//
//   logits (B, V), uniform (B,) in [0, 1), seen (B, V) or null, allowed (n_tokens,) or null
//   sharpness = log2(e) / temperature
//   disabled options have the values penalty 1, top_k 0, top_p 1, log2_min_p -inf
//
// Grid: B blocks, each with a multiple of 32 threads. If SAMPLED is false, the kernel chooses the
// most likely token, and ignores uniform and the filters. If KEEP is true, n_tokens floats of
// dynamic shared memory contain the adjusted logits after the first pass. Otherwise, later passes
// read the logits again, usually from the L2 cache.
// registers: at most 64
template <bool SAMPLED, bool KEEP>
__global__ void __launch_bounds__(MAX_THREADS)
    next_token(const float* logits, const double* uniform, bool* seen, const bool* allowed,
               long long* ids, float* log_probs, int n_vocab, int n_tokens, float penalty,
               float sharpness, int top_k, double top_p, float log2_min_p) {
  __shared__ Shared s;
  extern __shared__ float values[];
  let_next_kernel_start();
  wait_for_previous_kernel();
  const size_t start = (size_t)blockIdx.x * n_vocab;
  bool* const seen_here = seen ? seen + start : nullptr;
  const bool is_penalized = penalty != 1.0f;
  const Row<KEEP> row = {logits + start, is_penalized ? seen_here : nullptr, allowed, penalty,
                         values};
  const Segment segment(n_vocab);
  Summary all = summarize<SAMPLED>(row, segment, n_vocab, n_tokens);
  all.join_block<SAMPLED>(s);
  int token = NO_TOKEN;  // the one thread in which this becomes a token writes the results
  if (threadIdx.x == 0) token = all.token < n_tokens ? all.token : 0;  // 0 if all are NaN or -inf
  if (SAMPLED) {
    const Weight weight = {all.max, sharpness};
    Kept<KEEP> kept = {row, weight, key_of(all.lowest), 0, 0, log2_min_p};
    if (top_k > 0) kept.top_k = least_kept<false>(s, kept, segment, n_tokens, top_k - 1);
    if (top_p < 1.0) {
      kept.top_p = least_kept<true>(s, kept, segment, n_tokens, top_p);
      kept.top_p_equal = weight(value_of(kept.top_p));
    }
    draw(s, kept, segment, n_tokens, uniform[blockIdx.x], token);
  }
  if (token == NO_TOKEN) return;
  ids[blockIdx.x] = token;
  // the greedy token's logit is known already, unless the penalty has changed it
  const bool is_known = !SAMPLED && !is_penalized && all.max > MINUS_INFINITY;
  const float x = is_known ? all.max : row.logits[token];
  log_probs[blockIdx.x] = x - all.raw_max - logf(all.raw_sum);
  if (seen_here) seen_here[token] = true;
}
