// The pointwise family on a GPU: what a binding tells the kernels. Free of torch's tensors.
#pragma once
#include "../formulas/pointwise_names.h"
#include "types.h"

namespace fused_losses {

constexpr int kMaxDims = 6;

// One tensor in the order of the problem's sizes; strides in elements.
struct PointwiseOperand {
  const void* data = nullptr;
  Dtype dtype = Dtype::Float;
  int64_t strides[kMaxDims] = {};
};

// Operands of one shape; sizes[0] is the slowest dimension. Outputs are dense in this order.
struct PointwiseProblem {
  PointwiseOperand input, target;
  PointwiseOperand weight, pos_weight;  // without data where there are none
  PointwiseOperand upstream;            // of gradients; one number for a reduced loss, without data 1
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t numel = 0;
  double a = 0, b = 0;
  bool reduces = false;
  double divisor = 1;  // of a reduced loss
  // The gradients are there already for an upstream of 1.
  bool skips_one = false;
};

// Gradients that nobody asks for are null.
template <class T>
struct PointwiseGradients {
  T *input = nullptr, *target = nullptr;
};

struct PointwiseLoss {
  void* data;  // numel values, or one for a reduced loss
  Dtype dtype;
  double* partial;  // pointwise_blocks(numel) numbers for a reduced loss
};

constexpr int kPointwiseMaxBlocks = 1024;

// How many partial sums a reduced loss has: as many as blocks, whatever the GPU, so that results never
// differ.
inline int pointwise_blocks(int64_t numel, int max_blocks = kPointwiseMaxBlocks) {
  constexpr int64_t per_block = 256 * 8;
  const int64_t blocks = (numel + per_block - 1) / per_block;
  return static_cast<int>(blocks < 1 ? 1 : blocks < max_blocks ? blocks : max_blocks);
}

// Gradients of a reduced loss can be made with it, for an upstream of 1.
template <class T>
cudaError_t pointwise_forward(Formula formula, const PointwiseProblem& problem, const PointwiseLoss& loss,
                              const PointwiseGradients<T>& gradients, cudaStream_t stream,
                              int max_blocks = kPointwiseMaxBlocks);

template <class T>
cudaError_t pointwise_backward(Formula formula, const PointwiseProblem& problem,
                               const PointwiseGradients<T>& gradients, cudaStream_t stream,
                               int max_blocks = kPointwiseMaxBlocks);

}  // namespace fused_losses
