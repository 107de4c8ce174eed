// Runs cases of the pointwise kernels: emulation_pointwise CASES RESULTS
#include "../../csrc/cuda/pointwise.h"

#include "case.h"

using namespace fused_losses;

namespace {

PointwiseOperand read_operand(emulation::Cases& cases) {
  PointwiseOperand operand;
  operand.dtype = cases.dtype();
  cases.integers(operand.strides, kMaxDims);
  operand.data = cases.buffer<char>();
  return operand;
}

Formula formula_of(const std::string& name) {
#define FL_COMPARE(F, text) \
  if (name == text) return Formula::F;
  FL_POINTWISE_FORMULAS(FL_COMPARE)
#undef FL_COMPARE
  std::exit(2);
}

enum Direction { kForward, kBackward, kWithGradients };

void run_case(emulation::Cases& cases) {
  emulation::seed(static_cast<unsigned>(cases.integer()));
  const int max_blocks = static_cast<int>(cases.integer());
  const auto direction = static_cast<Direction>(cases.integer());
  const Formula formula = formula_of(cases.text());
  PointwiseProblem p;
  p.dims = static_cast<int>(cases.integer());
  cases.integers(p.sizes, kMaxDims);
  p.numel = cases.integer();
  p.a = cases.real(), p.b = cases.real();
  p.reduces = cases.integer() != 0;
  p.divisor = cases.real();
  p.input = read_operand(cases);
  p.target = read_operand(cases);
  p.weight = read_operand(cases);
  p.pos_weight = read_operand(cases);
  p.upstream = read_operand(cases);
  emulation::for_element_type(p.input.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    PointwiseGradients<T> gradients;
    if (direction != kForward) gradients = {cases.buffer<T>(), cases.buffer<T>()};
    if (direction == kBackward) {
      emulation::expect_success(pointwise_backward<T>(formula, p, gradients, nullptr, max_blocks));
    } else {
      const Dtype out_dtype = cases.dtype();
      void* out = cases.buffer<char>();
      std::vector<double> partial(static_cast<size_t>(pointwise_blocks(p.numel, max_blocks)));
      const PointwiseLoss loss{out, out_dtype, partial.data()};
      emulation::expect_success(pointwise_forward<T>(formula, p, loss, gradients, nullptr, max_blocks));
    }
  });
}

}  // namespace

int main(int, char** arguments) {
  emulation::use_shared_memory(block_memory);
  emulation::Cases cases(arguments[1], arguments[2]);
  while (cases.next()) {
    run_case(cases);
    cases.write_back();
  }
}
