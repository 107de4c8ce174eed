// Divergences of rows of logits on a GPU: what a binding tells the kernels. Free of torch's tensors.
#pragma once
#include "../formulas/divergence_names.h"
#include "types.h"

namespace fused_losses {

template <class T>
struct DivergenceProblem {
  int64_t rows = 0, classes = 0;
  const T* student = nullptr;  // rows of adjacent classes
  const T* teacher = nullptr;
  int64_t student_stride = 0, teacher_stride = 0;
  Accumulate<T> beta = 0, temperature = 1;
};

// A gradient that nobody asks for is null; another may be the logits it is of.
template <class T>
struct DivergenceGradient {
  T* student = nullptr;
  T* teacher = nullptr;
  int64_t student_stride = 0, teacher_stride = 0;
  const void* upstream = nullptr;  // one number for each row
  Dtype upstream_dtype = Dtype::Float;
};

constexpr int kDivergenceMaxBlocks = 4096;

// statistics: ten numbers for each row, name by name.
template <class T>
cudaError_t divergence_forward(Divergence divergence, const DivergenceProblem<T>& problem,
                               Accumulate<T>* losses, Accumulate<T>* statistics, cudaStream_t stream,
                               int max_blocks = kDivergenceMaxBlocks);

template <class T>
cudaError_t divergence_backward(Divergence divergence, const DivergenceProblem<T>& problem,
                                const DivergenceGradient<T>& gradient, const Accumulate<T>* statistics,
                                cudaStream_t stream, int max_blocks = kDivergenceMaxBlocks);

}  // namespace fused_losses
