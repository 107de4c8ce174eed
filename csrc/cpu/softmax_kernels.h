// Blocks of the softmax family, compiled once per instruction set. "row" functions run along the classes of one
// row; "pixel" functions run along pixels, one class at a time.

#include "../common/numerics.h"
#include "../formulas/softmax.h"
#include "load_store.h"

namespace {

constexpr int64_t kLanes = 64;

template <class A>
void transform(const A* x, int64_t n, A softcap, A temperature, A* z) {
  const LogitTransform<A> f{softcap, temperature};
  if (softcap > A(0)) {
    for (int64_t i = 0; i < n; ++i) z[i] = f(x[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) z[i] = x[i] / temperature;
  }
}

// gradient *= dz / dx
template <class A>
void chain(const A* z, int64_t n, A softcap, A temperature, A* gradient) {
  const LogitTransform<A> f{softcap, temperature};
  for (int64_t i = 0; i < n; ++i) gradient[i] *= f.derivative(z[i]);
}

template <class A>
void affine(const A* x, int64_t n, A scale, A shift, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale + shift;
}

template <class A>
void scale_by(const A* x, const A* y, int64_t n, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * y[i];
}

template <class A>
A row_max(const A* z, int64_t n) {
  A lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = -std::numeric_limits<A>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = z[i + j] > lanes[j] ? z[i + j] : lanes[j];
  }
  A result = lanes[0];
  for (int64_t j = 1; j < kLanes; ++j) result = lanes[j] > result ? lanes[j] : result;
  for (; i < n; ++i) result = z[i] > result ? z[i] : result;
  return result;
}

template <class A>
double row_sum_exp(const A* z, A maximum, int64_t n) {
  ExpSum<A> lanes[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j].add(z[i + j], maximum);
  }
  for (int64_t j = 0; i < n; ++i, ++j) lanes[j].add(z[i], maximum);
  double top = 0, rest = 0;
  for (int64_t j = 0; j < kLanes; ++j) top += lanes[j].top, rest += lanes[j].rest;
  return top + rest;
}

// sum of w * (maximum - z)
template <class A>
double row_gap(const A* z, const A* w, A maximum, int64_t n) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += w[i + j] * (maximum - z[i + j]);
  }
  double total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
  for (; i < n; ++i) total += w[i] * (maximum - z[i]);
  return total;
}

template <class A>
double row_sum(const A* x, int64_t n) {
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j];
  }
  double total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += lanes[j];
  for (; i < n; ++i) total += x[i];
  return total;
}

// a * softmax(z)
template <class A>
void row_gradient(const A* z, A maximum, A log_sum, A a, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  for (int64_t i = 0; i < n; ++i) out[i] = a * stats.probability(z[i]);
}

// a * softmax(z) - k * r
template <class A>
void row_gradient_minus(const A* z, A maximum, A log_sum, A a, A k, const A* r, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  for (int64_t i = 0; i < n; ++i) out[i] = a * stats.probability(z[i]) - k * r[i];
}

// k * w * (log-sum-exp - z)
template <class A>
void row_target_gradient(const A* z, A maximum, A log_sum, A k, const A* w, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  for (int64_t i = 0; i < n; ++i) out[i] = k * w[i] * stats.minus_log_probability(z[i]);
}

template <class A>
void pixel_max(const A* z, int64_t n, A* maximum) {
  for (int64_t i = 0; i < n; ++i) maximum[i] = z[i] > maximum[i] ? z[i] : maximum[i];
}

template <class A>
void pixel_sum_exp(const A* z, const A* maximum, int64_t n, A* top, A* rest) {
  for (int64_t i = 0; i < n; ++i) {
    ExpSum<A> sum{top[i], rest[i]};
    sum.add(z[i], maximum[i]);
    top[i] = sum.top, rest[i] = sum.rest;
  }
}

// gap += w * r * (maximum - z), weight += w * r
template <class A>
void pixel_gap(const A* z, const A* maximum, A w, const A* r, int64_t n, A* gap, A* weight) {
  for (int64_t i = 0; i < n; ++i) {
    gap[i] += w * r[i] * (maximum[i] - z[i]);
    weight[i] += w * r[i];
  }
}

template <class A>
void pixel_log(const A* top, const A* rest, int64_t n, A* log_sum) {
  for (int64_t i = 0; i < n; ++i) log_sum[i] = ExpSum<A>{top[i], rest[i]}.log();
}

template <class A>
void pixel_label_gradient(const A* z, const A* maximum, const A* log_sum, const A* excess, int64_t n, A* label) {
  for (int64_t i = 0; i < n; ++i) {
    label[i] = RowStats<A>{maximum[i], log_sum[i]}.label_gradient(z[i], excess[i], label[i]);
  }
}

// a * softmax(z), or b where this class is the label, minus k * w * r. An ignored row's gradient is 0 even
// where its logits are not finite.
template <class A>
void pixel_gradient(const A* z, const PixelRows<A>& rows, A w, const A* r, int32_t this_class, int64_t n, A* out) {
  for (int64_t i = 0; i < n; ++i) {
    const A p = RowStats<A>{rows.maximum[i], rows.log_sum[i]}.probability(z[i]);
    const A gradient = (rows.label[i] == this_class ? rows.b[i] : rows.a[i] * p) - rows.k[i] * w * r[i];
    out[i] = rows.label[i] == kIgnored ? A(0) : gradient;
  }
}

template <class A>
void pixel_target_gradient(const A* z, const PixelRows<A>& rows, A w, int64_t n, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = rows.k[i] * w * ((rows.maximum[i] - z[i]) + rows.log_sum[i]);
}

template <class A>
constexpr SoftmaxFunctions<A> softmax_functions() {
  return {load<A>,       store<A>,           transform<A>,          chain<A>,     affine<A>,
          scale_by<A>,   row_max<A>,         row_sum_exp<A>,        row_gap<A>,   row_sum<A>,
          row_gradient<A>, row_gradient_minus<A>, row_target_gradient<A>, pixel_max<A>, pixel_sum_exp<A>,
          pixel_gap<A>,  pixel_log<A>, pixel_label_gradient<A>, pixel_gradient<A>,     pixel_target_gradient<A>};
}

}  // namespace

inline constexpr SoftmaxTable kSoftmax = {softmax_functions<float>(), softmax_functions<double>()};
