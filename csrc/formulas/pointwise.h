// Value and derivatives of each pointwise loss for one element. Included like common/numerics.h, after it.
// x is the prediction, t the target, q the positive weight (1 where there is none).

template <class A>
struct Params {
  A a, b;
};

// The derivatives with respect to x and t.
template <class A>
struct Gradient {
  A input, target;
};

// The sign of x, 0 at 0, NaN for NaN.
template <class A>
FL_INLINE A sign_(A x) {
  return x > A(0) ? A(1) : x < A(0) ? A(-1) : x;
}

template <class A>
FL_INLINE Gradient<A> of_difference(A derivative) {
  return {derivative, -derivative};
}

struct MSE {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A>) {
    return (x - t) * (x - t);
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A>) {
    return of_difference(A(2) * (x - t));
  }
};

// NaN has a gradient of 0, as in torch.
struct L1 {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A>) {
    return abs_(x - t);
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A>) {
    const A d = x - t;
    return of_difference(d > A(0) ? A(1) : d < A(0) ? A(-1) : A(0));
  }
};

// a = beta
struct SmoothL1 {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A> p) {
    const A d = abs_(x - t);
    return d < p.a ? A(0.5) * d * d / p.a : d - A(0.5) * p.a;
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A> p) {
    const A d = x - t;
    return of_difference(abs_(d) < p.a ? d / p.a : sign_(d));
  }
};

// a = delta
struct Huber {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A> p) {
    const A d = abs_(x - t);
    return d <= p.a ? A(0.5) * d * d : p.a * (d - A(0.5) * p.a);
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A> p) {
    const A d = x - t;
    return of_difference(abs_(d) <= p.a ? d : p.a * sign_(d));
  }
};

struct LogCosh {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A>) {
    const A d = abs_(x - t);
    // Near 0 the subtraction of log 2 would cancel: log cosh d = -log(1 - tanh(d)^2) / 2.
    const A slope = tanh_(d);
    const A near = A(-0.5) * log1p_(-slope * slope);
    const A far = d + log1p_unit(exp_nonpositive(A(-2) * d)) - A(0.693147180559945309);
    return d < A(0.5) ? near : far;
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A>) {
    return of_difference(tanh_(x - t));
  }
};

// a = eps
struct Charbonnier {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A> p) {
    return sqrt_((x - t) * (x - t) + p.a);
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A> p) {
    return of_difference((x - t) / sqrt_((x - t) * (x - t) + p.a));
  }
};

// Logarithms are bounded by -100, as torch does.
struct BCE {
  template <class A>
  FL_INLINE static A bounded(A log) {
    return log < A(-100) ? A(-100) : log;
  }
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A>) {
    return (t - A(1)) * bounded(log1p_(-x)) - t * bounded(log_(x));
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A>) {
    const A variance = (A(1) - x) * x;
    return {(x - t) / (variance < A(1e-12) ? A(1e-12) : variance), bounded(log1p_(-x)) - bounded(log_(x))};
  }
};

// Everything a logit's loss needs, from one exponential: 1 - sigmoid(x) is never formed by subtraction.
template <class A>
struct Logit {
  A probability, complement;   // sigmoid(x), sigmoid(-x)
  A softplus, softplus_minus;  // log(1 + exp(x)), log(1 + exp(-x))

  FL_INLINE explicit Logit(A x) {
    const A e = exp_nonpositive(-abs_(x));
    const A larger = A(1) / (A(1) + e), smaller = e * larger;
    probability = x >= A(0) ? larger : smaller;
    complement = x >= A(0) ? smaller : larger;
    const A shared = log1p_unit(e);
    softplus = shared + (x > A(0) ? x : A(0));
    softplus_minus = shared + (x < A(0) ? -x : A(0));
  }

  // Both terms are positive: nothing cancels, however confident the prediction.
  FL_INLINE A cross_entropy(A t, A q) const { return fma_(A(1) - t, softplus, q * t * softplus_minus); }
};

struct BCEWithLogits {
  template <class A>
  FL_INLINE static A value(A x, A t, A q, Params<A>) {
    return Logit<A>(x).cross_entropy(t, q);
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A q, Params<A>) {
    const Logit<A> l(x);
    return {(A(1) - t) * l.probability - q * t * l.complement, q * l.softplus_minus - l.softplus};
  }
};

// u^gamma, in general and for the gamma nearly everybody uses.
struct AnyGamma {
  template <class A>
  FL_INLINE static A power(A u, A gamma) {
    return gamma == A(0) ? A(1) : exp_(gamma * log_(u));
  }
  template <class A>
  FL_INLINE static A power_less_one(A u, A gamma) {
    return power(u, gamma - A(1));
  }
};
struct GammaTwo {
  template <class A>
  FL_INLINE static A power(A u, A) {
    return u * u;
  }
  template <class A>
  FL_INLINE static A power_less_one(A u, A) {
    return u;
  }
};

// a = alpha, negative for none; b = gamma
template <class Gamma>
struct Focal {
  template <class A>
  FL_INLINE static A alpha(A t, Params<A> p) {
    return p.a >= A(0) ? p.a * t + (A(1) - p.a) * (A(1) - t) : A(1);
  }
  template <class A>
  FL_INLINE static A miss(const Logit<A>& l, A t) {
    return l.probability * (A(1) - t) + l.complement * t;
  }
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A> p) {
    const Logit<A> l(x);
    return alpha(t, p) * Gamma::power(miss(l, t), p.b) * l.cross_entropy(t, A(1));
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A> p) {
    const Logit<A> l(x);
    const A cross_entropy = l.cross_entropy(t, A(1));
    const A u = miss(l, t), focus = Gamma::power(u, p.b), scale = alpha(t, p);
    const A variance = l.probability * l.complement;
    // variance / u tends to 1 where u underflows, which it only does for hard targets.
    const A ratio = u > A(0) ? variance / u : A(1);
    const A du = p.b * focus * ratio * cross_entropy;
    const A slope = p.b == A(0) ? A(0) : p.b * Gamma::power_less_one(u, p.b);
    const A dt = slope * (l.complement - l.probability) * cross_entropy;
    const A miss_gradient = l.probability * (A(1) - t) - l.complement * t;
    const A alpha_slope = p.a >= A(0) ? A(2) * p.a - A(1) : A(0);
    return {scale * (du * (A(1) - A(2) * t) + focus * miss_gradient),
            alpha_slope * focus * cross_entropy + scale * (dt - focus * x)};
  }
};

using SigmoidFocal = Focal<AnyGamma>;
using SigmoidFocalTwo = Focal<GammaTwo>;

struct KLDiv {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A>) {
    return (t == A(0) ? A(0) : t * log_(t)) - t * x;
  }
  // Where log t is infinite torch's derivative is NaN, and 0 log t makes ours so.
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A>) {
    const A log = log_(t);
    return {-t, (log - x) + (A(1) + A(0) * log)};
  }
};

// t is the logarithm of the target.
struct KLDivLogTarget {
  template <class A>
  FL_INLINE static A value(A x, A t, A, Params<A>) {
    return exp_(t) * (t - x);
  }
  template <class A>
  FL_INLINE static Gradient<A> gradient(A x, A t, A, Params<A>) {
    const A p = exp_(t);
    return {-p, p * ((t - x) + A(1))};
  }
};
