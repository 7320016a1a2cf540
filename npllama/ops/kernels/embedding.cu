// The derivative of the embedding, in the type F (float or double):
//
//   dW[v] = sum of dx[m] over all m where token m is v
//
// dx (M, D) -> dW (V, D). order (M,) contains the indices m sorted by token. The indices of token v
// are order[begins[v]] .. order[begins[v + 1] - 1], with begins (V + 1,). A token that does not
// occur has a row of zeros.
//
// Block (v, i) computes THREADS columns of row v, and each thread computes one of them. The threads
// of a warp thus read consecutive elements of a row of dx, which the GPU combines into few memory
// accesses. Each thread adds in the order of `order`, so the result is deterministic. With atomic
// additions to dW it would not be.
constexpr int THREADS = 256;

// registers: at most 40
template <typename F>
__global__ void __launch_bounds__(THREADS)
embedding_backward(const F* dx, const long long* order, const long long* begins, F* dw,
                   int width) {
  wait_for_previous_kernel();
  const int column = blockIdx.y * THREADS + threadIdx.x;
  if (column >= width) return;
  F sum = 0;
  for (long long i = begins[blockIdx.x]; i < begins[blockIdx.x + 1]; i++)
    sum += dx[order[i] * width + column];
  dw[(size_t)blockIdx.x * width + column] = sum;
}
