// What happens to a chunk of logits between two matrix products, on a GPU. Free of torch's tensors.
#pragma once
#include "softmax.h"

namespace fused_losses {

// The problem's rows are of adjacent classes, its labels may be another block's, its class weights are the
// factors of the gap and of the gradient. statistics: five numbers for each row, name by name.
template <class T>
cudaError_t row_statistics(const SoftmaxProblem<T>& problem, Accumulate<T>* statistics, int64_t* prediction,
                           cudaStream_t stream, int max_blocks = kSoftmaxMaxBlocks);

// Writes the gradient over the logits; coefficients: four numbers for each row, name by name.
template <class T>
cudaError_t row_gradient(const SoftmaxProblem<T>& problem, const Accumulate<T>* statistics,
                         const Accumulate<T>* coefficients, T* logits, cudaStream_t stream,
                         int max_blocks = kSoftmaxMaxBlocks);

}  // namespace fused_losses
