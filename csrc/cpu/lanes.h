// Reductions along memory. Included like common/numerics.h, after it.

namespace {

// Partial results side by side: they vectorise, and keep the rounding of a block small.
constexpr int64_t kLanes = 64;
// A short row takes fewer, of which less is left over and which are soon joined.
constexpr int64_t kFewLanes = 16, kShort = 256;

// Calls body(the number of lanes that is best for n numbers), a constant.
template <class Body>
FL_INLINE auto with_lanes(int64_t n, const Body& body) {
  return n < kShort ? body(std::integral_constant<int64_t, kFewLanes>())
                    : body(std::integral_constant<int64_t, kLanes>());
}

// Fewer numbers than lanes, and a filling that changes no result.
template <int64_t kCount, class A>
FL_INLINE void fill_up(const A* x, int64_t n, A filling, A* lanes) {
  for (int64_t j = 0; j < kCount; ++j) lanes[j] = j < n ? x[j] : filling;
}

// Calls body(kCount numbers) until it has seen all of them.
template <int64_t kCount, class A, class Body>
FL_INLINE void for_each_lanes(const A* x, int64_t n, A filling, const Body& body) {
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) body(x + i);
  if (i == n) return;
  alignas(64) A last[kCount];
  fill_up<kCount>(x + i, n - i, filling, last);
  body(last);
}

// Calls body(kCount numbers, where their results go), which may be in their place.
template <int64_t kCount, class A, class Body>
FL_INLINE void map_lanes(const A* x, int64_t n, A filling, A* out, const Body& body) {
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) body(x + i, out + i);
  if (i == n) return;
  alignas(64) A last[kCount];
  fill_up<kCount>(x + i, n - i, filling, last);
  body(last, last);
  __builtin_memcpy(out + i, last, static_cast<size_t>(n - i) * sizeof(A));
}

// Halves are joined until one number is left.
template <int64_t kCount, class A, class Join>
FL_INLINE A joined(A* lanes, const Join& join) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    constexpr int64_t half = kCount / 2;
    for (int64_t j = 0; j < half; ++j) lanes[j] = join(lanes[j], lanes[j + half]);
    return joined<half>(lanes, join);
  }
}

template <int64_t kCount, class A>
FL_INLINE double sum_of_lanes(const A* lanes) {
  alignas(64) double wide[kCount];
  for (int64_t j = 0; j < kCount; ++j) wide[j] = static_cast<double>(lanes[j]);
  return joined<kCount>(wide, [](double a, double b) { return a + b; });
}

// Lane is what a lane adds up in.
template <class Lane, class A>
FL_INLINE double row_sum_in(const A* x, int64_t n) {
  return with_lanes(n, [&](auto count) {
    Lane lanes[count] = {};
    for_each_lanes<count>(x, n, A(0), [&](const A* block) {
      for (int64_t j = 0; j < count; ++j) lanes[j] += static_cast<Lane>(block[j]);
    });
    return sum_of_lanes<count>(lanes);
  });
}

template <class A>
double row_sum(const A* x, int64_t n) {
  return row_sum_in<A>(x, n);
}

}  // namespace
