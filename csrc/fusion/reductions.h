// What reduces: each has the type it accumulates in, where it starts, how two results join, and how a block
// is reduced. Included like common/numerics.h, after functions.h.

// Partial results side by side: they vectorise, and keep the rounding of a block small.
constexpr int64_t kLanes = 64;

template <class A>
using Wide = std::conditional_t<std::is_floating_point_v<A>, double, int64_t>;

template <class A>
struct Sum {
  using Result = Wide<A>;
  static constexpr Result start() { return 0; }
  FL_INLINE static Result join(Result a, Result b) { return a + b; }
  FL_APART static Result block(const A* x, int64_t n) {
    alignas(64) A lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] = static_cast<A>(lanes[j] + x[i + j]);
    }
    for (int64_t j = 0; i < n; ++i, ++j) lanes[j] = static_cast<A>(lanes[j] + x[i]);
    Result total[8] = {};
    for (int64_t j = 0; j < kLanes; j += 8) {
      for (int64_t k = 0; k < 8; ++k) total[k] += lanes[j + k];
    }
    return ((total[0] + total[4]) + (total[1] + total[5])) + ((total[2] + total[6]) + (total[3] + total[7]));
  }
};

// What lanes add up by themselves: so many terms in fp32, whose rounding is that of a block, then their sum.
constexpr int64_t kFew = 8;

// After so many rows, of which the last few are still to be added to the sums of those before.
FL_APART inline void take(float* few, int64_t n, double* sums, int64_t rows) {
  FL_ELEMENTWISE
  for (int64_t i = 0, count = whole(n); i < count; ++i) {
    sums[i] = few[i] + (rows == kFew ? 0 : sums[i]);
    few[i] = 0;
  }
}
FL_APART inline void take_last(float* few, int64_t n, const double* sums, int64_t rows) {
  if (rows < kFew) return;
  FL_ELEMENTWISE
  for (int64_t i = 0, count = whole(n); i < count; ++i) few[i] = static_cast<float>(sums[i] + few[i]);
}

// How many of a block of truth values hold.
template <class A>
struct Count {
  using Result = int64_t;
  static constexpr Result start() { return 0; }
  FL_INLINE static Result join(Result a, Result b) { return a + b; }
  FL_APART static Result block(const A* x, int64_t n) {
    Result total = 0;
    for (int64_t i = 0; i < n; ++i) total += x[i];
    return total;
  }
};

template <class A>
struct Product {
  using Result = Wide<A>;
  static constexpr Result start() { return 1; }
  FL_INLINE static Result join(Result a, Result b) { return a * b; }
  FL_APART static Result block(const A* x, int64_t n) {
    Result total = 1;
    for (int64_t i = 0; i < n; ++i) total *= x[i];
    return total;
  }
};

template <class A, A (*better)(A, A), bool largest>
struct Extremum {
  using Result = A;
  static constexpr A start() {
    using limits = std::numeric_limits<A>;
    if constexpr (limits::has_infinity) return largest ? -limits::infinity() : limits::infinity();
    return largest ? limits::lowest() : limits::max();
  }
  FL_INLINE static A join(A a, A b) { return better(b, a); }
  FL_APART static A block(const A* x, int64_t n) {
    alignas(64) A lanes[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = start();
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lanes[j] = better(x[i + j], lanes[j]);
    }
    for (int64_t j = 0; i < n; ++i, ++j) lanes[j] = better(x[i], lanes[j]);
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) lanes[j] = better(lanes[j + half], lanes[j]);
    }
    return lanes[0];
  }
};
template <class A>
struct Max : Extremum<A, maximum_<A>, true> {};
template <class A>
struct Min : Extremum<A, minimum_<A>, false> {};

template <class A>
struct Any {
  using Result = A;
  static constexpr A start() { return 0; }
  FL_INLINE static A join(A a, A b) { return a | b; }
  FL_APART static A block(const A* x, int64_t n) {
    A found = 0;
    for (int64_t i = 0; i < n; ++i) found |= x[i];
    return found;
  }
};
template <class A>
struct All {
  using Result = A;
  static constexpr A start() { return 1; }
  FL_INLINE static A join(A a, A b) { return a & b; }
  FL_APART static A block(const A* x, int64_t n) {
    A kept = 1;
    for (int64_t i = 0; i < n; ++i) kept &= x[i];
    return kept;
  }
};

// A value and its place; a NaN wins, and among equals the first.
template <class A>
struct Place {
  A value;
  int64_t index;
};
template <class A, bool largest>
struct ArgExtremum {
  using Result = Place<A>;
  static Result start() { return {Max<A>::start(), -1}; }
  FL_INLINE static Result join(Result a, Result b) {
    if (a.index < 0 || b.index < 0) return a.index < 0 ? b : a;
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool better = a_nan != b_nan ? b_nan : largest ? b.value > a.value : b.value < a.value;
    const bool equal = a_nan ? b_nan : a.value == b.value;
    return better || (equal && b.index < a.index) ? b : a;
  }
  FL_APART static Result block(const A* x, int64_t n, const int64_t* index) {
    Result best = start();
    for (int64_t i = 0; i < n; ++i) best = join(best, {x[i], index[i]});
    return best;
  }
};
template <class A>
struct ArgMax : ArgExtremum<A, true> {};
template <class A>
struct ArgMin : ArgExtremum<A, false> {};

// The sums up to each element of a block, on top of what came before; gives the last of them.
template <class How, class A>
FL_APART typename How::Result cumulate(const A* x, int64_t n, typename How::Result total, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(total = How::join(total, x[i]));
  return total;
}

// Takes in each element of a block at a place of its own.
template <class How, class A>
FL_APART void scatter(const A* x, const int64_t* places, int64_t n, typename How::Result* sums) {
  for (int64_t i = 0; i < n; ++i) sums[places[i]] = How::join(sums[places[i]], x[i]);
}
