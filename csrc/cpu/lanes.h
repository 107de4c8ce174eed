// Sums. Included like common/numerics.h, after it.

namespace {

// Partial sums side by side: they vectorise, and keep the rounding of a block small.
constexpr int64_t kLanes = 64;

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

}  // namespace
