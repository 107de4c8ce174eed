// Blocks of the softmax family, compiled once per instruction set. "row" functions run along the classes of
// one row; "pixel" functions run along pixels, one class at a time.

#include "../common/numerics.h"
#include "../formulas/softmax.h"
#include "lanes.h"
#include "load_store.h"

namespace {

template <class A>
void transform(const A* x, int64_t n, A softcap, A temperature, A* z) {
  const LogitTransform<A> f{softcap, temperature};
  if (softcap > A(0)) {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) z[i] = f(x[i]);
  } else {
    FL_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) z[i] = x[i] / temperature;
  }
}

// gradient *= dz / dx
template <class A>
void chain(const A* z, int64_t n, A softcap, A temperature, A* gradient) {
  const LogitTransform<A> f{softcap, temperature};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) gradient[i] *= f.derivative(z[i]);
}

template <class A>
void affine(const A* x, int64_t n, A scale, A shift, A* out) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale + shift;
}

template <class A>
void scale_by(const A* x, const A* y, int64_t n, A* out) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * y[i];
}

// Below every maximum, and its exponential is 0.
template <class A>
constexpr A kNoLogit = -std::numeric_limits<A>::infinity();

// With fewer lanes, short rows were measured to take five times as long.
template <class A>
A row_max(const A* z, int64_t n) {
  const auto larger = [](A a, A b) { return b > a ? b : a; };
  A lanes[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lanes[j] = kNoLogit<A>;
  for_each_lanes<kLanes>(z, n, kNoLogit<A>, [&](const A* block) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = larger(lanes[j], block[j]);
  });
  return joined<kLanes>(lanes, larger);
}

template <class A>
SplitSum row_sum_exp(const A* z, A maximum, int64_t n) {
  return with_lanes(n, [&](auto count) {
    A tops[count] = {}, rests[count] = {};
    for_each_lanes<count>(z, n, kNoLogit<A>, [&](const A* block) {
      for (int64_t j = 0; j < count; ++j) add_exp(block[j], maximum, tops[j], rests[j]);
    });
    return SplitSum{sum_of_lanes<count>(tops), sum_of_lanes<count>(rests)};
  });
}

// Replaces z by exp(z - maximum), and sums that.
template <class A>
SplitSum row_exp(A* z, A maximum, int64_t n) {
  return with_lanes(n, [&](auto count) {
    A tops[count] = {}, rests[count] = {};
    map_lanes<count>(z, n, kNoLogit<A>, z, [&](const A* block, A* to) {
      for (int64_t j = 0; j < count; ++j) {
        const A is_top = block[j] == maximum ? A(1) : A(0), e = exp_nonpositive(block[j] - maximum);
        tops[j] += is_top;
        rests[j] += e - is_top;
        to[j] = e;
      }
    });
    return SplitSum{sum_of_lanes<count>(tops), sum_of_lanes<count>(rests)};
  });
}

// Also sums exp(z - maximum) (maximum - z), to which a logit of -inf adds nothing: no exponential of less
// than -800 is above 0, and 0 times infinity would be NaN.
template <class A>
ExpSums row_exp_sums(const A* z, A maximum, int64_t n) {
  A tops[kLanes] = {}, rests[kLanes] = {}, moments[kLanes] = {};
  for_each_lanes<kLanes>(z, n, kNoLogit<A>, [&](const A* block) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const A below = maximum - block[j], e = exp_nonpositive(-below);
      const A is_top = block[j] == maximum ? A(1) : A(0);
      tops[j] += is_top;
      rests[j] += e - is_top;
      moments[j] += e * (below > A(800) ? A(800) : below);
    }
  });
  return {sum_of_lanes<kLanes>(tops) + sum_of_lanes<kLanes>(rests), sum_of_lanes<kLanes>(moments)};
}

// The first place of a value, or n.
template <class A>
int64_t row_find(const A* z, A value, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    int found = 0;
    for (int64_t j = 0; j < kLanes; ++j) found |= z[i + j] == value;
    if (found) break;
  }
  while (i < n && !(z[i] == value)) ++i;
  return i;
}

// sum of w * (maximum - z)
template <class A>
double row_gap(const A* z, const A* w, A maximum, int64_t n) {
  A lanes[kLanes] = {};
  const auto add = [&](const A* logits, const A* weights) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += weights[j] * (maximum - logits[j]);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(z + i, w + i);
  if (i < n) {
    alignas(64) A last[kLanes], weights[kLanes];
    fill_up<kLanes>(z + i, n - i, maximum, last);
    fill_up<kLanes>(w + i, n - i, A(0), weights);
    add(last, weights);
  }
  return sum_of_lanes<kLanes>(lanes);
}

// a * softmax(z)
template <class A>
void row_gradient(const A* z, A maximum, A log_sum, A a, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  map_lanes<kFewLanes>(z, n, kNoLogit<A>, out, [&](const A* block, A* to) {
    FL_ELEMENTWISE
    for (int64_t j = 0; j < kFewLanes; ++j) to[j] = a * stats.probability(block[j]);
  });
}

// a * softmax(z) - k * r
template <class A>
void row_gradient_minus(const A* z, A maximum, A log_sum, A a, A k, const A* r, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = a * stats.probability(z[i]) - k * r[i];
}

// p (a + e log p)
template <class A>
void row_entropy_gradient(const A* z, A maximum, A log_sum, A a, A e, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    const A p = stats.probability(z[i]);
    out[i] = p > A(0) ? p * (a - e * stats.minus_log_probability(z[i])) : a * p;
  }
}

// out -= k * f
template <class A>
void subtract(const A* f, A k, int64_t n, A* out) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] -= k * f[i];
}

// k * w * (log-sum-exp - z)
template <class A>
void row_target_gradient(const A* z, A maximum, A log_sum, A k, const A* w, int64_t n, A* out) {
  const RowStats<A> stats{maximum, log_sum};
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) out[i] = k * w[i] * stats.minus_log_probability(z[i]);
}

template <class A>
void pixel_max(const A* z, int64_t n, A* maximum) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) maximum[i] = z[i] > maximum[i] ? z[i] : maximum[i];
}

template <class A>
void pixel_sum_exp(const A* z, const A* maximum, int64_t n, A* top, A* rest) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    add_exp(z[i], maximum[i], top[i], rest[i]);
  }
}

// gap += w * r * (maximum - z), weight += w * r
template <class A>
void pixel_gap(const A* z, const A* maximum, A w, const A* r, int64_t n, A* gap, A* weight) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    gap[i] += w * r[i] * (maximum[i] - z[i]);
    weight[i] += w * r[i];
  }
}

template <class A>
void log_sums(const A* top, const A* rest, int64_t n, A* log_sum) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) log_sum[i] = log_of_sum(top[i], rest[i]);
}

template <class A>
void label_gradients(const A* z, const A* maximum, const A* log_sum, const A* excess, int64_t n, A* label) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    label[i] = RowStats<A>{maximum[i], log_sum[i]}.label_gradient(z[i], excess[i], label[i]);
  }
}

// a * softmax(z), or b where this class is the label, minus k * w * r. An ignored row's gradient is 0 even
// where its logits are not finite.
template <class A>
void pixel_gradient(const A* z, const PixelRows<A>& rows, A w, const A* r, int32_t this_class, int64_t n,
                    A* out) {
  const A *maximum = rows.maximum, *log_sum = rows.log_sum, *a = rows.a, *b = rows.b, *k = rows.k;
  const int32_t* label = rows.label;
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    const A p = RowStats<A>{maximum[i], log_sum[i]}.probability(z[i]);
    const A gradient = (label[i] == this_class ? b[i] : a[i] * p) - k[i] * w * r[i];
    out[i] = label[i] == kIgnored ? A(0) : gradient;
  }
}

template <class A>
void pixel_target_gradient(const A* z, const PixelRows<A>& rows, A w, int64_t n, A* out) {
  const A *maximum = rows.maximum, *log_sum = rows.log_sum, *k = rows.k;
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i)
    out[i] = k[i] * w * RowStats<A>{maximum[i], log_sum[i]}.minus_log_probability(z[i]);
}

template <class A>
constexpr SoftmaxFunctions<A> softmax_functions() {
  return {load<A>,
          store<A>,
          stream<A>,
          transpose<A>,
          transform<A>,
          chain<A>,
          affine<A>,
          scale_by<A>,
          row_max<A>,
          row_sum_exp<A>,
          row_exp<A>,
          row_exp_sums<A>,
          row_find<A>,
          row_gap<A>,
          row_sum<A>,
          row_gradient<A>,
          row_gradient_minus<A>,
          row_entropy_gradient<A>,
          subtract<A>,
          row_target_gradient<A>,
          pixel_max<A>,
          pixel_sum_exp<A>,
          pixel_gap<A>,
          log_sums<A>,
          label_gradients<A>,
          pixel_gradient<A>,
          pixel_target_gradient<A>};
}

}  // namespace

inline constexpr SoftmaxTable kSoftmax = {softmax_functions<float>(), softmax_functions<double>()};
