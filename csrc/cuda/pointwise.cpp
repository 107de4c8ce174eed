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

Tensor pointwise_forward_cuda(const std::string& formula, const Tensor& input, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& pos_weight, double a,
                              double b, const std::string& reduction, ScalarType out_dtype) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  const Launches launches(input);
  const bool reduces = call.reduction != Reduction::None;
  Tensor out = reduces ? empty_scalar(out_dtype, input) : empty_like(input, out_dtype);
  if (!reduces && input.numel() == 0) return out;
  const PointwiseProblem problem = problem_of(call, reduces ? input : out, nullptr);
  const int blocks = pointwise_blocks(problem.numel);
  const Tensor partial = empty_contiguous({reduces && blocks > 1 ? blocks : 0}, ScalarType::Double, input);
  STD_CUDA_CHECK(for_element_type(input.scalar_type(), [&](auto* type) {
    return pointwise_forward<std::remove_pointer_t<decltype(type)>>(
        call.formula, problem, out.mutable_data_ptr(), dtype_of(out_dtype),
        static_cast<double*>(partial.mutable_data_ptr()), launches.stream());
  }));
  return out;
}

// Fills the asked-for gradients, which share one memory order.
void fill_gradients(const Call& call, const Tensor& grad_output, Tensor* input_out, Tensor* target_out,
                    cudaStream_t stream) {
  const PointwiseProblem problem = problem_of(call, input_out ? *input_out : *target_out, &grad_output);
  STD_CUDA_CHECK(for_element_type(call.input.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto data = [](Tensor* out) { return out ? static_cast<T*>(out->mutable_data_ptr()) : nullptr; };
    return pointwise_backward<T>(call.formula, problem, data(input_out), data(target_out), stream);
  }));
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
  const ScalarType dtype = input.scalar_type();
  Tensor input_out = input_grad ? empty_like(input, dtype) : empty_contiguous({0}, dtype, input);
  Tensor target_out = target_grad ? empty_like(target, dtype) : empty_contiguous({0}, dtype, input);
  if (input.numel() == 0) return {input_out, target_out};
  const cudaStream_t stream = launches.stream();
  if (input_grad && target_grad && same_strides(input_out, target_out)) {
    fill_gradients(call, grad_output, &input_out, &target_out, stream);
  } else {
    if (input_grad) fill_gradients(call, grad_output, &input_out, nullptr, stream);
    if (target_grad) fill_gradients(call, grad_output, nullptr, &target_out, stream);
  }
  return {input_out, target_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
  m.impl("pointwise_forward", TORCH_BOX(&pointwise_forward_cuda));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward_cuda));
}

}  // namespace fused_losses
