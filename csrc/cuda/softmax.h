// The softmax family on a GPU: what a binding tells the kernels. Free of torch's tensors.
#pragma once
#include "types.h"

namespace fused_losses {

constexpr int kMaxRowDims = 6;

// Where one tensor's rows and classes are; strides in elements.
struct ClassLayout {
  int64_t classes = 1;
  int64_t rows[kMaxRowDims] = {};
};

template <class T>
struct SoftmaxProblem {
  using A = Accumulate<T>;

  int64_t classes = 0, rows = 0;
  // Rows are numbered with the last of these dimensions the fastest.
  int row_dims = 0;
  int64_t row_sizes[kMaxRowDims] = {};
  const T* logits = nullptr;
  const T* probabilities = nullptr;  // or
  const int64_t* labels = nullptr;   // contiguous
  ClassLayout logits_layout, probabilities_layout;
  const A* class_weight = nullptr;   // contiguous, null for none
  const A* sample_weight = nullptr;  // contiguous, null for none
  int64_t ignore_index = -100;
  A smoothing = 0, share = 0;  // share = smoothing / classes
  A z_loss = 0, softcap = 0, temperature = 1;
  bool transforms = false;
};

// stats: maxima of the rows, logarithms of their sums, the denominator of the mean.
template <class T>
struct SoftmaxLoss {
  enum Reduction { kNone, kMean, kSum };

  void* data;
  Dtype dtype;
  Reduction reduction;
  Accumulate<T>* stats;
  double* partial;  // two numbers for each block, of which there are no more than rows
};

template <class T>
struct SoftmaxGradient {
  T* data;  // may be the logits
  ClassLayout layout;
  const void* upstream;
  Dtype upstream_dtype;
  bool upstream_is_one;  // number for all rows
  const Accumulate<T>* stats;
};

constexpr int kSoftmaxMaxBlocks = 4096;

template <class T>
cudaError_t softmax_forward(const SoftmaxProblem<T>& problem, const SoftmaxLoss<T>& loss, cudaStream_t stream,
                            int max_blocks = kSoftmaxMaxBlocks);

template <class T>
cudaError_t softmax_backward(const SoftmaxProblem<T>& problem, const SoftmaxGradient<T>& gradient,
                             cudaStream_t stream, int max_blocks = kSoftmaxMaxBlocks);

// The gradient of the probabilities.
template <class T>
cudaError_t softmax_target_backward(const SoftmaxProblem<T>& problem, const SoftmaxGradient<T>& gradient,
                                    cudaStream_t stream, int max_blocks = kSoftmaxMaxBlocks);

}  // namespace fused_losses
