// Classes that are not adjacent in memory, or few: lanes run over pixels, a tile of all classes stays in
// cache. Where classes are adjacent, tiles are transposed.
#pragma once
#include "softmax.h"

namespace fused_losses {

template <class A>
class Pixels {
  using Problem = SoftmaxProblem<A>;

 public:
  explicit Pixels(const Problem& problem) : p_(problem), f_(problem.f) {
    // A share of the first-level cache for what is transposed, else of the second, in longer runs of memory.
    const int64_t bytes = p_.view.classes_are_adjacent() ? 32768 : 262144;
    const int64_t fitting = bytes / static_cast<int64_t>(sizeof(A)) / std::max<int64_t>(p_.view.classes, 1);
    width_ = std::clamp<int64_t>(fitting / 16 * 16, 16, kWidest);
    stride_ = width_ + 16;
    tiles_ = (p_.view.pixels + width_ - 1) / width_;
  }
  int64_t tasks() const { return p_.rows == 0 ? 0 : p_.view.outer_count * tiles_; }

  void forward(LossSink<A>& sink, A* maximum, A* log_sum) const {
    for_each_tile([&](int64_t task, const Tile& tile, Scratch& s) {
      load_logits(tile, s);
      add_losses(sink, task, tile, maximum, log_sum, s);
    });
  }

  void backward(const Upstream<A>& upstream, const Output<A>& out, int gradient_tensor) const {
    for_each_tile([&](int64_t, const Tile& tile, Scratch& s) {
      load_logits(tile, s);
      if (p_.probabilities) load_target(tile, s);
      put_gradient(upstream, out, gradient_tensor, tile, s);
    });
  }

  // What backward reads, forward has already.
  void forward_backward(LossSink<A>& sink, A* maximum, A* log_sum, const Upstream<A>& upstream,
                        const Output<A>& out, int gradient_tensor) const {
    for_each_tile([&](int64_t task, const Tile& tile, Scratch& s) {
      load_logits(tile, s);
      add_losses(sink, task, tile, maximum, log_sum, s);
      put_gradient(upstream, out, gradient_tensor, tile, s);
    });
  }

  void target_backward(const Upstream<A>& upstream, const Output<A>& out, int gradient_tensor) const {
    for_each_tile([&](int64_t, const Tile& tile, Scratch& s) {
      load_logits(tile, s);
      for (int64_t i = 0; i < tile.n; ++i) {
        s.k[i] = static_cast<A>(upstream(tile.row + i) * (1.0 - p_.call.label_smoothing));
      }
      const PixelRows<A> rows{
          upstream.maximum + tile.row, upstream.log_sum + tile.row, nullptr, nullptr, s.k, nullptr};
      for (int64_t c = 0; c < p_.view.classes; ++c) {
        f_.pixel_target_gradient(s.z.data() + c * stride_, rows, weight_of_class(c), tile.n, s.out);
        store_class(out, gradient_tensor, tile, c, s);
      }
      store_rows(out, gradient_tensor, tile, s);
    });
  }

 private:
  static constexpr int64_t kWidest = 2048;
  static_assert(kWidest <= Problem::kBlock, "a tile reads as many ones as it has pixels");
  struct Tile {
    int64_t outer, pixel, row, n;
  };
  struct Scratch {
    std::vector<A> z, target, rows;
    alignas(64) A maximum[kWidest], log_sum[kWidest], gap[kWidest], weight[kWidest];
    alignas(64) A top[kWidest], rest[kWidest], part[kWidest];
    alignas(64) A a[kWidest], b[kWidest], k[kWidest], out[kWidest];
    alignas(64) A excess[kWidest], label_z[kWidest];
    alignas(64) int32_t label[kWidest];
  };

  A weight_of_class(int64_t c) const { return p_.class_weight ? p_.class_weight[c] : A(1); }

  const A* target_of(int64_t c, const Scratch& s) const {
    return p_.probabilities ? s.target.data() + c * stride_ : Problem::ones();
  }

  template <class Body>
  void for_each_tile(const Body& body) const {
    for_each_task(tasks(), [&](int64_t task) {
      thread_local Scratch scratch;
      scratch.z.resize(static_cast<size_t>(p_.view.classes * stride_));
      scratch.rows.resize(scratch.z.size());
      Tile tile{task / tiles_, task % tiles_ * width_, 0, 0};
      tile.row = tile.outer * p_.view.pixels + tile.pixel;
      tile.n = std::min(width_, p_.view.pixels - tile.pixel);
      body(task, tile, scratch);
    });
  }

  int64_t at(int tensor, const Tile& tile, int64_t c) const {
    const auto& strides = p_.view.of[tensor];
    return p_.view.offset(tensor, tile.outer) + tile.pixel * strides.pixels + c * strides.classes;
  }

  // Whether rows follow each other without gaps.
  bool is_transposed(int tensor) const {
    const auto& strides = p_.view.of[tensor];
    return strides.classes == 1 && strides.pixels == p_.view.classes;
  }

  void load(int tensor, const char* data, const Tile& tile, Scratch& s, A* out) const {
    const int64_t classes = p_.view.classes;
    if (!is_transposed(tensor)) {
      for (int64_t c = 0; c < classes; ++c) {
        const char* source = data + at(tensor, tile, c) * element_size(p_.dtype);
        f_.load(p_.dtype, source, p_.view.of[tensor].pixels, tile.n, out + c * stride_);
      }
      return;
    }
    const char* source = data + at(tensor, tile, 0) * element_size(p_.dtype);
    const A* rows = reinterpret_cast<const A*>(source);
    if (p_.dtype != kAccumulate<A>) {
      f_.load(p_.dtype, source, 1, tile.n * classes, s.rows.data());
      rows = s.rows.data();
    }
    f_.transpose(rows, classes, tile.n, classes, out, stride_);
  }

  void load_logits(const Tile& tile, Scratch& s) const {
    load(0, p_.logits, tile, s, s.z.data());
    for (int64_t c = 0; p_.transforms && c < p_.view.classes; ++c) {
      A* z = s.z.data() + c * stride_;
      f_.transform(z, tile.n, p_.softcap, p_.temperature, z);
    }
  }

  // Smoothed probabilities, without class weights.
  void load_target(const Tile& tile, Scratch& s) const {
    s.target.resize(s.z.size());
    load(1, p_.probabilities, tile, s, s.target.data());
    for (int64_t c = 0; c < p_.view.classes; ++c) {
      A* t = s.target.data() + c * stride_;
      f_.affine(t, tile.n, A(1) - p_.smoothing, p_.share, t);
    }
  }

  void sums_of(const Tile& tile, Scratch& s) const {
    std::fill(s.maximum, s.maximum + tile.n, -std::numeric_limits<A>::infinity());
    std::fill(s.top, s.top + tile.n, A(0));
    std::fill(s.rest, s.rest + tile.n, A(0));
    std::fill(s.gap, s.gap + tile.n, A(0));
    std::fill(s.weight, s.weight + tile.n, A(0));
    for (int64_t c = 0; c < p_.view.classes; ++c) f_.pixel_max(s.z.data() + c * stride_, tile.n, s.maximum);
    // Sums of 32 classes are added up apart: thousands of terms one by one would round too often.
    for (int64_t c = 0; c < p_.view.classes; c += 32) {
      std::fill(s.part, s.part + tile.n, A(0));
      for (int64_t i = c; i < std::min(c + 32, p_.view.classes); ++i) {
        f_.pixel_sum_exp(s.z.data() + i * stride_, s.maximum, tile.n, s.top, s.part);
      }
      for (int64_t i = 0; i < tile.n; ++i) s.rest[i] += s.part[i];
    }
    f_.log_sums(s.top, s.rest, tile.n, s.log_sum);
    if (p_.probabilities) load_target(tile, s);
    if (!p_.probabilities && p_.share_of_class.empty()) return;
    for (int64_t c = 0; c < p_.view.classes; ++c) {
      f_.pixel_gap(s.z.data() + c * stride_, s.maximum, weight_of_class(c), target_of(c, s), tile.n, s.gap,
                   s.weight);
    }
  }

  void add_losses(LossSink<A>& sink, int64_t task, const Tile& tile, A* maximum, A* log_sum,
                  Scratch& s) const {
    sums_of(tile, s);
    for (int64_t i = 0; i < tile.n; ++i) {
      const int64_t row = tile.row + i;
      const bool ignored = p_.is_ignored(row);
      maximum[row] = ignored ? A(0) : s.maximum[i];
      log_sum[row] = ignored ? A(0) : s.log_sum[i];
      const A z = p_.labels && !ignored ? s.z[static_cast<size_t>(p_.labels[row] * stride_ + i)] : A(0);
      sink.add(task, row,
               ignored ? 0.0 : p_.row_loss(row, maximum[row], log_sum[row], z, s.gap[i], s.weight[i]));
    }
  }

  void put_gradient(const Upstream<A>& upstream, const Output<A>& out, int gradient_tensor, const Tile& tile,
                    Scratch& s) const {
    const PixelRows<A> rows = gradient_factors(tile, upstream, s);
    for (int64_t c = 0; c < p_.view.classes; ++c) {
      const A* z = s.z.data() + c * stride_;
      const A w = p_.probabilities            ? weight_of_class(c)
                  : p_.share_of_class.empty() ? A(0)
                                              : p_.share_of_class[c];
      f_.pixel_gradient(z, rows, w, target_of(c, s), static_cast<int32_t>(c), tile.n, s.out);
      if (p_.transforms) f_.chain(z, tile.n, p_.softcap, p_.temperature, s.out);
      store_class(out, gradient_tensor, tile, c, s);
    }
    store_rows(out, gradient_tensor, tile, s);
  }

  PixelRows<A> gradient_factors(const Tile& tile, const Upstream<A>& upstream, Scratch& s) const {
    std::fill(s.weight, s.weight + tile.n, A(0));
    for (int64_t c = 0; p_.probabilities && c < p_.view.classes; ++c) {
      const A *t = target_of(c, s), w = weight_of_class(c);
      for (int64_t i = 0; i < tile.n; ++i) s.weight[i] += w * t[i];
    }
    const A *maximum = upstream.maximum + tile.row, *log_sum = upstream.log_sum + tile.row;
    for (int64_t i = 0; i < tile.n; ++i) {
      const int64_t row = tile.row + i;
      const bool ignored = p_.is_ignored(row);
      const double k = ignored ? 0.0 : upstream(row);
      const double label = ignored ? 0.0 : k * p_.label_factor(row);
      const double excess = k * p_.excess_factor(maximum[i], log_sum[i], static_cast<double>(s.weight[i]));
      s.label[i] = ignored ? kIgnored : p_.labels ? static_cast<int32_t>(p_.labels[row]) : kNoLabel;
      s.k[i] = static_cast<A>(k), s.a[i] = static_cast<A>(excess + label);
      s.b[i] = static_cast<A>(label), s.excess[i] = static_cast<A>(excess);
      s.label_z[i] = s.label[i] >= 0 ? s.z[static_cast<size_t>(s.label[i] * stride_ + i)] : A(0);
    }
    if (p_.labels) f_.label_gradients(s.label_z, maximum, log_sum, s.excess, tile.n, s.b);
    return {maximum, log_sum, s.a, s.b, s.k, s.label};
  }

  // A class of a tile, from s.out; what is transposed takes the place of its logits until all classes are
  // done.
  void store_class(const Output<A>& out, int tensor, const Tile& tile, int64_t c, Scratch& s) const {
    if (is_transposed(tensor)) {
      std::copy_n(s.out, tile.n, s.z.data() + c * stride_);
    } else {
      out.put(s.out, p_.view.of[tensor].pixels, tile.n, at(tensor, tile, c));
    }
  }

  void store_rows(const Output<A>& out, int tensor, const Tile& tile, Scratch& s) const {
    if (!is_transposed(tensor)) return;
    const int64_t start = at(tensor, tile, 0), classes = p_.view.classes;
    A* rows = out.place(start, s.rows.data());
    f_.transpose(s.z.data(), stride_, classes, tile.n, rows, classes);
    out.put(rows, 1, tile.n * classes, start);
  }

  const Problem& p_;
  const SoftmaxFunctions<A>& f_;
  int64_t width_, stride_,
      tiles_;  // strides that are no power of two, which would crowd a few lines of a cache
};

}  // namespace fused_losses
