// Elementwise operations of fused losses, named as torch names them; what torch gives for NaN and infinity,
// they give. Included like common/numerics.h, after wide.h.

struct bfloat16 {
  uint16_t pattern;
};
struct half {
  uint16_t pattern;
};

// What is computed with: float for everything narrower, otherwise the stored type itself.
template <class T>
FL_INLINE T widen(T x) {
  return x;
}
FL_INLINE float widen(bfloat16 x) { return from_bfloat16(x.pattern); }
FL_INLINE float widen(half x) { return from_half(x.pattern); }

template <class To, class From>
FL_INLINE void narrow(From x, To& out) {
  out = static_cast<To>(x);
}
template <class From>
FL_INLINE void narrow(From x, bfloat16& out) {
  out.pattern = to_bfloat16(static_cast<float>(x));
}
template <class From>
FL_INLINE void narrow(From x, half& out) {
  out.pattern = to_half(static_cast<float>(x));
}

template <class Low, class A>
FL_INLINE float rounded_(A x) {
  Low low;
  narrow(x, low);
  return widen(low);
}

// NaN is looked for in b, as a may be a maximum itself: whether that is NaN is a choice between truth values,
// which keeps a loop from being vectorised.
template <class A>
FL_INLINE A maximum_(A a, A b) {
  return !(a <= b) && b == b ? a : b;
}
template <class A>
FL_INLINE A minimum_(A a, A b) {
  return !(a >= b) && b == b ? a : b;
}
template <class A>
FL_INLINE A fmax_(A a, A b) {
  return a > b || b != b ? a : b;
}
template <class A>
FL_INLINE A fmin_(A a, A b) {
  return a < b || b != b ? a : b;
}
template <class A>
FL_INLINE A sign_(A x) {
  return static_cast<A>(x > A(0)) - static_cast<A>(x < A(0));
}
template <class A>
FL_INLINE bool isnan_(A x) {
  return x != x;
}
template <class A>
FL_INLINE bool isinf_(A x) {
  return abs_(x) == std::numeric_limits<A>::infinity();
}

FL_INLINE int64_t abs_(int64_t x) { return x < 0 ? -x : x; }
FL_INLINE int32_t abs_(int32_t x) { return x < 0 ? -x : x; }
FL_INLINE int16_t abs_(int16_t x) { return x < 0 ? -x : x; }
FL_INLINE int8_t abs_(int8_t x) { return x < 0 ? -x : x; }
FL_INLINE uint8_t abs_(uint8_t x) { return x; }

// Functions of double are the standard library's; those of float are in numerics.h and wide.h.
#define FL_STANDARD(name) \
  FL_INLINE double name##_(double x) { return std::name(x); }
FL_STANDARD(tan)
FL_STANDARD(sinh)
FL_STANDARD(cosh)
FL_STANDARD(asin)
FL_STANDARD(acos)
FL_STANDARD(atan)
FL_STANDARD(asinh)
FL_STANDARD(acosh)
FL_STANDARD(atanh)
FL_STANDARD(sin)
FL_STANDARD(cos)
FL_STANDARD(erf)
FL_STANDARD(erfc)
FL_STANDARD(exp2)
FL_STANDARD(log2)
FL_STANDARD(log10)
#undef FL_STANDARD

FL_INLINE float floor_(float x) { return __builtin_floorf(x); }
FL_INLINE double floor_(double x) { return __builtin_floor(x); }
FL_INLINE float ceil_(float x) { return __builtin_ceilf(x); }
FL_INLINE double ceil_(double x) { return __builtin_ceil(x); }
FL_INLINE float trunc_(float x) { return __builtin_truncf(x); }
FL_INLINE double trunc_(double x) { return __builtin_trunc(x); }
FL_INLINE float round_(float x) { return __builtin_nearbyintf(x); }
FL_INLINE double round_(double x) { return __builtin_nearbyint(x); }
// Chooses alike for all lanes: a choice that no lane has a say in keeps a loop from being vectorised.
template <class A>
class Choice {
 public:
  FL_INLINE explicit Choice(bool first) : first_(first ? ~Bits(0) : Bits(0)) {}
  FL_INLINE A of(A a, A b) const { return bits<A>((bits<Bits>(a) & first_) | (bits<Bits>(b) & ~first_)); }

 private:
  using Bits = std::conditional_t<
      sizeof(A) == 8, uint64_t,
      std::conditional_t<sizeof(A) == 4, uint32_t, std::conditional_t<sizeof(A) == 2, uint16_t, uint8_t>>>;
  Bits first_;
};

// Divides lanes by what is the same for all of them, in a few operations that are many times as fast as a
// division: by a reciprocal in two parts, of a divisor that is moved to where neither over- nor underflows.
// By powers of two and where it is a whole number, the quotient is exact; else a last digit may differ, which
// is rare.
template <class A>
class Divisor {
 public:
  FL_INLINE explicit Divisor(A divisor) {
    using limits = std::numeric_limits<A>;
    const A big = static_cast<A>(1ull << 60), size = abs_(divisor);
    before_ = size < A(1) / big ? big : A(1);
    after_ = size > big ? A(1) / big : A(1);
    const A moved = divisor * before_ * after_;
    // Too small, so that both parts have the divisor's sign: infinity meets no other one.
    high_ = (A(1) - limits::epsilon()) / moved;
    low_ = size > 0 && size <= limits::max() ? fma_(-high_, moved, A(1)) / moved : high_;
  }
  FL_INLINE A quotient(A x) const {
    const A moved = x * before_;
    return fma_(moved, high_, moved * low_) * after_;
  }

 private:
  A before_, after_, high_, low_;
};

template <class A>
FL_INLINE A rsqrt_(A x) {
  return A(1) / sqrt_(x);
}
template <class A>
FL_INLINE A reciprocal_(A x) {
  return A(1) / x;
}
template <class A>
FL_INLINE A exp_nonpositive_(A x) {
  return exp_nonpositive(x);
}
template <class A>
FL_INLINE A sigmoid_(A x) {
  return A(1) / (A(1) + exp_(-x));
}

FL_INLINE double pow_(double x, double y) { return std::pow(x, y); }
FL_INLINE int64_t pow_(int64_t x, int64_t y) {
  if (y < 0) return x == 1 ? 1 : x == -1 ? (y % 2 == 0 ? 1 : -1) : 0;
  int64_t result = 1;
  for (; y > 0; y >>= 1, x *= x) {
    if (y & 1) result *= x;
  }
  return result;
}
FL_INLINE double atan2_(double y, double x) { return std::atan2(y, x); }
FL_INLINE double hypot_(double x, double y) { return std::hypot(x, y); }
FL_INLINE float copysign_(float x, float y) { return __builtin_copysignf(x, y); }
FL_INLINE double copysign_(double x, double y) { return __builtin_copysign(x, y); }
template <class A>
FL_INLINE A fmod_(A x, A y) {
  if constexpr (std::numeric_limits<A>::is_integer) {
    return y == 0 ? A(0) : static_cast<A>(x % y);
  } else {
    return std::fmod(x, y);
  }
}
// The sign of the divisor, as in Python.
template <class A>
FL_INLINE A remainder_(A x, A y) {
  const A rest = fmod_(x, y);
  return rest != A(0) && (rest < A(0)) != (y < A(0)) ? static_cast<A>(rest + y) : rest;
}
template <class A>
FL_INLINE A floor_divide_(A x, A y) {
  if constexpr (std::numeric_limits<A>::is_integer) {
    if (y == 0) return A(0);
    const A quotient = static_cast<A>(x / y);
    return x % y != 0 && (x < 0) != (y < 0) ? static_cast<A>(quotient - 1) : quotient;
  } else {
    if (y == A(0)) return x / y;
    const A rest = std::fmod(x, y);
    const A quotient = (x - rest) / y - (rest != A(0) && (rest < A(0)) != (y < A(0)) ? A(1) : A(0));
    const A below = floor_(quotient);
    return quotient == A(0) ? copysign_(A(0), x / y) : quotient - below > A(0.5) ? below + A(1) : below;
  }
}
FL_INLINE double lgamma_(double x) {
  int sign;
  return lgamma_r(x, &sign);
}

// The recurrence moves x above 10, where the asymptotic series holds; below 0, the reflection formula.
inline double digamma_(double x) {
  const double pi = 3.14159265358979323846;
  if (x == 0) return __builtin_copysign(std::numeric_limits<double>::infinity(), -x);
  double result = 0;
  if (x < 0) {
    if (x == std::floor(x)) return std::numeric_limits<double>::quiet_NaN();
    result = -pi / std::tan(pi * (x - std::floor(x)));
    x = 1 - x;
  }
  for (; x < 10; x += 1) result -= 1 / x;
  const double z = 1 / (x * x);
  double p = 1.0 / 12;
  p = p * z - 691.0 / 32760;
  p = p * z + 1.0 / 132;
  p = p * z - 1.0 / 240;
  p = p * z + 1.0 / 252;
  p = p * z - 1.0 / 120;
  p = p * z + 1.0 / 12;
  return result + std::log(x) - 0.5 / x - p * z;
}

// Giles' approximation, then two Newton steps on erf.
inline double erfinv_(double y) {
  if (!(abs_(y) < 1))
    return abs_(y) == 1 ? y * std::numeric_limits<double>::infinity()
                        : std::numeric_limits<double>::quiet_NaN();
  double w = -std::log((1 - y) * (1 + y)), x;
  if (w < 5) {
    w -= 2.5;
    x = 2.81022636e-08;
    for (const double c : {3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503,
                           -0.00417768164, 0.246640727, 1.50140941})
      x = c + x * w;
  } else {
    w = std::sqrt(w) - 3;
    x = -0.000200214257;
    for (const double c : {0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613,
                           0.00943887047, 1.00167406, 2.83297682})
      x = c + x * w;
  }
  x *= y;
  for (int step = 0; step < 2; ++step) x -= (std::erf(x) - y) / (1.12837916709551257390 * std::exp(-x * x));
  return x;
}
FL_INLINE float erfinv_(float x) { return static_cast<float>(erfinv_(static_cast<double>(x))); }
