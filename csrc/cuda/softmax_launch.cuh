// Which kernel of the softmax family runs, by shapes and strides alone.
#pragma once
#include "softmax.cuh"

namespace fused_losses {

// Fewer classes than this leave a warp idle; a thread then takes a row by itself, out of the first-level
// cache.
constexpr int64_t kFewClasses = 32;
// Up to here, a warp is enough for a row.
constexpr int64_t kWarpClasses = 1024;
// With this many rows, threads need no help from others along the classes.
constexpr int64_t kManyRows = 1 << 17;

template <class Way>
int softmax_blocks(int64_t rows, int max_blocks) {
  const int64_t tiles = (rows + Way::kRows - 1) / Way::kRows;
  return static_cast<int>(tiles < 1 ? 1 : tiles < max_blocks ? tiles : max_blocks);
}

// Calls run(way) with an empty value of the type that fits.
template <class T, class Run>
cudaError_t choose_way(const SoftmaxProblem<T>& p, int64_t gradient_stride, const Run& run) {
  const bool adjacent = p.logits_layout.classes == 1 && gradient_stride == 1 &&
                        (p.probabilities == nullptr || p.probabilities_layout.classes == 1);
  if (adjacent && p.classes > kWarpClasses) return run(AlongClasses<T, kThreads>());
  if (adjacent && p.classes > kFewClasses) return run(AlongClasses<T, kWarp>());
  if (p.classes > kFewClasses && p.rows < kManyRows) return run(AlongRows<T, 8>());
  return run(AlongRows<T, 1>());
}

template <class T>
bool is_dense(const SoftmaxProblem<T>& p) {
  return p.labels == nullptr || p.smoothing > 0;  // probabilities of no class have no address
}

template <class Way, class Value>
size_t shared_bytes() {
  const size_t bytes = Way::kSharedValues * sizeof(Value);
  return bytes > block_reduce_bytes<LossSums> ? bytes : block_reduce_bytes<LossSums>;
}

template <class T>
cudaError_t softmax_forward(const SoftmaxProblem<T>& problem, const SoftmaxLoss<T>& loss, cudaStream_t stream,
                            int max_blocks) {
  return choose_way(problem, 1, [&](auto way) {
    using Way = decltype(way);
    const int blocks = softmax_blocks<Way>(problem.rows, max_blocks);
    const cudaError_t error = is_dense(problem)
                                  ? launch(&softmax_forward_kernel<T, true, Way>, blocks,
                                           shared_bytes<Way, RowSums<T, true>>(), stream, problem, loss)
                                  : launch(&softmax_forward_kernel<T, false, Way>, blocks,
                                           shared_bytes<Way, RowSums<T, false>>(), stream, problem, loss);
    if (error != cudaSuccess || blocks == 1) return error;
    return launch(&softmax_finish_kernel<T>, 1, block_reduce_bytes<LossSums>, stream, problem, loss, blocks);
  });
}

template <class T>
cudaError_t softmax_backward(const SoftmaxProblem<T>& problem, const SoftmaxGradient<T>& gradient,
                             cudaStream_t stream, int max_blocks) {
  return choose_way(problem, gradient.layout.classes, [&](auto way) {
    using Way = decltype(way);
    const int blocks = softmax_blocks<Way>(problem.rows, max_blocks);
    if (!is_dense(problem)) {
      return launch(&softmax_backward_kernel<T, false, Way>, blocks, 0, stream, problem, gradient);
    }
    return launch(&softmax_backward_kernel<T, true, Way>, blocks, shared_bytes<Way, Total<Accumulate<T>>>(),
                  stream, problem, gradient);
  });
}

template <class T>
cudaError_t softmax_target_backward(const SoftmaxProblem<T>& problem, const SoftmaxGradient<T>& gradient,
                                    cudaStream_t stream, int max_blocks) {
  return choose_way(problem, gradient.layout.classes, [&](auto way) {
    using Way = decltype(way);
    return launch(&softmax_target_backward_kernel<T, Way>, softmax_blocks<Way>(problem.rows, max_blocks), 0,
                  stream, problem, gradient);
  });
}

#define FL_INSTANTIATE_SOFTMAX(T)                                                                        \
  template cudaError_t softmax_forward<T>(const SoftmaxProblem<T>&, const SoftmaxLoss<T>&, cudaStream_t, \
                                          int);                                                          \
  template cudaError_t softmax_backward<T>(const SoftmaxProblem<T>&, const SoftmaxGradient<T>&,          \
                                           cudaStream_t, int);                                           \
  template cudaError_t softmax_target_backward<T>(const SoftmaxProblem<T>&, const SoftmaxGradient<T>&,   \
                                                  cudaStream_t, int);

}  // namespace fused_losses
