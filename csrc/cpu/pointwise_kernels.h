// Blocks of the pointwise family, compiled once per instruction set.

#include "../common/numerics.h"
#include "../formulas/pointwise.h"
#include "lanes.h"
#include "load_store.h"

namespace {

template <class F, class A>
double weighted_sum(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n) {
  const Params<A> p{a, b};
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j)
      lanes[j] = fma_(w[i + j], F::value(x[i + j], t[i + j], q[i + j], p), lanes[j]);
  }
  double total = sum_of_lanes<kLanes>(lanes);
  for (; i < n; ++i) total += w[i] * F::value(x[i], t[i], q[i], p);
  return total;
}

template <class F, class A>
void weighted_values(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A* out) {
  const Params<A> p{a, b};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] * F::value(x[i], t[i], q[i], p);
}

// The sum of weighted values, and their gradients times the upstream one while everything is at hand.
template <class F, bool kTarget, class A>
double sum_and_gradients(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A upstream,
                         A* __restrict input, A* __restrict target) {
  const Params<A> p{a, b};
  const auto element = [&](int64_t i) __attribute__((always_inline)) {
    const Gradient<A> gradient = F::gradient(x[i], t[i], q[i], p);
    const A factor = w[i] * upstream;
    input[i] = factor * gradient.input;
    if constexpr (kTarget) target[i] = factor * gradient.target;
    return F::value(x[i], t[i], q[i], p);
  };
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    FL_ELEMENTWISE
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = fma_(w[i + j], element(i + j), lanes[j]);
  }
  double total = sum_of_lanes<kLanes>(lanes);
  for (; i < n; ++i) total += w[i] * element(i);
  return total;
}

// w holds the upstream gradient times the weight.
template <class F, class A>
void input_gradient(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A* out) {
  const Params<A> p{a, b};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] * F::gradient(x[i], t[i], q[i], p).input;
}

template <class F, class A>
void target_gradient(const A* x, const A* t, const A* w, const A* q, A a, A b, int64_t n, A* out) {
  const Params<A> p{a, b};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] * F::gradient(x[i], t[i], q[i], p).target;
}

template <class A>
bool in_unit_interval(const A* x, int64_t n) {
  int outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= !(x[i] >= A(0) && x[i] <= A(1));
  return !outside;
}

template <class A>
void multiply(const A* a, const A* b, int64_t n, A* out) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

template <class A>
PointwiseBlocks<A> blocks_of(Formula formula) {
  switch (formula) {
#define FL_CASE(F, name)                                                                 \
  case Formula::F:                                                                       \
    return {weighted_sum<F, A>,    weighted_values<F, A>,          input_gradient<F, A>, \
            target_gradient<F, A>, sum_and_gradients<F, false, A>, sum_and_gradients<F, true, A>};
    FL_POINTWISE_FORMULAS(FL_CASE)
#undef FL_CASE
  }
  return {};
}

}  // namespace

inline constexpr PointwiseTable kPointwise = {
    {load<float>, store<float>, stream<float>, multiply<float>, in_unit_interval<float>, blocks_of<float>},
    {load<double>, store<double>, stream<double>, multiply<double>, in_unit_interval<double>,
     blocks_of<double>},
};
