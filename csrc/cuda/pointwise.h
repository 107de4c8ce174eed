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
  PointwiseOperand upstream;            // in backward; one number for a reduced loss
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t numel = 0;
  double a = 0, b = 0;
  bool reduces = false;
  double divisor = 1;  // of a reduced loss
};

constexpr int kPointwiseMaxBlocks = 1024;

// How many partial sums a reduced loss has: as many as blocks, whatever the GPU, so that results never
// differ.
inline int pointwise_blocks(int64_t numel, int max_blocks = kPointwiseMaxBlocks) {
  constexpr int64_t per_block = 256 * 8;
  const int64_t blocks = (numel + per_block - 1) / per_block;
  return static_cast<int>(blocks < 1 ? 1 : blocks < max_blocks ? blocks : max_blocks);
}

// out: numel values, or one for a reduced loss; partial: pointwise_blocks(numel) numbers for that.
template <class T>
cudaError_t pointwise_forward(Formula formula, const PointwiseProblem& problem, void* out, Dtype out_dtype,
                              double* partial, cudaStream_t stream, int max_blocks = kPointwiseMaxBlocks);

// A gradient that nobody asks for is null.
template <class T>
cudaError_t pointwise_backward(Formula formula, const PointwiseProblem& problem, T* input_gradient,
                               T* target_gradient, cudaStream_t stream, int max_blocks = kPointwiseMaxBlocks);

}  // namespace fused_losses
