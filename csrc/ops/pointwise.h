// Arguments of the pointwise operators, and the checks that keep a direct call inside its memory.
#pragma once
#include "../common/tensor.h"
#include "../formulas/pointwise_names.h"

namespace fused_losses {

struct Call {
  Formula formula;
  const Tensor& input;
  const Tensor& target;
  const OptionalTensor& weight;
  const OptionalTensor& pos_weight;
  double a, b;
  Reduction reduction;
};

inline Formula formula_of(const std::string& name, double b) {
  if (name == "sigmoid_focal" && b == 2.0) return Formula::SigmoidFocalTwo;
#define FL_COMPARE(F, text) \
  if (name == text) return Formula::F;
  FL_POINTWISE_FORMULAS(FL_COMPARE)
#undef FL_COMPARE
  STD_TORCH_CHECK(false, "there is no pointwise formula ", name);
}

inline void check_like(const char* name, const Tensor& tensor, const Tensor& input) {
  STD_TORCH_CHECK(same_shape(tensor, input), name, " must have the input's shape");
  STD_TORCH_CHECK(tensor.device() == input.device(), name, " must be on the input's device");
  STD_TORCH_CHECK(is_supported(tensor.scalar_type()), name, " must be float64, float32, bfloat16 or float16");
}

inline Call checked_call(const std::string& formula, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& pos_weight, double a, double b,
                         const std::string& reduction) {
  STD_TORCH_CHECK(is_supported(input.scalar_type()), "input must be float64, float32, bfloat16 or float16");
  check_like("target", target, input);
  STD_TORCH_CHECK(target.scalar_type() == input.scalar_type(), "target must have the input's dtype");
  if (weight) check_like("weight", *weight, input);
  if (pos_weight) check_like("pos_weight", *pos_weight, input);
  return {formula_of(formula, b), input, target, weight, pos_weight, a, b, reduction_of(reduction)};
}

inline void check_grad_output(const Call& call, const Tensor& grad_output) {
  if (call.reduction == Reduction::None) {
    check_like("grad_output", grad_output, call.input);
  } else {
    STD_TORCH_CHECK(grad_output.numel() == 1 && is_supported(grad_output.scalar_type()),
                    "grad_output of a reduced loss must be one floating number");
    STD_TORCH_CHECK(grad_output.device() == call.input.device(), "grad_output must be on the input's device");
  }
}

inline void check_one_upstream(const Call& call, bool input_grad, bool target_grad) {
  STD_TORCH_CHECK(call.reduction != Reduction::None,
                  "one upstream gradient needs one loss, not reduction none");
  STD_TORCH_CHECK(input_grad || target_grad, "a gradient must be asked for");
}

// Gradients that one pass fills: one of them, or both where they share a memory order.
struct Outputs {
  Tensor* input;
  Tensor* target;

  const Tensor& leader() const { return input ? *input : *target; }
};

// A gradient for each of the tensors that is asked for, and an empty tensor for the other.
struct Gradients {
  Tensor input, target;
  bool input_grad, target_grad;

  Gradients(const Call& call, bool input_grad, bool target_grad)
      : Gradients(made(call.input, input_grad), made(call.target, target_grad), input_grad, target_grad) {}
  Gradients(const Tensor& input, const Tensor& target, bool input_grad, bool target_grad)
      : input(input), target(target), input_grad(input_grad), target_grad(target_grad) {}

  Outputs all() { return {input_grad ? &input : nullptr, target_grad ? &target : nullptr}; }

  // Calls pass(which to fill) for all at once, or one by one where their memory orders differ.
  template <class Pass>
  void fill(const Pass& pass) {
    if (input_grad && target_grad && same_strides(input, target)) return pass(all());
    if (input_grad) pass(Outputs{&input, nullptr});
    if (target_grad) pass(Outputs{nullptr, &target});
  }

  // Whether a pass that fills them adds up the loss in the order in which forward alone does.
  bool follow(const Tensor& leader) const {
    const auto order = memory_order(leader);
    return !(input_grad && memory_order(input) != order) && !(target_grad && memory_order(target) != order);
  }

 private:
  static Tensor made(const Tensor& like, bool asked) {
    return asked ? empty_like(like, like.scalar_type()) : empty_contiguous({0}, like.scalar_type(), like);
  }
};

// Of a gradient that is written over.
inline void check_gradient(const Call& call, const Tensor& gradient) {
  check_like("gradient", gradient, call.input);
  STD_TORCH_CHECK(gradient.scalar_type() == call.input.scalar_type(), "gradient must have the input's dtype");
  STD_TORCH_CHECK(is_dense(gradient, memory_order(gradient)), "gradient must fill its memory");
}

}  // namespace fused_losses
