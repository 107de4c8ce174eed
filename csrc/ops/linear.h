// Arguments of what happens to logits between two matrix products, and the checks that keep a direct call
// inside its memory. Logits are rows of some or all classes; a label outside of them is another block's.
#pragma once
#include "../common/tensor.h"
#include "row_names.h"
#include "softmax.h"

namespace fused_losses {

struct RowsCall {
  const Tensor& logits;           // (N, C), classes adjacent
  Tensor labels;                  // (N), contiguous
  const OptionalTensor& factors;  // (C)
  double softcap, temperature;

  int64_t rows() const { return logits.sizes()[0]; }
  int64_t classes() const { return logits.sizes()[1]; }
  // A row's label, or -1 where it is another block's.
  int64_t label(int64_t row) const {
    const int64_t value = static_cast<const int64_t*>(labels.const_data_ptr())[row];
    return value >= 0 && value < classes() ? value : -1;
  }
  template <class A>
  const A* factors_as() const {
    return static_cast<const A*>(factors->const_data_ptr());
  }
};

inline RowsCall checked_rows_call(const Tensor& logits, const Tensor& labels, const OptionalTensor& factors,
                                  double softcap, double temperature) {
  STD_TORCH_CHECK(is_supported(logits.scalar_type()), "logits must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(has_adjacent_columns(logits), "logits must be rows of adjacent classes");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && has_shape(labels, {logits.sizes()[0]}),
                  "labels must be int64, one for each row");
  STD_TORCH_CHECK(labels.device() == logits.device(), "labels must be on the logits' device");
  check_factor("factors", factors, {logits.sizes()[1]}, logits);
  return {logits, torch::stable::contiguous(labels), factors, softcap, temperature};
}

// A table with one row of accumulated numbers for each name, one column for each row of the logits.
inline void check_table(const char* name, const Tensor& table, int64_t names, const RowsCall& call) {
  STD_TORCH_CHECK(has_shape(table, {names, call.rows()}) && table.is_contiguous() &&
                      table.scalar_type() == accumulate_type(call.logits.scalar_type()),
                  name, " must be contiguous, of shape (", names,
                  ", rows), and float32, or float64 for float64 logits");
  STD_TORCH_CHECK(table.device() == call.logits.device(), name, " must be on the logits' device");
}

}  // namespace fused_losses
