// The operators between two matrix products on a GPU. Nothing here waits for the GPU.
#include "linear.h"

#include <torch/csrc/stable/library.h>

#include "../ops/linear.h"
#include "device.h"

namespace fused_losses {
namespace {

template <class T>
SoftmaxProblem<T> problem_of(const RowsCall& call) {
  using A = Accumulate<T>;
  SoftmaxProblem<T> problem;
  problem.classes = call.classes(), problem.rows = call.rows();
  problem.row_dims = 1;
  problem.row_sizes[0] = call.rows();
  problem.logits = static_cast<const T*>(call.logits.const_data_ptr());
  problem.logits_layout.rows[0] = call.logits.strides()[0];
  problem.labels = static_cast<const int64_t*>(call.labels.const_data_ptr());
  problem.class_weight = call.factors ? static_cast<const A*>(call.factors->const_data_ptr()) : nullptr;
  problem.share = A(1);
  problem.softcap = static_cast<A>(call.softcap), problem.temperature = static_cast<A>(call.temperature);
  problem.transforms = call.softcap > 0 || call.temperature != 1.0;
  return problem;
}

std::tuple<Tensor, Tensor> row_statistics_cuda(const Tensor& logits, const Tensor& labels,
                                               const OptionalTensor& factors, double softcap,
                                               double temperature) {
  const Launches launches(logits);
  const RowsCall call = checked_rows_call(logits, labels, factors, softcap, temperature);
  Tensor statistics =
      empty_contiguous({kStatistics, call.rows()}, accumulate_type(logits.scalar_type()), logits);
  Tensor prediction = empty_contiguous({call.rows()}, ScalarType::Long, logits);
  if (call.rows() == 0) return {statistics, prediction};
  STD_CUDA_CHECK(for_element_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return row_statistics<T>(problem_of<T>(call), static_cast<Accumulate<T>*>(statistics.mutable_data_ptr()),
                             static_cast<int64_t*>(prediction.mutable_data_ptr()), launches.stream());
  }));
  return {statistics, prediction};
}

void row_gradient_in_place_cuda(Tensor logits, const Tensor& labels, const Tensor& statistics,
                                const Tensor& coefficients, const OptionalTensor& factors, double softcap,
                                double temperature) {
  const Launches launches(logits);
  const RowsCall call = checked_rows_call(logits, labels, factors, softcap, temperature);
  check_table("statistics", statistics, kStatistics, call);
  check_table("coefficients", coefficients, kCoefficients, call);
  if (logits.numel() == 0) return;
  STD_CUDA_CHECK(for_element_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulate<T>;
    return row_gradient<T>(problem_of<T>(call), static_cast<const A*>(statistics.const_data_ptr()),
                           static_cast<const A*>(coefficients.const_data_ptr()),
                           static_cast<T*>(logits.mutable_data_ptr()), launches.stream());
  }));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics_cuda));
  m.impl("row_gradient_", TORCH_BOX(&row_gradient_in_place_cuda));
}

}  // namespace fused_losses
