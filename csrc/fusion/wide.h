// Functions of float that are computed in double: polynomials short enough for float, of which no step then
// loses anything. They vectorise, which those of the standard library do not. Included like
// common/numerics.h, after it.

// first + z * (second + z * (...))
template <class... Rest>
FL_INLINE double polynomial(double z, double first, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return first;
  } else {
    return fma_(polynomial(z, rest...), z, first);
  }
}

// x = 2^exponent m with m in [sqrt(1/2), sqrt(2)), and s = (m - 1) / (m + 1), so that log m = 2 atanh s. The
// exponent becomes a number by the trick of exp_.
struct Split {
  double exponent, s;
};
FL_INLINE Split split(double x) {
  const uint64_t u = bits<uint64_t>(x), shifted = u - 0x3fe6a09e667f3bcdull + 0x3ff0000000000000ull;
  const double exponent = bits<double>((shifted >> 52) | 0x4330000000000000ull) - 4503599627371519.0;
  const double m = bits<double>((shifted & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull);
  return {exponent, (m - 1) / (m + 1)};
}
// What a logarithm is where there is nothing to split.
FL_INLINE double log_or_special(double x, double result) {
  const double infinity = std::numeric_limits<double>::infinity();
  result = x == infinity ? infinity : result;
  result = x == 0 ? -infinity : result;
  return x >= 0 ? result : std::numeric_limits<double>::quiet_NaN();
}
FL_INLINE double log_wide(double x) {
  const Split split_x = split(x);
  const double s = split_x.s, z = s * s;
  const double series =
      polynomial(z, 2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17);
  return log_or_special(x, fma_(split_x.exponent, 0.693147180559945309, s * series));
}

// To about 1e-11, within the range of float; beyond it 0 or infinity once it is rounded to one. NaN stays
// NaN.
FL_INLINE double exp_wide(double x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -200 ? -200 : x;
  x = x > 200 ? 200 : x;
  const double shifted = x * 1.44269504088896341 + magic, whole = shifted - magic;
  const double r = fma_(-whole, 0.693147180559945309, x);
  const double p = polynomial(r, 1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                              1.0 / 40320, 1.0 / 362880);
  return p * bits<double>((bits<uint64_t>(shifted) + 1023) << 52);
}

FL_INLINE float log2_(float x) {
  return static_cast<float>(log_wide(static_cast<double>(x)) * 1.44269504088896341);
}
FL_INLINE float log10_(float x) {
  return static_cast<float>(log_wide(static_cast<double>(x)) * 0.434294481903251828);
}

// Both short: of the exponent of two, 2^-33 of its largest value is enough.
FL_INLINE double log2_short(double x) {
  const Split split_x = split(x);
  const double s = split_x.s, z = s * s;
  const double series = polynomial(z, 2.885390081789987, 0.9617966734518019, 0.5770835659712126,
                                   0.4116737679175649, 0.34071201320047784);
  return log_or_special(x, fma_(s, series, split_x.exponent));
}
FL_INLINE double exp2_short(double x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  x = x < -300 ? -300 : x;
  x = x > 300 ? 300 : x;
  const double shifted = x + magic, r = x - (shifted - magic);
  const double p =
      polynomial(r, 0.9999999999595617, 0.6931471805568319, 0.24022651213498386, 0.0555041090632735,
                 0.009618025613296754, 0.0013333478472582123, 0.0001546972921861718, 1.5303700956149545e-05);
  return p * bits<double>((bits<uint64_t>(shifted) + 1023) << 52);
}
FL_INLINE float exp2_(float x) { return static_cast<float>(exp2_short(static_cast<double>(x))); }
FL_INLINE float pow_(float x, float y) {
  const double wide_y = static_cast<double>(y);
  const double size = exp2_short(wide_y * log2_short(abs_(static_cast<double>(x))));
  const bool is_whole = __builtin_truncf(y) == y;
  const bool is_odd = is_whole && __builtin_truncf(y * 0.5f) != y * 0.5f;
  float result = static_cast<float>(size);
  result = x < 0 && !is_whole && x >= std::numeric_limits<float>::lowest()
               ? std::numeric_limits<float>::quiet_NaN()
               : result;
  result = is_odd ? __builtin_copysignf(result, x) : result;
  const bool is_one = y == 0 || x == 1 || (x == -1 && abs_(y) == std::numeric_limits<float>::infinity());
  return is_one ? 1.f : result;
}

FL_INLINE float sinh_(float x) {
  const double wide = static_cast<double>(x), z = wide * wide, e = exp_wide(wide);
  const double near = wide * polynomial(z, 1.0, 1.0 / 6, 1.0 / 120, 1.0 / 5040, 1.0 / 362880, 1.0 / 39916800);
  return static_cast<float>(z < 1 ? near : 0.5 * (e - 1 / e));
}
FL_INLINE float cosh_(float x) {
  const double e = exp_wide(static_cast<double>(x));
  return static_cast<float>(0.5 * (e + 1 / e));
}
FL_INLINE float asinh_(float x) {
  const double wide = abs_(static_cast<double>(x)), z = wide * wide;
  const double result = wide < 1e-3 ? wide - wide * z / 6 : log_wide(wide + sqrt_(z + 1));
  return __builtin_copysignf(static_cast<float>(result), x);
}
FL_INLINE float acosh_(float x) {
  const double wide = static_cast<double>(x);
  const double result = log_wide(wide + sqrt_(wide * wide - 1));
  return x < 1 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(result);
}
FL_INLINE float atanh_(float x) {
  const double wide = static_cast<double>(x);
  const double far = 0.5 * log_wide((1 + wide) / (1 - wide));
  return static_cast<float>(abs_(wide) < 1e-3 ? wide + wide * wide * wide / 3 : far);
}

// How far x is from a multiple of pi / 2, and which one: the first two of its three parts are short enough
// for exact products, as long as that is below 2^20.
struct Quadrant {
  double r;
  int64_t number;
};
FL_INLINE Quadrant quadrant(double x) {
  const double magic = 6755399441055744.0;
  const double shifted = x * 0.636619772367581343 + magic, whole = shifted - magic;
  const double first = fma_(-whole, 1.57079632673412561417, x),
               second = fma_(-whole, 6.07710050630396597660e-11, first);
  const double r = fma_(-whole, 2.02226624879595063154e-21, second);
  return {r, bits<int64_t>(shifted)};
}
FL_INLINE double sin_near(double r) {
  return r * polynomial(r * r, 1.0, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800);
}
FL_INLINE double cos_near(double r) {
  return polynomial(r * r, 1.0, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800);
}
FL_INLINE double sin_wide(double x) {
  const Quadrant q = quadrant(x);
  const double value = (q.number & 1) != 0 ? cos_near(q.r) : sin_near(q.r);
  return (q.number & 2) != 0 ? -value : value;
}
FL_INLINE double cos_wide(double x) {
  const Quadrant q = quadrant(x);
  const double value = (q.number & 1) != 0 ? -sin_near(q.r) : cos_near(q.r);
  return (q.number & 2) != 0 ? -value : value;
}
FL_INLINE float sin_(float x) { return static_cast<float>(sin_wide(static_cast<double>(x))); }
FL_INLINE float cos_(float x) { return static_cast<float>(cos_wide(static_cast<double>(x))); }
FL_INLINE float tan_(float x) {
  const Quadrant q = quadrant(static_cast<double>(x));
  const double s = sin_near(q.r), c = cos_near(q.r);
  return static_cast<float>((q.number & 1) != 0 ? -c / s : s / c);
}

// Minimax on [0, 1], beyond which atan(x) = pi / 2 - atan(1 / x).
FL_INLINE double atan_wide(double x) {
  const double size = abs_(x), t = size > 1 ? 1 / size : size;
  const double near =
      t * polynomial(t * t, 0.9999999999412197, -0.33333331570795316, 0.199999120348656, -0.14283980502804752,
                     0.11093239216609235, -0.08980229584658192, 0.07245690614367263, -0.054278588884535274,
                     0.03420898396605532, -0.01611121354155708, 0.004850736203092524, -0.0006847564087992887);
  return __builtin_copysign(size > 1 ? 1.57079632679489662 - near : near, x);
}
FL_INLINE float atan_(float x) { return static_cast<float>(atan_wide(static_cast<double>(x))); }
FL_INLINE float atan2_(float y, float x) {
  const double wide_y = static_cast<double>(y), wide_x = static_cast<double>(x), pi = 3.14159265358979324;
  const bool are_infinite = abs_(y) == std::numeric_limits<float>::infinity() && abs_(x) == abs_(y);
  double angle = are_infinite ? pi / 4 : y == 0 ? 0.0 : atan_wide(abs_(wide_y) / abs_(wide_x));
  angle = __builtin_copysignf(1.f, x) < 0 ? pi - angle : angle;
  return x != x || y != y ? x + y : __builtin_copysignf(static_cast<float>(angle), y);
}
// Minimax on [0, 1/2], beyond which asin(x) = pi / 2 - 2 asin(sqrt((1 - x) / 2)).
FL_INLINE double asin_wide(double x) {
  const double size = abs_(x);
  const double z = size > 0.5 ? 0.5 * (1 - size) : size * size;
  const double root = size > 0.5 ? sqrt_(z) : size;
  const double near = root * polynomial(z, 0.9999999999849042, 0.16666667421591044, 0.07499938203908041,
                                        0.044662034380746785, 0.030092222553238866, 0.024711464784287325,
                                        0.007224055260004716, 0.034951294444583836);
  return __builtin_copysign(size > 0.5 ? 1.57079632679489662 - 2 * near : near, x);
}
FL_INLINE float asin_(float x) { return static_cast<float>(asin_wide(static_cast<double>(x))); }
// Near 1, where pi / 2 - asin(x) would cancel, it is twice the asin of a root.
FL_INLINE float acos_(float x) {
  const double wide = static_cast<double>(x), half = asin_wide(sqrt_(0.5 * (1 - abs_(wide))));
  const double far = wide < 0 ? 3.14159265358979324 - 2 * half : 2 * half;
  return static_cast<float>(abs_(wide) > 0.5 ? far : 1.57079632679489662 - asin_wide(wide));
}
FL_INLINE float hypot_(float x, float y) {
  const double wide_x = static_cast<double>(x), wide_y = static_cast<double>(y);
  const float infinity = std::numeric_limits<float>::infinity();
  const float result = static_cast<float>(sqrt_(wide_x * wide_x + wide_y * wide_y));
  return abs_(x) == infinity || abs_(y) == infinity ? infinity : result;
}

// erfc(x) = t P(t) exp(-x^2) with t = 2 / (2 + x), for x >= 0.
FL_INLINE double erfc_far(double x) {
  const double t = 2 / (2 + x);
  const double p =
      polynomial(t, 0.28209431260501844, 0.2821133494475497, 0.24650792673700564, 0.17972037692718895,
                 0.05978990189895144, 0.11457275823577986, -0.4866986759461531, 1.0897691915268541,
                 -2.231609450047112, 3.162203738550451, -2.9138905792687835, 1.750014792327938,
                 -0.6682940249811616, 0.14832369923934854, -0.014617317249177109);
  return t * p * exp_wide(-x * x);
}
FL_INLINE float erf_(float x) {
  const double wide = static_cast<double>(x), size = abs_(wide);
  const double near =
      wide * polynomial(wide * wide, 1.128379167058022, -0.3761263843463519, 0.1128378197386832,
                        -0.026865400028267393, 0.005220945393857618, -0.0008482828282991926,
                        0.0001125694388359996, -9.641504760508386e-06);
  return static_cast<float>(size < 1 ? near : __builtin_copysign(1 - erfc_far(size), wide));
}
FL_INLINE float erfc_(float x) {
  const double wide = static_cast<double>(x), far = erfc_far(abs_(wide));
  return static_cast<float>(wide < 0 ? 2 - far : far);
}

// Stirling's series for x >= 8.
FL_INLINE double lgamma_far(double x) {
  const double z = 1 / (x * x);
  const double series =
      polynomial(z, 1.0 / 12, -1.0 / 360, 1.0 / 1260, -1.0 / 1680, 1.0 / 1188, -691.0 / 360360, 1.0 / 156) /
      x;
  return (x - 0.5) * log_wide(x) - x + 0.918938533204672742 + series;
}
// For x >= 0. Below 8, from x + 8 and the product of what lies between.
FL_INLINE double lgamma_positive(double x) {
  const double product = x * (x + 1) * (x + 2) * (x + 3) * (x + 4) * (x + 5) * (x + 6) * (x + 7);
  const double up = lgamma_far(x < 8 ? x + 8 : x);
  const double result = x < 8 ? up - log_wide(product) : up;
  return x == 1 || x == 2 ? 0 : x == std::numeric_limits<double>::infinity() ? x : result;
}
// Below 0, from 1 - x.
FL_INLINE float lgamma_(float value) {
  const double x = static_cast<double>(value), above = lgamma_positive(x < 0 ? 1 - x : x);
  const double half_turns = x * 2 + 6755399441055744.0;  // an integer number of half turns
  const double angle = (x - 0.5 * (half_turns - 6755399441055744.0)) * 3.14159265358979324;
  const double sine = (bits<int64_t>(half_turns) & 1) != 0 ? cos_near(angle) : sin_near(angle);
  const double reflected = 1.14472988584940017 - log_wide(abs_(sine)) - above;
  const double infinity = std::numeric_limits<double>::infinity();
  return static_cast<float>(x == -infinity ? infinity : x < 0 ? reflected : above);
}
// For x > 0, with the sum of 1 / (x + k) for k < 8 as one fraction below 8.
FL_INLINE double digamma_positive(double x) {
  double above = 1, below = x;
#pragma GCC unroll 8
  for (int k = 1; k < 8; ++k) above = above * (x + k) + below, below = below * (x + k);
  const double far = x < 8 ? x + 8 : x, z = 1 / (far * far);
  const double series =
      z * polynomial(z, 1.0 / 12, -1.0 / 120, 1.0 / 252, -1.0 / 240, 1.0 / 132, -691.0 / 32760);
  const double result = log_wide(far) - 0.5 / far - series - (x < 8 ? above / below : 0.0);
  return x == std::numeric_limits<double>::infinity() ? x : result;
}
FL_INLINE float digamma_(float value) {
  const double x = static_cast<double>(value), above = digamma_positive(x < 0 ? 1 - x : x);
  const double whole = (x + 6755399441055744.0) - 6755399441055744.0;
  const double angle = (x - whole) * 3.14159265358979324;
  const double reflected = above - 3.14159265358979324 * cos_wide(angle) / sin_wide(angle);
  const double infinity = std::numeric_limits<double>::infinity();
  const double result = x < 0 ? x == whole ? std::numeric_limits<double>::quiet_NaN() : reflected : above;
  return static_cast<float>(x == 0 ? __builtin_copysign(infinity, -x) : result);
}
