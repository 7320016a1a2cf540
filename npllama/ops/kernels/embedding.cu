// The derivative of the embedding, in F, float or double:
//
//   dW[v] = sum of dx[m] over the places m where the token v stands
//
// dx (M, D) -> dW (V, D). order (M,) are the places sorted by their token; those of v are
// order[begins[v]] to order[begins[v + 1] - 1], with begins (V + 1,). A token that stands nowhere
// gets zeros.
//
// Block (v, i) computes THREADS columns of row v, one a thread, so that neighbouring threads read
// neighbouring numbers of a row of dx. Each adds in the order of the places: every run gives the
// same bits, as atomic additions to dW would not.
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
