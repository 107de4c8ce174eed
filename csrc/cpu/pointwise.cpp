// The pointwise family on the CPU: blocks of the inputs through the first-level cache, one pass each way.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/isa.h"
#include "../formulas/pointwise_names.h"
#include "../ops/pointwise.h"
#include "operand.h"

namespace fused_losses {

template <class A>
struct PointwiseBlocks {
  double (*sum)(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n);
  void (*values)(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A* out);
  void (*input_gradient)(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A* out);
  void (*target_gradient)(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A* out);
  // These take the upstream gradient beside the weight.
  double (*sum_and_input_gradient)(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n,
                                   A upstream, A* input, A* target);
  double (*sum_and_gradients)(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A upstream,
                              A* input, A* target);
};

template <class A>
struct PointwiseFunctions {
  Load<A> load;
  Store<A> store;
  Stream<A> stream;
  void (*multiply)(const A* a, const A* b, int64_t n, A* out);
  bool (*in_unit_interval)(const A* x, int64_t n);
  PointwiseBlocks<A> (*blocks_of)(Formula formula);
};

struct PointwiseTable {
  PointwiseFunctions<float> single;
  PointwiseFunctions<double> wide;
};

}  // namespace fused_losses

#define FL_KERNELS "../cpu/pointwise_kernels.h"
#include "../common/for_each_isa.h"

namespace fused_losses {
namespace {

constexpr int64_t kBlock = 1024;
// What one task sums: fixed, so that the result does not depend on the number of threads.
constexpr int64_t kChunk = 32 * kBlock;

template <class A>
const PointwiseFunctions<A>& functions() {
  const auto& table = choose(isa_default::kPointwise, isa_avx2::kPointwise, isa_avx512::kPointwise);
  if constexpr (sizeof(A) == 4) {
    return table.single;
  } else {
    return table.wide;
  }
}

// The operands of one call; an absent weight is a block of ones.
template <class A>
struct Inputs {
  Operand x, t, w, q, g;
  bool has_w = false, has_q = false, has_g = false;
  A a, b;
  int64_t numel;
};

template <class A>
struct Scratch {
  alignas(64) A x[kBlock], t[kBlock], w[kBlock], q[kBlock], g[kBlock], out[kBlock], target_out[kBlock];

  explicit Scratch(A upstream) {
    std::fill(w, w + kBlock, upstream);
    std::fill(q, q + kBlock, A(1));
  }
};

// Calls body(begin, n, x, t, w, q) for the blocks of [begin, end); w includes the upstream gradient.
template <class A, class Body>
void for_each_block(const Inputs<A>& in, int64_t begin, int64_t end, Scratch<A>& scratch, A upstream,
                    const Body& body) {
  const auto& f = functions<A>();
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min(kBlock, end - i);
    const A* x = in.x.block(i, n, f.load, scratch.x);
    const A* t = in.t.block(i, n, f.load, scratch.t);
    const A* q = in.has_q ? in.q.block(i, n, f.load, scratch.q) : scratch.q;
    const A* w = scratch.w;
    if (in.has_w) {
      w = in.w.block(i, n, f.load, scratch.w);
      if (in.has_g) {
        f.multiply(w, in.g.block(i, n, f.load, scratch.g), n, scratch.w), w = scratch.w;
      } else if (upstream != A(1)) {
        std::fill(scratch.g, scratch.g + n, upstream);
        f.multiply(w, scratch.g, n, scratch.w), w = scratch.w;
      }
    } else if (in.has_g) {
      w = in.g.block(i, n, f.load, scratch.g);
    }
    body(i, n, x, t, w, q);
  }
}

template <class Body>
void for_each_chunk(int64_t numel, const Body& body) {
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  for_each_task(chunks, [&](int64_t c) { body(c, c * kChunk, std::min(numel, (c + 1) * kChunk)); });
}

template <class A>
Inputs<A> inputs_of(const Layout& layout, const Call& call) {
  Inputs<A> in;
  int index = 1;  // after the leader
  in.x = Operand(call.input, layout, index++);
  in.t = Operand(call.target, layout, index++);
  in.has_w = call.weight.has_value();
  in.has_q = call.pos_weight.has_value();
  if (in.has_w) in.w = Operand(*call.weight, layout, index++);
  if (in.has_q) in.q = Operand(*call.pos_weight, layout, index++);
  in.a = static_cast<A>(call.a), in.b = static_cast<A>(call.b), in.numel = layout.numel;
  return in;
}

// A leader, whose memory order is followed, and the operands in the order that inputs_of expects.
struct Operands {
  std::array<const Tensor*, kMaxOperands> tensors;
  int count = 0;

  Operands(const Tensor& leader, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
           const OptionalTensor& pos_weight) {
    for (const Tensor* tensor : {&leader, &input, &target}) add(*tensor);
    if (weight) add(*weight);
    if (pos_weight) add(*pos_weight);
  }
  void add(const Tensor& tensor) { tensors[count++] = &tensor; }
  Layout layout() const { return joint_layout(tensors.data(), count); }
};

// torch refuses probabilities outside [0, 1]. The pass that computes only notices them; a slower one names
// the first.
template <class A>
class RangeCheck {
 public:
  explicit RangeCheck(Formula formula) : wanted_(formula == Formula::BCE) {}

  void notice(const A* x, const A* t, int64_t n) {
    const auto inside = functions<A>().in_unit_interval;
    if (wanted_ && !(inside(x, n) && inside(t, n))) failed_ = true;
  }

  void raise(const Inputs<A>& in) const {
    if (!failed_) return;
    raise_for("input", in.x, in.numel, "; apply a sigmoid, or use BCEWithLogitsLoss");
    raise_for("target", in.t, in.numel, "");
  }

 private:
  static void raise_for(const char* name, const Operand& operand, int64_t numel, const char* way_out) {
    alignas(64) A scratch[kBlock];
    for (int64_t i = 0; i < numel; i += kBlock) {
      const int64_t n = std::min(kBlock, numel - i);
      const A* values = operand.block(i, n, functions<A>().load, scratch);
      const A* bad = std::find_if_not(values, values + n, [](A v) { return v >= A(0) && v <= A(1); });
      STD_TORCH_CHECK(bad == values + n, "all elements of ", name, " should be between 0 and 1, got ", *bad,
                      way_out);
    }
  }

  bool wanted_;
  std::atomic<bool> failed_{false};
};

template <class A>
void store_scalar(double value, Tensor& out) {
  const A wide = static_cast<A>(value);
  functions<A>().store(dtype_of(out.scalar_type()), &wide, 1, 1, out.mutable_data_ptr());
}

// Adds up body(begin, end, scratch) over the chunks.
template <class A, class Body>
double sum_over_chunks(int64_t numel, const Body& body) {
  std::vector<double> partial(static_cast<size_t>((numel + kChunk - 1) / kChunk));
  for_each_chunk(numel, [&](int64_t chunk, int64_t begin, int64_t end) {
    Scratch<A> scratch(A(1));
    partial[static_cast<size_t>(chunk)] = body(begin, end, scratch);
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

template <class A>
double sum_of(Formula formula, const Inputs<A>& in) {
  const auto blocks = functions<A>().blocks_of(formula);
  RangeCheck<A> range(formula);
  const double sum = sum_over_chunks<A>(in.numel, [&](int64_t begin, int64_t end, Scratch<A>& scratch) {
    double total = 0;
    for_each_block<A>(in, begin, end, scratch, A(1), [&](int64_t, int64_t n, auto x, auto t, auto w, auto q) {
      range.notice(x, t, n);
      total += blocks.sum(x, t, w, q, in.a, in.b, n);
    });
    return total;
  });
  range.raise(in);
  return sum;
}

template <class A>
void values_of(Formula formula, const Inputs<A>& in, Tensor& result) {
  const auto blocks = functions<A>().blocks_of(formula);
  RangeCheck<A> range(formula);
  const Output<A> out(result, functions<A>());
  for_each_chunk(in.numel, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<A> scratch(A(1));
    for_each_block<A>(in, begin, end, scratch, A(1),
                      [&](int64_t i, int64_t n, auto x, auto t, auto w, auto q) {
                        range.notice(x, t, n);
                        A* values = out.place(i, scratch.out);
                        blocks.values(x, t, w, q, in.a, in.b, n, values);
                        out.put(values, 1, n, i);
                      });
  });
  range.raise(in);
}

template <class A>
std::optional<Output<A>> output_of(Tensor* tensor) {
  return tensor ? std::optional<Output<A>>(std::in_place, *tensor, functions<A>()) : std::nullopt;
}

template <class A>
void gradients_of(Formula formula, const Inputs<A>& in, A upstream, const Outputs& outputs) {
  const auto blocks = functions<A>().blocks_of(formula);
  const auto input_out = output_of<A>(outputs.input), target_out = output_of<A>(outputs.target);
  for_each_chunk(in.numel, [&](int64_t, int64_t begin, int64_t end) {
    Scratch<A> scratch(upstream);
    for_each_block<A>(in, begin, end, scratch, upstream,
                      [&](int64_t i, int64_t n, auto x, auto t, auto w, auto q) {
                        const auto write = [&](auto gradient, const Output<A>& out) {
                          A* values = out.place(i, scratch.out);
                          gradient(x, t, w, q, in.a, in.b, n, values);
                          out.put(values, 1, n, i);
                        };
                        if (input_out) write(blocks.input_gradient, *input_out);
                        if (target_out) write(blocks.target_gradient, *target_out);
                      });
  });
}

// The sum, and the gradients for an upstream one, from one read of the inputs.
template <class A>
double sum_and_gradients_of(Formula formula, const Inputs<A>& in, A upstream, const Outputs& outputs) {
  const auto blocks = functions<A>().blocks_of(formula);
  const auto pass = outputs.target ? blocks.sum_and_gradients : blocks.sum_and_input_gradient;
  RangeCheck<A> range(formula);
  const auto input_out = output_of<A>(outputs.input), target_out = output_of<A>(outputs.target);
  const double sum = sum_over_chunks<A>(in.numel, [&](int64_t begin, int64_t end, Scratch<A>& scratch) {
    double total = 0;
    for_each_block<A>(in, begin, end, scratch, A(1),
                      [&](int64_t i, int64_t n, auto x, auto t, auto w, auto q) {
                        range.notice(x, t, n);
                        A* input = input_out ? input_out->place(i, scratch.out) : scratch.out;
                        A* target = target_out ? target_out->place(i, scratch.target_out) : nullptr;
                        total += pass(x, t, w, q, in.a, in.b, n, upstream, input, target);
                        if (input_out) input_out->put(input, 1, n, i);
                        if (target_out) target_out->put(target, 1, n, i);
                      });
    return total;
  });
  range.raise(in);
  return sum;
}

template <class A>
A scalar_of(const Tensor& tensor) {
  A value;
  functions<A>().load(dtype_of(tensor.scalar_type()), tensor.const_data_ptr(), 1, 1, &value);
  return value;
}

// What a reduced loss divides its sum by.
double denominator(const Call& call) {
  return call.reduction == Reduction::Mean ? static_cast<double>(call.input.numel()) : 1.0;
}

Operands operands_of(const Tensor& leader, const Call& call) {
  return {leader, call.input, call.target, call.weight, call.pos_weight};
}

// Fills the asked-for gradients, which share one memory order.
template <class A>
void backward_pass(const Call& call, const Tensor& grad_output, const Outputs& out) {
  Operands operands = operands_of(out.leader(), call);
  const int upstream_index = operands.count;
  const bool unreduced = call.reduction == Reduction::None;
  if (unreduced) operands.add(grad_output);
  const Layout layout = operands.layout();
  Inputs<A> in = inputs_of<A>(layout, call);
  if (unreduced) in.has_g = true, in.g = Operand(grad_output, layout, upstream_index);
  const A upstream = unreduced ? A(1) : scalar_of<A>(grad_output);
  gradients_of(call.formula, in, upstream / static_cast<A>(denominator(call)), out);
}

template <class A>
Tensor forward(const Call& call, ScalarType out_dtype) {
  const bool unreduced = call.reduction == Reduction::None;
  Tensor out = unreduced ? empty_like(call.input, out_dtype) : empty_scalar(out_dtype, call.input);
  const Layout layout = operands_of(unreduced ? out : call.input, call).layout();
  const Inputs<A> in = inputs_of<A>(layout, call);
  if (unreduced) {
    values_of(call.formula, in, out);
  } else {
    store_scalar<A>(sum_of(call.formula, in) / denominator(call), out);
  }
  return out;
}

// The reduced loss; fills the gradients, which share one memory order, for an upstream one.
template <class A>
double forward_backward(const Call& call, const Outputs& gradients) {
  const Layout layout = operands_of(gradients.leader(), call).layout();
  const Inputs<A> in = inputs_of<A>(layout, call);
  const A upstream = A(1) / static_cast<A>(denominator(call));
  return sum_and_gradients_of(call.formula, in, upstream, gradients) / denominator(call);
}

// The reduced loss; fills the gradients for an upstream one.
template <class A>
Tensor with_gradients(const Call& call, ScalarType out_dtype, Gradients& gradients) {
  Tensor loss = empty_scalar(out_dtype, call.input);
  if (gradients.follow(call.input)) {
    gradients.fill([&](const Outputs& out) { store_scalar<A>(forward_backward<A>(call, out), loss); });
    return loss;
  }
  Tensor one = empty_scalar(call.input.scalar_type(), call.input);
  store_scalar<A>(1.0, one);
  gradients.fill([&](const Outputs& out) { backward_pass<A>(call, one, out); });
  return forward<A>(call, out_dtype);
}

Tensor pointwise_forward(const std::string& formula, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& pos_weight, double a, double b,
                         const std::string& reduction, ScalarType out_dtype) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  return input.scalar_type() == ScalarType::Double ? forward<double>(call, out_dtype)
                                                   : forward<float>(call, out_dtype);
}

std::tuple<Tensor, Tensor> pointwise_backward(const std::string& formula, const Tensor& grad_output,
                                              const Tensor& input, const Tensor& target,
                                              const OptionalTensor& weight, const OptionalTensor& pos_weight,
                                              double a, double b, const std::string& reduction,
                                              bool input_grad, bool target_grad) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  check_grad_output(call, grad_output);
  Gradients gradients(call, input_grad, target_grad);
  const auto pass = input.scalar_type() == ScalarType::Double ? backward_pass<double> : backward_pass<float>;
  if (input.numel() != 0) gradients.fill([&](const Outputs& out) { pass(call, grad_output, out); });
  return {gradients.input, gradients.target};
}

std::tuple<Tensor, Tensor, Tensor> pointwise_with_gradients(
    const std::string& formula, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& pos_weight, double a, double b, const std::string& reduction, bool input_grad,
    bool target_grad, ScalarType out_dtype) {
  const Call call = checked_call(formula, input, target, weight, pos_weight, a, b, reduction);
  check_one_upstream(call, input_grad, target_grad);
  const auto run = input.scalar_type() == ScalarType::Double ? with_gradients<double> : with_gradients<float>;
  Gradients gradients(call, input_grad, target_grad);
  const Tensor loss = run(call, out_dtype, gradients);
  return {loss, gradients.input, gradients.target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("pointwise_forward", TORCH_BOX(&pointwise_forward));
  m.impl("pointwise_backward", TORCH_BOX(&pointwise_backward));
  m.impl("pointwise_with_gradients", TORCH_BOX(&pointwise_with_gradients));
}

}  // namespace fused_losses
