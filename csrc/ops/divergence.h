// Arguments of the divergence operators, and the checks that keep a direct call inside its memory.
#pragma once
#include "../common/tensor.h"
#include "../formulas/divergence_names.h"
#include "divergence_names.h"
#include "softmax.h"

namespace fused_losses {

struct DivergenceCall {
  const Tensor& student;  // (N, C), classes adjacent
  const Tensor& teacher;
  Divergence divergence;
  double beta, temperature;

  int64_t rows() const { return student.sizes()[0]; }
  int64_t classes() const { return student.sizes()[1]; }
};

inline Divergence divergence_of(const std::string& name) {
#define FL_COMPARE(F, text) \
  if (name == text) return Divergence::F;
  FL_DIVERGENCES(FL_COMPARE)
#undef FL_COMPARE
  STD_TORCH_CHECK(false, "there is no divergence ", name);
}

inline void check_rows(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(is_supported(tensor.scalar_type()), name, " must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(has_adjacent_columns(tensor), name, " must be rows of adjacent classes");
}

inline void check_like_rows(const char* name, const Tensor& tensor, const Tensor& rows) {
  check_rows(name, tensor);
  STD_TORCH_CHECK(same_shape(tensor, rows) && tensor.scalar_type() == rows.scalar_type() &&
                      tensor.device() == rows.device(),
                  name, " must have the student's shape, dtype and device");
}

inline DivergenceCall checked_divergence_call(const Tensor& student, const Tensor& teacher,
                                              const std::string& divergence, double beta,
                                              double temperature) {
  check_rows("student", student);
  check_like_rows("teacher", teacher, student);
  STD_TORCH_CHECK(temperature > 0, "temperature must be above 0");
  return {student, teacher, divergence_of(divergence), beta, temperature};
}

inline void check_divergence_saved(const DivergenceCall& call, const Tensor& grad_losses,
                                   const Tensor& statistics) {
  const ScalarType wide = accumulate_type(call.student.scalar_type());
  STD_TORCH_CHECK(has_shape(grad_losses, {call.rows()}) && is_supported(grad_losses.scalar_type()) &&
                      grad_losses.device() == call.student.device(),
                  "grad_losses must be floating, one for each row");
  STD_TORCH_CHECK(has_shape(statistics, {kDivergenceStatistics, call.rows()}) && statistics.is_contiguous() &&
                      statistics.scalar_type() == wide && statistics.device() == call.student.device(),
                  "statistics must come from the forward operator");
}

}  // namespace fused_losses
