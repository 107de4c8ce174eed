// The divergence operators on a GPU. Nothing here waits for the GPU.
#include "divergence.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../ops/divergence.h"
#include "device.h"

namespace fused_losses {
namespace {

template <class T>
DivergenceProblem<T> problem_of(const DivergenceCall& call) {
  using A = Accumulate<T>;
  DivergenceProblem<T> problem;
  problem.rows = call.rows(), problem.classes = call.classes();
  problem.student = static_cast<const T*>(call.student.const_data_ptr());
  problem.teacher = static_cast<const T*>(call.teacher.const_data_ptr());
  problem.student_stride = call.student.strides()[0], problem.teacher_stride = call.teacher.strides()[0];
  problem.beta = static_cast<A>(call.beta);
  problem.temperature = static_cast<A>(call.temperature);
  return problem;
}

std::tuple<Tensor, Tensor> divergence_forward_cuda(const Tensor& student, const Tensor& teacher,
                                                   const std::string& divergence, double beta,
                                                   double temperature) {
  const Launches launches(student);
  const DivergenceCall call = checked_divergence_call(student, teacher, divergence, beta, temperature);
  const ScalarType wide = accumulate_type(student.scalar_type());
  Tensor losses = empty_contiguous({call.rows()}, wide, student);
  Tensor statistics = empty_contiguous({kDivergenceStatistics, call.rows()}, wide, student);
  if (call.rows() == 0) return {losses, statistics};
  STD_CUDA_CHECK(for_element_type(student.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return divergence_forward<T>(
        call.divergence, problem_of<T>(call), static_cast<Accumulate<T>*>(losses.mutable_data_ptr()),
        static_cast<Accumulate<T>*>(statistics.mutable_data_ptr()), launches.stream());
  }));
  return {losses, statistics};
}

// Fills the gradients that there is memory for.
void fill_gradients(const Tensor& grad_losses, const DivergenceCall& call, const Tensor& statistics,
                    Tensor* student_out, Tensor* teacher_out, const Launches& launches) {
  check_divergence_saved(call, grad_losses, statistics);
  if (call.student.numel() == 0 || (!student_out && !teacher_out)) return;
  const Tensor upstream = torch::stable::contiguous(grad_losses);
  STD_CUDA_CHECK(for_element_type(call.student.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DivergenceGradient<T> gradient;
    if (student_out) {
      gradient.student = static_cast<T*>(student_out->mutable_data_ptr());
      gradient.student_stride = student_out->strides()[0];
    }
    if (teacher_out) {
      gradient.teacher = static_cast<T*>(teacher_out->mutable_data_ptr());
      gradient.teacher_stride = teacher_out->strides()[0];
    }
    gradient.upstream = upstream.const_data_ptr();
    gradient.upstream_dtype = dtype_of(upstream.scalar_type());
    return divergence_backward<T>(call.divergence, problem_of<T>(call), gradient,
                                  static_cast<const Accumulate<T>*>(statistics.const_data_ptr()),
                                  launches.stream());
  }));
}

std::tuple<Tensor, Tensor> divergence_backward_cuda(const Tensor& grad_losses, const Tensor& student,
                                                    const Tensor& teacher, const Tensor& statistics,
                                                    const std::string& divergence, double beta,
                                                    double temperature, bool student_grad,
                                                    bool teacher_grad) {
  const Launches launches(student);
  const DivergenceCall call = checked_divergence_call(student, teacher, divergence, beta, temperature);
  const auto memory = [&](bool wanted) {
    return empty_contiguous({wanted ? call.rows() : 0, call.classes()}, student.scalar_type(), student);
  };
  Tensor of_student = memory(student_grad), of_teacher = memory(teacher_grad);
  fill_gradients(grad_losses, call, statistics, student_grad ? &of_student : nullptr,
                 teacher_grad ? &of_teacher : nullptr, launches);
  return {of_student, of_teacher};
}

void divergence_backward_in_place_cuda(const Tensor& grad_losses, Tensor student, Tensor teacher,
                                       const Tensor& statistics, const std::string& divergence, double beta,
                                       double temperature, bool student_grad, bool teacher_grad) {
  const Launches launches(student);
  const DivergenceCall call = checked_divergence_call(student, teacher, divergence, beta, temperature);
  fill_gradients(grad_losses, call, statistics, student_grad ? &student : nullptr,
                 teacher_grad ? &teacher : nullptr, launches);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
  m.impl("divergence_forward", TORCH_BOX(&divergence_forward_cuda));
  m.impl("divergence_backward", TORCH_BOX(&divergence_backward_cuda));
  m.impl("divergence_backward_", TORCH_BOX(&divergence_backward_in_place_cuda));
}

}  // namespace fused_losses
