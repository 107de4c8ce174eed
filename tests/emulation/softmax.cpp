// Runs cases of the softmax kernels: emulation_softmax CASES RESULTS
#include "../../csrc/cuda/softmax.h"

#include "case.h"

using namespace fused_losses;

namespace {

enum Direction { kForward, kBackward, kInPlace, kTargetBackward };

ClassLayout read_layout(emulation::Cases& cases) {
  ClassLayout layout;
  layout.classes = cases.integer();
  cases.integers(layout.rows, kMaxRowDims);
  return layout;
}

template <class T>
SoftmaxProblem<T> read_problem(emulation::Cases& cases) {
  using A = Accumulate<T>;
  SoftmaxProblem<T> p;
  p.classes = cases.integer();
  p.rows = cases.integer();
  p.row_dims = static_cast<int>(cases.integer());
  cases.integers(p.row_sizes, kMaxRowDims);
  p.logits = cases.buffer<T>();
  p.logits_layout = read_layout(cases);
  p.probabilities = cases.buffer<T>();
  p.probabilities_layout = read_layout(cases);
  p.labels = cases.buffer<int64_t>();
  p.class_weight = cases.buffer<A>();
  p.sample_weight = cases.buffer<A>();
  p.ignore_index = cases.integer();
  const double smoothing = cases.real();
  p.smoothing = static_cast<A>(smoothing);
  p.share = static_cast<A>(smoothing / static_cast<double>(p.classes));
  p.z_loss = static_cast<A>(cases.real());
  p.softcap = static_cast<A>(cases.real());
  p.temperature = static_cast<A>(cases.real());
  p.transforms = p.softcap > A(0) || p.temperature != A(1);
  return p;
}

template <class T>
void run(emulation::Cases& cases, Direction direction, int max_blocks) {
  SoftmaxProblem<T> p = read_problem<T>(cases);
  using A = Accumulate<T>;
  if (direction == kForward) {
    const auto reduction = static_cast<typename SoftmaxLoss<T>::Reduction>(cases.integer());
    const Dtype dtype = cases.dtype();
    void* loss = cases.buffer<char>();
    A* stats = cases.buffer<A>();
    std::vector<double> partial(2 * static_cast<size_t>(max_blocks));
    const SoftmaxLoss<T> out{loss, dtype, reduction, stats, partial.data()};
    return emulation::expect_success(softmax_forward<T>(p, out, nullptr, max_blocks));
  }
  SoftmaxGradient<T> g;
  g.upstream_dtype = cases.dtype();
  g.upstream = cases.buffer<char>();
  g.upstream_is_one = cases.integer() != 0;
  g.stats = cases.buffer<A>();
  g.data = cases.buffer<T>();
  g.layout = read_layout(cases);
  if (direction == kInPlace) g.data = const_cast<T*>(p.logits);
  emulation::expect_success(direction == kTargetBackward
                                ? softmax_target_backward<T>(p, g, nullptr, max_blocks)
                                : softmax_backward<T>(p, g, nullptr, max_blocks));
}

}  // namespace

int main(int, char** arguments) {
  emulation::use_shared_memory(block_memory);
  emulation::Cases cases(arguments[1], arguments[2]);
  while (cases.next()) {
    emulation::seed(static_cast<unsigned>(cases.integer()));
    const int max_blocks = static_cast<int>(cases.integer());
    const auto direction = static_cast<Direction>(cases.integer());
    emulation::for_element_type(cases.dtype(), [&](auto* type) {
      run<std::remove_pointer_t<decltype(type)>>(cases, direction, max_blocks);
    });
    cases.write_back();
  }
}
