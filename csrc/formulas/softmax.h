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
};
