// The pointwise operators on a GPU. Nothing here waits for the GPU.
#include <torch/csrc/stable/library.h>

#include "../common/layout.h"
#include "../ops/pointwise.h"
#include "device.h"
#include "pointwise.h"

namespace fused_losses {
namespace {

PointwiseOperand operand_of(const Tensor& tensor, const Layout& layout, int index) {
  PointwiseOperand operand{tensor.const_data_ptr(), dtype_of(tensor.scalar_type()), {}};
  std::copy(layout.strides[index].begin(), layout.strides[index].end(), operand.strides);
  return operand;
}

// The operands in the memory order of an output, or of the input.
PointwiseProblem problem_of(const Call& call, const Tensor& leader, const Tensor* upstream) {
  std::array<const Tensor*, kMaxOperands> tensors{&leader, &call.input, &call.target};
  int count = 3;
  if (call.weight) tensors[count++] = &*call.weight;
  if (call.pos_weight) tensors[count++] = &*call.pos_weight;
  const bool upstream_has_shape = upstream != nullptr && call.reduction == Reduction::None;
  if (upstream_has_shape) tensors[count++] = upstream;
  const Layout layout = joint_layout(tensors.data(), count);
  STD_TORCH_CHECK(layout.sizes.size() <= kMaxDims, "the strides of these tensors need ", layout.sizes.size(),
                  " dimensions and the CUDA kernels take ", kMaxDims, "; pass contiguous tensors");
  PointwiseProblem problem;
  int index = 1;
  problem.input = operand_of(call.input, layout, index++);
  problem.target = operand_of(call.target, layout, index++);
  if (call.weight) problem.weight = operand_of(*call.weight, layout, index++);
  if (call.pos_weight) problem.pos_weight = operand_of(*call.pos_weight, layout, index++);
  if (upstream_has_shape) {
    problem.upstream = operand_of(*upstream, layout, index++);
  } else if (upstream != nullptr) {
    problem.upstream = {upstream->const_data_ptr(), dtype_of(upstream->scalar_type()), {}};
  }
  problem.dims = static_cast<int>(layout.sizes.size());
  std::copy(layout.sizes.begin(), layout.sizes.end(), problem.sizes);
  problem.numel = layout.numel;
  problem.a = call.a, problem.b = call.b;
  problem.reduces = call.reduction != Reduction::None;
  problem.divisor = call.reduction == Reduction::Mean ? static_cast<double>(layout.numel) : 1.0;
  return problem;
}

template <class T>
PointwiseGradients<T> gradients_of(const Outputs& out) {
  const auto data = [](Tensor* of) { return of ? static_cast<T*>(of->mutable_data_ptr()) : nullptr; };
  return {data(out.input), data(out.target)};
}

// Fills the gradients, too, where they are given: for an upstream of 1.
Tensor forward(const Call& call, ScalarType out_dtype, const PointwiseProblem& problem, Tensor loss,
               const Outputs& gradients, cudaStream_t stream) {
  const int64_t blocks = pointwise_blocks(problem.numel);
  const Tensor partial =
      empty_contiguous({problem.reduces && blocks > 1 ? blocks : 0}, ScalarType::Double, call.input);
  STD_CUDA_CHECK(for_element_type(call.input.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return pointwise_forward<T>(
        call.formula, problem,
        {loss.mutable_data_ptr(), dtype_of(out_dtype), static_cast<double*>(partial.mutable_data_ptr())},
        gradients_of<T>(gradients), stream);
  }));
  return loss;
}

Tensor pointwise_forward_cuda(const std::string& formula, const Tensor& input, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& pos_weight, double a,
                              double b, const std::string& reduction, ScalarType out_dtype) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  const Launches launches(input);
  const bool reduces = call.reduction != Reduction::None;
  Tensor loss = reduces ? empty_scalar(out_dtype, input) : empty_like(input, out_dtype);
  if (!reduces && input.numel() == 0) return loss;
  const PointwiseProblem problem = problem_of(call, reduces ? input : loss, nullptr);
  return forward(call, out_dtype, problem, loss, {}, launches.stream());
}

// An upstream of null is 1; with skips_one, the gradients for that are there already.
void fill(Gradients& gradients, const Call& call, const Tensor* upstream, bool skips_one,
          cudaStream_t stream) {
  if (call.input.numel() == 0) return;
  gradients.fill([&](const Outputs& out) {
    PointwiseProblem problem = problem_of(call, out.leader(), upstream);
    problem.skips_one = skips_one;
    STD_CUDA_CHECK(for_element_type(call.input.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return pointwise_backward<T>(call.formula, problem, gradients_of<T>(out), stream);
    }));
  });
}

std::tuple<Tensor, Tensor, Tensor> pointwise_with_gradients_cuda(
    const std::string& formula, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pos_weight, double a, double b, const std::string& reduction, bool input_grad,
    bool target_grad, ScalarType out_dtype) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  check_one_upstream(call, input_grad, target_grad);
  const Launches launches(input);
  const cudaStream_t stream = launches.stream();
  Gradients gradients(call, input_grad, target_grad);
  const bool at_once = gradients.follow(input);
  const Tensor loss = forward(call, out_dtype, problem_of(call, input, nullptr),
                              empty_scalar(out_dtype, input), at_once ? gradients.all() : Outputs{}, stream);
  if (!at_once) fill(gradients, call, nullptr, false, stream);
  return {loss, gradients.input, gradients.target};
}

std::tuple<Tensor, Tensor> pointwise_backward_cuda(const std::string& formula, const Tensor& grad_output,
                                                   const Tensor& input, const Tensor& target,
                                                   const OptionalTensor& weight,
                                                   const OptionalTensor& pos_weight, double a, double b,
                                                   const std::string& reduction, bool input_grad,
                                                   bool target_grad) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  check_grad_output(call, grad_output);
  const Launches launches(input);
  Gradients gradients(call, input_grad, target_grad);
  fill(gradients, call, &grad_output, false, launches.stream());
  return {gradients.input, gradients.target};
}

// Over gradients for an upstream of 1: whether it is one, only the GPU knows.
void pointwise_backward_unless_one_cuda(const std::string& formula, const Tensor& grad_output,
                                        const Tensor& input, const Tensor& target,
                                        const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                        double a, double b, const std::string& reduction,
                                        Tensor input_gradient, Tensor target_gradient) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  const bool input_grad = input_gradient.numel() > 0, target_grad = target_gradient.numel() > 0;
  check_one_upstream(call, input_grad, target_grad || input.numel() == 0);
  check_grad_output(call, grad_output);
  if (input_grad) check_gradient(call, input_gradient);
  if (target_grad) check_gradient(call, target_gradient);
  const Launches launches(input);
  Gradients gradients(input_gradient, target_gradient, input_grad, target_grad);
  fill(gradients, call, &grad_output, true, launches.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
  m.impl("pointwise_forward", TORCH_BOX(&pointwise_forward_cuda));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward_cuda));
  m.impl("pointwise_with_gradients", TORCH_BOX(&pointwise_with_gradients_cuda));
  m.impl("pointwise_backward_unless_one_", TORCH_BOX(&pointwise_backward_unless_one_cuda));
}

}  // namespace fused_losses
