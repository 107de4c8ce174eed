// Rows whose classes are adjacent in memory: blocks of a row stay in the first-level cache.
#pragma once
#include "softmax.h"

namespace fused_losses {

template <class A>
class Rows {
  using Problem = SoftmaxProblem<A>;
  static constexpr int64_t kBlock = Problem::kBlock, kWritten = Problem::kWritten;

 public:
  explicit Rows(const Problem& problem) : p_(problem), f_(problem.f) {
    per_task_ = std::max<int64_t>(1, 65536 / std::max<int64_t>(p_.view.classes, 1));
    tasks_ = (p_.rows + per_task_ - 1) / per_task_;
  }
  int64_t tasks() const { return tasks_; }

  void forward(LossSink<A>& sink, A* maximum, A* log_sum) const {
    for_each_batch([&](int64_t task, int64_t first, int64_t count, Scratch& scratch) {
      for_each_counted(first, count, [&](int64_t row, int64_t i) {
        scratch.batch.keep(i, sums_of(row, scratch), label_logit(row));
      });
      add_losses(sink, task, first, count, maximum, log_sum, scratch.batch);
    });
  }

  void backward(const Upstream<A>& upstream, const Output<A>& out, int gradient_tensor) const {
    for_each_batch([&](int64_t, int64_t first, int64_t count, Scratch& scratch) {
      for_each_counted(first, count, [&](int64_t row, int64_t i) { scratch.batch.z[i] = label_logit(row); });
      gradient_factors(upstream, first, count, scratch);
      put_gradients(out, gradient_tensor, first, count, [&](int64_t row, int64_t i, int64_t start) {
        gradient_of(row, upstream, i, out, start, scratch);
      });
    });
  }

  // Rows with labels take one exponential for each logit: first it replaces the logit, then the gradient
  // replaces it. Not for transformed logits, whose derivative needs them.
  void forward_backward(LossSink<A>& sink, A* maximum, A* log_sum, const Upstream<A>& upstream,
                        const Output<A>& out, int gradient_tensor) const {
    for_each_batch([&](int64_t task, int64_t first, int64_t count, Scratch& scratch) {
      Batch& batch = scratch.batch;
      scratch.exponentials.resize(static_cast<size_t>(count * p_.view.classes));
      const auto place = [&](int64_t i) {
        return out.place(at(gradient_tensor, first + i), scratch.exponentials.data() + i * p_.view.classes);
      };
      for_each_counted(first, count, [&](int64_t row, int64_t i) {
        const A z = label_logit(row);  // before it is written over
        batch.keep(i, exponentials_of(row, place(i)), z);
      });
      add_losses(sink, task, first, count, maximum, log_sum, batch);
      gradient_factors(upstream, first, count, scratch);
      put_gradients(out, gradient_tensor, first, count, [&](int64_t row, int64_t i, int64_t start) {
        gradient_from(row, i, place(i), out, start, scratch);
      });
    });
  }

  void target_backward(const Upstream<A>& upstream, const Output<A>& out, int gradient_tensor) const {
    for_each_batch([&](int64_t, int64_t first, int64_t count, Scratch& scratch) {
      put_gradients(out, gradient_tensor, first, count, [&](int64_t row, int64_t, int64_t start) {
        const A k = static_cast<A>(upstream(row) * (1.0 - p_.call.label_smoothing));
        for_each_block<kWritten>(row, scratch, [&](int64_t c, int64_t n, const A* z) {
          A* gradient = out.place(start + c, scratch.out);
          const A* w = p_.class_weight ? p_.class_weight + c : Problem::ones();
          f_.row_target_gradient(z, upstream.maximum[row], upstream.log_sum[row], k, w, n, gradient);
          out.put(gradient, 1, n, start + c);
        });
      });
    });
  }

 private:
  struct Sums {
    A maximum = -std::numeric_limits<A>::infinity();
    double top = 0, rest = 0, gap = 0, weight = 0;
  };
  // What the rows of a task have each, so that what is computed once a row vectorises.
  struct Batch {
    std::vector<A> maximum, top, rest, z, k, excess, label;
    std::vector<double> total, gap, weight, slope;  // slope is excess + label, the factor of the softmax

    // An ignored row keeps what it starts with: its log-sum and loss are 0.
    void start(int64_t rows) {
      const auto count = static_cast<size_t>(rows);
      for (auto* numbers : {&maximum, &rest, &z, &k, &excess, &label}) numbers->assign(count, A(0));
      top.assign(count, A(1));
      for (auto* numbers : {&total, &gap, &weight, &slope}) numbers->resize(count);
    }
    void keep(int64_t i, const Sums& sums, A label_logit) {
      maximum[i] = sums.maximum, z[i] = label_logit;
      top[i] = static_cast<A>(sums.top), rest[i] = static_cast<A>(sums.rest);
      total[i] = sums.top + sums.rest, gap[i] = sums.gap, weight[i] = sums.weight;
    }
  };
  struct Scratch {
    alignas(64) A z[kBlock], r[kBlock], out[kBlock];
    std::vector<A> exponentials;
    Batch batch;
  };

  int64_t at(int tensor, int64_t row) const {
    const int64_t stride = p_.view.of[tensor].pixels;
    if (p_.view.outer.empty()) return row * stride;  // two divisions a row would be seen
    return p_.view.offset(tensor, row / p_.view.pixels) + row % p_.view.pixels * stride;
  }

  // Calls body(task, first row, count, scratch memory for that many rows).
  template <class Body>
  void for_each_batch(const Body& body) const {
    for_each_task(tasks_, [&](int64_t task) {
      thread_local Scratch scratch;
      const int64_t first = task * per_task_, count = std::min(p_.rows - first, per_task_);
      scratch.batch.start(count);
      body(task, first, count, scratch);
    });
  }

  // Calls body(row, its place in the batch) for rows that are not ignored.
  template <class Body>
  void for_each_counted(int64_t first, int64_t count, const Body& body) const {
    for (int64_t i = 0; i < count; ++i) {
      if (!p_.is_ignored(first + i)) body(first + i, i);
    }
  }

  // Calls put(row, its place in the batch, where its gradient starts) for rows that are not ignored.
  template <class Put>
  void put_gradients(const Output<A>& out, int gradient_tensor, int64_t first, int64_t count,
                     const Put& put) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i, start = at(gradient_tensor, row);
      if (p_.is_ignored(row)) {
        out.zero(p_.view.classes, start);
      } else {
        put(row, i, start);
      }
    }
  }

  void add_losses(LossSink<A>& sink, int64_t task, int64_t first, int64_t count, A* maximum, A* log_sum,
                  const Batch& batch) const {
    std::copy_n(batch.maximum.data(), count, maximum + first);
    f_.log_sums(batch.top.data(), batch.rest.data(), count, log_sum + first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      sink.add(task, row,
               p_.is_ignored(row)
                   ? 0.0
                   : p_.row_loss(row, maximum[row], log_sum[row], batch.z[i], batch.gap[i], batch.weight[i]));
    }
  }

  A label_logit(int64_t row) const {
    return p_.labels ? p_.label_logit(at(0, row) + p_.labels[row] * p_.view.of[0].classes) : A(0);
  }

  // Calls body(first class, count, transformed logits).
  template <int64_t kStep, class Body>
  void for_each_block(int64_t row, Scratch& scratch, const Body& body) const {
    const char* source = p_.logits_at(at(0, row));
    for (int64_t c = 0; c < p_.view.classes; c += kStep) {
      const int64_t n = std::min(kStep, p_.view.classes - c);
      const char* block = source + c * element_size(p_.dtype);
      const A* z = scratch.z;
      if (p_.dtype == kAccumulate<A>) {
        z = reinterpret_cast<const A*>(block);
      } else {
        f_.load(p_.dtype, block, 1, n, scratch.z);
      }
      if (p_.transforms) f_.transform(z, n, p_.softcap, p_.temperature, scratch.z), z = scratch.z;
      body(c, n, z);
    }
  }

  // The factors of (log-sum-exp - z) of a block: smoothed probabilities times class weights.
  void target_factors(int64_t row, int64_t c, int64_t n, A* out) const {
    f_.load(p_.dtype, p_.probabilities_at(at(1, row) + c), 1, n, out);
    f_.affine(out, n, A(1) - p_.smoothing, p_.share, out);
    if (p_.class_weight) f_.multiply(out, p_.class_weight + c, n, out);
  }

  // One read: sums are rescaled whenever a block has a larger maximum.
  Sums sums_of(int64_t row, Scratch& scratch) const {
    const A lowest = -std::numeric_limits<A>::infinity();
    const bool smooths = p_.labels && p_.smoothing > A(0);
    Sums s;
    for_each_block<kBlock>(row, scratch, [&](int64_t c, int64_t n, const A* z) {
      const A maximum = f_.row_max(z, n);
      if (maximum > s.maximum) {
        const auto step = static_cast<double>(maximum) - static_cast<double>(s.maximum);
        s.rest = s.maximum == lowest ? 0.0 : (s.top + s.rest) * std::exp(-step);
        s.top = 0.0;
        if (s.weight != 0) s.gap += step * s.weight;
        s.maximum = maximum;
      }
      // A block of nothing but -inf adds exp(-inf) = 0, a NaN adds NaN.
      const A reference = s.maximum == lowest ? A(0) : s.maximum;
      const SplitSum sum = f_.row_sum_exp(z, reference, n);
      s.top += sum.top, s.rest += sum.rest;
      if (smooths) {
        const A* w = p_.class_weight ? p_.class_weight + c : Problem::ones();
        s.gap += f_.row_gap(z, w, s.maximum, n);
        s.weight += p_.class_weight ? f_.row_sum(w, n) : static_cast<double>(n);
      } else if (p_.probabilities) {
        target_factors(row, c, n, scratch.r);
        s.gap += f_.row_gap(z, scratch.r, s.maximum, n);
        s.weight += f_.row_sum(scratch.r, n);
      }
    });
    if (s.maximum == lowest) s.rest = std::numeric_limits<double>::quiet_NaN();
    return s;
  }

  // Replaces logits, copied where they are not in place, by exp(logit - maximum).
  Sums exponentials_of(int64_t row, A* e) const {
    Sums s;
    const char* source = p_.logits_at(at(0, row));
    const bool copies = reinterpret_cast<const char*>(e) != source;
    for (int64_t c = 0; c < p_.view.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, p_.view.classes - c);
      if (copies) f_.load(p_.dtype, source + c * element_size(p_.dtype), 1, n, e + c);
      s.maximum = std::max(s.maximum, f_.row_max(e + c, n));
    }
    const A lowest = -std::numeric_limits<A>::infinity(), reference = s.maximum == lowest ? A(0) : s.maximum;
    for (int64_t c = 0; c < p_.view.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, p_.view.classes - c);
      if (p_.smoothing > A(0)) {
        const A* w = p_.class_weight ? p_.class_weight + c : Problem::ones();
        s.gap += f_.row_gap(e + c, w, s.maximum, n);
      }
      const SplitSum sum = f_.row_exp(e + c, reference, n);
      s.top += sum.top, s.rest += sum.rest;
    }
    if (s.maximum == lowest) s.rest = std::numeric_limits<double>::quiet_NaN();
    return s;
  }

  void gradient_from(int64_t row, int64_t i, const A* e, const Output<A>& out, int64_t start,
                     Scratch& scratch) const {
    const Batch& batch = scratch.batch;
    const A scale = static_cast<A>(batch.slope[i] / batch.total[i]);
    for (int64_t c = 0; c < p_.view.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, p_.view.classes - c);
      A* gradient = out.place(start + c, scratch.out);
      f_.affine(e + c, n, scale, A(0), gradient);
      if (!p_.share_of_class.empty()) f_.subtract(p_.share_of_class.data() + c, batch.k[i], n, gradient);
      if (p_.labels[row] >= c && p_.labels[row] < c + n) gradient[p_.labels[row] - c] = batch.label[i];
      out.put(gradient, 1, n, start + c);
    }
  }

  double target_weight(int64_t row, Scratch& scratch) const {
    double weight = 0;
    for (int64_t c = 0; p_.probabilities && c < p_.view.classes; c += kBlock) {
      const int64_t n = std::min(kBlock, p_.view.classes - c);
      target_factors(row, c, n, scratch.r);
      weight += f_.row_sum(scratch.r, n);
    }
    return weight;
  }

  // What the gradients of rows are made of; label becomes that of the label's logit.
  void gradient_factors(const Upstream<A>& upstream, int64_t first, int64_t count, Scratch& scratch) const {
    Batch& b = scratch.batch;
    for_each_counted(first, count, [&](int64_t row, int64_t i) {
      const double k = upstream(row), weight = target_weight(row, scratch);
      const double excess = k * p_.excess_factor(upstream.maximum[row], upstream.log_sum[row], weight);
      const double label = k * p_.label_factor(row);
      b.k[i] = static_cast<A>(k), b.slope[i] = excess + label;
      b.excess[i] = static_cast<A>(excess), b.label[i] = static_cast<A>(label);
    });
    if (!p_.labels) return;
    f_.label_gradients(b.z.data(), upstream.maximum + first, upstream.log_sum + first, b.excess.data(), count,
                       b.label.data());
    if (p_.share_of_class.empty()) return;
    for_each_counted(first, count, [&](int64_t row, int64_t i) {
      b.label[i] -= b.k[i] * p_.share_of_class[p_.labels[row]];
    });
  }

  void gradient_of(int64_t row, const Upstream<A>& upstream, int64_t i, const Output<A>& out, int64_t start,
                   Scratch& scratch) const {
    const Batch& batch = scratch.batch;
    const A maximum = upstream.maximum[row], log_sum = upstream.log_sum[row];
    const A a = static_cast<A>(batch.slope[i]), scale = batch.k[i];
    for_each_block<kWritten>(row, scratch, [&](int64_t c, int64_t n, const A* z) {
      A* gradient = out.place(start + c, scratch.out);
      if (p_.probabilities) {
        target_factors(row, c, n, scratch.r);
        f_.row_gradient_minus(z, maximum, log_sum, a, scale, scratch.r, n, gradient);
      } else if (!p_.share_of_class.empty()) {
        f_.row_gradient_minus(z, maximum, log_sum, a, scale, p_.share_of_class.data() + c, n, gradient);
      } else {
        f_.row_gradient(z, maximum, log_sum, a, n, gradient);
      }
      if (p_.labels && p_.labels[row] >= c && p_.labels[row] < c + n)
        gradient[p_.labels[row] - c] = batch.label[i];
      if (p_.transforms) f_.chain(z, n, p_.softcap, p_.temperature, gradient);
      out.put(gradient, 1, n, start + c);
    });
  }

  const Problem& p_;
  const SoftmaxFunctions<A>& f_;
  int64_t per_task_, tasks_;
};

}  // namespace fused_losses
