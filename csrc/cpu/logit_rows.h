// Rows of adjacent classes, read a block at a time: transformed logits in the accumulation type.
#pragma once
#include "softmax.h"

namespace fused_losses {

template <class A>
class LogitRows {
 public:
  static constexpr int64_t kBlock = SoftmaxProblem<A>::kBlock, kWritten = SoftmaxProblem<A>::kWritten;
  using Block = A[kBlock];

  LogitRows(const Tensor& logits, double softcap, double temperature)
      : data_(static_cast<const char*>(logits.const_data_ptr())),
        dtype_(dtype_of(logits.scalar_type())),
        rows_(logits.sizes()[0]),
        classes_(logits.sizes()[1]),
        stride_(logits.strides()[0]),
        softcap_(static_cast<A>(softcap)),
        temperature_(static_cast<A>(temperature)) {}

  bool transforms() const { return softcap_ > A(0) || temperature_ != A(1); }
  int64_t rows() const { return rows_; }
  int64_t classes() const { return classes_; }
  int64_t start(int64_t row) const { return row * stride_; }

  // Calls body(row) in parallel, a share of the first-level caches at a time.
  template <class Body>
  void for_each_row(const Body& body) const {
    const int64_t per_task = std::max<int64_t>(1, 65536 / std::max<int64_t>(classes_, 1));
    for_each_task((rows_ + per_task - 1) / per_task, [&](int64_t task) {
      const int64_t end = std::min(rows_, (task + 1) * per_task);
      for (int64_t row = task * per_task; row < end; ++row) body(row);
    });
  }

  // Logits [c, c + n) of a row: the memory itself where it can be used as it is, else a converted copy.
  const A* block(int64_t row, int64_t c, int64_t n, Block& scratch) const {
    const char* source = data_ + (start(row) + c) * element_size(dtype_);
    const A* z = scratch;
    if (dtype_ == kAccumulate<A>) {
      z = reinterpret_cast<const A*>(source);
    } else {
      f_.load(dtype_, source, 1, n, scratch);
    }
    if (!transforms()) return z;
    f_.transform(z, n, softcap_, temperature_, scratch);
    return scratch;
  }

  // Calls body(first class, count, logits).
  template <int64_t kStep = kBlock, class Body>
  void for_each_block(int64_t row, Block& scratch, const Body& body) const {
    for (int64_t c = 0; c < classes_; c += kStep) {
      const int64_t n = std::min(kStep, classes_ - c);
      body(c, n, block(row, c, n, scratch));
    }
  }

  A logit(int64_t row, int64_t c) const {
    Block scratch;
    return *block(row, c, 1, scratch);
  }

  A maximum(int64_t row, Block& scratch) const {
    A result = -std::numeric_limits<A>::infinity();
    for_each_block(row, scratch,
                   [&](int64_t, int64_t n, const A* z) { result = std::max(result, f_.row_max(z, n)); });
    return result;
  }

  // The first place of a value in the block that starts with class c, or that class.
  int64_t find(int64_t row, int64_t c, A value, Block& scratch) const {
    const int64_t n = std::min(kBlock, classes_ - c);
    const int64_t found = f_.row_find(block(row, c, n, scratch), value, n);
    return found < n ? c + found : c;
  }

  // gradient *= dz / dx
  void chain(const A* z, int64_t n, A* gradient) const {
    if (transforms()) f_.chain(z, n, softcap_, temperature_, gradient);
  }

 private:
  const SoftmaxFunctions<A>& f_ = softmax_functions<A>();
  const char* data_;
  Dtype dtype_;
  int64_t rows_, classes_, stride_;
  A softcap_, temperature_;
};

// What exponents of a row are relative to; exp(-inf - (-inf)) would be NaN.
template <class A>
A reference_of(A maximum) {
  return maximum == -std::numeric_limits<A>::infinity() ? A(0) : maximum;
}

// The logarithm of a sum of exponentials; NaN for a row of nothing but -inf, as in torch.
template <class A>
A log_sum_of(A maximum, double sum) {
  const bool is_nothing = maximum == -std::numeric_limits<A>::infinity();
  return static_cast<A>(is_nothing ? std::numeric_limits<double>::quiet_NaN() : std::log(sum));
}

}  // namespace fused_losses
