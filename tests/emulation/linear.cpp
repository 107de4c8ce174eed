// Runs cases of the kernels between matrix products: emulation_linear CASES RESULTS
#include "../../csrc/cuda/linear.h"

#include "case.h"

using namespace fused_losses;

namespace {

template <class T>
void run(emulation::Cases& cases, bool is_gradient, int max_blocks) {
  using A = Accumulate<T>;
  SoftmaxProblem<T> p;
  p.rows = cases.integer();
  p.classes = cases.integer();
  p.row_dims = 1;
  p.row_sizes[0] = p.rows;
  p.logits_layout.rows[0] = cases.integer();
  T* logits = cases.buffer<T>();
  p.logits = logits;
  p.labels = cases.buffer<int64_t>();
  p.class_weight = cases.buffer<A>();
  p.share = A(1);
  p.softcap = static_cast<A>(cases.real());
  p.temperature = static_cast<A>(cases.real());
  p.transforms = p.softcap > A(0) || p.temperature != A(1);
  A* statistics = cases.buffer<A>();
  if (is_gradient) {
    const A* coefficients = cases.buffer<A>();
    emulation::expect_success(row_gradient<T>(p, statistics, coefficients, logits, nullptr, max_blocks));
  } else {
    int64_t* prediction = cases.buffer<int64_t>();
    emulation::expect_success(row_statistics<T>(p, statistics, prediction, nullptr, max_blocks));
  }
}

}  // namespace

int main(int, char** arguments) {
  emulation::use_shared_memory(block_memory);
  emulation::Cases cases(arguments[1], arguments[2]);
  while (cases.next()) {
    emulation::seed(static_cast<unsigned>(cases.integer()));
    const int max_blocks = static_cast<int>(cases.integer());
    const bool is_gradient = cases.integer() != 0;
    emulation::for_element_type(cases.dtype(), [&](auto* type) {
      run<std::remove_pointer_t<decltype(type)>>(cases, is_gradient, max_blocks);
    });
    cases.write_back();
  }
}
