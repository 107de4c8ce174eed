// What a softmax loss does to one logit. Included like common/numerics.h, after it.

// z = softcap * tanh(x / softcap) / temperature; softcap 0 is off.
template <class A>
struct LogitTransform {
  A softcap, temperature;

  FL_INLINE A operator()(A x) const {
    return (softcap > A(0) ? softcap * tanh_(x / softcap) : x) / temperature;
  }

  // dz / dx, from z.
  FL_INLINE A derivative(A z) const {
    const A capped = softcap > A(0) ? z * temperature / softcap : A(0);
    return (A(1) - capped * capped) / temperature;
  }
};

// What a row knows of its logits: their maximum and the logarithm of the sum of exp(z - maximum). Their sum
// is the log-sum-exp; apart, they stay exact where logits have a large offset.
template <class A>
struct RowStats {
  A maximum, log_sum;

  FL_INLINE A log_sum_exp() const { return maximum + log_sum; }
  FL_INLINE A minus_log_probability(A z) const { return (maximum - z) + log_sum; }
  FL_INLINE A probability(A z) const { return exp_((z - maximum) - log_sum); }

  // excess * p + label * (p - 1), the gradient of a label's logit: p - 1 must not cancel where p is near 1.
  FL_INLINE A label_gradient(A z, A excess, A label) const {
    const A log_probability = (z - maximum) - log_sum;
    return excess * exp_(log_probability) + label * expm1_(log_probability);
  }
};

// Logits equal to the maximum are counted apart from the sum of the others: added to their 1, terms below
// rounding would vanish, and with them the loss of a confident row.
template <class A>
struct ExpSum {
  A top = A(0), rest = A(0);

  FL_INLINE void add(A z, A maximum) {
    const A e = exp_(z - maximum);
    const bool is_top = z == maximum;
    top += is_top ? A(1) : A(0);
    rest += is_top ? e - A(1) : e;  // 0, or NaN where the maximum is infinite
  }
  FL_INLINE A log() const { return log1p_(rest + (top - A(1))); }
};
